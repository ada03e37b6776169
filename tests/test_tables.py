"""tables.py and report.py: the numbers of a learning curve, paired differences, and that results/ is up to date."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest

import experiments
import plots
import report
import tables
from config import BY_ENV, Config, departures
from tables import Run, by_setting, difference_rows, is_pair, measures, paired_difference, read_table, setting_row

RESULTS = Path(__file__).parents[1] / "results"


def make_run(success, seed=0, failure="", digest="a", **settings):
    """A run with these evaluations, ten steps apart."""
    lines = [{"step": 10 * i, "success": s, "low": s, "high": s, "prompts": 4, "n": 8} for i, s in enumerate(success)]
    config = Config(seed=seed, **settings)
    about = {"model_sha256": digest, "commit": "c", "torch": "t"}
    metrics = [{"seconds_rollout": 30.0, "seconds_update": 30.0, "success": s} for s in success[1:]]
    return Run(f"frozenlake-{config.algo}-{config.weights}-seed{seed}", config, about, lines, metrics, failure)


def test_the_measures_of_a_learning_curve_by_hand():
    # area: (0.25 + 0.75) / 2 · 10 + (0.75 + 0.5) / 2 · 10 = 5 + 6.25 = 11.25, over 20 steps .5625
    assert measures(make_run([0.25, 0.75, 0.5]), 0.9) == {
        "before": 0.25, "final": 0.5, "rollouts": 0.5, "peak": 0.75, "decay": 0.25, "area": pytest.approx(0.5625),
        "to_80": 10}
    assert measures(make_run([0.25, 0.75, 0.5]), 1.0)["to_80"] is None  # .8 was never reached
    assert measures(make_run([0.5]), 0.5)["area"] == 0.5 and measures(make_run([0.5]), 0.5)["to_80"] == 0


def test_area_weighs_evaluations_by_the_steps_between_them():
    run = make_run([0.0, 1.0, 1.0])
    run.evaluations[2]["step"] = 40  # 5 over the first ten, 30 over the next thirty: 35 / 40
    assert measures(run, 1.0)["area"] == pytest.approx(0.875)


def test_late_success_is_the_mean_of_the_rollouts_of_the_last_third():
    run = make_run([0.0] * 8)
    for row, success in zip(run.metrics, [0.9, 0.9, 0.9, 0.9, 0.9, 0.25, 0.5], strict=True):
        row["success"] = success
    assert tables.late_success(run) == 0.375  # two of seven steps
    assert tables.late_success(make_run([0.0, 0.5])) == 0.5


def test_the_interval_of_a_setting_is_over_seeds_and_there_is_none_of_two():
    one, two, *_ = runs = [make_run([0.1, final]) for final in (0.5, 0.6, 0.7)]
    # Student's: mean .6, std .1, t₂ = 4.303: half 4.303 · .1 / √3 = .2484
    assert tables.seed_interval(runs) == pytest.approx((0.6 - 0.2484, 0.6 + 0.2484), abs=1e-3)
    assert tables.seed_interval([one, two]) == (None, None) and tables.seed_interval([one]) == (0.5, 0.5)
    *_, row = tables.result_rows([one, make_run([0.1, 0.6], seed=1)])
    assert row == "| frozenlake | grpo | actfocus | 0.0001 | 0 1 | 10 | 10.0 | 55.0 | 1 |"


def test_games_are_pooled_as_equals_whatever_their_number_of_seeds():
    # Means .1 and .4: .25, not the mean of all five. Only the first game varies: half of its own bootstrap [0, .2].
    found = tables.pooled_difference([[0.0, 0.2], [0.4, 0.4, 0.4]])
    half = 12.706 * 0.1 / 2  # Student's: s² = .02 / 2 of the first game alone, one degree of freedom
    assert found == pytest.approx({"mean": 0.25, "low": 0.2, "high": 0.3, "student_low": 0.25 - half,
                                   "student_high": 0.25 + half, "above": 2, "of": 2})
    pairs = [(make_run([0.2, 0.5], seed, env=env, **BY_ENV["laptop"].get(env, {})),
              make_run([0.2, 0.4], seed, env=env, weights="uniform", **BY_ENV["laptop"].get(env, {})))
             for env, seeds in (("frozenlake", range(3)), ("sokoban", range(4)), ("sudoku", range(2)))
             for seed in seeds]
    rows = tables.pooled_rows("main", [*pairs, (pairs[0][0], make_run([0.1, 0.1], 7))])  # the last is no pair
    assert [row["measure"] for row in rows] == list(tables.MEASURES)
    assert (rows[0]["seeds"], rows[0]["mean"]) == ("frozenlake 3, sokoban 4", pytest.approx(0.1))
    line = report.pooled_table(rows)[3]
    start = "| grpo | actfocus | uniform | frozenlake 3, sokoban 4 | +10.0 [10.0, 10.0] | [10.0, 10.0] | "
    assert line.startswith(start)


def test_the_paired_difference_of_a_known_case():
    # Differences 0, 0, 1, 0, 0: bootstrap [0, .6] (see test_metrics), mean .2, one seed above.
    # Student: std √(.8 / 4) = .4472, standard error .2, t₄ = 2.776
    found = paired_difference([1, 2, 4, 4, 5], [1, 2, 3, 4, 5])
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.2, 0, 0.6))
    assert (found["student_low"], found["student_high"]) == pytest.approx((0.2 - 0.5552, 0.2 + 0.5552), abs=1e-3)
    assert (found["above"], found["of"]) == (1, 5)
    few = paired_difference([0.75, 0.5], [0.5, 0.5])
    assert few["mean"] == 0.125 and few["low"] is None and few["student_high"] is None


def test_pairing_takes_out_what_seeds_have_in_common():
    base = [0.1, 0.9, 0.4, 0.6, 0.2]
    found = paired_difference([b + 0.05 for b in base], base)
    assert found["low"] == pytest.approx(0.05) and found["high"] == pytest.approx(0.05)


def test_differences_pair_runs_of_one_seed_from_the_same_weights_and_levels_only(tmp_path):
    focus = [make_run([0.2, 0.5 + 0.1 * seed], seed) for seed in range(4)]
    uniform = [make_run([0.2, 0.4], seed, weights="uniform") for seed in range(4)]
    assert is_pair(focus[0], uniform[0]) and is_pair(focus[0], make_run([1.0], learning_rate=2e-4, algo="ppo"))
    for other in (make_run([0.2], 1), make_run([0.2], digest="b"), make_run([0.2], eval_prompts=64),
                  make_run([0.2], max_steps=40), make_run([0.2], success_rate=0.5),
                  make_run([0.2], model="somebody/other")):
        assert not is_pair(focus[0], other)
    stranger = replace(uniform[3], about={"model_sha256": "b"})
    rows = difference_rows("main", zip(focus, [*uniform[:3], stranger], strict=True))
    final = next(row for row in rows if row["measure"] == "final")
    assert (final["seeds"], final["of"], final["against"]) == ("0 1 2", 3, "uniform")
    assert final["mean"] == pytest.approx(0.2)  # (.1 + .2 + .3) / 3
    assert [row["measure"] for row in rows] == list(tables.MEASURES)
    assert difference_rows("main", [(focus[0], focus[0])]) == []
    (tmp_path / "rivals.png").touch()  # of runs that are no more
    drawn = report.figures(tmp_path, {"main": []}, {}, rows, [])
    assert drawn == [tmp_path / "differences.png"] == [*tmp_path.iterdir()]
    assert (tmp_path / "differences.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_compared_at_every_evaluation_that_they_share_and_games_together():
    focus = [make_run([0.2, 0.3, 0.5 + 0.1 * seed], seed) for seed in range(3)]
    uniform = [make_run([0.2, 0.2, 0.4], seed, weights="uniform") for seed in (2, 1, 0, 4)]
    lines = report.comparison([focus, uniform])
    assert lines[0] == "frozenlake-grpo-actfocus-seed0 and frozenlake-grpo-uniform-seed2, seeds 0 1 2"
    assert "| step 10 | 30.0 | 20.0 | +10.0 [10.0, 10.0] | [10.0, 10.0] | 3 of 3 |" in lines
    # after step 20 .1, .2, .3: mean .2, standard error .1 / √3, t₂ = 4.303
    for name in ("step 20", "final"):
        assert f"| {name} | 60.0 | 40.0 | +20.0 [10.0, 30.0] | [-4.8, 44.8] | 3 of 3 |" in lines
    assert not any("together" in line for line in lines)
    short = [replace(run, evaluations=run.evaluations[::2]) for run in uniform]
    assert not any("step 10" in line for line in report.comparison([focus, short]))
    # both ways round: mean 0, standard error √(2 · .01 / 3) / 2 = .0408, t₄ = 2.776
    both = report.comparison([focus, uniform, uniform, focus])
    together = both[both.index("| together | difference [bootstrap] | [Student] | games above |"):]
    assert "| final | +0.0 [-6.7, 6.7] | [-11.3, 11.3] | 1 of 2 |" in together
    few = report.comparison([focus, uniform, focus, uniform[:1]])  # one pair has no interval, nor have games with it
    assert not any("together" in line for line in few)
    for rows, said in (([focus, focus], "share no seed"), ([focus[:1], uniform[:1]], "share no seed"),
                       ([focus, [*uniform, focus[0]]], "expected runs of one setting")):
        with pytest.raises(ValueError, match=said):
            report.comparison(rows)


def test_the_command_compares_rows_as_the_committed_table_has_them(capsys):
    row = next(row for row in read_table(RESULTS / "differences.csv")
               if [row[name] for name in ("grid", "env", "algo", "measure")] == ["main", "webshop", "ppo", "final"])
    assert experiments.main(["--compare", "webshop-ppo-actfocus-seed?", "webshop-ppo-uniform-seed?"]) == 0
    found = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| final |"))
    for name in ("mean", "low", "high", "student_low", "student_high"):
        assert f"{100 * float(row[name]):.1f}" in found


def test_runs_are_pooled_only_where_all_but_the_seed_is_the_same():
    runs = [make_run([0.2], 0), make_run([0.2], 1), make_run([0.2], 2, alpha=0.3), make_run([0.2], 3, digest="b"),
            make_run([0.2], 4, learning_rate=2e-4), make_run([0.2], 5, max_steps=40)]
    assert sorted(len(group) for group in by_setting(runs).values()) == [1, 1, 1, 1, 2]


def test_a_row_of_a_setting_keeps_runs_that_broke_down(tmp_path):
    small = dict(eval_prompts=4, eval_samples=2)
    runs = [make_run([0.2, 0.9], 0, **small), make_run([0.2, 0.1], 1, "stopped: the gradient was not finite", **small)]
    row = setting_row(runs, tmp_path / "floors.csv")
    assert (row["seeds"], row["broke_down"], row["final"], row["decay"]) == ("0 1", 1, 0.5, pytest.approx(0.05))
    assert row["reached_80"] == 1 and row["to_80"] == 10 and row["minutes"] == 1
    assert row["final_low"] is None  # of two seeds
    assert row["command"] == 'python experiments.py --run "frozenlake-grpo-actfocus-seed?"'
    assert 0 <= row["floor"] < row["ceiling"] == 1
    (floor, ceiling) = read_table(tmp_path / "floors.csv")
    assert (floor["player"], ceiling["player"], floor["n"]) == ("random floor", "oracle ceiling", "8")
    setting_row(runs, tmp_path / "floors.csv")
    assert len(read_table(tmp_path / "floors.csv")) == 2  # played once
    slippery = [make_run([0.2], success_rate=0.5, **small)]
    assert setting_row(slippery, tmp_path / "floors.csv")["ceiling"] < 1
    assert len(read_table(tmp_path / "floors.csv")) == 4


def test_departures_are_settings_unlike_the_environments_own():
    assert departures(Config(seed=3, output_dir="x", save_steps=1, max_turns=5, num_threads=1)) == {}
    assert departures(Config(alpha=0.3, max_steps=40)) == {"alpha": 0.3, "max_steps": 40}
    assert departures(Config(weights="uniform", alpha=0.3, signal="entropy")) == {}  # which uniform weights do not read
    assert departures(Config(env="sudoku", **BY_ENV["laptop"]["sudoku"])) == {} != departures(Config(env="sudoku"))
    assert departures(Config(model="elsewhere/tiny")) == {} and departures(Config(model="a/b")) == {"model": "b"}


def test_tables_stand_between_their_markers_and_other_text_stays():
    where = Path("here/README.md")
    page = "by hand\n<!-- one -->\nold\n<!-- /one -->\nby hand too\n<!-- two -->\n<!-- /two -->\n"
    filled = report.fill(page, {"one": ["| a |", "| b |"], "two": []}, where)
    assert filled == ("by hand\n<!-- one -->\n\n| a |\n| b |\n\n<!-- /one -->\nby hand too\n"
                      "<!-- two -->\n\n(none yet)\n\n<!-- /two -->\n")
    assert report.fill(filled, {"one": ["| a |", "| b |"], "two": []}, where) == filled
    for parts in ({"one": []}, {"one": [], "two": [], "three": []}):
        with pytest.raises(ValueError, match=r"here/README\.md: has the markers"):
            report.fill(page, parts, where)
    with pytest.raises(ValueError, match="marker two must be closed"):
        report.fill(page.replace("<!-- /two -->", ""), {"one": [], "two": []}, where)


def diagnosis_rows(step, rho, model="run"):
    about = {"model": model, "model_sha256": f"d{step}", "env": "frozenlake", "step": str(step), "seed": "0",
             "groups": "256", "group_size": "16", "mean_success": str(0.3 + step / 100), "action_fraction": "0.05"}
    return [{**about, "signal": signal, "tokens": tokens, "rho": str(rho), "p": "0.001", "partial_rho": "nan",
             "partial_p": "nan"} for signal in report.SIGNALS for tokens in report.CLASSES[:3]]


def test_the_diagnosis_is_a_row_a_checkpoint_and_class_the_last_one_counts(tmp_path):
    rows = report.latest([*diagnosis_rows(10, 0.5), *diagnosis_rows(0, -0.2), *diagnosis_rows(10, 0.25)],
                         *report.KEY, "signal", "tokens")
    lines = report.diagnosis_table(rows)
    assert len(lines) == 2 + 2 * 3
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:10] == ["frozenlake", "run", "d0", "0", "0", "256 x 16", "30.0", "5.0", "action", "-0.20* (-)"]
    assert "+0.25* (-)" in lines[5] and "+0.50" not in "".join(lines)
    assert report.plots.diagnosis(rows, tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_energy_that_says_how_hard_a_level_is_goes_with_the_spread_as_success_does():
    key = {name: row[name] for row in diagnosis_rows(10, 0.1) for name in report.KEY}
    groups = [{**key, "success": str(m), "return_std": str(m * (1 - m)), "energy_action": str(-m)}
              for m in (0.6, 0.7, 0.9)]
    cells = [cell.strip() for cell in report.difficulty_table(groups)[-1].split("|")[1:-1]]
    assert cells == ["frozenlake", "run", "10", "0", "73.3", "-1.00", "-1.00", "+1.00", "+1.00"]
    assert report.difficulty_table([]) == []


def test_figure_2_is_drawn_of_the_groups_of_every_model_before_training(tmp_path):
    def groups(step):
        key = {name: row[name] for row in diagnosis_rows(step, 0.1) for name in report.KEY}
        return [{**key, "group": str(i), "return_std": str(0.1 * i), **{f"energy_{name}": str(i) for name in
                                                                         report.CLASSES}} for i in range(3)]

    (tmp_path / "bottleneck-old.png").touch()
    drawn = report.figure_2(tmp_path, diagnosis_rows(0, 0.1) + diagnosis_rows(10, 0.2), groups(0) + groups(10))
    assert drawn == [tmp_path / "bottleneck-frozenlake-run.png"] == [*tmp_path.iterdir()]


@pytest.mark.parametrize("row", [row for row in read_table(RESULTS / "floors.csv")
                                 if row["env"] in ("frozenlake", "sokoban")], ids=lambda row: row["settings"][:40])
def test_the_committed_floors_and_ceilings_are_what_the_players_reach_today(row, tmp_path):
    settings = json.loads(row["settings"])
    names = {field.name for field in fields(Config)}
    config = Config(env=row["env"], eval_prompts=settings["prompts"], eval_samples=settings["samples"],
                    **{name: value for name, value in settings.items() if name in names})
    found = tables.floor_and_ceiling(config, tmp_path / "floors.csv")
    assert found[row["player"] == "oracle ceiling"] == float(row["success"])


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """results/ with everything made of runs written once more, from a copy without what can be made."""
    made = tmp_path_factory.mktemp("again") / "results"
    made.mkdir()
    shutil.copytree(RESULTS / "runs", made / "runs")
    for name in ("README.md", "floors.csv", "diagnosis.csv", "diagnosis-groups.csv"):
        if (RESULTS / name).exists():
            shutil.copy(RESULTS / name, made)
    shutil.copy(RESULTS.parent / "README.md", made.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "RESULTS", made)
        experiments.write_report()
    return made


@pytest.mark.parametrize("name", ["../README.md", "README.md", "runs.csv", "settings.csv", "evaluations.csv",
                                  "differences.csv", "pooled.csv", "claims.csv", "floors.csv"])
def test_the_committed_tables_are_what_the_report_writes(again, name):
    written, there = again / name, RESULTS / name
    assert written.exists() == there.exists() and (not there.exists() or written.read_text() == there.read_text())


def test_every_committed_run_has_a_row_with_seed_steps_n_interval_floor_and_provenance(again):
    rows = {row["run"]: row for row in read_table(again / "runs.csv")}
    assert rows.keys() == {folder.name for folder in (RESULTS / "runs").iterdir()}
    for row in rows.values():
        for name in ("seed", "steps", "n", "final", "rollouts", "final_low", "final_high", "floor", "ceiling", "commit",
                     "torch", "python", "transformers", "machine", "threads", "command"):
            assert row[name] != "", name
    seeds = sum(len(row["seeds"].split()) for row in read_table(again / "settings.csv") if row["grid"] == "main")
    assert seeds == len(rows.keys() & {experiments.name_of(run) for run in experiments.grids()["main"].runs})


def test_the_figures_are_drawn_and_none_is_old(again):
    names = {path.name for path in again.glob("*.png")}
    assert {"defaults.png", "learning.png", "gradient.png"} <= names == {path.name for path in RESULTS.glob("*.png")}
    assert all((again / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_a_run_in_no_grid_is_under_other(again, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "figures", lambda *_: [])  # they take their time
    monkeypatch.setattr(report, "figure_2", lambda *_: [])
    made = tmp_path / "results"
    shutil.copytree(again, made)
    shutil.copy(again.parent / "README.md", tmp_path)
    name = "frozenlake-grpo-actfocus-seed0"
    shutil.copytree(made / "runs" / name, made / "runs" / "by-hand")
    about = json.loads((made / "runs" / "by-hand" / "config.json").read_text())
    about["config"]["gamma"] = 0.5
    (made / "runs" / "by-hand" / "config.json").write_text(json.dumps(about))
    (made / "runs" / "half").mkdir()
    shutil.copy(made / "runs" / name / "config.json", made / "runs" / "half")
    assert "left out, as there is no eval.jsonl: half" in report.write(made, {"main": [(name, None)], "tune": []}, {})
    other = (made / "README.md").read_text().split("<!-- other -->")[1].split("<!-- /other -->")[0]
    assert "gamma 0.5" in other and "by-hand" in other


def test_learning_curves_pool_seeds_and_never_settings(tmp_path, monkeypatch):
    drawn = []

    def curve(ax, members, label, colour, mean_only):
        drawn.append((label, len(members), colour))
        ax.plot([], label=label)
        return "a note"

    monkeypatch.setattr(plots, "_curve", curve)
    settings = [{"seed": 0}, {"seed": 1}, {"alpha": 0.3}, {"weights": "uniform"}, {"weights": "uniform", "seed": 1},
                {"env": "sokoban", "learning_rate": 2e-4}, {"env": "sokoban", "weights": "uniform"}]
    for i, setting in enumerate(settings):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_text(json.dumps({"config": setting}))
    plots.learning_curves(sorted(tmp_path.iterdir()), tmp_path / "curves.png")
    blue, red, green = plots.COLOURS[:3]
    assert drawn == [("actfocus", 2, blue), ("actfocus, alpha 0.3", 1, red), ("uniform", 2, green),
                     ("actfocus", 1, blue), ("uniform", 1, green)]  # a rate of its own, shared by all its seeds: none
