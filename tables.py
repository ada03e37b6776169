"""Tables and figures of results/, made of the committed runs alone: `python experiments.py report` writes them again.

    results/runs/NAME/   what a run left: settings with commit, versions and hardware, metrics, evaluations
    runs.csv             a row a run          evaluations.csv   a row an evaluation
    settings.csv         a row a setting      differences.csv   a row a paired difference     pooled.csv   of all games
    claims.csv           a row a test of one of the paper's claims
    floors.csv, diagnosis.csv, diagnosis-groups.csv, README.md (between its markers), *.png

A setting is what the seeds of one row share. Runs of one seed share levels and first weights, so settings are compared
seed by seed. Of every run: success before training, in the last evaluation (final) and in the best one (peak), decay
(peak - final), area (mean of the learning curve), steps until 80 % of the ceiling; and success of the rollouts of the
last third of the steps, which are sampled at temperature 1 on training levels, and are more than an evaluation.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import plots
from config import Config, departures, of_run
from envs import BUDGETS, ENVS, oracle_player, random_player
from methods import env_options
from metrics import bootstrap_interval, mean_interval, pooled_interval
from train import evaluate_player

MEASURES = ("final", "rollouts", "peak", "decay", "area")  # those that are compared seed by seed
SHARED = (  # what two runs must share to be a pair: levels, budgets, evaluation
    "env", "seed", "max_steps", "num_prompts", "num_generations", "temperature", "max_response_tokens", "max_context",
    "prompt_style", "max_turns", "actions_per_turn", "max_actions", "format_penalty", "success_rate", "frozen",
    "coordinates", "sudoku_level", "hints", "webshop_data", "results_per_page", "title_words", "short_pages",
    "eval_steps", "eval_prompts", "eval_samples", "eval_first", "eval_temperature")
MADE_WITH = ("commit", "python", "torch", "transformers", "device", "threads", "machine", "cpu", "cores")


@dataclass(frozen=True)
class Run:
    """What a run left in results/runs."""

    name: str
    config: Config
    about: dict  # config.json: commit, versions, hardware, digest of the first weights
    evaluations: list[dict]
    metrics: list[dict]
    failure: str  # why it broke down; "" if it did not

    @property
    def setting(self) -> tuple:
        """What it shares with the other seeds of its row."""
        own = departures(self.config)
        rest = tuple((name, value) for name, value in own.items() if name not in ("learning_rate", "max_steps"))
        return (self.config.env, self.config.algo, self.config.weights, rest, self.config.learning_rate,
                self.config.max_steps, self.about.get("model_sha256") or "")


def read_run(folder: Path) -> Run:
    """A run folder as `Run`."""
    reason = folder / "failure.txt"
    return Run(folder.name, of_run(folder), checkpoint.read_about(folder),
               checkpoint.read_lines(folder / "eval.jsonl"), checkpoint.read_lines(folder / "metrics.jsonl"),
               reason.read_text(encoding="utf-8").strip() if reason.exists() else "")


def whole_runs(results: Path) -> list[Path]:
    """The folders of runs that are there whole: eval.jsonl is copied last."""
    return sorted(path.parent for path in (results / "runs").glob("*/eval.jsonl"))


def measures(run: Run, ceiling: float) -> dict[str, float | None]:
    """The numbers of one learning curve; success as a share, `to_80` in steps, None where it was never reached.

        decay = peak - final        area = ∫ success d step / steps (trapezoids)
    """
    steps, success = (np.array([line[name] for line in run.evaluations]) for name in ("step", "success"))
    reached = steps[success >= 0.8 * ceiling]
    area = float(np.trapezoid(success, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else float(success[0])
    return {"before": float(success[0]), "final": float(success[-1]), "rollouts": late_success(run),
            "peak": float(success.max()), "decay": float(success.max() - success[-1]), "area": area,
            "to_80": int(reached[0]) if len(reached) else None}


def late_success(run: Run) -> float:
    """Mean success of the rollouts of the last third of the steps."""
    late = [row["success"] for row in run.metrics[-max(1, len(run.metrics) // 3):]]
    return statistics.mean(late) if late else float("nan")


def paired_difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float | int | None]:
    """Mean of first - second over paired seeds, its 95 % percentile bootstrap interval over seeds, and Student's.

    Fewer than three pairs have no interval. `above` counts the pairs with first > second, `of` all.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    low, high = bootstrap_interval(differences) if len(differences) > 2 else (None, None)
    student_low, student_high = mean_interval(differences) if len(differences) > 2 else (None, None)
    return {"mean": statistics.mean(differences), "low": low, "high": high, "student_low": student_low,
            "student_high": student_high, "above": sum(d > 0 for d in differences), "of": len(differences)}


