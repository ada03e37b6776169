"""Seconds an iteration: TRL's GRPOTrainer and train.py in turns, in one process, on one core.

    OMP_NUM_THREADS=1 taskset -c 1 python -m contrib.trl_bench --rounds 5 --log results/trl/bench.jsonl

Same model, levels, number of trajectories and optimiser steps, uniform weights; both play with rollout.rollout. Each
learns on by itself, so their episodes come to differ in length: tokens are logged too. The first round is not counted.
The two part where TRL scores padding and prompts, and asks once more for the old log-probs, and train.py the reference.
(GRPO as in arXiv:2605.14558v1, Eq. (3).)
"""

import argparse
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from transformers import TrainerCallback

from checkpoint import append_line
from config import Config
from contrib.trl_example import Log, build
from train import build_state, iteration


class Turns(TrainerCallback):
    """After every iteration of TRL's one of ours."""

    def __init__(self, config: Config, log: Path | None):
        self.config, self.log, self.state, self.rows, self.start = config, log, build_state(config), [], None

    def on_train_begin(self, args, state, control, **others):
        """The clock starts."""
        self.start = clock()

    def on_log(self, args, state, control, logs, **others):
        """TRL has just finished one."""
        if "loss" not in logs or "reward" not in logs:
            return
        trl = clock() - self.start
        start = clock()
        metrics, batch = iteration(self.config, self.state, len(self.rows))
        ours = clock() - start
        row = {"trl_seconds": trl[0], "trl_cpu_seconds": trl[1], "seconds": ours[0], "cpu_seconds": ours[1]}
        row = {name: value.item() for name, value in row.items()}
        row |= {"trl_response_tokens": logs["completions/mean_length"],
                "response_tokens": batch.is_response.sum().item() / len(batch.returns),
                **{name: value for name, value in metrics.items() if name.startswith("seconds_")}}
        self.rows.append(row)
        print("  ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)
        if self.log:
            append_line(self.log, row)
        self.start = clock()


def clock() -> torch.Tensor:
    """Wall and CPU seconds; the second does not mind a busy core."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def main() -> None:
    """Rounds, and their mean and spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="that count")
    parser.add_argument("--log", type=Path, help="jsonl file")
    args = parser.parse_args()
    config = Config(max_steps=args.rounds + 1, weights="uniform")
    trainer, turns = build(config), Turns(config, args.log)
    trainer.remove_callback(Log)
    trainer.add_callback(turns)
    trainer.train()
    for name in ("trl_seconds", "seconds", "trl_cpu_seconds", "cpu_seconds"):
        values = [row[name] for row in turns.rows[1:]]
        print(f"{name}: mean {mean(values):.1f}, std {stdev(values) if len(values) > 1 else 0:.1f}, n = {len(values)}")


if __name__ == "__main__":
    main()
