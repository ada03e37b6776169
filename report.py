"""Writes results/ again from the committed runs alone: CSV tables, Markdown tables, figures.

    python experiments.py report

Between `<!-- NAME -->` and `<!-- /NAME -->` results/README.md and README.md are this file's work, all other text is
written by hand.
Nothing is left out: a run that belongs to no grid of experiments.py stands under "other".
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

import claims
import plots
from diagnosis import CLASSES, groups_table
from energy import SIGNALS, spearman
from tables import (
    MADE_WITH,
    MEASURES,
    Run,
    by_setting,
    compared,
    difference_rows,
    evaluation_rows,
    interval,
    markdown,
    paired_difference,
    percent,
    pooled_difference,
    pooled_rows,
    read_run,
    read_table,
    real_pairs,
    result_rows,
    run_row,
    setting_row,
    whole_runs,
    write_table,
)

Pair = tuple[str, str | None]  # names of a run and of the one it is compared with
GRIDS = ("defaults", "main", "long", "slippery", "ablation", "tags", "rates", "committed", "rivals", "lambda", "other")
PICTURES = {  # each at the top of its part of the page, with what it shows
    "defaults": ("defaults.png", "Learning curves of the defaults on each game"),
    "main": ("learning.png", "Learning curves of PPO and GRPO: ActFocus, uniform weights at its rate and at their own"),
    "rivals": ("rivals.png", "Learning curves of the seven methods"),
    "differences": ("differences.png", "Paired differences in final success, with intervals"),
    "diagnosis": ("diagnosis.png", "Correlation of energy and spread of returns along training"),
}
KEY = ("model", "model_sha256", "env", "step", "seed")  # of a diagnosis


def write(results: Path, grids: dict[str, list[Pair]], tuning: dict[tuple, dict]) -> list[str]:
    """Tables and figures of all runs in results/runs. Returns a line for each file.

    Args:
        grids: of each grid the runs it asks for, present or not.   tuning: of each (env, algo, weights) its scores.
    """
    runs = {folder.name: read_run(folder) for folder in whole_runs(results)}
    others = sorted({path.name for path in (results / "runs").iterdir()} - runs.keys())
    members = {grid: [runs[name] for name, _ in pairs if name in runs] for grid, pairs in grids.items()}
    known = {run.name for group in members.values() for run in group}
    members["other"] = [run for name, run in runs.items() if name not in known]
    pairs = {grid: [(runs[one], runs[other]) for one, other in names if one in runs and other in runs]
             for grid, names in grids.items()}
    differences = [row for grid, both in pairs.items() for row in difference_rows(grid, both)]
    pooled = pooled_rows("main", pairs.get("main", []))
    floors, table = results / "floors.csv", results / "diagnosis.csv"
    diagnosis = latest(read_table(table), *KEY, "signal", "tokens")
    of_levels = latest(read_table(groups_table(table)), *KEY, "group")
    groups = {grid: by_setting(members.get(grid, [])).values() for grid in GRIDS}
    settings = {grid: [{"grid": grid, **setting_row(group, floors)} for group in groups[grid]] for grid in GRIDS}
    write_table(results / "runs.csv", [run_row(run, floors) for run in runs.values()])
    write_table(results / "evaluations.csv", evaluation_rows(runs.values()))
    write_table(results / "settings.csv", [row for rows in settings.values() for row in rows])
    write_table(results / "differences.csv", differences)
    write_table(results / "pooled.csv", pooled)
    write_table(results / "claims.csv", tests := claims.tested(list(runs.values())))
    parts = {grid: settings_table(rows) + differences_table([d for d in differences if d["grid"] == grid])
             for grid, rows in settings.items()}
    parts["main"] += pooled_table(pooled)
    parts |= {"tuning": tuning_table(tuning), "diagnosis": diagnosis_table(diagnosis) + difficulty_table(of_levels),
              "claims": claims_table(tests), "differences": []}
    uniform = [run for run in members.get("rates", []) if run.config.weights == "uniform"]
    names = curve_names(members["main"], uniform)
    drawn = figures(results, members, names, differences, diagnosis) + figure_2(results, diagnosis, of_levels)
    for name, (picture, shows) in PICTURES.items():
        if results / picture in drawn:
            parts[name] = [f"![{shows}]({picture})", "", *parts[name]]
    front = {"main": result_rows({run.name: run for run in members["main"] + uniform}.values())}
    for page, tables in ((results / "README.md", parts), (results.parent / "README.md", front)):
        page.write_text(fill(page.read_text(encoding="utf-8"), tables, page), encoding="utf-8")
    left_out = [f"left out, as there is no eval.jsonl: {name}" for name in others]
    return [f"{len(runs)} runs, tables in {results}", *left_out, *(f"plot {path}" for path in drawn)]


def figures(
    results: Path, members: dict[str, list[Run]], names: dict[str, str], differences: list[dict], diagnosis: list[dict]
) -> list[Path]:
    """Learning curves of three grids, gradient mass, paired differences of all grids, the diagnosis along training."""
    folders = {grid: [results / "runs" / run.name for run in runs] for grid, runs in members.items()}
    final = [row for row in differences if row["measure"] == "final" and row["low"] is not None]
    drawn = {"defaults": (folders.get("defaults"), plots.learning_curves),
             "main": ([results / "runs" / name for name in names], partial(plots.learning_curves, names=names)),
             "rivals": (folders.get("rivals"), partial(plots.learning_curves, side_by_side=False)),
             "differences": (final, plots.differences), "diagnosis": (diagnosis, plots.diagnosis)}
    wanted = [(*drawn[name], picture) for name, (picture, _) in PICTURES.items()]
    wanted.append((folders["main"], plots.gradient_mass, "gradient.png"))
    for _, _, picture in wanted:
        (results / picture).unlink(missing_ok=True)
    return [path for rows, draw, picture in wanted if rows and (path := draw(rows, results / picture))]


def curve_names(runs: Sequence[Run], uniform: Sequence[Run]) -> dict[str, str]:
    """What the main picture calls a run: ActFocus, or uniform weights at its rate or at their own tuned one."""
    rates = {run.setting[:2]: run.config.learning_rate for run in runs if run.config.weights == "actfocus"}
    same = [run for run in [*runs, *uniform] if rates.get(run.setting[:2]) == run.config.learning_rate]
    names = {run.name: "uniform weights, their own tuned rate" for run in runs}
    names |= {run.name: "uniform weights, ActFocus' rate" for run in same}
    return names | {run.name: "ActFocus" for run in runs if run.config.weights == "actfocus"}


def figure_2(results: Path, diagnosis: list[dict], groups: list[dict]) -> list[Path]:
    """The scatter of every model's first diagnosis of every environment."""
    for old in results.glob("bottleneck-*.png"):
        old.unlink()
    drawn, known = [], by_diagnosis(diagnosis)
    for key, levels in by_diagnosis(row for row in groups if row["step"] == "0").items():
        found = {row["tokens"]: row for row in known.get(key, ()) if row["signal"] == "energy"}
        model, _, env, *_ = key
        drawn.append(plots.bottleneck(found, levels, results / f"bottleneck-{env}-{model}.png"))
    return drawn


