"""Figures, drawn from run folders and result dictionaries alone."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

from checkpoint import read_lines
from config import departures, of_run
from energy import SIGNALS
from metrics import mean_interval

matplotlib.use("Agg")  # files only, no window
import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # for colour-blind readers too


def learning_curves(
    runs: Sequence[Path], path: Path, floor: float | None = None, ceiling: float | None = None,
    side_by_side: bool = True, names: Mapping[str, str] | None = None,
) -> Path:
    """Success against step, a panel for every (env, algo), a colour for every other setting, or for each of `names`.

    Several seeds: their mean and its 95 % interval. One run: evaluations with intervals over its training rollouts.
    Not side by side: one panel for all algos of an env, and of every curve nothing but the mean.
    """
    settings = _by_setting(runs, names)
    if not side_by_side:
        settings = {(env, "", f"{algo}, {label}"): members for (env, algo, label), members in settings.items()}
    panels, labels = sorted({key[:2] for key in settings}), sorted({key[2] for key in settings})
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1 + 3.8 * columns, 0.8 + 3.6 * lines), squeeze=False,
                                layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    notes = set()
    for ax, (env, algo) in zip(axes.flat, panels, strict=False):
        for label in labels:
            if members := settings.get((env, algo, label)):
                notes.add(_curve(ax, members, label, COLOURS[labels.index(label) % len(COLOURS)], not side_by_side))
        ax.set(title=", ".join(filter(None, (env, algo))), xlabel="step", ylabel="success", ylim=(0, 1.05))
        for level, name in ((floor, "random floor"), (ceiling, "oracle ceiling")):
            if level is not None:
                ax.axhline(level, color="0.5", linestyle=":", linewidth=1)
                ax.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    handles = {handle.get_label(): handle for ax in axes.flat for handle in ax.get_lines()}
    title = "\n".join(textwrap.fill(note, 60 * columns) for note in sorted(notes))
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", fontsize=9, frameon=False,
                  ncols=min(len(labels), 2 * columns), title=title, title_fontsize=8)
    return _save(figure, path)


def _by_setting(
    runs: Sequence[Path], names: Mapping[str, str] | None = None
) -> dict[tuple[str, str, str], list[Path]]:
    """Runs that differ in seed only, under (env, algo, label): its name, or weights and what else tells it apart."""
    alike: dict[tuple, dict[Path, set]] = {}
    for run in runs:
        config = of_run(run)
        alike.setdefault((config.env, config.algo, config.weights), {})[run] = {*departures(config).items()}
    groups: dict[tuple[str, str, str], list[Path]] = {}
    for (env, algo, weights), members in alike.items():
        common = set.intersection(*members.values())
        for run, own in members.items():
            rest = sorted(f"{name} {value}" for name, value in own - common)
            label = names[run.name] if names else ", ".join([weights, *rest])
            groups.setdefault((env, algo, label), []).append(run)
    return dict(sorted(groups.items()))


def _curve(ax, members: Sequence[Path], label: str, colour: str, mean_only: bool) -> str:
    """One setting's curve. Returns what its parts mean."""
    tables = [read_lines(run / "eval.jsonl") for run in members]
    steps = sorted({row["step"] for table in tables for row in table})
    success = np.array([np.interp(steps, *zip(*((row["step"], row["success"]) for row in table), strict=True))
                        for table in tables])  # (seeds, steps); a line between two evaluations, after the last it stays
    if mean_only:
        note = "mean over seeds of the success on evaluation levels; intervals stand in the table"
    elif len(members) == 1:
        metrics = read_lines(members[0] / "metrics.jsonl")
        ax.plot([row["step"] for row in metrics], [row["success"] for row in metrics], color=colour, alpha=0.3, lw=0.8)
        error = [[abs(row[end] - row["success"]) for row in tables[0]] for end in ("low", "high")]
        ax.errorbar(steps, success[0], error, color=colour, capsize=3, ls="none")
        note = "one seed: success on evaluation levels, 95 % interval over levels; faint: training rollouts"
    else:
        ax.plot(steps, success.T, color=colour, alpha=0.3, lw=0.8)
        if len(members) > 2:
            ax.fill_between(steps, *zip(*map(mean_interval, success.T), strict=True), color=colour, alpha=0.15, lw=0)
        note = "several seeds: mean and its 95 % interval (Student's); thin: each seed"
    ax.plot(steps, success.mean(0), color=colour, marker="o", label=label)
    return note