def pooled_difference(games: Sequence[Sequence[float]]) -> dict[str, float | int]:
    """Mean over games of their mean paired difference; 95 % intervals as above, each game's seeds resampled apart."""
    rng = np.random.default_rng(0)
    means = [rng.choice(np.asarray(game), (10_000, len(game))).mean(1) for game in games]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    student_low, student_high = pooled_interval(games)
    return {"mean": statistics.mean(map(statistics.mean, games)), "low": float(low), "high": float(high),
            "student_low": student_low, "student_high": student_high,
            "above": sum(statistics.mean(game) > 0 for game in games), "of": len(games)}


def is_pair(run: Run, other: Run) -> bool:
    """Whether two runs met the same levels from the same weights, and were evaluated alike."""
    starts = {(Path(each.config.model).name, each.about.get("model_sha256")) for each in (run, other)}
    return len(starts) == 1 and all(getattr(run.config, name) == getattr(other.config, name) for name in SHARED)


def real_pairs(pairs: Iterable[tuple[Run, Run]]) -> list[tuple[Run, Run]]:
    """Those of two settings that are pairs, in order of their seeds."""
    found = [(run, other) for run, other in pairs if run.setting != other.setting and is_pair(run, other)]
    return sorted(found, key=lambda pair: pair[0].config.seed)


def floor_and_ceiling(config: Config, table: Path) -> tuple[float, float]:
    """Success of the random player and of the oracle on a run's evaluation levels; played once, kept in `table`."""
    game = ENVS[config.env]
    budgets = {name: getattr(config, name) or getattr(game, name) for name in BUDGETS}
    first = {"eval_first": config.eval_first} if config.eval_first else {}  # rows are older than the setting
    key = json.dumps({**env_options(config), **budgets, "prompts": config.eval_prompts, "samples": config.eval_samples,
                      **first})
    known = {(row["env"], row["player"], row["settings"]): float(row["success"]) for row in read_table(table)}
    players = {"random floor": random_player, "oracle ceiling": oracle_player}
    for name, player in players.items():
        if (config.env, name, key) not in known:
            result = evaluate_player(config, player)
            append_rows(table, [{"env": config.env, "player": name, "purchased": None, **result, "settings": key}])
            known[config.env, name, key] = result["success"]
    return tuple(known[config.env, name, key] for name in players)


def run_row(run: Run, floors: Path) -> dict:
    """A run as a row of runs.csv."""
    env, algo, weights, rest, rate, steps, digest = run.setting
    floor, ceiling = floor_and_ceiling(run.config, floors)
    last = run.evaluations[-1]
    return {"run": run.name, "env": env, "algo": algo, "weights": weights, "seed": run.config.seed,
            "game": label(env_options(run.config).items()), "settings": label(rest), "learning_rate": rate,
            "steps": last["step"], "max_steps": steps,
            "levels": last["prompts"], "n": last["n"], **measures(run, ceiling), "final_low": last["low"],
            "final_high": last["high"], "floor": floor, "ceiling": ceiling, "minutes": minutes(run),
            "failure": run.failure, "model_sha256": digest, **{name: run.about.get(name) for name in MADE_WITH},
            "command": command(run)}


def minutes(run: Run) -> float:
    """Of training, without evaluations."""
    return math.fsum(value for row in run.metrics for name, value in row.items() if name.startswith("seconds_")) / 60


def label(settings: Iterable[tuple]) -> str:
    """Settings as text."""
    return ", ".join(f"{name} {value}" for name, value in settings)


