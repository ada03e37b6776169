"""A model small enough for tests: two layers of width 32 that learn the response format, and no strategy, in seconds.

Test modules import the helpers and load the fixture with `pytest_plugins`, so that one session trains it once.
PYTEST_DONT_REWRITE: it is imported before pytest could.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import warmstart
from checkpoint import STATE, find_checkpoint
from config import Config
from envs import Episode, make_env
from policy import pad, score_tokens
from rollout import Batch

THOUGHTS = ("No hurry.", "The sky is clear.", "One thing after another.", "I look with care.")
SMOKE = {"num_prompts": 2, "num_generations": 4, "mini_batch_size": 8, "eval_prompts": 2, "eval_samples": 2,
         "max_response_tokens": 24, "max_context": 512, "max_steps": 4, "save_steps": 2, "eval_steps": 2}


def transcript(seed):
    """An episode of FrozenLake whose player says little and moves at random."""
    rng = np.random.default_rng(seed)
    episode = Episode(make_env("frozenlake"), warmstart.FIRST_SEED + seed, style="brief")
    parts = [(f"{episode.system()}\n{episode.user()}\n", False)]
    while not episode.done:
        answer = " || ".join(rng.choice(episode.env.actions, 2))
        parts.append((f"<think>{rng.choice(THOUGHTS)}</think><answer>{answer}</answer>", True))
        if message := episode.act(answer):
            parts.append((f"\n{message}\n", False))
    return parts


def llama(vocab_size, **options):
    """Random weights, the same every time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=1024, tie_word_embeddings=True,
                         bos_token_id=None, pad_token_id=0, eos_token_id=1, **(shape | options))
    return LlamaForCausalLM(config).eval()


def teach(model, tokenizer, steps=80, rows=4):
    """Supervised steps on responses alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        encoded = [warmstart.encode(tokenizer, transcript(step * rows + i)) for i in range(rows)]
        weights = pad([weights for _, weights in encoded], torch.float32)
        tokens = pad([ids for ids, _ in encoded], torch.int64)
        loss = -(score_tokens(model, tokens, weights > 0).logp * weights).sum() / weights.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of the model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    texts = ["".join(text for text, _ in transcript(10_000 + i)) for i in range(100)]
    tokenizer = warmstart.build_tokenizer(texts, vocab_size=360)
    model = llama(len(tokenizer))
    teach(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(tiny, **options):
    """Settings of a smoke-sized run."""
    return Config(**(SMOKE | {"model": str(tiny)} | options))


def make_batch(is_response, **columns):
    """A batch of which the given columns say something; turns are the runs of response tokens, all else is 0."""
    before = torch.cat([torch.zeros_like(is_response[:, :1]), is_response[:, :-1]], 1)
    after = torch.cat([is_response[:, 1:], torch.zeros_like(is_response[:, :1])], 1)
    turn = torch.where(is_response, (is_response & ~before).cumsum(1) - 1, -1)
    nothing = torch.zeros(is_response.shape)
    given = {"tokens": nothing.long(), "is_response": is_response, "is_action": is_response & False,
             "old_logp": nothing, "entropy": nothing, "score_norm": nothing, "turn": turn,
             "is_turn_end": is_response & ~after, "rewards": nothing, "returns": nothing[:, 0],
             "lengths": torch.where(is_response, torch.arange(1, 1 + nothing.shape[1]), 1).amax(1)} | columns
    return Batch(is_reasoning=is_response & ~given["is_action"], **given)


def flags(**options):
    """Command line of a smoke-sized run."""
    return [part for name, value in (SMOKE | options).items() for part in (f"--{name}", str(value))]


def lines(path: Path):
    """Rows of a jsonl file without the seconds, which no two runs share."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("seconds_")} for row in rows]


def weights(folder):
    """A model folder's tensors by name."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(one, other):
    """Whether two model folders agree to the last bit."""
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_run(one, other):
    """Every number and every weight equal, to the last bit."""
    assert lines(one / "metrics.jsonl") == lines(other / "metrics.jsonl")
    assert lines(one / "eval.jsonl") == lines(other / "eval.jsonl")
    assert find_checkpoint(one).name == find_checkpoint(other).name
    assert same_weights(find_checkpoint(one), find_checkpoint(other))
    ours, theirs = (torch.load(find_checkpoint(path) / STATE, weights_only=True) for path in (one, other))
    assert ours.keys() == theirs.keys() and ours["generator"].equal(theirs["generator"])
    for name in set(ours) & {"critic"}:
        assert all(torch.equal(ours[name][key], theirs[name][key]) for key in ours[name])
