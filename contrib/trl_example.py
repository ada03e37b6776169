"""FrozenLake in TRL: the tiny agent trained by GRPOTrainer, on our rollouts, with ActFocus's weights or without.

The trajectories come in through TRL's `rollout_func`: token ids, the mask of what the policy wrote, the return. Model,
levels, budgets and optimiser are those of `python train.py`: 8 prompts x 8 rollouts, 2 mini-batches of 32.
(Eqs. (5) and (6) of arXiv:2605.14558v1 stand in trl_actfocus.py.) From the repository's root, beside `pip install trl`:

    python -m contrib.trl_example
    accelerate launch --multi_gpu --num_processes 2 -m contrib.trl_example    # CPU processes where there is no GPU

(With `--cpu` in its place accelerate 1.15 starts a single process, silently.)

An iteration is one generation batch; TRL counts its optimiser steps, two an iteration.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from checkpoint import append_line
from config import Config
from contrib.trl_actfocus import ActFocusTrainer
from envs import Episode
from methods import FIRST_TRAIN_SEED, build_env, rollout_settings
from metrics import describe
from policy import load_model, load_tokenizer
from rollout import Trajectory, rollout
from train import evaluate_policy


class Player:
    """TRL's `rollout_func`: plays the levels whose numbers are the prompts, a group's adjacent."""

    def __init__(self, config: Config):
        self.config, self.generator = config, None

    def __call__(self, levels: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        """Trajectories in TRL's columns; what lies before the first response is the prompt."""
        rows = self.play(levels, trainer)
        cut = [(row, row.spans[0][0]) for row in rows]
        return {"prompt_ids": [row.tokens[:start] for row, start in cut],
                "completion_ids": [row.tokens[start:] for row, start in cut],
                "logprobs": [row.logp[start:] for row, start in cut],
                "env_mask": [[int(own) for own in row.is_response[start:]] for row, start in cut],
                "episode_return": [row.episode.return_ for row in rows],
                "success": [row.episode.success for row in rows]}

    def play(self, levels: list[str], trainer: GRPOTrainer) -> list[Trajectory]:
        """Our rollouts under TRL's policy; no two share their luck."""
        config, process = self.config, trainer.accelerator.process_index
        if self.generator is None:
            self.generator = torch.Generator(trainer.model.device).manual_seed(config.seed + 10_000 * process)
        episodes = [Episode(build_env(config), int(level), process * len(levels) + i, config.prompt_style,
                            config.format_penalty) for i, level in enumerate(levels)]
        return rollout(trainer.model, trainer.processing_class, episodes, self.generator, *rollout_settings(config))


def reward(episode_return: list[float], success: list[bool], log_metric, **others) -> list[float]:
    """R(τ), which the rollout already knows."""
    log_metric("success", sum(success) / len(success))
    return episode_return


class Log(TrainerCallback):
    """A line an iteration: on the screen, and with the seconds it took to the file."""

    def __init__(self, path: Path | None):
        self.path, self.start = path, (0.0, 0.0)

    def on_train_begin(self, args, state, control, **others):
        """The clock starts."""
        self.start = time.perf_counter(), time.process_time()

    def on_log(self, args, state, control, logs, **others):
        """TRL's means over the iteration."""
        if "reward" not in logs or "loss" not in logs or not state.is_world_process_zero:
            return
        now = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = (end - start for start, end in zip(self.start, now, strict=True))
        names = ("success", "reward", "reward_std", "frac_reward_zero_std", "loss", "grad_norm", "entropy",
                 "clip_ratio/region_mean", "completions/mean_length")
        row = {"step": state.global_step, **{name: logs[name] for name in names}, "seconds": seconds,
               "cpu_seconds": cpu_seconds}
        self.start = now
        print(f"step {row['step']:4d}  success {row['success']:.3f}  return {row['reward']:7.3f}  "
              f"entropy {row['entropy']:.3f}  {row['seconds']:5.1f} s", flush=True)
        if self.path:
            append_line(self.path, row)


def settings(config: Config, processes: int = 1, **options) -> GRPOConfig:
    """The run's settings in TRL's words; an optimiser step is one micro-batch on every process."""
    minis = config.num_prompts * config.num_generations // config.mini_batch_size
    given = dict(
        output_dir="runs/trl", max_steps=config.max_steps * minis, num_generations=config.num_generations,
        per_device_train_batch_size=config.mini_batch_size // processes, steps_per_generation=minis,
        gradient_accumulation_steps=1, loss_type="dapo", importance_sampling_level="token", beta=config.kl_coef,
        epsilon=config.clip_low, epsilon_high=config.clip_high, entropy_coef=config.entropy_coef,
        temperature=config.temperature, learning_rate=config.learning_rate, lr_scheduler_type="constant",
        max_grad_norm=config.max_grad_norm, logging_steps=minis, seed=config.seed, shuffle_dataset=False,
        use_cpu=not torch.cuda.is_available(), bf16=False, activation_checkpointing=False, save_strategy="no",
        report_to="none", disable_tqdm=True, ddp_find_unused_parameters=False)
    return GRPOConfig(**given | options)


def build(config: Config, log: Path | None = None, processes: int = 1, **options) -> GRPOTrainer:
    """The trainer, on the levels that train.py meets."""
    first = FIRST_TRAIN_SEED * (1 + config.seed)
    levels = range(first, first + config.max_steps * config.num_prompts)
    common = dict(model=load_model(config.model), reward_funcs=reward, args=settings(config, processes, **options),
                  train_dataset=Dataset.from_dict({"prompt": [str(level) for level in levels]}),
                  processing_class=load_tokenizer(config.model), rollout_func=Player(config), callbacks=[Log(log)])
    if config.weights == "actfocus":
        trainer = ActFocusTrainer(alpha=config.alpha, reach=config.beta, **common)
    else:
        trainer = GRPOTrainer(**common)
    trainer.remove_callback(PrinterCallback)
    return trainer


def finish(trainer: GRPOTrainer) -> None:
    """Leave the process group in order: a process that just ends can abort the others' gloo threads."""
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = None  # Careful: what wraps the model must go before the group, or it waits for ever
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def main() -> None:
    """Evaluate, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=50, help="generation batches")
    parser.add_argument("--weights", choices=["actfocus", "uniform"], default="actfocus")
    parser.add_argument("--num_generations", type=int, default=Config.num_generations, help="rollouts of a level")
    parser.add_argument("--mini_batch_size", type=int, default=Config.mini_batch_size, help="rollouts a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="jsonl file")
    parser.add_argument("--no_evaluation", action="store_true")
    args = parser.parse_args()
    config = Config(max_steps=args.iterations, weights=args.weights, seed=args.seed,
                    num_generations=args.num_generations, mini_batch_size=args.mini_batch_size)
    trainer = build(config, args.log, int(os.environ.get("WORLD_SIZE", "1")))
    for done in (0, args.iterations):
        if done:
            trainer.train()
        if args.no_evaluation:
            continue
        result, _ = evaluate_policy(config, trainer.model, trainer.processing_class)  # shared out to the processes
        if trainer.accelerator.is_main_process:
            print(f"after {done} iterations: {describe(result)}", flush=True)
            if args.log:
                append_line(args.log.with_suffix(".eval.jsonl"), {"iterations": done, **result})
    finish(trainer)


if __name__ == "__main__":
    main()
