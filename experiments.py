"""Runs grids of experiments: every combination is a run of train.py with its own folder, at one thread.

    python experiments.py tune main                  # all missing runs of these grids, two at a time
    python experiments.py rivals --jobs 4 --list
    python experiments.py --run "frozenlake-grpo-actfocus-seed?"     # these again, whether there or not
    python experiments.py report                     # tables and figures of results/ from the committed runs

Kill it at any moment: finished runs are skipped, others go on from their last checkpoint (bit for bit, see train.py).
What a table needs of a finished run (settings with commit, metrics, evaluations) is copied to results/runs/NAME, and
so is a run that broke down, with the reason. A run is finished only if its settings are those of the grid and it
started from the weights that are there now.

Seeds are paired: runs of one seed share training levels, evaluation levels and first weights, whatever their method.
Learning rates are chosen for each (env, algo, weights) from RATES in runs of half the length on TUNING_SEEDS, which no
other grid uses: the one with the highest mean success of the last TUNING_STEPS iterations' rollouts (training levels,
each met once, so that no evaluation level takes part); the smaller one of equals; the default until all are there.
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import NamedTuple

import checkpoint
import report
from config import ALGOS, Config, Parser, departures, of_run, usual_settings
from tables import Run, read_run

HERE = Path(__file__).parent
WORK, RESULTS, MODELS = HERE / "runs", HERE / "results", HERE / "models"
KEPT = ("config.json", "metrics.jsonl", "eval.jsonl")  # the last one says that a run is whole
WEIGHTS = ("actfocus", "uniform")
GAMES = ("frozenlake", "sokoban", "sudoku", "webshop")
TWO = GAMES[:2]
SEEDS, FEW, TUNING_SEEDS = range(5), range(3), (900, 901)
RATES, TUNING_STEPS = (1e-4, 2e-4, 4e-4), 10
VARIANTS = [  # of Eq. (5), one thing changed at a time
    {}, *({"alpha": alpha} for alpha in (0.0, 0.05, 0.3, 1.0)), *({"beta": beta} for beta in (0.0, 1.0, 2.0)),
    *({"signal": signal} for signal in ("entropy", "policy_nll", "logprob_shift")),
    {"tag_weight": "one"}, {"weight_stats": "mini_batch"},
    {"alpha": 0.05, "beta": 0.0},  # about what a loss that averages over each class would do: action tokens are 5 %
    {"alpha": 1.0, "beta": 0.0},  # uniform, at ActFocus' learning rate
]


class Grid(NamedTuple):
    """Runs, and for each the run of the same seed that it is compared with."""

    runs: list[dict]
    against: Callable[[dict], dict] | None = None


def grid(seeds: Iterable[int], envs: Iterable[str], algos: Iterable[str], weights: Iterable[str],
         **settings: Iterable) -> list[dict]:
    """All combinations as settings of runs, seed by seed, so that a stopped grid has all methods on some seeds."""
    names = ("seed", "env", "algo", "weights", *settings)
    return [dict(zip(names, values, strict=True)) for values in product(seeds, envs, algos, weights,
                                                                       *settings.values())]


def grids() -> dict[str, Grid]:
    """All grids; `main`, `ablation` and `committed` at the learning rates that the tuning runs in results/ choose."""
    chosen = {cell: found["chosen"] for cell, found in tuning().items()}

    def rate(env: str, algo: str, weights: str) -> dict:  # nothing before it is tuned: the environment's own then
        found = chosen.get((env, algo, weights))
        return {"learning_rate": found} if found else {}

    def tuned(run: dict, **changes) -> dict:
        run = {**run, **changes}
        return canonical({**rate(run["env"], run["algo"], run["weights"]), **run})

    def variant(run: dict, changes: dict) -> dict:  # at ActFocus' rate, also where it is uniform
        return canonical({**run, **rate(run["env"], "grpo", "actfocus"), **changes})

    def bare(run: dict) -> dict:  # its seed and environment, with the paper's weights
        return tuned({"seed": run["seed"], "env": run["env"], "algo": "grpo", "weights": "actfocus"})

    def uniform(run: dict) -> dict:
        return tuned({name: run[name] for name in ("seed", "env", "algo", "model") if name in run}, weights="uniform")

    focus = grid(SEEDS, TWO, ["grpo"], ["actfocus"])
    return {
        "tune": Grid([canonical(run) for run in tuning_runs()]),
        "main": Grid([tuned(run) for run in grid(SEEDS, GAMES, ("grpo", "ppo"), WEIGHTS)], uniform),
        "ablation": Grid([variant(run, changes) for run in focus for changes in VARIANTS], bare),
        "rates": Grid([canonical(run) for run in grid(SEEDS, TWO, ["grpo"], WEIGHTS, learning_rate=(5e-5, *RATES))],
                      bare),
        "committed": Grid([tuned(run) for run in grid(SEEDS, TWO, ["grpo"], WEIGHTS, model=["committed"])], uniform),
        "defaults": Grid([canonical(run) for run in grid(FEW, GAMES, ["grpo"], ["actfocus"])]),
        "rivals": Grid([canonical(run) for run in grid(FEW, TWO, ALGOS, ["uniform"])],
                       lambda run: canonical({**run, "algo": "grpo"})),
    }


def tuning_runs(games: Iterable[str] = GAMES) -> list[dict]:
    """The runs that learning rates are chosen from, half as long as others, evaluated at both ends only."""
    half = {game: planned({"env": game, "algo": "grpo"}).max_steps // 2 for game in games}
    return [run for game in games for run in grid(TUNING_SEEDS, [game], ("grpo", "ppo"), WEIGHTS, learning_rate=RATES,
                                                  max_steps=[half[game]], eval_steps=[half[game]])]


def tuning() -> dict[tuple, dict]:
    """Of each (env, algo, weights) with tuning runs in results/: scores of the rates, seeds, and the chosen rate."""
    cells: dict[tuple, dict[float, list[Run]]] = {}
    for run in tuning_runs():
        folder = RESULTS / "runs" / name_of(canonical(run))
        if (folder / KEPT[-1]).exists():
            cell = cells.setdefault((run["env"], run["algo"], run["weights"]), {})
            cell.setdefault(run["learning_rate"], []).append(read_run(folder))
    return {cell: choice(by_rate) for cell, by_rate in cells.items()}


def choice(by_rate: dict[float, list[Run]]) -> dict:
    """The rule of the module's docstring; runs from several first weights choose nothing. A run that broke down: 0."""
    scores = {rate: statistics.mean(0.0 if run.failure else
                                    statistics.mean(row["success"] for row in run.metrics[-TUNING_STEPS:])
                                    for run in runs) for rate, runs in sorted(by_rate.items())}
    starts = {run.about.get("model_sha256") for runs in by_rate.values() for run in runs}
    whole = len(starts) == 1 and all(len(by_rate.get(rate, [])) == len(TUNING_SEEDS) for rate in RATES)
    return {"scores": scores, "chosen": max(scores, key=scores.get) if whole else None,
            "seeds": " ".join(map(str, sorted({run.config.seed for runs in by_rate.values() for run in runs})))}