def command(run: Run, all_seeds: bool = False) -> str:
    """What runs it again."""
    seed = str(run.config.seed)
    name = run.name.replace(f"seed{seed}", "seed" + "?" * len(seed), 1) if all_seeds else run.name
    return f'python experiments.py --run "{name}"'


def by_setting(runs: Iterable[Run]) -> dict[tuple, list[Run]]:
    """The runs of each setting, in order of their seeds."""
    groups: dict[tuple, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.config.seed):
        groups.setdefault(run.setting, []).append(run)
    return dict(sorted(groups.items(), key=lambda item: str(item[0])))


def seed_interval(runs: Sequence[Run]) -> tuple[float | None, float | None]:
    """95 % interval of a setting's mean final success: Student's over seeds, none for two, over levels for one."""
    last = [run.evaluations[-1] for run in runs]
    if len(runs) == 1:
        return last[0]["low"], last[0]["high"]
    return mean_interval([line["success"] for line in last]) if len(runs) > 2 else (None, None)


def setting_row(runs: Sequence[Run], floors: Path) -> dict:
    """The seeds of one setting as a row of settings.csv: means over seeds."""
    rows = [run_row(run, floors) for run in runs]
    first, reached = rows[0], [row["to_80"] for row in rows if row["to_80"] is not None]
    low, high = seed_interval(runs)
    means = {name: statistics.mean(row[name] for row in rows) for name in ("before", *MEASURES, "minutes")}
    several = {name: " ".join(sorted({str(row[name]) for row in rows})) for name in ("n", *MADE_WITH, "model_sha256")}
    return {**{name: first[name] for name in ("env", "game", "algo", "weights", "settings", "learning_rate")},
            "seeds": " ".join(str(row["seed"]) for row in rows),
            "steps": "-".join(map(str, sorted({row["steps"] for row in rows}))), **means, "final_low": low,
            "final_high": high, "reached_80": len(reached), "to_80": statistics.mean(reached) if reached else None,
            "floor": first["floor"], "ceiling": first["ceiling"],
            "broke_down": sum(bool(row["failure"]) for row in rows),
            **several, "command": command(runs[0], all_seeds=True)}


def difference_rows(grid: str, pairs: Iterable[tuple[Run, Run]]) -> list[dict]:
    """Paired differences of the first runs of the pairs to the second ones, a row a setting and measure."""
    groups: dict[tuple, list[tuple[Run, Run]]] = {}
    for run, other in real_pairs(pairs):
        groups.setdefault((run.setting, other.setting), []).append((run, other))
    rows = []
    for (setting, against), members in sorted(groups.items(), key=str):
        env, algo, weights, rest, rate, *_ = setting
        about = {"grid": grid, "env": env, "algo": algo, "weights": weights, "settings": label(rest),
                 "learning_rate": rate, "against": describe_setting(against, setting),
                 "seeds": " ".join(str(run.config.seed) for run, _ in members)}
        values = compared(members)
        rows += [{**about, "measure": measure, **paired_difference(*values[measure])} for measure in MEASURES]
    return rows


def pooled_rows(grid: str, pairs: Iterable[tuple[Run, Run]]) -> list[dict]:
    """Of each method the paired differences of all games together that have three pairs, a row a measure."""
    methods: dict[tuple, dict[str, list[tuple[Run, Run]]]] = {}
    for run, other in real_pairs(pairs):
        key = run.config.algo, run.config.weights, other.config.weights
        methods.setdefault(key, {}).setdefault(run.config.env, []).append((run, other))
    rows = []
    for (algo, weights, against), by_game in sorted(methods.items()):
        games = {env: members for env, members in by_game.items() if len(members) > 2}
        about = {"grid": grid, "algo": algo, "weights": weights, "against": against,
                 "seeds": ", ".join(f"{env} {len(members)}" for env, members in sorted(games.items()))}
        values = [compared(members) for members in games.values()]
        rows += [{**about, "measure": measure, **pooled_difference([np.subtract(*game[measure]) for game in values])}
                 for measure in MEASURES if len(games) > 1]
    return rows


