"""Runs grids of experiments: every combination is a run of train.py with its own folder, at one thread.

    python experiments.py tune main                  # all missing runs of these grids, one a core
    python experiments.py tune main --only "frozenlake-*"
    python experiments.py rivals --jobs 4 --list
    python experiments.py --run "frozenlake-grpo-actfocus-seed?"     # these again, whether there or not
    python experiments.py report                     # tables and figures of results/ from the committed runs
    python experiments.py --compare "sokoban-ppo-actfocus-seed?" "sokoban-ppo-uniform-seed?"     # at every evaluation

Kill it at any moment: finished runs are skipped, others go on from their last checkpoint (bit for bit, see train.py).
What a table needs of a finished run (settings with commit, metrics, evaluations) is copied to results/runs/NAME, and
so is a run that broke down, with the reason. A run is finished only if its settings are those of the grid and it
started from the weights that are there now.

Seeds are paired: runs of one seed share training levels, evaluation levels and first weights, whatever their method.
Learning rates are chosen for each (env, algo, weights, model) from RATES on TUNING_SEEDS, which no other grid uses: the
one with the highest mean success at the last evaluation, at the temperature of all evaluations but on levels of their
own, from TUNING_LEVELS on; the smaller one of equals. Until it is chosen, a grid of TUNED refuses to run.
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import NamedTuple

import checkpoint
import report
from config import ALGOS, Config, Parser, departures, of_run, usual_settings
from methods import FIRST_TRAIN_SEED
from tables import Run, read_run, whole_runs

HERE = Path(__file__).parent
WORK, RESULTS, MODELS = HERE / "runs", HERE / "results", HERE / "models"
KEPT = ("config.json", "failure.txt", "metrics.jsonl", "eval.jsonl")  # the last one says that a run is whole
WEIGHTS = ("actfocus", "uniform")
GAMES = ("frozenlake", "sokoban", "sudoku", "webshop")
TWO = GAMES[:2]
FEW, TUNING_SEEDS, RATES = range(3), (890, 894), (1e-4, 2e-4, 4e-4)
TUNING_LEVELS = FIRST_TRAIN_SEED * 881  # no run trains on these, and in a shop of few goals the tuning seeds on others
SEEDS = {**dict.fromkeys(GAMES, range(5)), "webshop": (0, 4, 8)}  # in a shop of few goals others would share them
VARIANTS = [  # of Eq. (5), one thing changed at a time
    {}, *({"alpha": alpha} for alpha in (0.0, 0.05, 0.3, 1.0)), *({"beta": beta} for beta in (0.0, 1.0, 2.0)),
    *({"signal": signal} for signal in ("entropy", "policy_nll", "logprob_shift")),
    {"tag_weight": "one"}, {"weight_stats": "mini_batch"},
    {"alpha": 0.08, "beta": 0.0},  # no energy, but the classes' ratio of α = 0.1, β = 0.5, whose mean weight is 1.24
    {"weights": "class_mean"},  # a loss that averages over each class
    {"alpha": 1.0, "beta": 0.0},  # uniform, at ActFocus' learning rate
    {"alpha": 0.1001},  # no change worth the name: what a row differs by without a cause
]
TUNED = ("main", "slippery", "ablation", "tags", "committed")


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
    """All grids; those of TUNED at the learning rates that the tuning runs in results/ choose."""
    chosen = {cell: found["chosen"] for cell, found in tuning().items()}

    def tuned(run: dict, **changes) -> dict:  # nothing before it is tuned: the environment's own rate then
        run = {**run, **changes}
        found = chosen.get(cell_of(run))
        return canonical({**({"learning_rate": found} if found else {}), **run})

    def variant(run: dict, changes: dict) -> dict:  # at ActFocus' rate, also where it is uniform
        return canonical({**tuned(run), **changes})

    def bare(run: dict) -> dict:  # its seed, game and algorithm, with the paper's weights
        return tuned({name: run[name] for name in ("seed", "env", "algo")} | {"weights": "actfocus"})

    def uniform(run: dict) -> dict:
        rest = {name: value for name, value in run.items() if name != "learning_rate"}
        return tuned(rest, weights="uniform")

    both = [run for game in TWO for run in grid(SEEDS[game], [game], ["grpo"], WEIGHTS)]
    focus = [run for run in both if run["weights"] == "actfocus"]
    lake = [run for run in both if run["env"] == "frozenlake"]
    return {
        "tune": Grid([canonical(run) for run in tuning_runs()]),
        "main": Grid([tuned(run) for game in GAMES for run in grid(SEEDS[game], [game], ("grpo", "ppo"), WEIGHTS)],
                     uniform),
        "long": Grid([canonical({**run, "max_steps": 100, "eval_steps": 10, "learning_rate": rate})
                      for run in lake for rate in RATES[:2]], uniform),  # each also at the rate chosen for the other
        "slippery": Grid([tuned(run, success_rate=0.8) for run in lake], uniform),
        "ablation": Grid([variant(run, changes) for run in focus for changes in VARIANTS], bare),
        "rates": Grid([canonical({**run, "learning_rate": rate}) for run in both for rate in (5e-5, *RATES)]
                      + [canonical(run) for game in TWO
                         for run in grid(SEEDS[game], [game], ["ppo"], ["uniform"], learning_rate=RATES)], bare),
        "tags": Grid([tuned(run, tag_weight="one") for run in grid(SEEDS["sokoban"], ["sokoban"], ["ppo"],
                                                                   ["actfocus"])], bare),  # where it loses its format
        "committed": Grid([tuned(run, model="committed") for run in both], uniform),
        "defaults": Grid([canonical(run) for run in grid(FEW, GAMES, ["grpo"], ["actfocus"])]),
        "rivals": Grid([canonical(run) for run in grid(FEW, TWO, ALGOS, ["uniform"])],
                       lambda run: canonical({**run, "algo": "grpo"})),
        "lambda": Grid([canonical(run) for run in grid(FEW, TWO, ["poad"], ["uniform"], lam=[1.0])],
                       lambda run: canonical({name: value for name, value in run.items() if name != "lam"})),
    }


def cell_of(run: dict) -> tuple[str, str, str, str]:
    """What a learning rate is chosen for."""
    return run["env"], run["algo"], run["weights"], run.get("model", "")


def tuning_runs() -> list[dict]:
    """The runs that learning rates are chosen from, evaluated at both ends only, twice on each level."""
    runs = []
    for game in GAMES:
        steps = planned({"env": game, "algo": "grpo"}).max_steps
        settings = dict(learning_rate=RATES, eval_steps=[steps], eval_samples=[2], eval_first=[TUNING_LEVELS])
        runs += grid(TUNING_SEEDS, [game], ("grpo", "ppo"), WEIGHTS, **settings)
        if game in TWO:
            runs += grid(TUNING_SEEDS, [game], ["grpo"], WEIGHTS, **settings, model=["committed"])
    return runs


def tuning() -> dict[tuple, dict]:
    """Of each cell with tuning runs in results/: scores of the rates, seeds, and the chosen rate."""
    cells: dict[tuple, dict[float, list[Run]]] = {}
    for run in tuning_runs():
        one = canonical(run)
        if (found := current(RESULTS / "runs" / name_of(one), one)) and found.evaluations:
            cells.setdefault(cell_of(run), {}).setdefault(run["learning_rate"], []).append(found)
    return {cell: choice(by_rate) for cell, by_rate in cells.items()}


def choice(by_rate: dict[float, list[Run]]) -> dict:
    """The rule of the module's docstring; a run that broke down counts 0."""
    scores = {rate: statistics.mean(0.0 if run.failure else run.evaluations[-1]["success"] for run in runs)
              for rate, runs in sorted(by_rate.items())}
    whole = all(len(by_rate.get(rate, [])) == len(TUNING_SEEDS) for rate in RATES)
    return {"scores": scores, "chosen": max(scores, key=scores.get) if whole else None,
            "seeds": " ".join(map(str, sorted({run.config.seed for runs in by_rate.values() for run in runs})))}