def canonical(run: dict) -> dict:
    """The same run in the fewest settings, so that whatever asks for it finds it under one name."""
    if run["weights"] == "actfocus" and run.get("alpha") == 1 and run.get("beta") == 0:
        run = {**run, "weights": "uniform"}
    return settings_as_run(planned(run))


def settings_as_run(config: Config) -> dict:
    """A run's settings as the grids have them."""
    return {**{name: getattr(config, name) for name in ("seed", "env", "algo", "weights")}, **departures(config)}


def flags(run: dict) -> list[str]:
    """The run as a command line of train.py; a model goes by its folder's name."""
    given = {**run, "model": MODELS / run["model"]} if "model" in run else run
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


def planned(run: dict) -> Config:
    """The settings that train.py would give the run."""
    given = {**run, "model": str(MODELS / run["model"])} if "model" in run else run
    return Config(**{**usual_settings("laptop", run["env"], run["algo"]), **given})


def name_of(run: dict) -> str:
    """The run's folder: environment, method, seed, then whatever else it sets."""
    rest = [f"{key}{value}" for key, value in run.items() if key not in ("env", "algo", "weights", "seed")]
    return "-".join([run["env"], run["algo"], run["weights"], f"seed{run['seed']}", *rest])


def current(folder: Path, run: dict) -> Run | None:
    """What is in a run folder, if it has these settings and started from the weights that are there now."""
    try:
        found = read_run(folder)
    except (ValueError, OSError):  # no run, one killed while it wrote its settings, or settings that are no more
        return None
    digest = checkpoint.weights_digest(Path(planned(run).model))
    return found if settings_as_run(found.config) == run and found.about.get("model_sha256") == digest else None