def by_diagnosis(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    """The rows of each diagnosis, in order of environment, model and step."""
    found: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (row["env"], row["model"], int(row["step"]))):
        found.setdefault(tuple(row[name] for name in KEY), []).append(row)
    return found


def fill(text: str, parts: dict[str, list[str]], page: Path) -> str:
    """The page with new tables between its markers; every table must have its place, every marker its table."""
    marked = re.findall(r"^<!-- (\w+) -->$", text, re.M)
    if sorted(marked) != sorted(parts):
        raise ValueError(f"{page}: has the markers {sorted(marked)}, needs {sorted(parts)}")
    for name, lines in parts.items():
        body = "\n".join(lines or ["(none yet)"])
        text, count = re.subn(rf"(?s)<!-- {name} -->\n.*?<!-- /{name} -->",
                              lambda _, name=name, body=body: f"<!-- {name} -->\n\n{body}\n\n<!-- /{name} -->", text)
        if count != 1:
            raise ValueError(f"{page}: marker {name} must be closed, once, by <!-- /{name} -->")
    return text


def settings_table(rows: Sequence[dict]) -> list[str]:
    """Markdown: a row a setting, and below it the games' settings and what the runs were made with."""
    if not rows:
        return []
    letters: dict[tuple, str] = {}
    body = []
    for row in rows:
        made = tuple(row[name] for name in (*MADE_WITH, "model_sha256"))
        letter = letters.setdefault(made, chr(ord("a") + len(letters)))
        body.append([row["env"], row["algo"], row["weights"], row["settings"] or "-", f"{row['learning_rate']:g}",
                     row["seeds"], row["steps"], row["n"], percent(row["before"]),
                     f"{percent(row['final'])} {interval(row['final_low'], row['final_high'])}".strip(),
                     percent(row["rollouts"]), percent(row["peak"]),
                     percent(row["decay"]), percent(row["area"]), reached(row), percent(row["floor"]),
                     percent(row["ceiling"]), str(row["broke_down"]), letter, f"`{row['command']}`"])
    head = ["env", "algo", "weights", "other settings", "lr", "seeds", "steps", "n", "before", "final [95 %]",
            *MEASURES[1:], "80 % of ceiling", "floor", "ceiling", "broke down", "made", "again"]
    names = *MADE_WITH, "first weights"
    notes = [f"- {letter}: " + ", ".join(f"{name} {value}" for name, value in zip(names, made, strict=True)
                                         if value not in ("", "None")) for made, letter in letters.items()]
    games = sorted({f"- {row['env']}: {row['game']}" for row in rows})
    return [*markdown(head, body), "", *games, *notes]


