"""train.py and checkpoint.py: limits, micro-batches, resuming bit for bit, crashes, NaN, and a user's mistakes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import SafetensorError
from tiny import SMOKE, assert_same_run, config, flags, lines, same_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import evaluate
import methods
import startup
import train
import warmstart
from actfocus import policy_loss, token_weights
from checkpoint import find_checkpoint
from config import of_run
from policy import load_tokenizer, opening_text
from rollout import Batch

pytest_plugins = ["tiny"]


def run(tiny, folder, **options):
    """Train from the command line's door; the run folder."""
    assert train.main(flags(model=tiny, output_dir=folder, **options)) == 0
    return folder


def resume(folder, *more):
    return train.main(["--resume_from_checkpoint", str(folder), *more])


@pytest.fixture(scope="module", params=["grpo", "ppo"])
def finished(request, tiny, tmp_path_factory):
    """A run of four steps that nothing interrupted, for each algorithm."""
    return run(tiny, tmp_path_factory.mktemp(request.param) / "run", algo=request.param, mini_batch_size=4)


def test_a_run_leaves_its_numbers_its_samples_and_its_plot(finished, capsys):
    config_file = json.loads((finished / "config.json").read_text())
    assert config_file["config"]["num_generations"] == 4 and config_file["torch"] == torch.__version__
    assert [row["step"] for row in lines(finished / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in lines(finished / "eval.jsonl")] == [0, 2, 4]
    assert sorted(path.name for path in finished.glob("*-*")) == ["checkpoint-0", "checkpoint-2", "checkpoint-4"]
    assert "<think>" in (finished / "samples" / "step-4.txt").read_text()
    assert (finished / "plots" / "learning.png").read_bytes().startswith(b"\x89PNG")
    assert all(row["logp_gap_max"] < 1e-4 for row in lines(finished / "metrics.jsonl"))


def test_training_moves_the_policy_and_leaves_the_reference(finished, tiny):
    assert same_weights(finished / "checkpoint-0", tiny)
    assert not same_weights(finished / "checkpoint-2", tiny)
    first, *_, last = lines(finished / "metrics.jsonl")
    assert abs(first["kl_ref"]) < 1e-6 < last["kl_ref"]


def test_a_checkpoint_is_an_ordinary_model_folder_and_its_state_plain_tensors(finished, tiny):
    folder = finished / "checkpoint-4"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.hidden_size == 32 and len(tokenizer.encode("<answer>√")) == 4
    state = torch.load(folder / checkpoint.STATE, weights_only=True)
    assert state["step"] == 4 and state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def until_step_2(finished, folder):
    """The run as a kill after step 4's evaluation leaves it: lines to step 4, the last checkpoint at step 2."""
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / ".checkpoint-4.tmp").mkdir()
    (folder / ".checkpoint-4.tmp" / "model.safetensors").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "succ')  # the kill came in the middle of a line
    return folder


def test_a_resumed_run_equals_the_uninterrupted_one(finished, tmp_path):
    folder = until_step_2(finished, tmp_path / "resumed")
    assert resume(folder) == 0
    assert_same_run(folder, finished)


def test_with_another_generator_state_the_resumed_run_differs(finished, tmp_path):
    folder = until_step_2(finished, tmp_path / "resumed")
    state = torch.load(folder / "checkpoint-2" / checkpoint.STATE, weights_only=True)
    state["generator"] = torch.Generator().manual_seed(99).get_state()
    torch.save(state, folder / "checkpoint-2" / checkpoint.STATE)
    assert resume(folder) == 0
    assert lines(folder / "metrics.jsonl")[:2] == lines(finished / "metrics.jsonl")[:2]
    assert lines(folder / "metrics.jsonl") != lines(finished / "metrics.jsonl")