def is_finished(folder: Path, run: dict) -> bool:
    """Whether the run evaluated its last step, or broke down."""
    found = current(folder, run)
    return found is not None and (
        bool(found.failure) or any(line["step"] >= found.config.max_steps for line in found.evaluations))


def work_off(run: dict, name: str = "", again: bool = False) -> str:
    """Start or continue one run, and keep its numbers when it is done. Returns a line about it."""
    name = name or name_of(run)
    folder, kept = WORK / name, RESULTS / "runs" / name
    goes_on = current(folder, run) and list(folder.glob("checkpoint-[0-9]*"))
    if goes_on and not (again and is_finished(folder, run)):
        arguments = ["--resume_from_checkpoint", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        arguments = ["--output_dir", str(folder), *flags(run)]
    log = WORK / f"{name}.log"
    with log.open("a") as file:
        code = subprocess.run([sys.executable, str(HERE / "train.py"), *arguments], stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    said = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    broke_down = code == 1 and said.startswith("stopped: ")  # numbers, not a mistake: this is a result
    if code and not broke_down:
        return f"{name}: exit code {code}, see {log}"
    before = checkpoint.read_lines(kept / "eval.jsonl")
    keep(folder, kept, said if broke_down else "")
    lines = checkpoint.read_lines(kept / "eval.jsonl")
    compared = "" if not before else ", as it was" if before == lines else ", NOT as it was: see git diff"
    reason = f", {said}" if broke_down else ""
    return f"{name}: {100 * lines[-1]['success']:.1f} % after {lines[-1]['step']} steps{compared}{reason}"


def keep(folder: Path, kept: Path, failure: str) -> None:
    """Copy what tables need, and why a run broke down."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    if failure:
        (kept / "failure.txt").write_text(failure + "\n", encoding="utf-8")
    for part in KEPT:
        if (folder / part).exists():
            shutil.copy(folder / part, kept / part)


def named(pattern: str) -> dict[str, dict]:
    """Runs of all grids and of results/ whose name matches, by name; one in results/ as it was run."""
    known = {name_of(run): run for one in grids().values() for run in one.runs}
    known |= {folder.name: settings_as_run(of_run(folder)) for folder in (RESULTS / "runs").iterdir()}
    chosen = {name: run for name, run in sorted(known.items()) if fnmatchcase(name, pattern)}
    if not chosen:
        raise ValueError(f"--run {pattern}: no run of that name in a grid or in results/runs")
    return chosen


def write_report() -> list[str]:
    """Everything in results/ that is made of runs."""
    names = {name: [(name_of(run), one.against and name_of(one.against(run))) for run in one.runs]
             for name, one in grids().items()}
    return report.write(RESULTS, names, tuning())


def launch(argv: list[str] | None) -> None:
    """Read the command line and do what it says."""
    parser, known = Parser(description=__doc__.splitlines()[0]), grids()
    parser.add_argument("what", nargs="*", metavar="GRID", help=f"{', '.join(known)}, or report")
    parser.add_argument("--run", metavar="NAME", help="run these again, whether they are there or not; * and ? match")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    given = parser.parse_args(argv)
    unknown = [name for name in given.what if name not in (*known, "report")]
    if unknown or bool(given.what) == bool(given.run) or given.jobs < 1:
        raise ValueError(f"expected grids ({', '.join(known)}), report or --run NAME, and --jobs of at least 1; "
                         f"got {' '.join(given.what) or 'no grid'}, --run {given.run}, --jobs {given.jobs}")
    if given.run:
        chosen = named(given.run)
    else:
        wanted = {name_of(run): run for name in given.what if name != "report" for run in known[name].runs}
        chosen = {name: run for name, run in wanted.items() if not is_finished(RESULTS / "runs" / name, run)}
        if wanted:
            print(f"{len(chosen)} of {len(wanted)} runs are missing")
    if given.list:
        print(*chosen, sep="\n")
        return
    WORK.mkdir(exist_ok=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        for line in pool.map(lambda item: work_off(item[1], item[0], again=bool(given.run)), chosen.items()):
            print(line, flush=True)
    if "report" in given.what:
        print(*write_report(), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """Command line; exit code 2 for a user's mistake."""
    try:
        launch(argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