def differences_table(rows: Sequence[dict]) -> list[str]:
    """Markdown: paired differences in percentage points, a row a setting."""
    grouped: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("env", "algo", "weights", "settings", "learning_rate", "against", "seeds"))
        grouped.setdefault(key, {})[row["measure"]] = row
    body = []
    for (env, algo, weights, settings, rate, against, seeds), by_measure in grouped.items():
        cells = [difference_cells(by_measure[name]) for name in MEASURES]
        body.append([env, algo, ", ".join(filter(None, [weights, settings])), f"{rate:g}", against, seeds, *cells[0],
                     *(rest[0] for rest in cells[1:])])
    head = ["env", "algo", "weights", "lr", "against", "paired seeds", "final [bootstrap]", "[Student]",
            "seeds above", *MEASURES[1:]]
    return ["", *markdown(head, body)] if body else []


def pooled_table(rows: Sequence[dict]) -> list[str]:
    """Markdown: the paired differences of all games together, a row a method."""
    methods: dict[tuple, list[str]] = {}
    for row in rows:
        cells = methods.setdefault(tuple(row[name] for name in ("algo", "weights", "against", "seeds")), [])
        cells += difference_cells(row)[:2 if row["measure"] == "final" else 1]
    head = ["all games together", "weights", "against", "paired seeds", "final [bootstrap]", "[Student]", *MEASURES[1:]]
    return ["", *markdown(head, [[*key, *cells] for key, cells in methods.items()])] if methods else []


def claims_table(rows: Sequence[dict]) -> list[str]:
    """Markdown: the tests of the paper's claims, a row a setting; a claim is named once."""
    body, last = [], ""
    for row in rows:
        cells = difference_cells(row) if row["mean"] is not None else ["-", "-", "-"]
        claim = [row["claim"], row["paper"]] if row["claim"] != last else ["", ""]
        body.append([*claim, row["setting"], row["seeds"], *cells, row["verdict"], f"`{row['command']}`"])
        last = row["claim"]
    head = ["claim", "paper", "ours: game", "seeds", "difference [bootstrap]", "[Student]", "above 0", "verdict",
            "again"]
    return markdown(head, body)


def comparison(rows: Sequence[Sequence[Run]]) -> list[str]:
    """Markdown: differences of the first row of runs to the second, the third to the fourth, ..., and of all together.

    All together only where every game has three pairs, as in `pooled_rows`.

    Raises:
        ValueError: the runs of a row differ in more than the seed, or two rows have no pair of runs.
    """
    lines, games = [], []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        for row in (first, second):
            if len(by_setting(row)) > 1:
                raise ValueError("--compare: expected runs of one setting, got " + ", ".join(run.name for run in row))
        pairs = real_pairs(product(first, second))
        if not pairs:
            raise ValueError(f"--compare: {first[0].name} and {second[0].name} share no seed, or their levels, first "
                             "weights or evaluations differ")
        games.append(compared(pairs))
        seeds = " ".join(str(run.config.seed) for run, _ in pairs)
        lines += ["", f"{first[0].name} and {second[0].name}, seeds {seeds}", "",
                  *markdown(["", "first", "second", "difference [bootstrap]", "[Student]", "seeds above"],
                            [[name, *(percent(statistics.mean(side)) for side in sides),
                              *difference_cells(paired_difference(*sides))] for name, sides in games[-1].items()])]
    if len(games) > 1 and all(len(game["final"][0]) > 2 for game in games):
        together = [[name, *difference_cells(pooled_difference([np.subtract(*game[name]) for game in games]))]
                    for name in MEASURES]
        lines += ["", *markdown(["together", "difference [bootstrap]", "[Student]", "games above"], together)]
    return lines[1:]