def check_tuned(name: str, runs: Iterable[dict]) -> None:
    """Refuse the runs of a grid whose learning rate is not chosen yet.

    Raises:
        ValueError: it names the first of them.
    """
    chosen = {cell for cell, found in tuning().items() if found["chosen"]}
    for run in runs if name in TUNED else ():
        cell = cell_of({**run, "weights": "actfocus"} if name == "ablation" else run)
        if cell not in chosen:
            raise ValueError(f"{name}: no learning rate is chosen yet for {' '.join(filter(None, cell))}: first "
                             "`python experiments.py tune`, or leave it out by --only")


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
    return Config(**{**usual_settings(run["env"], run["algo"]), **given})


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
    return found is not None and any(
        found.failure or line["step"] >= found.config.max_steps for line in found.evaluations)


def work_off(run: dict, name: str = "", again: bool = False) -> str:
    """Start or continue one run, and keep its numbers when it is done. Returns a line about it."""
    name = name or name_of(run)
    folder, kept = WORK / name, RESULTS / "runs" / name
    goes_on = current(folder, run) and checkpoint.checkpoints(folder)
    if goes_on and not (again and is_finished(folder, run)):
        arguments = ["--resume_from_checkpoint", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        arguments = ["--output_dir", str(folder), *flags(run)]
    (folder / "failure.txt").unlink(missing_ok=True)  # of an earlier try
    log = WORK / f"{name}.log"
    with log.open("a") as file:
        code = subprocess.run([sys.executable, str(HERE / "train.py"), *arguments], stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    said = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    broke_down = code == 1 and said.startswith("stopped: ")  # numbers, not a mistake: this is a result
    if broke_down:
        (folder / "failure.txt").write_text(said + "\n", encoding="utf-8")  # so that --run starts it anew
    if code and not broke_down:
        return f"{name}: exit code {code}, see {log}"
    before = checkpoint.read_lines(kept / "eval.jsonl")
    keep(folder, kept)
    lines = checkpoint.read_lines(kept / "eval.jsonl")
    compared = "" if not before else ", as it was" if before == lines else ", NOT as it was: see git diff"
    reason = f", {said}" if broke_down else ""
    return f"{name}: {100 * lines[-1]['success']:.1f} % after {lines[-1]['step']} steps{compared}{reason}"


def keep(folder: Path, kept: Path) -> None:
    """Copy what tables need."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for part in KEPT:
        if (folder / part).exists():
            shutil.copy(folder / part, kept / part)


def named(pattern: str) -> dict[str, dict]:
    """Runs of all grids and of results/ whose name matches, by name; one in results/ as it was run."""
    known = {name_of(run): run for one in grids().values() for run in one.runs}
    known |= {folder.name: settings_as_run(of_run(folder)) for folder in whole_runs(RESULTS)}
    chosen = {name: run for name, run in sorted(known.items()) if fnmatchcase(name, pattern)}
    if not chosen:
        raise ValueError(f"--run {pattern}: no run of that name in a grid or in results/runs")
    return chosen


def rows_of(patterns: Sequence[str]) -> list[list[Run]]:
    """Of each pattern the runs in results/ whose name matches."""
    if len(patterns) % 2:
        raise ValueError(f"--compare: expected pairs of NAMEs, got {len(patterns)}")
    folders = whole_runs(RESULTS)
    rows = [[read_run(folder) for folder in folders if fnmatchcase(folder.name, pattern)] for pattern in patterns]
    if not all(rows):
        raise ValueError(f"--compare {patterns[rows.index([])]}: no run of that name in results/runs")
    return rows


def write_report() -> list[str]:
    """Everything in results/ that is made of runs."""
    names = {name: [(name_of(run), one.against and name_of(one.against(run))) for run in one.runs]
             for name, one in grids().items()}
    return report.write(RESULTS, names, tuning())


def launch(argv: list[str] | None) -> None:
    """Read the command line and do what it says."""
    parser, known = Parser(description=__doc__.splitlines()[0]), grids()
    parser.add_argument("what", nargs="*", metavar="GRID", help=f"{', '.join(known)}, or report")
    parser.add_argument("--only", metavar="NAME", default="*", help="of the grids' runs those that match")
    parser.add_argument("--run", metavar="NAME", help="run these again, whether they are there or not; * and ? match")
    parser.add_argument("--compare", metavar="NAME", nargs="+", help="differences of the first row of runs in results/ "
                        "to the second, the third to the fourth, ..., and of all together")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    given = parser.parse_args(argv)
    unknown = [name for name in given.what if name not in (*known, "report")]
    if unknown or sum(map(bool, (given.what, given.run, given.compare))) != 1 or given.jobs < 1:
        raise ValueError(f"expected grids ({', '.join(known)}), report, --run NAME or --compare NAME NAME, and --jobs "
                         f"of at least 1; got {' '.join(given.what) or 'no grid'}, --run {given.run}, "
                         f"--compare {' '.join(given.compare or ['None'])}, --jobs {given.jobs}")
    if given.run:
        work_through(named(given.run), given.jobs, given.list, again=True)
    if given.compare:
        print(*report.comparison(rows_of(given.compare)), sep="\n")
    for name in given.what:
        if name == "report":
            print(*write_report(), sep="\n")
            continue
        runs = {name_of(run): run for run in grids()[name].runs}  # of now: `tune` may just have chosen their rates
        wanted = {name: run for name, run in runs.items() if fnmatchcase(name, given.only)}
        missing = {name: run for name, run in wanted.items() if not is_finished(RESULTS / "runs" / name, run)}
        print(f"{name}: {len(missing)} of {len(wanted)} runs are missing", flush=True)
        if not given.list:
            check_tuned(name, missing.values())
        work_through(missing, given.jobs, given.list)


def work_through(runs: dict[str, dict], jobs: int, only_list: bool, again: bool = False) -> None:
    """Run them, several side by side, and print a line about each; or only their names."""
    if only_list:
        print(*runs, sep="\n")
        return
    WORK.mkdir(exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(lambda item: work_off(item[1], item[0], again), runs.items()):
            print(line, flush=True)


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