def gradient_mass(runs: Sequence[Path], path: Path) -> Path | None:
    """Figure 1, middle: whose the gradient is before (w = 1) and after Eq. (5), beside whose the tokens are.

    A bar is the mean over a run's steps, then over seeds with its 95 % interval. None where no step used Eq. (5).
    """
    settings = {key: [shares for run in members if (shares := _action_shares(run))]
                for key, members in _by_setting(runs).items() if key[2].startswith("actfocus")}
    settings = {key: shares for key, shares in settings.items() if shares}
    if not settings:
        return None
    figure, ax = plt.subplots(figsize=(2.4 + 2 * len(settings), 4), layout="constrained")
    for group, members in enumerate(settings.values()):
        shares = np.array(members)  # (seeds, 3)
        for bar, name in enumerate(("tokens", "gradient,\nw = 1", "gradient,\nw of Eq. (5)")):
            x, mean = group + 0.27 * (bar - 1), shares[:, bar].mean()
            error = np.ptp(mean_interval(shares[:, bar])) / 2 if len(members) > 1 else None
            ax.bar(x, mean, 0.25, yerr=error, capsize=3, color=COLOURS[1], ecolor="0.2")
            ax.bar(x, 1 - mean, 0.25, bottom=mean, color=COLOURS[0], alpha=0.35)
            ax.annotate(f"{100 * mean:.0f} %", (x, 1.01), ha="center", fontsize=8)
            ax.annotate(name, (x, -0.02), ha="center", va="top", fontsize=6.5, annotation_clip=False)
    names = [f"\n\n{env}, {algo}\n{textwrap.fill(label, 24)}" for env, algo, label in settings]
    ax.set(xticks=range(len(settings)), xticklabels=names, ylim=(0, 1.08), ylabel="share")
    ax.tick_params(axis="x", length=0)
    figure.legend(ax.patches[:2], ["action tokens (number above)", "reasoning tokens"], loc="outside upper center",
                  ncols=2, frameon=False)
    return _save(figure, path)


def _action_shares(run: Path) -> list[float] | None:
    """Of the tokens, of the gradient with w = 1 and with the run's own w, in the steps that had a gradient, if any."""
    rows = [row for row in read_lines(run / "metrics.jsonl") if row["gradient_share_reasoning_uniform"]]
    if not rows:
        return None
    tokens = [row["tokens_action"] / (row["tokens_action"] + row["tokens_reasoning"]) for row in rows]
    return [float(np.mean(tokens)), *(float(np.mean([row[f"gradient_share_action{end}"] for row in rows]))
                                      for end in ("_uniform", ""))]


def weight_of_energy(energy: np.ndarray, weights: np.ndarray, alpha: float, beta: float, path: Path) -> Path:
    """Eq. (5) as a picture: a point per action token on its curve, α below, and how often each energy occurs.

    Args:
        energy, weights: (N,) Eₜ in nats and wₜ of the action tokens.
    """
    figure, (ax, below) = plt.subplots(2, 1, figsize=(6, 5), height_ratios=(3, 1), sharex=True, layout="constrained")
    grid = np.linspace(energy.min(), energy.max(), 200)
    std = np.sqrt(energy.var() + 1e-6)  # Eq. (16)
    ax.plot(grid, 1 + beta / (1 + np.exp((energy.mean() - grid) / std)), color=COLOURS[6], lw=1,
            label=r"$1 + \beta\,$sigmoid$\,((E - \mu_E)\,/\,\sigma_E)$")
    ax.scatter(energy, weights, s=18, alpha=0.4, color=COLOURS[1], edgecolors="none",
               label=f"{len(energy)} action tokens")
    ax.axhline(alpha, color=COLOURS[0], lw=2, label=f"reasoning tokens, α = {alpha:g}")
    ax.axvline(energy.mean(), color="0.6", lw=0.8, ls=":")
    ax.annotate(r" $\mu_E$", (energy.mean(), 0.02), xycoords=("data", "axes fraction"), fontsize=9)
    ax.set(ylabel="weight w", ylim=(0, 1.08 * (1 + beta)), title=f"Eq. (5), α = {alpha:g}, β = {beta:g}")
    ax.legend(fontsize=8, loc="center left", frameon=False)
    below.hist(energy, 40, color=COLOURS[1])
    below.set(xlabel="energy E, nats (right: the reference model is less sure)", ylabel="tokens")
    return _save(figure, path)


