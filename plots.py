"""Figures, drawn from run folders and result dictionaries alone."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from checkpoint import read_lines
from config import departures, of_run
from energy import SIGNALS

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # for colour-blind readers too


def learning_curves(runs: Sequence[Path], path: Path, floor: float | None = None, ceiling: float | None = None) -> Path:
    """Success against step, a panel for every (env, algo), a colour for every kind of token weights and settings.

    One run: evaluations with 95 % intervals over its training rollouts. Several seeds: their mean over thin lines.
    """
    panels: dict[tuple, dict[str, list[Path]]] = {}
    curves: dict[tuple, dict[Path, set]] = {}  # what sets runs of the same weights apart is in their label
    for run in runs:
        config = of_run(run)
        curves.setdefault((config.env, config.algo, config.weights), {})[run] = {*departures(config).items()}
    for (env, algo, weights), members in curves.items():
        common = set.intersection(*members.values())
        for run, own in members.items():
            rest = sorted(f"{name} {value}" for name, value in own - common if name != "max_steps")
            panels.setdefault((env, algo), {}).setdefault(", ".join([weights, *rest]), []).append(run)
    labels = sorted({label for by_label in panels.values() for label in by_label})
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1 + 3.8 * columns, 3.6 * lines), squeeze=False,
                                layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, ((env, algo), by_label) in zip(axes.flat, sorted(panels.items()), strict=False):
        for label, members in sorted(by_label.items()):
            _curve(ax, members, label, COLOURS[labels.index(label) % len(COLOURS)])
        ax.set(title=f"{env}, {algo}", xlabel="step", ylabel="success", ylim=(0, 1.05))
        for level, name in ((floor, "random floor"), (ceiling, "oracle ceiling")):
            if level is not None:
                ax.axhline(level, color="0.5", linestyle=":", linewidth=1)
                ax.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        ax.legend(fontsize=8, loc="lower right")
    return _save(figure, path)


def _curve(ax, members: Sequence[Path], label: str, colour: str) -> None:
    tables = [read_lines(run / "eval.jsonl") for run in members]
    steps = [row["step"] for row in max(tables, key=len)]
    success = np.array([[row["success"] for row in table + table[-1:] * (len(steps) - len(table))]
                        for table in tables])  # (seeds, evaluations); of a run that broke down the last one stays
    if len(members) == 1:
        metrics = read_lines(members[0] / "metrics.jsonl")
        ax.plot([row["step"] for row in metrics], [row["success"] for row in metrics], color=colour, alpha=0.35, lw=1)
        error = [[abs(row[end] - row["success"]) for row in tables[0]] for end in ("low", "high")]
        ax.errorbar(steps, success[0], error, color=colour, marker="o", capsize=3, label=f"{label} (training: thin)")
    else:
        ax.plot(steps, success.T, color=colour, alpha=0.3, lw=1)
        ax.plot(steps, success.mean(0), color=colour, marker="o", label=f"{label}, mean of {len(members)} seeds")


def bottleneck(result: dict, means: dict[str, np.ndarray], return_std: np.ndarray, path: Path) -> Path:
    """Figure 2: a point a group, mean energy of one token class against the spread of the group's returns."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
    for axes, name, colour in zip(panels, ("action", "reasoning", "response"), COLOURS, strict=False):
        axes.scatter(means[name], return_std, s=14, alpha=0.6, color=colour, edgecolors="none")
        axes.set_title(f"{name} tokens: ρ = {result[f'rho_{name}']:+.2f}, p = {result[f'p_{name}']:.1e}", fontsize=10)
        axes.set_xlabel("mean energy of the group, nats")
    panels[0].set_ylabel("std of returns in the group, σ_g")
    return _save(figure, path)


def differences(rows: Sequence[dict], path: Path) -> Path:
    """Paired differences of final success with their bootstrap intervals, a line a setting, a colour a grid."""
    keys = "grid", "env", "algo", "weights", "settings"
    names = [f"{', '.join(row[key] for key in keys if row[key])}, lr {row['learning_rate']:g} - {row['against']} "
             f"({row['pairs']} seeds)" for row in rows]
    figure, ax = plt.subplots(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    for y, row in enumerate(rows):
        mean, low, high = (100 * row[name] for name in ("mean", "low", "high"))
        ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3,
                    color=COLOURS[grids.index(row["grid"]) % len(COLOURS)])
    ax.axvline(0, color="0.5", linewidth=1)
    ax.set_yticks(range(len(rows)), names, fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("difference of final success, percentage points, 95 % bootstrap interval over paired seeds")
    return _save(figure, path)


def diagnosis(rows: Sequence[dict], path: Path) -> Path:
    """ρ of action tokens against mean success: a panel an environment, a colour a signal, a line a run."""
    envs = sorted({row["env"] for row in rows})
    figure, panels = plt.subplots(1, len(envs), figsize=(1 + 3.8 * len(envs), 3.8), squeeze=False, sharey=True,
                                  layout="constrained")
    for ax, env in zip(panels.flat, envs, strict=True):
        chosen = [row for row in rows if row["env"] == env and row["tokens"] == "action"]
        for signal, colour in zip(SIGNALS, COLOURS, strict=False):
            lines: dict[tuple, list[dict]] = {}
            for row in chosen:
                if row["signal"] == signal:
                    lines.setdefault((row["model"], row["seed"]), []).append(row)
            for i, line in enumerate(lines.values()):
                line.sort(key=lambda row: int(row["step"]))
                points = [(float(row["mean_success"]), float(row["rho"])) for row in line]
                ax.plot(*zip(*points, strict=True), marker="o", color=colour, label=signal if i == 0 else None)
        ax.axhline(0, color="0.5", linewidth=1)
        ax.set(title=env, xlabel="mean success", xlim=(0, 1), ylim=(-1, 1))
    panels.flat[0].set_ylabel("Spearman's ρ of action tokens with σ_g")
    panels.flat[0].legend(fontsize=8)
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
