"""Runs grids of experiments: every combination is a run of train.py with its own folder, at one thread.

    python experiments.py rivals                # all missing runs of a grid, two at a time
    python experiments.py rivals --jobs 4 --list

Kill it at any moment: finished runs are skipped, others go on from their last checkpoint (bit for bit, see train.py).
What a table needs of a finished run (settings with commit, metrics, evaluations) is copied to results/runs/NAME.
Seeds are paired: runs of one seed share training levels, evaluation levels and first weights, whatever their method.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import checkpoint

HERE = Path(__file__).parent
WORK, RESULTS = HERE / "runs", HERE / "results" / "runs"
KEPT = ("config.json", "metrics.jsonl", "eval.jsonl")
WEIGHTS = ("actfocus", "uniform")


def grid(
    envs: Iterable[str], algos: Iterable[str], weights: Iterable[str], seeds: int, **settings: Iterable
) -> list[dict]:
    """All combinations as flags of train.py, seed by seed, so that a stopped grid has all methods on some seeds."""
    names = ("seed", "env", "algo", "weights", *settings)
    return [dict(zip(names, values, strict=True))
            for values in product(range(seeds), envs, algos, weights, *settings.values())]


GRIDS = {
    "main": grid(("frozenlake", "sokoban", "sudoku", "webshop"), ("grpo", "ppo"), WEIGHTS, 5),
    "rivals": grid(("frozenlake", "sokoban"), ("dapo", "empg", "poad", "ntpo", "carl"), ("uniform",), 3),
}


def name_of(run: dict) -> str:
    """The run's folder: environment, method, seed, then whatever else it sets."""
    rest = [f"{key}{value}" for key, value in run.items() if key not in ("env", "algo", "weights", "seed")]
    return "-".join([run["env"], run["algo"], run["weights"], f"seed{run['seed']}", *rest])


def is_finished(folder: Path) -> bool:
    """Whether the run evaluated its last step."""
    lines = checkpoint.read_lines(folder / "eval.jsonl")
    return bool(lines) and lines[-1]["step"] >= checkpoint.read_config(folder)["max_steps"]


def work_off(run: dict) -> str:
    """Start or continue one run, and keep its numbers when it is done. Returns a line about it."""
    name = name_of(run)
    folder, kept = WORK / name, RESULTS / name
    if list(folder.glob("checkpoint-[0-9]*")):
        flags = ["--resume_from_checkpoint", folder]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--output_dir", folder, *(part for key, value in run.items() for part in (f"--{key}", value))]
    log = WORK / f"{name}.log"
    with log.open("a") as file:
        code = subprocess.run([sys.executable, HERE / "train.py", *map(str, flags)], stdout=file, stderr=file,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        return f"{name}: stopped with exit code {code}, see {log}"
    kept.mkdir(parents=True, exist_ok=True)
    for part in KEPT:
        shutil.copy(folder / part, kept / part)
    last = checkpoint.read_lines(kept / "eval.jsonl")[-1]
    return f"{name}: {100 * last['success']:.1f} % after {last['step']} steps"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", nargs="+", choices=GRIDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    arguments = parser.parse_args()
    runs = [run for name in arguments.grid for run in GRIDS[name]]
    missing = [run for run in runs if not is_finished(RESULTS / name_of(run))]
    print(f"{len(missing)} of {len(runs)} runs are missing")
    if arguments.list:
        print(*map(name_of, missing), sep="\n")
        return 0
    WORK.mkdir(exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for line in pool.map(work_off, missing):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
