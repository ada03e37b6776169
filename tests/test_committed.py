"""The second warm start: thoughts that end with the move, in a copy of models/tiny."""

import re
import sys

import pytest
import torch
from tiny import llama

import warmstart
from actfocus import answer_span, classify_tokens
from config import Config
from diagnosis import commitments
from methods import make_episodes, rollout_settings
from policy import load_model, load_tokenizer
from rollout import Batch, rollout, token_pieces
from warmstart import COMMITTED, FIRST_SEED, committed, transcript

pytest_plugins = ["tiny"]
SEEDS = range(FIRST_SEED, FIRST_SEED + 20)


@pytest.fixture(params=COMMITTED)
def game(request):
    return request.param


def test_only_the_thoughts_end_is_new_and_it_names_the_moves_of_the_answer(game):
    for seed in SEEDS:
        plain, parts = transcript(game, seed, 0.5), committed(game, seed, 0.5)
        assert [text for text, is_response in parts if not is_response] == plain_texts(plain, False)
        for old, new in zip(plain_texts(plain, True), plain_texts(parts, True), strict=True):
            start, end = answer_span(new)
            added = re.search(rf" {COMMITTED[game]} ([^.]*)\.</think>", new)
            assert new.replace(added.group(), "</think>") == old
            moves = re.sub(r"(\d) at (\d,\d)", r"\2,\1", added.group(1)).split(" and ")
            assert moves == new[start:end].split(" || ")


def plain_texts(parts, responses):
    return [text for text, is_response in parts if is_response is responses]


def test_what_the_thought_commits_to_is_reasoning_and_one_token_a_move_as_in_the_answer():
    tokenizer = load_tokenizer(str(warmstart.TINY))
    for game in ("frozenlake", "sokoban"):
        (response, *_) = plain_texts(committed(game, FIRST_SEED, 0.5), True)
        pieces = token_pieces(tokenizer, tokenizer.encode(response))
        is_reasoning, is_action = classify_tokens(pieces)
        names = [t for t, piece in enumerate(pieces) if piece.strip() in ("Up", "Down", "Left", "Right")]
        count = len(response[slice(*answer_span(response))].split(" || "))
        assert len(names) == 2 * count  # each is one token in both places
        assert is_reasoning[names[:count]].all() and is_action[names[count:]].all()


def test_training_writes_what_it_is_told_to(tiny):
    seen, model = [], llama(len(load_tokenizer(str(tiny))))

    def note(*arguments):
        seen.append(arguments[:3])
        return committed(*arguments)

    skills = [{"frozenlake": 0.25}]
    warmstart.train(model, load_tokenizer(str(tiny)), skills, 1e-3, 0, {"frozenlake": 2}, write=note)
    assert seen == [("frozenlake", FIRST_SEED, 0.25), ("frozenlake", FIRST_SEED + 1, 0.25)]


def test_the_command_starts_from_tiny_and_saves_a_model_with_the_same_tokenizer(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmstart, "TINY", tiny)
    monkeypatch.setattr(warmstart, "ROWS", dict.fromkeys(warmstart.GAMES, 1))
    arguments = ["--output_dir", str(tmp_path / "new"), "--committed", "--shrink", "150"]  # two steps of each phase
    monkeypatch.setattr(sys, "argv", ["warmstart.py", *arguments])
    skills, train = [], warmstart.train
    monkeypatch.setattr(warmstart, "train", lambda *given, **rest: skills.extend(given[2]) or train(*given, **rest))
    warmstart.main()
    last = dict(zip(warmstart.GAMES, warmstart.STAGES[-1][1][-1][1], strict=True))
    assert skills == [dict.fromkeys(warmstart.GAMES, 1.0)] * 2 + [last] * 2
    old, new = load_model(str(tiny)), load_model(str(tmp_path / "new"))
    assert not torch.equal(old.lm_head.weight, new.lm_head.weight)
    assert (old.lm_head.weight - new.lm_head.weight).abs().max() < 0.01  # and not far from where it started
    assert load_tokenizer(str(tmp_path / "new")).get_vocab() == load_tokenizer(str(tiny)).get_vocab()
    assert "step     3" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()}
    assert warmstart.main() == 2 and f"--output_dir {tmp_path / 'new'}: exists already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()} == before  # nothing is written over
    skills.clear()
    assert warmstart.main(["--output_dir", str(tmp_path / "short"), "--committed", "--shrink", "1000"]) == 0
    assert len(skills) == 2  # at least one step of each phase


def test_the_model_in_the_repository_decides_in_its_thoughts_and_keeps_to_it():
    settings = Config(model=str(warmstart.TINY.with_name("committed")))
    tokenizer = load_tokenizer(settings.model)
    rows = rollout(load_model(settings.model), tokenizer, make_episodes(settings, range(12), 1),
                   torch.Generator().manual_seed(0), *rollout_settings(settings))
    batch, (named, kept) = Batch.of(rows), commitments(rows, tokenizer, "frozenlake")
    assert kept > 0.9 and named.any(1).all() and (named <= batch.is_reasoning).all()
    assert batch.entropy[batch.is_action].mean() < 0.2 < 0.8 < batch.entropy[named].mean()
