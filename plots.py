"""Figures, drawn from run folders and result dictionaries alone."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from checkpoint import read_config, read_lines

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # for colour-blind readers too


def learning_curves(runs: Sequence[Path], path: Path, floor: float | None = None, ceiling: float | None = None) -> Path:
    """Success against step, a panel for every (env, algo), a colour for every kind of token weights.

    One run: evaluations with 95 % intervals over its training rollouts. Several seeds: their mean over thin lines.
    """
    panels: dict[tuple, dict[str, list[Path]]] = {}
    for run in runs:
        config = read_config(run)
        panels.setdefault((config["env"], config["algo"]), {}).setdefault(config["weights"], []).append(run)
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1 + 3.8 * columns, 3.6 * lines), squeeze=False,
                                layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, ((env, algo), by_weights) in zip(axes.flat, sorted(panels.items()), strict=False):
        for weights, members in sorted(by_weights.items()):
            _curve(ax, members, weights, COLOURS[["actfocus", "uniform"].index(weights)])
        ax.set(title=f"{env}, {algo}", xlabel="step", ylabel="success", ylim=(0, 1.05))
        for level, name in ((floor, "random floor"), (ceiling, "oracle ceiling")):
            if level is not None:
                ax.axhline(level, color="0.5", linestyle=":", linewidth=1)
                ax.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        ax.legend(fontsize=8, loc="lower right")
    return _save(figure, path)


def _curve(ax, members: Sequence[Path], weights: str, colour: str) -> None:
    tables = [read_lines(run / "eval.jsonl") for run in members]
    steps = [row["step"] for row in min(tables, key=len)]
    success = np.array([[row["success"] for row in table[: len(steps)]] for table in tables])  # (seeds, evaluations)
    if len(members) == 1:
        metrics = read_lines(members[0] / "metrics.jsonl")
        ax.plot([row["step"] for row in metrics], [row["success"] for row in metrics], color=colour, alpha=0.35, lw=1)
        error = [[abs(row[end] - row["success"]) for row in tables[0]] for end in ("low", "high")]
        ax.errorbar(steps, success[0], error, color=colour, marker="o", capsize=3, label=f"{weights} (training: thin)")
    else:
        ax.plot(steps, success.T, color=colour, alpha=0.3, lw=1)
        ax.plot(steps, success.mean(0), color=colour, marker="o", label=f"{weights}, mean of {len(members)} seeds")


def bottleneck(result: dict, means: dict[str, np.ndarray], return_std: np.ndarray, path: Path) -> Path:
    """Figure 2: a point a group, mean energy of one token class against the spread of the group's returns."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
    for axes, name, colour in zip(panels, ("action", "reasoning", "response"), COLOURS, strict=False):
        axes.scatter(means[name], return_std, s=14, alpha=0.6, color=colour, edgecolors="none")
        axes.set_title(f"{name} tokens: ρ = {result[f'rho_{name}']:+.2f}, p = {result[f'p_{name}']:.1e}", fontsize=10)
        axes.set_xlabel("mean energy of the group, nats")
    panels[0].set_ylabel("std of returns in the group, σ_g")
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