def compared(pairs: Sequence[tuple[Run, Run]]) -> dict[str, tuple[list[float], list[float]]]:
    """Of paired runs both sides' values, seed by seed: success at every evaluation that all have, then MEASURES."""
    sides = [[{f"step {line['step']}": line["success"] for line in run.evaluations}
              | {name: value for name, value in measures(run, 1.0).items() if name in MEASURES} for run in side]
             for side in zip(*pairs, strict=True)]
    shared = [name for name in sides[0][0] if all(name in values for side in sides for values in side)]
    return {name: tuple([values[name] for values in side] for side in sides) for name in shared}


def describe_setting(setting: tuple, beside: tuple) -> str:
    """A setting in words: weights, and what else differs from another one of the same environment."""
    _, algo, weights, rest, rate, *_ = setting
    parts = [algo] * (algo != beside[1]) + [weights] + [label(rest)] * bool(rest)
    return ", ".join([*parts, *([f"lr {rate:g}"] * (rate != beside[4]))])


def result_rows(runs: Sequence[Run]) -> list[str]:
    """The main README's Markdown table: success before and after, 95 % interval, minutes of training."""
    body = []
    for (env, algo, weights, rest, rate, *_), members in by_setting(runs).items():
        before, after = (statistics.mean(run.evaluations[i]["success"] for run in members) for i in (0, -1))
        seeds = " ".join(str(run.config.seed) for run in members)
        steps = "-".join(map(str, sorted({run.evaluations[-1]["step"] for run in members})))
        name = ", ".join([weights, label(rest)] if rest else [weights])
        body.append([env, algo, name, f"{rate:g}", seeds, steps, percent(before),
                     f"{percent(after)} {interval(*seed_interval(members))}".strip(),
                     f"{statistics.mean(map(minutes, members)):.0f}"])
    head = ["env", "algo", "weights", "lr", "seeds", "steps", "before", "after [95 % interval]", "minutes"]
    return markdown(head, body)


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table's lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def percent(value: float, sign: bool = False) -> str:
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def interval(low: float | None, high: float | None) -> str:
    return "" if low is None else f"[{100 * low:.1f}, {100 * high:.1f}]"


def evaluation_rows(runs: Iterable[Run]) -> list[dict]:
    """A row an evaluation."""
    rows = []
    for run in runs:
        chosen = {name: getattr(run.config, name) for name in ("env", "algo", "weights", "seed", "learning_rate")}
        chosen |= {"run": run.name, "settings": label(run.setting[3])}
        chosen |= {name: run.about.get(name) for name in ("commit", "torch", "threads")}
        rows += [{**chosen, "purchased": None, **line} for line in run.evaluations]
    return rows


def compare(folders: Sequence[Path], out: Path) -> None:
    """Learning curves and gradient mass of several runs, all their evaluations as a table, a line for each setting."""
    runs, table = [read_run(folder) for folder in folders], out / "evaluations.csv"
    if empty := [str(folder) for folder, run in zip(folders, runs, strict=True) if not run.evaluations]:
        raise ValueError(f"--plot {empty[0]}: has no evaluation yet")
    curves = plots.learning_curves(folders, out / "learning.png")
    gradient = plots.gradient_mass(folders, out / "gradient.png")
    write_table(table, evaluation_rows(runs))
    print(*result_rows(runs), f"plot {curves}", sep="\n")
    print(f"plot {gradient}" if gradient else "no plot of the gradient: no run here has --weights actfocus")
    print(f"table {table}")


def append_rows(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, in one write, so that processes side by side do not mix their lines.

    Raises:
        ValueError: the file has other columns.
    """
    header = ",".join(rows[0])
    if path.exists() and (there := path.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")) != header:
        raise ValueError(f"cannot add to {path}: its columns are not those of this table, but {there[:60]!r}")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, rows[0], lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    with path.open("ab", buffering=0) as file:
        file.write(lines.getvalue().encode("utf-8"))


def read_table(path: Path) -> list[dict]:
    """A CSV file's rows; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: Sequence[dict]) -> None:
    """A CSV file of these rows, instead of what was there."""
    path.unlink(missing_ok=True)
    if rows:
        append_rows(path, list(rows))
