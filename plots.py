"""Figures, drawn from run folders and result dictionaries alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from checkpoint import read_lines

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # for colour-blind readers too


def learning_curves(runs: Sequence[Path], path: Path, floor: float | None = None, ceiling: float | None = None) -> Path:
    """Success against step: evaluations as points with their 95 % intervals, training rollouts as thin lines."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, run in enumerate(runs):
        if not (run / "config.json").exists():
            raise ValueError(f"{run} is not a run folder: no config.json")
        config = json.loads((run / "config.json").read_text())["config"]
        label, colour = "{env}, {algo}, {weights}, seed {seed}".format(**config), COLOURS[i % len(COLOURS)]
        metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "eval.jsonl")
        steps, train = ([row[key] for row in metrics] for key in ("step", "success"))
        axes.plot(steps, train, color=colour, alpha=0.35, linewidth=1)
        steps, success, low, high = (
            np.array([row[key] for row in evaluations]) for key in ("step", "success", "low", "high")
        )
        axes.errorbar(steps, success, [success - low, high - success], color=colour, marker="o", capsize=3, label=label)
    for level, name in ((floor, "random floor"), (ceiling, "oracle ceiling")):
        if level is not None:
            axes.axhline(level, color="0.5", linestyle=":", linewidth=1)
            axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", color="0.4", fontsize=8)
    axes.set(xlabel="step", ylabel="success", ylim=(0, 1.08))
    axes.set_title("Evaluation (points, 95 % interval) and training rollouts (thin)", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    return _save(figure, path)


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