def bottleneck(found: dict[str, dict], groups: Sequence[dict], path: Path) -> Path:
    """Figure 2: a point a group, mean energy of one token class against the spread of the group's returns."""
    figure, panels = plt.subplots(1, len(found), figsize=(3.7 * len(found), 3.6), layout="constrained", sharey=True)
    for axes, (name, row), colour in zip(panels, found.items(), COLOURS, strict=False):
        points = [(float(group[f"energy_{name}"]), float(group["return_std"])) for group in groups]
        axes.scatter(*zip(*points, strict=True), s=14, alpha=0.6, color=colour, edgecolors="none")
        axes.set_title(f"{name} tokens: ρ = {float(row['rho']):+.2f}, p = {float(row['p']):.1e}", fontsize=10)
        axes.set_xlabel("mean energy of the group, nats")
    panels[0].set_ylabel("std of returns in the group, σ_g")
    return _save(figure, path)


def differences(rows: Sequence[dict], path: Path) -> Path:
    """Paired differences of final success with both intervals, a line a setting, a colour a grid."""
    keys = "grid", "env", "algo", "weights", "settings"
    names = [f"{', '.join(row[key] for key in keys if row[key])}, lr {row['learning_rate']:g} - {row['against']} "
             f"({row['of']} seeds)" for row in rows]
    figure, ax = plt.subplots(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    for y, row in enumerate(rows):
        colour = COLOURS[grids.index(row["grid"]) % len(COLOURS)]
        for thickness, *bounds in ((1, "student_low", "student_high"), (3, "low", "high")):
            ax.plot([100 * row[name] for name in bounds], [y, y], color=colour, linewidth=thickness,
                    solid_capstyle="butt")
        ax.plot(100 * row["mean"], y, "o", color=colour)
    ax.axvline(0, color="0.5", linewidth=1)
    ax.set_yticks(range(len(rows)), names, fontsize=7)
    ax.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    ax.set_xlabel("final success, points\n95 %: bootstrap, Student's (thin)")
    return _save(figure, path)


def diagnosis(rows: Sequence[dict], path: Path) -> Path:
    """ρ of action tokens against mean success: a panel an environment, a colour a signal, a marker a model or run."""
    envs, colours = sorted({row["env"] for row in rows}), dict(zip(SIGNALS, COLOURS, strict=False))
    rows = sorted((row for row in rows if row["rho"] != "nan"), key=lambda row: int(row["step"]))
    markers = dict(zip(dict.fromkeys(row["model"] for row in rows), cycle("osv^DP*X<>pd"), strict=False))
    figure, panels = plt.subplots(1, len(envs), figsize=(1 + 4.4 * len(envs), 4.8), squeeze=False, sharey=True,
                                  layout="constrained")
    for ax, env in zip(panels.flat, envs, strict=True):
        lines: dict[tuple, list[dict]] = {}
        for row in rows:
            if row["env"] == env and row["tokens"] == "action":
                lines.setdefault((row["signal"], row["model"], row["seed"]), []).append(row)
        for (signal, model, _), line in lines.items():
            points = [(float(row["mean_success"]), float(row["rho"])) for row in line]
            ax.plot(*zip(*points, strict=True), marker=markers[model], color=colours[signal])
        ax.axhline(0, color="0.5", linewidth=1)
        ax.axvline(0.5, color="0.5", linewidth=1, linestyle=":")
        ax.set(title=env, xlabel="mean success", xlim=(0, 1), ylim=(-1, 1))
    panels.flat[0].set_ylabel("Spearman's ρ of action tokens with σ_g")
    named = [plt.Line2D([], [], color=colour, label=signal) for signal, colour in colours.items()]
    named += [plt.Line2D([], [], color="0.3", marker=marker, linestyle="", label=model)
              for model, marker in markers.items()]
    figure.legend(handles=named, loc="outside lower center", ncols=2, fontsize=8)
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
