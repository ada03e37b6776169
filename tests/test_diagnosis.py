"""diagnosis.py: four signals, three classes of tokens, and the rows that gather along training."""

import csv
import math
import re
import shutil

import numpy as np
import pytest
import torch
from tiny import SMOKE, config, flags

import diagnosis
import evaluate
import train
from energy import SIGNALS, partial_spearman, spearman
from policy import TINY, load_model, load_tokenizer
from rollout import Trajectory

pytest_plugins = ["tiny"]
SHORT = [part for name in ("max_response_tokens", "max_context", "num_prompts", "num_generations", "mini_batch_size")
         for part in (f"--{name}", str(SMOKE[name]))]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Plots go below the working folder; few groups."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diagnosis, "PROMPTS", 6)
    monkeypatch.setattr(diagnosis, "ROLLOUTS", 4)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Two steps from the tiny model, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs") / "frozenlake-run"
    options = {"max_steps": 2, "save_steps": 1, "eval_steps": 2, "learning_rate": 1e-2}
    assert train.main(flags(model=tiny, output_dir=folder, **options)) == 0
    return folder


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_prints_every_signal_for_three_classes_and_draws_the_energy(tiny, tmp_path, capsys):
    assert evaluate.main([str(tiny), "--bottleneck", *SHORT]) == 0
    out = capsys.readouterr().out
    assert "6 groups x 4" in out and re.search(r"mean success \d\.\d{3}, action tokens \d+\.\d %", out)
    for name in ("action", "reasoning", "response"):
        for signal in SIGNALS:
            (line,) = [line for line in out.splitlines() if line.split()[:2] == [name, signal]]
            numbers = re.findall(r"ρ ([+-]\d\.\d{3}|\+nan) \(p (\S+)\)", line)
            assert len(numbers) == 2 and not any(abs(float(rho)) > 1 or float(p) > 1 for rho, p in numbers)
    plot = re.search(r"plot (\S+)", out).group(1)
    assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG") and "table" not in out


def test_rows_of_several_checkpoints_gather_in_one_table(tiny, run, tmp_path):
    table = tmp_path / "diagnosis.csv"
    for folder in (tiny, run / "checkpoint-1", run / "checkpoint-2"):
        assert evaluate.main([str(folder), "--bottleneck", "--csv", str(table), *SHORT]) == 0
    rows = read(table)
    assert len(rows) == 3 * 4 * 3 and None not in rows[0]
    steps = {(row["model"], row["step"]) for row in rows}
    assert steps == {("tiny", "0"), ("frozenlake-run", "1"), ("frozenlake-run", "2")}
    for row in rows:
        assert (row["env"], row["seed"], row["groups"], row["group_size"]) == ("frozenlake", "0", "6", "4")
        assert 0 <= float(row["mean_success"]) <= 1 and 0 < float(row["action_fraction"]) < 0.5
        assert row["commit"] and row["torch"] and row["cpu"] and len(row["model_sha256"]) == 12
    assert len({row["model_sha256"] for row in rows}) == 3
    (shift,) = [row["rho"] for row in rows
                if (row["model"], row["signal"], row["tokens"]) == ("tiny", "logprob_shift", "action")]
    assert math.isnan(float(shift))  # the policy is its own reference: no shift, and no rounding taken for one
    groups = read(tmp_path / "diagnosis-groups.csv")
    assert len(groups) == 3 * 6 and [row["group"] for row in groups[:6]] == list("012345")
    for digest in {row["model_sha256"] for row in rows}:
        own = [row for row in groups if row["model_sha256"] == digest]
        mean = np.mean([float(row["success"]) for row in own])
        (about,) = [row for row in rows
                    if (row["model_sha256"], row["signal"], row["tokens"]) == (digest, "energy", "action")]
        assert float(about["mean_success"]) == pytest.approx(mean, abs=1e-6)
        columns = [np.array([float(row[name]) for row in own]) for name in ("energy_action", "return_std")]
        assert spearman(*columns)[0] == pytest.approx(float(about["rho"]), nan_ok=True)


