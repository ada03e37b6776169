"""plots.py: a figure shows the numbers of its run folders or tensors, and no others."""

import json

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer

import plots
import tables
from actfocus import token_weights


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, instead of files."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure) or path)
    yield drawn
    for figure in drawn:
        plots.plt.close(figure)


@pytest.fixture
def run(tmp_path):
    """Writes a run folder: success of its evaluations every 10 steps, action's share of the gradient step by step."""

    def write(name, success, shares=((0.2, 0.8),), tokens=(10, 90), **settings):
        folder = tmp_path / name
        folder.mkdir()
        config = {"env": "sokoban", "algo": "grpo", "weights": "actfocus", "seed": 0, "alpha": 0.1} | settings
        (folder / "config.json").write_text(json.dumps({"config": config | {"output_dir": name}}))
        evaluations = [{"step": 10 * i, "success": s, "low": s - 0.1, "high": s + 0.1} for i, s in enumerate(success)]
        metrics = [{"step": 1 + i, "success": 0.5, "seconds_update": 60, "tokens_action": tokens[0],
                    "tokens_reasoning": tokens[1], "gradient_share_action_uniform": before,
                    "gradient_share_reasoning_uniform": 1 - before if before is not None else 0.0,
                    "gradient_share_action": after} for i, (before, after) in enumerate(shares)]
        for kind, rows in (("eval", evaluations), ("metrics", metrics)):
            (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def curve(ax, label):
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return line


def test_the_band_of_three_seeds_is_students_interval_by_hand(run, figures, tmp_path):
    runs = [run(f"s{i}", [0.4, last], seed=i) for i, last in enumerate((0.5, 0.6, 0.7))]
    plots.learning_curves(runs, tmp_path / "x.png")
    ax = figures[0].axes[0]
    assert curve(ax, "actfocus").get_xydata().tolist() == [[0, pytest.approx(0.4)], [10, pytest.approx(0.6)]]
    (band,) = ax.collections
    edges = band.get_paths()[0].vertices
    half = 4.303 * 0.1 / 3**0.5  # Student's t at 2 degrees of freedom, std of 0.5, 0.6, 0.7
    assert sorted(set(edges[edges[:, 0] == 10, 1].round(6))) == pytest.approx([0.6 - half, 0.6 + half], abs=1e-5)
    assert edges[edges[:, 0] == 0, 1] == pytest.approx(0.4)


def test_one_seed_has_the_intervals_of_its_evaluations_and_no_band_over_seeds(run, figures, tmp_path):
    plots.learning_curves([run("one", [0.4, 0.6])], tmp_path / "x.png")
    (bars,) = figures[0].axes[0].collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [pytest.approx([0.3, 0.5]),
                                                                           pytest.approx([0.5, 0.7])]


def test_runs_of_another_alpha_are_another_setting_and_not_further_seeds(run, figures, tmp_path):
    wanted = {"actfocus": 0.6, "actfocus, alpha 1.0": 0.5, "actfocus, alpha 0.0": 0.7}
    runs = [run(label, [0.4, success], alpha=float(label.partition("alpha ")[2] or 0.1))
            for label, success in wanted.items()]
    plots.learning_curves(runs, tmp_path / "x.png")
    (ax,) = figures[0].axes
    lines = {label: curve(ax, label) for label in wanted}
    assert {label: line.get_ydata()[1] for label, line in lines.items()} == wanted
    assert len({to_hex(line.get_color()) for line in lines.values()}) == 3
    figures[0].draw_without_rendering()
    legend = figures[0].legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figures[0].bbox.width  # none of it is cut off
    rows = tables.result_rows([tables.read_run(folder) for folder in runs])
    assert len(rows) == 2 + 3 and any("| actfocus, alpha 1.0 | 0.0001 | 0 | 10 | 40.0 | 50.0 [" in row for row in rows)


def test_what_no_number_depends_on_makes_no_other_setting(run, figures, tmp_path):
    runs = [run("a", [0.4]), run("b", [0.4, 0.5], seed=1, model="models/tiny"),
            run("c", [0.4], seed=2, model="/elsewhere/tiny", device="cpu",
                gradient_checkpointing=True),
            run("d", [0.4], weights="uniform", alpha=0.1), run("e", [0.4], weights="uniform", alpha=0.5, seed=1)]
    plots.learning_curves(runs, tmp_path / "x.png")
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == {"actfocus", "uniform"}
    thin = [line for line in figures[0].axes[0].get_lines() if line.get_linewidth() < 1]
    assert len(thin) == 5  # the seeds of both


def test_methods_share_a_panel_where_they_are_not_side_by_side(run, figures, tmp_path):
    runs = [run("a", [0.4, 0.6]), run("b", [0.4, 0.8], seed=1), run("c", [0.4, 0.5], algo="carl"),
            run("d", [0.1, 0.2], env="frozenlake", algo="carl")]
    plots.learning_curves(runs, tmp_path / "x.png", side_by_side=False)
    one, other = figures[0].axes
    assert (one.get_title(), other.get_title()) == ("frozenlake", "sokoban")
    drawn = {line.get_label(): list(line.get_ydata()) for line in other.get_lines()}
    assert drawn == {"grpo, actfocus": pytest.approx([0.4, 0.7]), "carl, actfocus": pytest.approx([0.4, 0.5])}


def test_seeds_that_were_evaluated_after_other_steps_meet_at_the_same_ones(run, figures, tmp_path):
    runs = [run("a", [0.2, 0.4, 0.6]), run("b", [0.2, 0.6], seed=1), run("c", [0.4, 0.4], seed=2)]
    rows = (runs[1] / "eval.jsonl").read_text().replace('"step": 10', '"step": 20')  # b at 0 and 20, c ended at 10
    (runs[1] / "eval.jsonl").write_text(rows)
    plots.learning_curves(runs, tmp_path / "x.png")
    mean = curve(figures[0].axes[0], "actfocus").get_xydata()
    assert mean.tolist() == [[0, pytest.approx(0.8 / 3)], [10, pytest.approx(0.4)], [20, pytest.approx(1.6 / 3)]]


def test_runs_of_other_lengths_are_another_curve(run, figures, tmp_path):
    runs = [run("a", [0.4, 0.6], max_steps=10), run("b", [0.4, 0.5, 0.9], seed=1, max_steps=20)]
    plots.learning_curves(runs, tmp_path / "x.png")
    labels = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert labels == {"actfocus, max_steps 10", "actfocus, max_steps 20"}


def test_gradient_bars_are_the_means_of_metrics_jsonl_over_steps_and_then_seeds(run, figures, tmp_path):
    runs = [run("a", [0.4], shares=[(0.1, 0.5), (0.3, 0.7)], tokens=(10, 90)),
            run("b", [0.4], shares=[(0.4, 0.8)], tokens=(20, 80), seed=1),
            run("u", [0.4], shares=[(0.9, 0.9)], weights="uniform")]
    plots.gradient_mass(runs, tmp_path / "x.png")
    (ax,) = figures[0].axes
    action, reasoning = ax.patches[::2], ax.patches[1::2]
    assert [bar.get_height() for bar in action] == pytest.approx([0.15, (0.2 + 0.4) / 2, (0.6 + 0.8) / 2])
    assert [bar.get_y() + bar.get_height() for bar in reasoning] == pytest.approx([1, 1, 1])
    half = 12.706 * 0.1  # Student's t at 1 degree of freedom times |0.4 - 0.2| / 2
    whiskers = [bars.errorbar for bars in ax.containers if isinstance(bars, BarContainer) and bars.errorbar]
    (segment,) = whiskers[1].lines[2][0].get_segments()
    assert segment[:, 1] == pytest.approx([0.3 - half, 0.3 + half], abs=1e-3)


def test_a_step_without_gradient_is_left_out_of_the_shares(run, figures, tmp_path):
    plots.gradient_mass([run("a", [0.4], shares=[(0.2, 0.6), (None, 0.0)])], tmp_path / "x.png")
    assert [bar.get_height() for bar in figures[0].axes[0].patches[2:6:2]] == pytest.approx([0.2, 0.6])


def test_a_run_without_a_step_has_no_bar(run, figures, tmp_path):
    assert plots.gradient_mass([run("none", [0.4], shares=[])], tmp_path / "x.png") is None and not figures
    plots.gradient_mass([run("a", [0.4], shares=[(0.2, 0.6)]), run("b", [0.4], shares=[], seed=1)], tmp_path / "x.png")
    assert [bar.get_height() for bar in figures[0].axes[0].patches[2:6:2]] == pytest.approx([0.2, 0.6])


def test_without_actfocus_weights_there_is_no_picture_of_the_gradient(run, figures, tmp_path):
    assert plots.gradient_mass([run("u", [0.4], weights="uniform")], tmp_path / "x.png") is None and not figures


@pytest.mark.parametrize("energies", [[-3.0, -1.0, -1.5, -8.0], [-2.0, -2.0]])
def test_the_points_of_eq5_lie_on_its_curve(figures, tmp_path, energies):
    energy = torch.tensor([energies])
    weights = token_weights(energy, torch.ones_like(energy).bool(), torch.zeros_like(energy).bool(), 0.2, 0.8)
    plots.weight_of_energy(energy[0].numpy(), weights[0].numpy(), 0.2, 0.8, tmp_path / "x.png")
    ax = figures[0].axes[0]
    grid, line = ax.get_lines()[0].get_data()
    x, y = (column.tolist() for column in np.asarray(ax.collections[0].get_offsets()).T)
    assert x == energies and y == pytest.approx(weights[0].tolist())
    assert y == pytest.approx(np.interp(x, grid, line).tolist(), abs=2e-3)
    assert ax.get_lines()[1].get_ydata() == [0.2, 0.2]
    assert sum(bar.get_height() for bar in figures[0].axes[1].patches) == len(energies)
