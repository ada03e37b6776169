"""evaluate.py: what it prints and draws, for a model folder and for a run, and a user's mistakes."""

import re
from pathlib import Path

import pytest
from tiny import SMOKE, flags

import bench
import evaluate
import methods
import train
from envs import ENVS, Episode
from rollout import rollout

pytest_plugins = ["tiny"]

ANSI = re.compile(r"\x1b\[[\d;]*m")
SHORT = [part for name in ("eval_prompts", "eval_samples", "max_response_tokens", "max_context", "num_prompts",
                           "num_generations", "mini_batch_size") for part in (f"--{name}", str(SMOKE[name]))]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Plots go below the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two short runs of different token weights."""
    folders = [tmp_path_factory.mktemp("runs") / weights for weights in ("actfocus", "uniform")]
    for folder in folders:
        options = {"weights": folder.name, "max_steps": 2, "save_steps": 1, "eval_steps": 1}
        assert train.main(flags(model=tiny, output_dir=folder, **options)) == 0
    return folders


def printed(capsys, *arguments):
    capsys.readouterr()
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_a_model_folder_is_reported_beside_floor_and_ceiling(tiny, capsys):
    out = printed(capsys, tiny, *SHORT)
    assert "frozenlake, temperature 0.5" in out and str(tiny) in out
    for name in ("policy", "random floor", "oracle ceiling"):
        (line,) = [line for line in out.splitlines() if line.strip().startswith(name)]
        assert "95 % interval [" in line and "n = 4 episodes on 2 levels" in line
    assert "success 100.0 %, 95 % interval [100.0, 100.0]" in line  # ice that does not slip: the oracle always arrives


def test_a_run_brings_its_settings_and_its_last_checkpoint_and_flags_win(runs, capsys):
    out = printed(capsys, runs[0])
    assert str(runs[0] / "checkpoint-2") in out and "n = 4 episodes" in out
    out = printed(capsys, runs[0] / "checkpoint-1", "--eval_samples", "3", "--success_rate", "0.5")
    assert str(runs[0] / "checkpoint-1") in out and "n = 6 episodes" in out and "success_rate 0.5" in out


def test_the_report_repeats_the_runs_last_evaluation(runs, capsys):
    line = train.checkpoint.read_lines(runs[0] / "eval.jsonl")[-1]
    assert f"policy: success {100 * line['success']:.1f} %" in printed(capsys, runs[0])


def test_plot_draws_the_learning_curves_of_several_runs(runs, tmp_path, capsys):
    out = printed(capsys, "--plot", *runs)
    plots = [line.removeprefix("plot ") for line in out.splitlines() if line.startswith("plot ")]
    assert [Path(plot).name for plot in plots] == ["learning.png", "gradient.png"]
    assert all((tmp_path / plot).read_bytes().startswith(b"\x89PNG") for plot in plots)
    out = printed(capsys, "--plot", runs[1])
    assert "no plot of the gradient: no run here has --weights actfocus" in out and out.count("plot runs") == 1


def test_show_tokens_colours_the_whole_episode_by_class_and_hides_none_of_it(tiny, capsys, monkeypatch):
    rows = []
    monkeypatch.setattr(methods, "rollout", lambda *arguments: rows.extend(rollout(*arguments)) or rows)
    out = printed(capsys, tiny, "--show_tokens", *SHORT)
    plain, tokenizer = ANSI.sub("", out), evaluate.load_tokenizer(str(tiny))
    for row in (rows[0], rows[SMOKE["num_generations"]]):
        assert tokenizer.decode(row.tokens).rstrip("�") in plain
    shown = out[out.index("\nlevel 0") :]
    painted = {code: "".join(re.findall(rf"\x1b\[{code}m(.*?)\x1b\[0m", shown)) for code in ("2", "34", r"30;48;5;\d+")}
    assert "FrozenLake: reach G" in painted["2"] and "<think>" not in painted["2"]
    assert "<think>" in painted["34"] and "<answer>" in painted["34"] and "Turn" not in painted["34"]
    moves = "".join(tokenizer.decode(token).strip() for row in (rows[0], rows[SMOKE["num_generations"]])
                    for token, is_action in zip(row.tokens, row.is_action, strict=True) if is_action)
    assert painted[r"30;48;5;\d+"].replace(" ", "") == moves != ""
    assert re.search(r"^ +1 +-?\d+\.\d\d +1\.\d\d +[+-]\d\.\d\d  (Left|Right|Up|Down)$", plain, re.M)


@pytest.mark.slow
def test_bench_prints_every_ratio(tiny, capsys, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    steps, recomputes = bench._bench_steps, []

    def watched(config, state, rounds):
        recomputes.append(any("forward" in vars(module) for module in state.policy.modules()))
        steps(config, state, rounds)

    monkeypatch.setattr(bench, "_bench_steps", watched)
    out = printed(capsys, "--bench", "--model", tiny, *SHORT)
    assert recomputes == [False]  # as the rivals' states do not
    ratios = [float(x) for x in re.findall(r": (\d+\.\d\d) \[", out)]
    assert len(ratios) == 16 and min(ratios) > 0.05
    share = float(re.search(r"reference pass takes: (\d\.\d\d)", out).group(1))
    assert 0 < share < 0.5


@pytest.mark.parametrize("arguments, part", [
    (["/nowhere/model"], "/nowhere/model"),
    (["models/nope"], "models/nope"),
    (["checkpoint-9"], "checkpoint-9"),
    (["--plot", "missing"], "'missing' is not a run folder"),
    (["--env", "chess"], "--env chess"),
    (["--bogus"], "--bogus"),
    (["MODEL", "--show_tokens", "--html", "page.html"], "--show_tokens --html: one at a time"),
    (["MODEL", "--show_tokens", "--max_context", "60"], "leaves no room"),
    (["--bench", "--algo", "ppo"], "--algo ppo --filter_fraction 1.0: --bench compares all"),
    (["MODEL", "--csv", "table.csv"], "--csv table.csv: goes with --bottleneck"),
    (["MODEL", "--bottleneck", "--csv", "nowhere/table.csv"], "its folder must exist"),
    (["MODEL", "--groups", "9"], "--groups 9: goes with --bottleneck"),
    (["MODEL", "--bottleneck", "--groups", "2"], "--groups 2: goes with --bottleneck, which needs at least 3 groups"),
    (["MODEL", "--bottleneck", "--env", "webshop", "--groups", "129"], "--groups 129: webshop has 128 "),
])
def test_a_mistake_is_one_line_and_code_2(tiny, tmp_path, capsys, arguments, part):
    capsys.readouterr()
    assert evaluate.main([str(tiny) if word == "MODEL" else word for word in arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and part in error[0]
    assert not list(tmp_path.iterdir())


def test_floors_of_one_game_alone(capsys):
    lines = printed(capsys, "--floors", "--env", "sokoban", "--eval_prompts", "12").splitlines()
    assert [line.split(",")[0].strip() for line in lines] == ["sokoban", "sokoban"]


def test_a_model_is_taught_and_evaluated_however_its_path_is_written(tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "start_model", lambda config: "taught")
    for name in (str(tiny), f"{tiny}/"):
        _, settings, folder = evaluate.parse(["--model", name, "--warmstart_steps", "1"])
        assert (settings.model, folder) == ("taught", Path("taught"))


def test_a_run_without_an_evaluation_is_not_plotted(tiny, tmp_path, capsys):
    run, page = tmp_path / "run", tmp_path / "out"
    assert train.main(flags(model=tiny, output_dir=run, max_steps=0)) == 0
    (run / "eval.jsonl").unlink()
    assert evaluate.main(["--plot", str(run), "--output_dir", str(page)]) == 2
    assert f"--plot {run}: has no evaluation yet" in capsys.readouterr().err and not page.exists()


def test_a_run_that_has_not_made_a_step_is_reported_from_its_first_checkpoint(tiny, tmp_path, capsys):
    assert train.main(flags(model=tiny, output_dir=tmp_path / "run", max_steps=0)) == 0
    assert str(tmp_path / "run" / "checkpoint-0") in printed(capsys, tmp_path / "run")


def test_evaluation_levels_are_fixed_and_no_training_level_is_among_them(tiny, monkeypatch):
    settings = train.Config(**SMOKE | {"model": str(tiny)})
    state, seen = train.build_state(settings), []

    def note(env, seed, *rest):
        seen.append(seed)
        return Episode(env, seed, *rest)

    monkeypatch.setattr(methods, "Episode", note)
    monkeypatch.setattr(train, "EVALUATED", 2)  # a block for every level
    first, _ = train.evaluate_policy(settings, state.policy, state.tokenizer)
    evaluation, again = seen.copy(), train.evaluate_policy(settings, state.policy, state.tokenizer)[0]
    assert evaluation == [0, 0, 1, 1] == seen[4:] and first == again
    seen.clear()
    methods.sample(settings, state, 0)
    methods.sample(settings, state, 1)
    assert len(set(seen)) == 4 and min(seen) >= methods.FIRST_TRAIN_SEED > 10_000 * (bench.ROUNDS + 1)


def test_floors_prints_what_chance_and_the_solver_reach_in_every_environment(capsys):
    lines = printed(capsys, "--floors", "--eval_prompts", "12", "--eval_samples", "1").splitlines()
    names = [(env, name) for env in ENVS for name in ("random floor", "oracle ceiling")]
    assert [tuple(part.strip() for part in line.split(":")[0].split(",")) for line in lines] == names
    assert all("95 % interval [" in line and "n = 12 episodes on 12 levels" in line for line in lines)
    assert "oracle ceiling: success 100.0 %" in lines[names.index(("sudoku", "oracle ceiling"))]


def test_the_report_names_the_options_of_its_environment(tiny, capsys):
    assert "frozenlake, temperature 0.5, success_rate 1.0, frozen 0.8," in printed(capsys, tiny, *SHORT)
    flags = ["--env", "sudoku", "--sudoku_level", "hard", "--max_context", "1000"]
    assert "sudoku, temperature 0.5, level hard, hints True," in printed(capsys, tiny, *SHORT, *flags)