@pytest.mark.parametrize("flags, groups", [("webshop", 128), ("frozenlake", 256), ("frozenlake --groups 5", 5)])
def test_a_diagnosis_has_256_groups_and_in_webshop_one_a_goal_or_what_is_asked_for(monkeypatch, flags, groups):
    asked = []
    monkeypatch.setattr(diagnosis, "PROMPTS", 256)
    monkeypatch.setattr(diagnosis, "scored_rollouts", lambda *given: asked.append(given[2]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main([str(TINY), "--bottleneck", "--env", *flags.split()])
    assert asked == [groups]


def test_a_diagnosis_plays_level_after_level_from_the_first_evaluated_one_on(tiny, monkeypatch):
    monkeypatch.setattr(diagnosis, "ROLLOUTS", 2)
    rows, *_ = diagnosis.scored_rollouts(config(tiny, eval_first=50, max_turns=1), tiny, 18)
    assert [row.episode.seed for row in rows] == [level for level in range(50, 68) for _ in range(2)]


def test_the_policys_log_probs_are_those_of_the_checkpoint_and_the_references_those_of_the_first_model(tiny, run):
    settings = config(tiny)
    rows, batch, signals = diagnosis.scored_rollouts(settings, run / "checkpoint-2", 2)
    own = train.score_batch(load_model(str(run / "checkpoint-2")), batch, settings)
    first = train.score_batch(load_model(str(tiny)), batch, settings)
    assert signals["policy_nll"].equal(-own.logp) and signals["logprob_shift"].equal(own.logp - first.logp)
    assert signals["energy"].equal(first.energy) and signals["entropy"].equal(first.entropy)
    assert (own.logp - batch.old_logp).abs().max() < 1e-4 and signals["logprob_shift"].abs().max() > 1e-3
    assert [row.episode.seed for row in rows] == [0] * 4 + [1] * 4


def test_correlations_are_those_of_the_groups(monkeypatch):
    rng = np.random.default_rng(0)
    values, returns = torch.tensor(rng.standard_normal((40, 3))), torch.tensor(rng.standard_normal(40))
    success = torch.tensor(rng.integers(0, 2, 40))
    is_action, is_reasoning = (torch.tensor([[False, here, not here]]).expand(40, 3) for here in (True, False))
    masks = is_action, is_reasoning, is_action | is_reasoning, is_action & False
    (action, reasoning, response, commitment) = diagnosis.correlations({"energy": values}, masks, returns, success, 4)
    spread, solved = returns.view(10, 4).std(1).numpy(), success.view(10, 4).double().mean(1).numpy()
    means = values[:, 1].view(10, 4).mean(1).numpy()
    assert (action["rho"], action["p"]) == pytest.approx(spearman(means, spread))
    assert (action["partial_rho"], action["partial_p"]) == pytest.approx(
        partial_spearman(means, spread, solved, (solved * (1 - solved)).round(9)))
    both = values[:, 1:].reshape(10, 8).mean(1).numpy()
    assert response["rho"] == pytest.approx(spearman(both, spread)[0])
    assert [row["tokens"] for row in (action, reasoning, response, commitment)] == list(diagnosis.CLASSES)
    assert math.isnan(commitment["rho"])  # no thought names its moves
    masks = is_action, is_reasoning, is_action | is_reasoning, is_reasoning
    *_, commitment = diagnosis.correlations({"energy": values}, masks, returns, success, 4)
    assert commitment["rho"] == reasoning["rho"]  # all reasoning tokens name moves


@pytest.mark.parametrize("game, response, named, kept", [
    ("frozenlake", "<think>Hm. I go Left and Up.</think><answer>Left || Up</answer>", ["Left", "Up"], 1.0),
    ("sokoban", "<think>Hm. I go Left.</think><answer>Right</answer>", ["Left"], 0.0),
    ("sudoku", "<think>I put 3 at 1,2.</think><answer>1,2,3</answer>", [], math.nan),  # no word before it
    ("sudoku", "<think>Hm. I put 3 at 1,2.</think><answer>1,2,3</answer>", ["3", "at", "1,2"], 1.0),
    ("webshop", "<think>Hm. I go Left.</think><answer>search[a]</answer>", [], math.nan),
    ("frozenlake", "<think>Hm. I go Left. No.</think><answer>Left</answer>", [], math.nan),  # not at its end
    ("frozenlake", "<think>Hm. I go Left.</think>", [], math.nan),  # no answer
    ("frozenlake", "<think>Hm. I go over the cells one by one.</think><answer>Left</answer>", [], math.nan),
])
def test_commitments_are_the_tokens_of_the_moves_at_a_thoughts_end(game, response, named, kept):
    tokenizer = load_tokenizer(str(TINY))
    row = Trajectory(None, [], [], [], [], [], [])
    row.read(tokenizer.encode("a prompt"))
    start = len(row.tokens)
    for token in tokenizer.encode(response):
        row.write(token, 0.0, 0.0, 0.0)
    row.close(tokenizer)
    mask, share = diagnosis.commitments([row], tokenizer, game)
    words = [tokenizer.decode([token]).strip() for token, here in zip(row.tokens, mask[0], strict=True) if here]
    assert [word for word in words if word != "and"] == named and not mask[0, :start].any()
    assert share == pytest.approx(kept, nan_ok=True)


def test_a_copy_of_a_checkpoint_whose_name_says_no_step_is_refused(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    copy = (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-2-old")
    assert evaluate.main([str(copy), "--bottleneck", *SHORT]) == 2
    assert capsys.readouterr().err == f"error: {copy}: expected a checkpoint-N, whose name says the step\n"


def test_a_reference_with_another_tokenizer_is_refused(tiny, tmp_path, capsys):
    assert evaluate.main([str(tiny), "--bottleneck", "--model", str(TINY), *SHORT]) == 2
    assert capsys.readouterr().err == f"error: --model {TINY}: no reference for {tiny}, whose tokenizer is another\n"


def test_a_table_with_other_columns_is_left_alone(tiny, tmp_path, capsys):
    table = tmp_path / "other.csv"
    table.write_text("a,b\n1,2\n")
    assert evaluate.main([str(tiny), "--bottleneck", "--csv", str(table), *SHORT]) == 2
    assert "its columns are not those" in capsys.readouterr().err and table.read_text() == "a,b\n1,2\n"


def test_a_copy_of_the_same_weights_has_the_same_digest_and_other_weights_another(tiny, run, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    digest = train.checkpoint.weights_digest
    assert digest(tmp_path / "copy") == digest(tiny) != digest(run / "checkpoint-2")
    assert digest(tmp_path) is None