def test_resuming_in_an_earlier_checkpoint_repeats_the_later_steps(finished, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    assert resume(folder / "checkpoint-2") == 0
    assert_same_run(folder, finished)


def test_a_kill_after_resuming_in_an_earlier_checkpoint_loses_no_line(finished, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "iteration", kill)
        resume(folder / "checkpoint-2")
    assert resume(folder) == 0
    assert_same_run(folder, finished)


def test_a_run_whose_reference_was_made_anew_does_not_go_on(finished, tiny, tmp_path, capsys):
    folder, model = tmp_path / "run", tmp_path / "tiny"
    shutil.copytree(finished, folder)
    shutil.copytree(tiny, model)
    about = json.loads((folder / "config.json").read_text())
    about["config"]["model"] = str(model)
    (folder / "config.json").write_text(json.dumps(about))
    assert resume(folder, "--max_steps", "4") == 0
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.norm.weight.add_(0.1)
    changed.save_pretrained(model)
    before = sorted(path.name for path in folder.iterdir())
    capsys.readouterr()
    assert resume(folder, "--max_steps", "6") == 2
    said = capsys.readouterr().err
    assert f"{folder} began with {model} of weights {about['model_sha256']}" in said and said.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_setting_that_there_is_no_more_is_one_clear_line(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    about = json.loads((folder / "config.json").read_text())
    about["config"]["gone"] = 1
    (folder / "config.json").write_text(json.dumps(about))
    assert resume(folder) == 2
    assert "was started with a setting that there is no more: gone" in capsys.readouterr().err


@pytest.mark.parametrize("first, seed, prompts, refused", [
    (0, 0, 128, False), (999_990, 0, 10, False), (999_990, 0, 11, True), (1_000_000, 0, 1, True),
    (1_999_999, 0, 1, True), (2_000_000, 0, 1, False), (1_999_999, 1, 2, True), (881_000_000, 890, 128, False),
])
def test_no_level_is_evaluated_that_the_run_trains_on(first, seed, prompts, refused):
    settings = train.Config(eval_first=first, seed=seed, eval_prompts=prompts)
    if refused:
        with pytest.raises(ValueError, match=f"--eval_first {first}: of its {prompts} levels some are those that"):
            methods.evaluation_levels(settings)
    else:
        assert methods.evaluation_levels(settings) == range(first, first + prompts)


def test_a_finished_run_can_be_extended(finished, tmp_path):
    folder = tmp_path / "longer"
    shutil.copytree(finished, folder)
    assert resume(folder, "--max_steps", "5") == 0
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert find_checkpoint(folder).name == "checkpoint-5"
    assert checkpoint.read_config(folder)["max_steps"] == 5  # or a kill and a plain resume would end at 4


HOLDS = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print('held', flush=True); input()"


@pytest.mark.parametrize("finished", ["grpo"], indirect=True)
def test_two_processes_do_not_train_in_one_folder(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    command = [sys.executable, "-c", HOLDS, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        capsys.readouterr()
        assert resume(folder / "checkpoint-2") == 2
        assert capsys.readouterr().err == f"error: {folder}: another process is training there\n"
        assert len(lines(folder / "metrics.jsonl")) == 4
        other.communicate("\n")
    assert resume(folder / "checkpoint-2") == 0  # the lock ended with its process
    assert not checkpoint.LOCKS  # and ours with its run
    assert_same_run(folder, finished)


@pytest.mark.parametrize("finished", ["grpo"], indirect=True)
def test_a_copy_of_a_run_without_its_samples_and_evaluations_brings_its_settings_and_goes_on(finished, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(finished / "config.json", folder)
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    config, found = evaluate.settings_of(folder / "checkpoint-2", {})
    assert (config, found) == (of_run(folder), folder / "checkpoint-2")
    assert resume(folder) == 0 and sorted(path.name for path in (folder / "samples").iterdir()) == [
        "step-2.txt", "step-4.txt"]


def test_in_a_log_of_both_the_reason_of_an_end_stands_last(tmp_path, monkeypatch):
    with (tmp_path / "log").open("a") as out, (tmp_path / "log").open("a") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        print("step 1")
        train.complain("stopped: so it is")
        err.flush()
        monkeypatch.undo()
        assert (tmp_path / "log").read_text() == "step 1\nstopped: so it is\n"


@pytest.mark.parametrize("finished", ["grpo"], indirect=True)
def test_a_run_cannot_be_resumed_to_end_before_its_checkpoint(finished, tmp_path, capsys):
    folder = tmp_path / "shorter"
    shutil.copytree(finished, folder)
    capsys.readouterr()
    assert resume(folder, "--max_steps", "3") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --max_steps 3: {folder}/checkpoint-4 has done 4 already"
    assert len(lines(folder / "metrics.jsonl")) == 4 and checkpoint.read_config(folder)["max_steps"] == 4


@pytest.mark.parametrize("finished", ["grpo"], indirect=True)
def test_a_users_copy_of_a_checkpoint_is_neither_taken_for_one_nor_deleted(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("checkpoint-2-2026", "checkpoint-4.bak", "checkpoint-4 (copy)"):
        shutil.copytree(folder / "checkpoint-2", folder / name)
    assert find_checkpoint(folder) == folder / "checkpoint-4"
    checkpoint.forget_later(folder, 2)
    assert sorted(path.name for path in folder.glob("checkpoint-[24]*")) == [
        "checkpoint-2", "checkpoint-2-2026", "checkpoint-4 (copy)", "checkpoint-4.bak"]


@pytest.mark.parametrize("lines_before", [pytest.param(0, marks=pytest.mark.slow), 1,
                                          pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("finished", ["grpo"], indirect=True)
def test_a_run_killed_at_any_moment_and_resumed_equals_the_uninterrupted_one(finished, tiny, tmp_path, lines_before):
    folder = tmp_path / "killed"
    command = [sys.executable, str(Path(train.__file__)), *flags(model=tiny, output_dir=folder, mini_batch_size=4)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (folder / "checkpoint-0").exists() or len(checkpoint.read_lines(folder / "metrics.jsonl")) < lines_before:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert resume(folder) == 0
    assert_same_run(folder, finished)


def test_the_commit_is_marked_where_code_differs_and_unknown_where_there_is_no_git(monkeypatch):
    for changed, ending in (("", ""), (" M train.py", "-dirty")):
        answers = {"status": changed, "rev-parse": "0123456789ab"}
        monkeypatch.setattr(checkpoint.subprocess, "run", lambda command, answers=answers, **_: SimpleNamespace(
            stdout=answers[command[1]]))
        assert checkpoint.provenance(Path("nowhere"))["commit"] == "0123456789ab" + ending
    monkeypatch.setenv("PATH", "")
    assert checkpoint.provenance(Path("nowhere"))["commit"] == "unknown"


def test_a_run_killed_in_its_first_evaluation_can_be_continued(tiny, tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate_step", kill)
        run(tiny, tmp_path / "run", max_steps=1)
    started_again = train.main(flags(model=tiny, output_dir=tmp_path / "run", max_steps=1))
    assert started_again == 0 or resume(tmp_path / "run") == 0


def test_uniform_weights_are_alpha_1_and_beta_0_bit_for_bit(tiny, tmp_path):
    uniform = run(tiny, tmp_path / "uniform", weights="uniform", max_steps=2, mini_batch_size=4)
    limit = run(tiny, tmp_path / "limit", alpha=1, beta=0, max_steps=2, mini_batch_size=4)
    focus = run(tiny, tmp_path / "focus", max_steps=2, mini_batch_size=4)
    assert_same_run(uniform, limit)
    assert not same_weights(uniform / "checkpoint-2", focus / "checkpoint-2")
    first = [lines(folder / "metrics.jsonl")[0] for folder in (uniform, focus)]
    assert first[0]["success"] == first[1]["success"]  # nothing else differs: the first rollouts are the same
    assert first[0]["gradient_share_action"] == first[0]["gradient_share_action_uniform"]
    assert first[1]["gradient_share_action"] > first[1]["gradient_share_action_uniform"]


def prepared(settings):
    """State and a batch ready for the update, with advantages and weights no two tokens share."""
    state = train.build_state(settings)
    rows = methods.sample(settings, state, 0)
    batch = Batch.of(rows)
    reference = train.score_batch(state.reference, batch, settings)
    batch.energy, batch.ref_logp = reference.energy, reference.logp - 0.3
    batch.advantages = methods.METHODS[settings.algo].advantages(settings, state, batch, rows)
    noise = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(3))
    batch.advantages = torch.where(batch.is_response, batch.advantages + noise, 0.0)
    batch.weights = token_weights(batch.energy, batch.is_action, batch.is_reasoning)
    return state, batch


def gradients(monkeypatch, settings, state, batch):
    """What the update hands to the optimiser in its first step."""
    kept = []

    def keep(_, state, policy_too):
        models = [state.policy] + ([state.critic] if state.critic else [])
        kept.append([parameter.grad.clone() for model in models for parameter in model.parameters()])
        for model in models:
            model.zero_grad()
        return 0.0

    monkeypatch.setattr(train, "optimizer_step", keep)
    state.generator.manual_seed(5)
    metrics = train.update(settings, state, batch)
    return kept[0], metrics


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_the_size_of_micro_batches_does_not_change_the_update(tiny, monkeypatch, algo):
    settings = config(tiny, algo=algo, entropy_coef=0.05, kl_coef=0.2, kl_kind="k2", max_response_tokens=60)
    state, batch = prepared(settings)
    (whole, metrics), (pieces, same) = (
        gradients(monkeypatch, replace(settings, micro_batch_tokens=tokens), state, batch) for tokens in (100_000, 300)
    )
    assert max(grad.abs().max() for grad in whole) > 1e-2
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert metrics == pytest.approx(same, abs=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_update_is_equation_6_with_the_kl_and_entropy_terms_unweighted(tiny, monkeypatch, kind):
    settings = config(tiny, entropy_coef=0.05, kl_coef=0.2, kl_kind=kind, temperature=0.7, clip_low=0.1, clip_high=0.4)
    state, batch = prepared(settings)
    far = 0.25 * (-1.0) ** torch.arange(batch.tokens.shape[1])  # ratios of 0.78, which is clipped below, and of 1.28
    batch.old_logp = torch.where(batch.is_response, batch.old_logp + far, 0.0)
    ours, metrics = gradients(monkeypatch, settings, state, batch)
    scores = train.score_tokens(state.policy, batch.tokens, batch.is_response, 0.7)
    mask = batch.is_response
    log_ratio = (batch.ref_logp - scores.logp)[mask]
    kl = {"k1": -log_ratio, "k2": log_ratio.square() / 2, "k3": log_ratio.exp() - 1 - log_ratio}[kind]
    loss = policy_loss(scores.logp, batch.old_logp, batch.advantages, batch.weights, 0.1, 0.4)
    loss = loss + 0.2 * kl.mean() - 0.05 * scores.entropy[mask].mean()
    low = mask & ((scores.logp - batch.old_logp).exp() < 0.9) & (batch.advantages < 0)
    assert metrics["clip_fraction"] == int(low.sum()) / int(mask.sum()) > 0.1
    expected = torch.autograd.grad(loss, list(state.policy.parameters()))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_rollouts_training_and_the_reference_share_one_temperature(tiny):
    settings = config(tiny, temperature=0.7)
    row, batch = train.iteration(settings, train.build_state(settings), 0)
    assert row["logp_gap_max"] < 1e-4 and abs(row["kl_ref"]) < 1e-6
    at_1 = train.score_batch(train.build_state(settings).reference, batch, config(tiny))
    assert (batch.old_logp - at_1.logp).abs().max() > 0.1


def test_policy_and_critic_have_their_own_rates_and_one_bound_on_the_gradient(tiny):
    settings = config(tiny, algo="ppo", learning_rate=1e-3, critic_learning_rate=3e-3, max_grad_norm=1e-12)
    state = train.build_state(settings)
    assert [optimizer.param_groups[0]["lr"] for _, optimizer in state.learners] == [1e-3, 3e-3]
    before = [weight.clone() for weight in state.policy.parameters()]
    assert train.iteration(settings, state, 0)[0]["grad_norm"] > 1e-3  # before it is clipped
    moved = max((one - two).abs().max() for one, two in zip(before, state.policy.parameters(), strict=True))
    assert 0 < moved < 1e-6  # Adam's ε is larger than what is left of the gradient


def test_what_is_logged_of_an_update_is_of_all_its_mini_batches(tiny, monkeypatch):
    settings = config(tiny, mini_batch_size=4, algo="ppo")
    state, batch = prepared(settings)
    parts = iter([{"loss": 1.0, "value_loss": 5.0, "clipped": 3}, {"loss": 4.0, "value_loss": 8.0, "clipped": 8}])
    norms = iter([2.0, 7.0])

    def add_gradients(config, state, mini, sums, first):
        for name, value in next(parts).items():
            sums[name] += value
        return 0.0

    monkeypatch.setattr(train, "add_gradients", add_gradients)
    monkeypatch.setattr(train, "optimizer_step", lambda *given, **rest: next(norms))
    metrics = train.update(settings, state, batch)
    assert len(batch.returns) == 8 and (metrics["loss"], metrics["value_loss"], metrics["grad_norm"]) == (2.5, 6.5, 4.5)
    assert metrics["clip_fraction"] == 11 / int(batch.is_response.sum())
    assert metrics["kl_ref"] == pytest.approx(math.exp(-0.3) - 1 + 0.3, abs=1e-4)  # π_ref is put 0.3 lower; 0.041


def test_a_gap_that_is_no_number_is_not_logged_as_no_gap(tiny, monkeypatch):
    settings = config(tiny)
    state, batch = prepared(settings)
    batch.old_logp[tuple(batch.is_response.nonzero()[3])] = float("nan")
    assert gradients(monkeypatch, settings, state, batch)[1]["logp_gap_max"] == float("inf")


def test_the_energy_is_the_frozen_references_and_not_the_policys(tiny, monkeypatch):
    settings, seen = config(tiny), []
    state = train.build_state(settings)
    monkeypatch.setattr(train, "token_weights", lambda *given: seen.append(given[0]) or token_weights(*given))
    first = [parameter.clone() for parameter in state.reference.parameters()]
    with torch.no_grad():
        state.policy.model.norm.weight.mul_(2.0)
    train.iteration(settings, state, 0)
    _, batch = train.iteration(settings, state, 1)
    expected = train.score_batch(state.reference, batch, settings).energy
    assert seen[1].equal(expected) and not seen[1].equal(train.score_batch(state.policy, batch, settings).energy)
    assert all(torch.equal(one, two) for one, two in zip(first, state.reference.parameters(), strict=True))


def test_the_filter_trains_the_kept_groups_only(tiny, monkeypatch):
    settings = config(tiny, filter_fraction=0.5, mini_batch_size=4)
    state = train.build_state(settings)
    returns = iter([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0])

    def rows_with_returns(*arguments):
        rows = methods.sample(*arguments)
        for row in rows:
            row.episode.rewards = [next(returns)] + [0.0] * (len(row.spans) - 1)
        return rows

    monkeypatch.setitem(methods.METHODS, "grpo", methods.METHODS["grpo"]._replace(sample=rows_with_returns))
    metrics, batch = train.iteration(settings, state, 0)
    assert batch.returns.tolist() == [0, 1, 0, 1] and metrics["return_mean"] == 0.75


def test_levels_of_training_are_no_others(tiny):
    settings = config(tiny, num_prompts=4)
    asked = []

    class Seen(Exception):
        pass

    def note(config, seeds, samples):
        asked.append(list(seeds))
        raise Seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "make_episodes", note)
        for seed in (0, 1, 9_999):
            for step in (0, 1, 199):
                for again in (0, 1, methods.DAPO_ROUNDS - 1):
                    with pytest.raises(Seen):
                        methods.sample(replace(settings, seed=seed), None, step, again)
    levels = [level for seeds in asked for level in seeds]
    assert len(set(levels)) == len(levels) == 108 and min(levels) == methods.FIRST_TRAIN_SEED


def crash(*_, **__):
    raise OSError("no space left on device")


BREAKABLE = {
    "model": lambda state: (state.policy, "save_pretrained"),
    "tokenizer": lambda state: (state.tokenizer, "save_pretrained"),
    "state": lambda state: (checkpoint.torch, "save"),
    "flush": lambda state: (checkpoint.os, "fsync"),
    "rename": lambda state: (checkpoint.os, "replace"),
}


@pytest.mark.parametrize("part", BREAKABLE)
def test_a_crash_in_the_middle_of_a_checkpoint_leaves_the_last_one_loadable(tiny, tmp_path, monkeypatch, part):
    settings = config(tiny)
    state = train.build_state(settings)
    checkpoint.save(state, tmp_path)
    before = weights(find_checkpoint(tmp_path))
    with torch.no_grad():
        state.policy.model.norm.weight.add_(1.0)
    state.step = 1
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(*BREAKABLE[part](state), crash)
        checkpoint.save(state, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0"]
    fresh = train.build_state(settings)
    checkpoint.restore(fresh, find_checkpoint(tmp_path))
    assert fresh.step == 0 and all(torch.equal(before[name], p) for name, p in fresh.policy.state_dict().items())
    checkpoint.save(state, tmp_path)  # what the crash left is not in the way
    assert find_checkpoint(tmp_path).name == "checkpoint-1" and not list(tmp_path.glob(".*"))


def nan_losses(monkeypatch, which, name="policy_loss"):
    """The policy's loss, or the critic's, is NaN in these calls, from 1."""
    calls, honest = [], getattr(train, name)

    def loss(*arguments):
        calls.append(1)
        return honest(*arguments) * (float("nan") if len(calls) in which else 1)

    monkeypatch.setattr(train, name, loss)


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    pytest.param(RuntimeError("unexpected pos 64 vs 0"), marks=pytest.mark.slow),
    pytest.param(SafetensorError("I/O error: No space left on device"), marks=pytest.mark.slow),
])
def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on_when_there_is_room(
    tiny, tmp_path, monkeypatch, capsys, error
):
    def full(state, path):
        if "checkpoint-2" in str(path):
            raise error
        save(state, path)

    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        assert train.main(flags(model=tiny, output_dir=tmp_path / "run", max_steps=2, save_steps=1)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith(f"error: {tmp_path}/run/checkpoint-2: cannot be written with ")
    assert str(error.args[-1]) in line
    assert line.endswith(f"--resume_from_checkpoint {tmp_path}/run goes on from its last checkpoint, if it has one")
    assert resume(tmp_path / "run") == 0
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("algo, which", [("grpo", "policy_loss"), ("ppo", "policy_loss"), ("ppo", "value_loss")])
def test_a_nan_is_skipped_and_counted_and_moves_no_weight(tiny, tmp_path, monkeypatch, algo, which):
    nan_losses(monkeypatch, {2}, which)
    folder = run(tiny, tmp_path / "run", algo=algo, max_steps=3, save_steps=1, micro_batch_tokens=10**6)
    rows = lines(folder / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 0]
    logged = which.removeprefix("policy_")  # the metric's name
    assert [row[logged] is None for row in rows] == [False, True, False] and "NaN" not in str(rows)
    assert not same_weights(folder / "checkpoint-0", folder / "checkpoint-1")
    assert same_weights(folder / "checkpoint-1", folder / "checkpoint-2")
    assert not same_weights(folder / "checkpoint-2", folder / "checkpoint-3")
    if algo == "ppo":
        one, two, three = (torch.load(folder / f"checkpoint-{n}" / checkpoint.STATE, weights_only=True)["critic"]
                           for n in (1, 2, 3))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not torch.equal(two["head.weight"], three["head.weight"])


def test_one_nan_micro_batch_skips_the_whole_step(tiny, tmp_path, monkeypatch):
    nan_losses(monkeypatch, {2})
    folder = run(tiny, tmp_path / "run", max_steps=1, micro_batch_tokens=600)
    assert lines(folder / "metrics.jsonl")[0]["skipped_steps"] == 1
    assert same_weights(folder / "checkpoint-0", folder / "checkpoint-1")


def test_five_nans_in_a_row_end_the_run_with_the_reason_and_no_nan_is_saved(tiny, tmp_path, monkeypatch, capsys):
    nan_losses(monkeypatch, range(4, 100))
    options = {"mini_batch_size": 4, "micro_batch_tokens": 10**6, "save_steps": 1}  # two optimiser steps an iteration
    assert train.main(flags(model=tiny, output_dir=tmp_path / "run", **options)) == 1
    error = capsys.readouterr().err
    assert "the gradient was not finite 5 times in a row (step 4)" in error and "checkpoint-3" in error
    assert [row["skipped_steps"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in weights(folder).values())
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-3"


def test_the_count_of_nans_in_a_row_starts_again_after_a_good_step_and_survives_a_resume(tiny, tmp_path, monkeypatch):
    options = {"mini_batch_size": 2, "micro_batch_tokens": 10**6, "save_steps": 1}  # four optimiser steps an iteration
    with monkeypatch.context() as patch:
        nan_losses(patch, {1, 2, 3, 4, 6, 7, 8})
        folder = run(tiny, tmp_path / "run", max_steps=2, **options)
    assert [row["skipped_steps"] for row in lines(folder / "metrics.jsonl")] == [4, 3]
    with monkeypatch.context() as patch:
        nan_losses(patch, {1, 2})  # three before the resume and these two make five
        assert resume(folder, "--max_steps", "3") == 1


def test_a_starting_model_with_a_nan_is_refused_and_leaves_no_run_folder(tiny, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "broken")
    capsys.readouterr()  # transformers' progress bars so far
    assert train.main(flags(model=tmp_path / "broken", output_dir=tmp_path / "run")) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: cannot load model '{tmp_path / 'broken'}': it has weights that are not finite"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["policy", "critic"])
def test_weights_that_are_nan_are_not_saved(tiny, tmp_path, which):
    state = train.build_state(config(tiny, algo="ppo"))
    checkpoint.save(state, tmp_path)
    next(getattr(state, which).parameters()).data[3] = float("nan")
    state.step = 1
    with pytest.raises(FloatingPointError, match="refusing"):
        checkpoint.save(state, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0"]


def mistake(arguments, capsys):
    """Exit code and lines on stderr."""
    code = train.main(arguments)
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("wrong, part", [
    ({"env": "chess"}, "--env chess: choose from sokoban, frozenlake"),
    ({"algo": "reinforce"}, "--algo reinforce: choose from grpo, ppo"),
    ({"weights": "focus"}, "--weights focus: choose from actfocus, uniform"),
    ({"num_generations": 1, "mini_batch_size": 2}, "--num_generations 1"),
    ({"mini_batch_size": 3}, "--mini_batch_size 3: must divide the 8 trajectories"),
    ({"filter_fraction": 0.5}, "--mini_batch_size 8: must divide the 4 trajectories"),
    ({"alpha": -1}, "--alpha -1.0: must lie in [0, 1]"),
    ({"alpha": "nan"}, "--alpha nan: must lie in [0, 1]"),
    ({"beta": -0.5}, "--beta -0.5"),
    ({"temperature": 0}, "--temperature 0.0"),
    ({"learning_rate": 0}, "--learning_rate 0.0"),
    ({"micro_batch_tokens": 0}, "--micro_batch_tokens 0"),
    ({"seed": -1}, "--seed -1"),
    ({"kl_kind": "k4"}, "--kl_kind k4"),
    ({"model": "models/nope"}, "cannot load model 'models/nope'"),
    ({"model": "/nowhere/nope"}, "cannot load model '/nowhere/nope'"),
    ({"beta": "inf"}, "--beta inf"),
    ({"max_context": 60}, "(--max_response_tokens) do not fit"),
    ({"max_response_tokens": 600}, "(--max_response_tokens) do not fit"),
])
def test_an_impossible_setting_is_one_line_and_code_2_and_leaves_no_folder(
    tiny, tmp_path, monkeypatch, capsys, wrong, part
):
    monkeypatch.chdir(tmp_path)
    code, error = mistake(flags(**{"model": tiny, **wrong}), capsys)
    assert code == 2 and len(error) == 1 and part in error[0]
    assert not list(tmp_path.iterdir())


def test_a_context_that_a_later_levels_prompt_does_not_fit_is_refused(tiny, tmp_path, capsys):
    tokenizer = load_tokenizer(str(tiny))
    episodes = train.make_episodes(config(tiny), range(16), 1)
    lengths = [len(tokenizer.encode(opening_text(tokenizer, e.system(), e.user()))) for e in episodes]
    assert max(lengths) > lengths[0]
    options = {"model": tiny, "output_dir": tmp_path / "run", "eval_prompts": 16}
    code, error = mistake(flags(**options, max_context=lengths[0] + SMOKE["max_response_tokens"]), capsys)
    assert code == 2 and len(error) == 1 and not list(tmp_path.iterdir())


def test_a_model_whose_template_rewrites_earlier_turns_is_refused_at_the_door(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    code, error = mistake(flags(model=tmp_path / "model", output_dir=tmp_path / "run"), capsys)
    assert code == 2 and len(error) == 1 and "rewrites" in error[0] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [
    ["--learning_speed", "1"], ["--temp", "0.5"], ["--alpha", "high"], ["--max_steps", "1e3"], ["--coordinates", "yes"],
    ["--preset", "huge"], ["surplus"], ["--alpha"], ["--top_p", "0.9"], ["--top_k", "20"],
])
def test_a_flag_that_cannot_be_read_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    code, error = mistake(arguments, capsys)
    assert code == 2 and len(error) == 1 and error[0].startswith("error: ") and arguments[0] in error[0]
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_written_is_one_line_and_code_2(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("here first")
    for folder in ("file", "file/run"):
        code, error = mistake(flags(model=tiny, output_dir=tmp_path / folder), capsys)
        assert code == 2 and len(error) == 1 and str(tmp_path / "file") in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "here first"


def test_an_output_folder_that_is_not_empty_is_left_alone(tiny, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    code, error = mistake(flags(model=tiny, output_dir=tmp_path), capsys)
    assert code == 2 and len(error) == 1 and "not empty" in error[0]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("finished", ["grpo"], indirect=True)
@pytest.mark.parametrize("wrong", [
    ["--alpha", "0.3"], ["--env", "sokoban"], ["--seed", "1"], ["--algo", "ppo"], ["--weights", "uniform"],
    (["--output_dir", "elsewhere"]),
    (["--preset", "paper"]),
])
def test_a_run_does_not_resume_with_other_settings(finished, tmp_path, capsys, wrong):
    before = (finished / "metrics.jsonl").read_bytes()
    code, error = mistake(["--resume_from_checkpoint", str(finished), *wrong], capsys)
    assert code == 2 and len(error) == 1 and wrong[0] in error[0]
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_there_is_nothing_to_resume_in_a_folder_without_a_checkpoint(tiny, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing", tiny):
        code, error = mistake(["--resume_from_checkpoint", str(folder)], capsys)
        assert code == 2 and len(error) == 1 and "no complete checkpoint" in error[0] and str(folder) in error[0]
    assert not (tmp_path / "missing").exists()


def test_the_default_run_folder_is_new_every_time(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        checkpoint.new_run(asdict(train.Config()))
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["frozenlake-grpo-actfocus-seed0", "frozenlake-grpo-actfocus-seed0-2"]


def test_presets_say_what_they_change_and_flags_win(capsys):
    settings, _ = train.parse(["--preset", "smoke", "--max_steps", "7"])
    assert (settings.max_steps, settings.num_prompts) == (7, 2) and "--num_prompts 2" in capsys.readouterr().out
    paper, _ = train.parse(["--preset", "paper", "--env", "sokoban"])
    assert (paper.learning_rate, paper.filter_fraction, paper.num_prompts, paper.mini_batch_size) == (1e-6, 0.25, 8, 32)
    assert train.parse(["--preset", "paper"])[0].filter_fraction == 1.0
    assert train.parse([])[0] == train.Config()


def test_budgets_are_the_environments_own_unless_the_run_sets_them():
    def budgets(**options):
        env = train.build_env(train.Config(**options))
        return env.max_turns, env.actions_per_turn, env.max_actions

    assert [budgets(env=name) for name in ("sokoban", "frozenlake", "sudoku")] == [(5, 2, 10), (5, 2, 10), (8, 2, 16)]
    assert budgets(env="sudoku", max_turns=3) == (3, 2, 16)
    assert budgets(env="sokoban", actions_per_turn=1, max_actions=7) == (5, 1, 7)
    assert budgets(env="sokoban") == (5, 2, 10)  # the class keeps its own


def test_sudokus_level_and_hints_are_flags(capsys):
    env = train.build_env(train.parse(["--env", "sudoku"])[0])
    assert (env.level, env.hints, env.unique) == ("easy", True, True)
    env = train.build_env(train.parse(["--env", "sudoku", "--sudoku_level", "hard", "--hints", "false"])[0])
    assert (env.level, env.hints) == ("hard", False)
    code, error = mistake(["--sudoku_level", "evil"], capsys)
    assert code == 2 and error == ["error: --sudoku_level evil: choose from easy, medium, hard"]


def test_a_run_from_before_a_setting_existed_resumes_with_its_default(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    about = json.loads(path.read_text())
    del about["config"]["sudoku_level"], about["config"]["hints"]
    about["config"] |= {"max_turns": 5, "actions_per_turn": 2, "max_actions": 10}
    path.write_text(json.dumps(about))
    settings, _ = train.parse(["--resume_from_checkpoint", str(tmp_path / "run"), "--sudoku_level", "easy"])
    assert (settings.sudoku_level, settings.hints, settings.max_turns) == ("easy", True, 5)


def test_a_smoke_run_on_sudoku_ends_with_floor_and_ceiling(tiny, tmp_path, capsys):
    assert train.main(flags(model=tiny, output_dir=tmp_path / "run", env="sudoku", max_steps=1, max_context=1000)) == 0
    out = capsys.readouterr().out
    assert "random floor: success" in out and "oracle ceiling: success 100.0 %" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["env"], config["sudoku_level"], config["hints"], config["max_turns"]) == ("sudoku", "easy", True, 0)


def test_a_warm_start_is_made_once_and_is_the_reference_of_every_later_run(tiny, tmp_path, capsys, monkeypatch):
    options = {"warmstart_steps": 2, "cache_dir": tmp_path / "cache"}
    one = run(tiny, tmp_path / "one", max_steps=1, **options)
    assert "warm start of" in capsys.readouterr().out
    two = run(tiny, tmp_path / "two", max_steps=1, seed=1, **options)
    assert "warm start of" not in capsys.readouterr().out
    (folder,) = (tmp_path / "cache").iterdir()
    for made in (one, two):
        assert checkpoint.read_config(made)["model"] == str(folder) and same_weights(made / "checkpoint-0", folder)
    assert not same_weights(folder, Path(tiny))
    run(tiny, tmp_path / "three", max_steps=1, **{**options, "warmstart_steps": 1})
    run(tiny, tmp_path / "four", max_steps=1, **options, actions_per_turn=1)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # another warm start is another folder
    monkeypatch.setattr(startup, "files_digest", lambda *_: "of a model that was made anew")
    run(tiny, tmp_path / "five", max_steps=0, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_warm_start_is_another_where_weights_tokenizer_template_or_config_are(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(warmstart, "bring_to_format", lambda config, name, folder: folder.mkdir(parents=True))
    shutil.copytree(tiny, tmp_path / "model")
    options = config(tmp_path / "model", warmstart_steps=1, cache_dir=str(tmp_path / "cache"))
    found = [startup.start_model(options)]
    assert startup.start_model(options) == found[0]
    template = b"{% for m in messages %}{{ m.content }}{% endfor %}"
    for name, more in (("model.safetensors", b" "), ("tokenizer.json", b" "), ("config.json", b" "),
                       ("chat_template.jinja", template)):
        with (tmp_path / "model" / name).open("ab") as file:
            file.write(more)
        found.append(startup.start_model(options))
    assert len(set(found)) == 5


def test_a_warm_start_on_a_full_disk_is_one_line_and_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    options = {"warmstart_steps": 1, "cache_dir": tmp_path / "cache", "output_dir": tmp_path / "run"}
    assert train.main(flags(model=tiny, **options)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith(f"error: {tmp_path}/cache/") and line.endswith("(I/O error: No space left on device)")
    assert not (tmp_path / "run").exists() and not list((tmp_path / "cache").iterdir())


def test_a_warm_start_is_on_the_prompts_and_budgets_of_the_run(tiny, tmp_path, monkeypatch):
    written, transcript = [], warmstart.transcript
    monkeypatch.setattr(warmstart, "transcript", lambda *given: written.append(transcript(*given)) or written[-1])
    options = {"warmstart_steps": 1, "cache_dir": tmp_path / "cache", "prompt_style": "paper", "max_context": 4096}
    run(tiny, tmp_path / "run", max_steps=0, **options, actions_per_turn=1)
    texts = ["".join(text for text, _ in parts) for parts in written]
    assert len(texts) == warmstart.ROWS_OF_ONE and all("one into an answer" in text for text in texts)
    assert not any("||" in text for parts in written for text, is_response in parts if is_response)


def test_a_place_that_cannot_be_written_is_refused_before_the_steps_of_a_warm_start(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(warmstart, "train", lambda *_, **__: pytest.fail("it taught first"))
    (tmp_path / "file").write_text("in the way")
    arguments = ["--output_dir", str(tmp_path / "file" / "new")]
    for more in ([], ["--committed"], ["--model", str(tiny), "--steps", "1"]):
        assert warmstart.main([*arguments, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: {tmp_path}/file/new: cannot be written (Not a directory)"


def test_a_warm_start_learns_no_more_of_a_transcript_than_a_run_can_read(tiny, tmp_path, monkeypatch):
    seen, score = [], warmstart.score_tokens
    monkeypatch.setattr(warmstart, "score_tokens", lambda model, tokens, mask: seen.append(tokens.shape[1]) or score(
        model, tokens, mask))
    run(tiny, tmp_path / "run", max_steps=0, warmstart_steps=2, cache_dir=tmp_path / "cache", max_context=300)
    assert max(seen) == 300
    run(tiny, tmp_path / "more", max_steps=0, warmstart_steps=2, cache_dir=tmp_path / "cache", max_context=310)
    assert max(seen) == 310  # another length is another warm start
    shutil.rmtree(tmp_path / "cache")
    options = {"warmstart_steps": 2, "cache_dir": tmp_path / "cache", "max_context": 60}
    assert train.main(flags(model=tiny, output_dir=tmp_path / "none", **options)) == 2
    assert not (tmp_path / "cache").exists()  # a prompt fills it, so nothing could be taught


def test_any_model_is_taught_a_games_format_by_a_command(tiny, tmp_path, capsys):
    arguments = ["--model", str(tiny), "--env", "sudoku", "--steps", "1", "--output_dir", str(tmp_path / "new")]
    assert warmstart.main(arguments) == 0
    assert "on sudoku: 1 steps of 8 transcripts at 0.0001" in capsys.readouterr().out
    assert not same_weights(tmp_path / "new", Path(tiny))
    elsewhere = [*arguments[:-1], str(tmp_path / "a")]
    for wrong, part in ((arguments, "exists"), ([*elsewhere, "--env", "chess"], "--env chess"),
                        ([*elsewhere, "--model", "no/such"], "no/such"), ([*elsewhere, "--steps", "0"], "--steps"),
                        ([*elsewhere, "--committed"], "--committed"), ([*elsewhere, "--shrink", "2"], "--shrink")):
        assert warmstart.main(wrong) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and part in line and not (tmp_path / "a").exists()


def test_bfloat16_rounds_products_and_leaves_weights_and_log_probs_float32(tiny, tmp_path):
    folder = run(tiny, tmp_path / "run", max_steps=2, dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(folder / "checkpoint-2").values()} == {torch.float32}
    gaps = [row["logp_gap_max"] for row in lines(folder / "metrics.jsonl")]
    exact = lines(run(tiny, tmp_path / "exact", max_steps=1) / "metrics.jsonl")[0]["logp_gap_max"]
    assert exact < 1e-4 < max(gaps) < 0.2
