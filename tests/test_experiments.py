"""experiments.py: grids, how learning rates are chosen, what counts as finished; and that seeds are pairs."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import SMOKE, config, flags, lines

import experiments
import methods
import train
from config import Config, departures
from envs import Episode
from experiments import canonical, name_of
from policy import load_model, load_tokenizer

pytest_plugins = ["tiny"]
RUN = {"seed": 0, "env": "frozenlake", "algo": "grpo", "weights": "actfocus"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Empty results/ and runs/."""
    (tmp_path / "results" / "runs").mkdir(parents=True)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments, "WORK", tmp_path / "runs")
    return tmp_path / "results"


def put(results, run, success, failure="", digest=None):
    """A finished run whose last evaluation had this success."""
    folder = results / "runs" / name_of(canonical(run))
    folder.mkdir()
    settings = train.asdict(experiments.planned(run))
    digest = digest or train.checkpoint.weights_digest(experiments.MODELS / "tiny")
    (folder / "config.json").write_text(json.dumps({"config": settings, "model_sha256": digest}))
    rows = [{"step": i, "success": 0.7} for i in range(30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text("".join(json.dumps({"step": step, "success": number}) + "\n"
                                             for step, number in ((0, 0.99), (30, success))))
    if failure:
        (folder / "failure.txt").write_text(failure)


def test_names_say_what_differs_and_equal_runs_have_one_name():
    assert name_of(canonical(RUN)) == "frozenlake-grpo-actfocus-seed0"
    assert name_of(canonical({**RUN, "alpha": 0.1, "beta": 0.5, "learning_rate": 1e-4, "signal": "energy"})) == name_of(
        canonical(RUN))
    assert name_of(canonical({**RUN, "alpha": 1.0, "beta": 0.0})) == "frozenlake-grpo-uniform-seed0"
    assert name_of(canonical({**RUN, "alpha": 1.0, "beta": 0.5})) == "frozenlake-grpo-actfocus-seed0-alpha1.0"
    assert name_of(canonical({**RUN, "model": "committed"})) == "frozenlake-grpo-actfocus-seed0-modelcommitted"
    assert experiments.flags(canonical({**RUN, "model": "committed"}))[-2:] == [
        "--model", str(experiments.MODELS / "committed")]


def test_every_planned_run_is_one_that_train_accepts_and_has_its_own_name(results):
    for name, grid in experiments.grids().items():
        named = {name_of(run): run for run in grid.runs}
        assert len(named) == len({json.dumps(run, sort_keys=True) for run in grid.runs}) and named
        for run in list(named.values())[:30]:
            assert canonical(run) == run, name
            if grid.against:
                other = grid.against(run)
                assert (other["seed"], other["env"], other.get("model")) == (run["seed"], run["env"], run.get("model"))


def test_the_grids_have_what_the_issue_asks_for(results):
    grids = {name: {name_of(run) for run in grid.runs} for name, grid in experiments.grids().items()}
    assert len(grids["main"]) == (3 * 5 + 3) * 2 * 2 and len(grids["tune"]) == (4 * 2 + 2) * 2 * 3 * 2
    assert len(grids["ablation"]) == 17 * 2 * 5 and len(grids["committed"]) == 2 * 2 * 5
    assert len(grids["slippery"]) == 2 * 5 and len(grids["long"]) == 2 * 2 * 5 and len(grids["tags"]) == 5
    assert len(grids["rates"]) == 2 * 2 * 4 * 5 + 2 * 3 * 5
    assert len(grids["rivals"]) == 7 * 2 * 3 and len(grids["defaults"]) == 4 * 3
    assert grids["lambda"] == {f"{env}-poad-uniform-seed{seed}-lam1.0" for env in ("frozenlake", "sokoban")
                               for seed in range(3)}
    for part in ("alpha0.0", "alpha0.05", "alpha0.3", "alpha1.0", "beta0.0", "beta1.0", "beta2.0", "signalentropy",
                 "signalpolicy_nll", "signallogprob_shift", "tag_weightone", "weight_statsmini_batch"):
        assert {f"{env}-grpo-actfocus-seed{seed}-{part}" for env in ("frozenlake", "sokoban")
                for seed in range(5)} <= grids["ablation"]
    assert {"frozenlake-grpo-class_mean-seed4", "sokoban-grpo-actfocus-seed0-alpha0.08-beta0.0"} <= grids["ablation"]
    shared = grids["ablation"] & grids["main"]
    assert len(shared) == 2 * 2 * 5  # ActFocus as the paper has it, and uniform: not run twice
    tuned = {run["seed"] for run in experiments.grids()["tune"].runs}
    others = {run["seed"] for name, grid in experiments.grids().items() if name != "tune" for run in grid.runs}
    assert not tuned & others and tuned == set(experiments.TUNING_SEEDS)


def test_webshops_seeds_of_main_and_the_tuning_seeds_meet_no_training_goal_twice():
    shop = experiments.planned({"env": "webshop", "algo": "grpo"})
    goals = len(methods.build_env(shop).parts["train"])

    def met(seed):
        first = methods.FIRST_TRAIN_SEED * (1 + seed)
        return {level % goals for level in range(first, first + shop.max_steps * shop.num_prompts)}

    seeds = [*experiments.SEEDS["webshop"], *experiments.TUNING_SEEDS]
    tuning = {(experiments.TUNING_LEVELS + i) % goals for i in range(shop.eval_prompts)}
    assert len(tuning) == 128 and not tuning & set.union(*map(met, experiments.TUNING_SEEDS))
    assert goals == 878 and len(set.union(*map(met, seeds))) == 160 * len(seeds)
    assert len(set.intersection(*map(met, experiments.FEW))) == 76


def scores(results, weights, by_rate, **options):
    for rate, success in by_rate.items():
        for seed in experiments.TUNING_SEEDS:
            run = {**RUN, "seed": seed, "weights": weights, "learning_rate": rate, "eval_steps": 30,
                   "eval_samples": 2, "eval_first": experiments.TUNING_LEVELS}
            put(results, run, success, **options)


def test_the_chosen_rate_is_the_one_whose_last_evaluation_succeeds_most(results):
    scores(results, "actfocus", {1e-4: 0.5, 2e-4: 0.6, 4e-4: 0.7})
    scores(results, "uniform", {1e-4: 0.5, 2e-4: 0.6, 4e-4: 0.3})
    found = experiments.tuning()
    assert {cell[2]: one["chosen"] for cell, one in found.items()} == {"actfocus": 4e-4, "uniform": 2e-4}
    assert found["frozenlake", "grpo", "actfocus", ""]["scores"] == pytest.approx({1e-4: 0.5, 2e-4: 0.6, 4e-4: 0.7})
    names = {grid: {name_of(run) for run in one.runs} for grid, one in experiments.grids().items()}
    assert {"frozenlake-grpo-actfocus-seed0-learning_rate0.0004", "frozenlake-grpo-uniform-seed0-learning_rate0.0002",
            "frozenlake-ppo-actfocus-seed0", "sokoban-grpo-actfocus-seed0"} <= names["main"]
    assert {"frozenlake-dapo-uniform-seed0", "frozenlake-grpo-uniform-seed0"} <= names["rivals"]  # one rate for all
    assert "frozenlake-grpo-actfocus-seed0" in names["defaults"]
    assert {"frozenlake-grpo-actfocus-seed0-alpha0.3-learning_rate0.0004",
            "frozenlake-grpo-uniform-seed0-learning_rate0.0004"} <= names["ablation"]  # uniform at ActFocus' rate
    main = experiments.grids()["main"]
    pairs = {name_of(run): name_of(main.against(run)) for run in main.runs}
    assert pairs["frozenlake-grpo-actfocus-seed0-learning_rate0.0004"] == (
        "frozenlake-grpo-uniform-seed0-learning_rate0.0002")


def test_a_grid_starts_only_at_rates_that_are_chosen_and_those_of_now(results, monkeypatch, capsys):
    started = []

    def tune(run, name, again):
        started.append(name)
        if run["seed"] in experiments.TUNING_SEEDS:
            put(results, run, 0.9 if run.get("learning_rate") == 2e-4 else 0.5)
        return name

    monkeypatch.setattr(experiments, "work_off", tune)
    assert experiments.main(["main", "--only", "frozenlake-grpo-*"]) == 2 and not started
    assert "no learning rate is chosen yet for frozenlake grpo actfocus: first" in capsys.readouterr().err
    assert experiments.main(["tune", "ablation", "main", "--only", "frozenlake-grpo-*", "--jobs", "1"]) == 0
    assert len([name for name in started if "committed" not in name]) == 12 + 17 * 5 + 10
    assert all("learning_rate0.0002" in name for name in started[24:])
    assert experiments.main(["main", "--list"]) == 0 and experiments.main(["main"]) == 2


def test_of_equal_rates_the_smaller_one_is_chosen_and_a_run_that_broke_down_counts_0(results):
    scores(results, "uniform", {1e-4: 0.4, 2e-4: 0.6, 4e-4: 0.6})
    scores(results, "actfocus", {1e-4: 0.4, 2e-4: 0.5})
    scores(results, "actfocus", {4e-4: 0.9}, failure="stopped: the gradient was not finite")
    assert [one["chosen"] for _, one in sorted(experiments.tuning().items())] == [2e-4, 2e-4]


def test_nothing_is_chosen_before_all_tuning_runs_are_there_or_from_another_model(results):
    scores(results, "uniform", {1e-4: 0.4, 2e-4: 0.6})
    scores(results, "actfocus", {1e-4: 0.4, 2e-4: 0.5})
    scores(results, "actfocus", {4e-4: 0.9}, digest="another")
    assert [one["chosen"] for one in experiments.tuning().values()] == [None, None]


@pytest.fixture
def small(results, tiny, monkeypatch):
    """A grid of one run that takes seconds, from the tiny model of the tests."""
    monkeypatch.setattr(experiments, "MODELS", tiny.parent)
    options = {name: value for name, value in SMOKE.items() if name != "save_steps"}
    run = {**RUN, **options, "model": tiny.name}
    monkeypatch.setattr(experiments, "planned", lambda run: config(tiny, **{k: v for k, v in run.items()
                                                                             if k != "model"}))
    monkeypatch.setattr(experiments, "flags", lambda run: flags(model=tiny, **{k: v for k, v in run.items()
                                                                               if k != "model"}))
    run = canonical(run)
    monkeypatch.setattr(experiments, "grids", lambda: {"small": experiments.Grid([run])})
    return run


@pytest.mark.slow
def test_a_grid_runs_what_is_missing_keeps_it_and_skips_it_the_next_time(small, results, capsys):
    assert experiments.main(["small", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 runs are missing" in out and "% after 4 steps" in out
    (folder,) = (results / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "eval.jsonl"}
    assert lines(folder / "eval.jsonl")[-1]["step"] == 4
    assert experiments.main(["small"]) == 0 and "0 of 1 runs are missing" in capsys.readouterr().out
    before = lines(folder / "metrics.jsonl")
    assert experiments.main(["--run", "frozenlake-grpo-*"]) == 0
    assert "steps, as it was" in capsys.readouterr().out and lines(folder / "metrics.jsonl") == before


@pytest.mark.slow
def test_a_run_from_other_weights_or_with_other_settings_is_not_finished(small, results, tiny):
    experiments.WORK.mkdir()
    folder = results / "runs" / name_of(small)
    assert "after 4 steps" in experiments.work_off(small) and experiments.is_finished(folder, small)
    about = json.loads((folder / "config.json").read_text())
    assert about["model_sha256"] == train.checkpoint.weights_digest(tiny)
    for change in ({"model_sha256": "another"}, {"model_sha256": None},
                   {"config": {**about["config"], "learning_rate": 7e-4}}):
        (folder / "config.json").write_text(json.dumps({**about, **change}))
        assert not experiments.is_finished(folder, small)
    for broken in ("", "{", "{}"):
        (folder / "config.json").write_text(broken)  # killed while it was written
        assert not experiments.is_finished(folder, small)
    (folder / "config.json").write_text(json.dumps(about))
    assert experiments.is_finished(folder, small)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(small, results, monkeypatch):
    experiments.WORK.mkdir()
    name, commands, real = name_of(small), [], experiments.subprocess.run
    assert train.main([*experiments.flags({**small, "max_steps": 2}), "--output_dir",
                       str(experiments.WORK / name)]) == 0
    path = experiments.WORK / name / "config.json"
    path.write_text(path.read_text().replace('"max_steps": 2', '"max_steps": 4'))  # as if it had been killed half-way
    monkeypatch.setattr(experiments.subprocess, "run", lambda command, **options: commands.append(command) or real(
        command, **options))
    assert "after 4 steps" in experiments.work_off(small)
    assert "--resume_from_checkpoint" in commands[0]


def breaks_down(monkeypatch, code, line):
    def run(command, stdout, **options):
        folder = experiments.Path(command[command.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "eval.jsonl").write_text('{"step": 0, "success": 0.5}\n')
        stdout.write(f"evaluation\n{line}\n")
        stdout.flush()
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(experiments.subprocess, "run", run)


def test_a_run_that_broke_down_is_kept_with_its_reason_and_a_mistake_is_not(small, results, monkeypatch):
    experiments.WORK.mkdir()
    folder = results / "runs" / name_of(small)
    for code, line in ((2, "error: --bogus"), (1, "Traceback: a bug of ours"), (-9, "stopped: not by itself")):
        breaks_down(monkeypatch, code, line)
        assert f"exit code {code}" in experiments.work_off(small) and not folder.exists()
    breaks_down(monkeypatch, 1, "stopped: the gradient was not finite 5 times in a row (step 3)")
    assert "50.0 % after 0 steps, stopped: the gradient" in experiments.work_off(small)
    assert "not finite" in (folder / "failure.txt").read_text()
    assert (experiments.WORK / name_of(small) / "failure.txt").exists()  # or --run would go on instead of anew
    about = {"config": train.asdict(experiments.planned(small))}
    about["model_sha256"] = train.checkpoint.weights_digest(experiments.MODELS / "tiny")
    (folder / "config.json").write_text(json.dumps(about))
    assert experiments.is_finished(folder, small)
    (folder / "eval.jsonl").unlink()
    assert not experiments.is_finished(folder, small)  # copied half


def test_class_means_of_mini_batches_are_another_setting_and_uniform_weights_have_none():
    assert departures(Config(weights="class_mean", weight_stats="mini_batch")) == {"weight_stats": "mini_batch"}
    assert departures(Config(weights="uniform", weight_stats="mini_batch", alpha=0.5)) == {}


@pytest.mark.parametrize("arguments, part", [
    ([], "expected grids (tune, main"), (["chess"], "got chess"), (["main", "--run", "x"], "got main, --run x"),
    (["--run", "nothing-like-this"], "--run nothing-like-this: no run of that name"), (["main", "--jobs", "0"], "jobs"),
    (["main", "--bogus"], "--bogus"), (["main", "--compare", "a", "b"], "--compare a b"),
    (["--compare", "a"], "expected pairs"), (["--compare", "a", "b"], "--compare a: no run of that name"),
])
def test_a_mistake_is_one_line_and_code_2(results, capsys, arguments, part):
    assert experiments.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and part in error


PAIRED = [(algo, weights) for algo in ("grpo", "ppo") for weights in ("actfocus", "uniform")]


@pytest.mark.slow
def test_runs_of_one_seed_share_first_weights_evaluations_and_first_rollouts(tiny, tmp_path):
    for seed in (0, 1):
        for algo, weights in PAIRED:
            folder = tmp_path / f"{algo}-{weights}-{seed}"
            options = {"max_steps": 1, "save_steps": 1, "eval_steps": 1, "max_response_tokens": 60}
            assert train.main(flags(model=tiny, algo=algo, weights=weights, seed=seed, output_dir=folder,
                                    **options)) == 0
    first = load_model(str(tiny)).state_dict()
    played = ("success", "return_mean", "return_std", "turns", "invalid_turns", "response_tokens", "tokens_action",
              "energy_action", "entropy_reasoning")
    for seed in (0, 1):
        folders = [tmp_path / f"{algo}-{weights}-{seed}" for algo, weights in PAIRED]
        for folder in folders:
            weights = load_model(str(folder / "checkpoint-0")).state_dict()
            assert all(torch.equal(weights[name], tensor) for name, tensor in first.items())
            texts = [(one / "samples" / "step-0.txt").read_text() for one in (folder, folders[0])]
            assert texts[0] == texts[1]
            assert lines(folder / "eval.jsonl")[0] == lines(tmp_path / "grpo-actfocus-0" / "eval.jsonl")[0]
        rows = [{name: lines(folder / "metrics.jsonl")[0][name] for name in played} for folder in folders]
        assert all(row == rows[0] for row in rows)
        ends = [load_model(str(folder / "checkpoint-1")).lm_head.weight for folder in folders]
        assert not any(torch.equal(ends[0], end) for end in ends[1:])  # what they learn from it differs
    one, other = (lines(tmp_path / f"grpo-actfocus-{seed}" / "metrics.jsonl")[0] for seed in (0, 1))
    assert any(one[name] != other[name] for name in played)  # another seed, other rollouts


def test_critics_of_one_seed_start_as_the_same_copy_of_the_model_too(tiny):
    states = [train.build_state(config(tiny, algo="ppo", weights=weights, seed=seed))
              for weights in ("actfocus", "uniform") for seed in (0, 1)]
    for state in states[1:]:
        for one, other in zip(states[0].critic.parameters(), state.critic.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("algo, weights", PAIRED)
def test_every_method_meets_the_same_training_levels_in_every_step(tiny, monkeypatch, algo, weights):
    seen = []
    monkeypatch.setattr(methods, "Episode", lambda env, seed, *rest: seen.append(seed) or Episode(env, seed, *rest))

    def levels(seed):
        settings = config(tiny, algo=algo, weights=weights, seed=seed)
        state = train.build_state(settings)
        seen.clear()
        for step in range(2):
            train.iteration(settings, state, step)
        return seen.copy()

    first = methods.FIRST_TRAIN_SEED
    expected = [first + level for level in range(4) for _ in range(SMOKE["num_generations"])]
    assert levels(0) == expected and levels(1) == [level + first for level in expected]
    state, settings = train.build_state(config(tiny)), config(tiny, algo=algo, weights=weights, seed=1)
    seen.clear()
    train.evaluate_policy(settings, state.policy, load_tokenizer(str(tiny)))
    assert seen == [0, 0, 1, 1]  # evaluation levels know of no seed and no method