def difference_cells(found: dict) -> list[str]:
    """A difference in points, its two intervals, and how many of the pairs or games are above 0."""
    return [f"{percent(found['mean'], sign=True)} {interval(found['low'], found['high'])}".strip(),
            interval(found["student_low"], found["student_high"]) or "-",
            f"{found['above']} of {found['of']}"]


def tuning_table(tuning: dict[tuple, dict]) -> list[str]:
    """Markdown: the score of every learning rate on the tuning seeds, and the one that is used."""
    rates = sorted({rate for cell in tuning.values() for rate in cell["scores"]})
    head, body = ["env", "algo", "weights", "model", *(f"{rate:g}" for rate in rates), "seeds", "chosen"], []
    for (env, algo, weights, model), found in sorted(tuning.items()):
        scores = (percent(found["scores"][rate]) if rate in found["scores"] else "-" for rate in rates)
        edge = " (edge)" if found["chosen"] in (rates[0], rates[-1]) else ""
        chosen = f"{found['chosen']:g}{edge}" if found["chosen"] else "-"
        body.append([env, algo, weights, model or "tiny", *scores, found["seeds"], chosen])
    return markdown(head, body) if body else []


def latest(rows: Iterable[dict], *names: str) -> list[dict]:
    """Of rows that agree in these columns the last one."""
    return list({tuple(row[name] for name in names): row for row in rows}.values())


def diagnosis_table(rows: Sequence[dict]) -> list[str]:
    """Markdown: ρ of every signal at every class of tokens; ρ given the group's success; * where p < 0.05."""
    body = []
    for (model, digest, env, step, seed), members in by_diagnosis(rows).items():
        found = {(row["signal"], row["tokens"]): row for row in members}
        for tokens in (name for name in CLASSES if ("energy", name) in found):
            first = found["energy", tokens]
            cells = [f"{correlation(row['rho'], row['p'])} ({correlation(row['partial_rho'], row['partial_p'])})"
                     for row in (found[signal, tokens] for signal in SIGNALS)]
            success, share = (percent(float(first[name])) for name in ("mean_success", "action_fraction"))
            groups = f"{first['groups']} x {first['group_size']}"
            body.append([env, model, digest, step, seed, groups, success, share, tokens, *cells])
    head = ["env", "model", "weights", "step", "seed", "groups x G", "mean success", "action tokens %", "tokens",
            *SIGNALS]
    return markdown(head, body) if body else []


def difficulty_table(groups: Sequence[dict]) -> list[str]:
    """Markdown: what energy and spread of the returns have in common with success, of every diagnosis' groups."""
    body = []
    for (model, _, env, step, seed), levels in by_diagnosis(groups).items():
        success, spread, energy = (np.array([float(row[name]) for row in levels])
                                   for name in ("success", "return_std", "energy_action"))
        known, varied = spearman(energy, success)[0], spearman(success, spread)[0]
        rhos = (known, varied, known * varied, spearman(energy, spread)[0])
        body.append([env, model, step, seed, percent(success.mean()), *(f"{rho:+.2f}" for rho in rhos)])
    head = ["env", "model", "step", "seed", "mean success", "action energy and success", "success and spread",
            "product of both", "action energy and spread"]
    return ["", *markdown(head, body)] if body else []


def reached(row: dict) -> str:
    """How many seeds came to 80 % of the ceiling, and in which step on average."""
    seeds = len(row["seeds"].split())
    return f"{row['reached_80']} of {seeds}" + (f", step {row['to_80']:.0f}" if row["reached_80"] else "")


def correlation(rho: str, p: str) -> str:
    """ρ, with a star where p < 0.05; a dash where nothing varies."""
    return "-" if rho == "nan" else f"{float(rho):+.2f}" + "*" * (float(p) < 0.05)
