"""Trains a language-model agent: rollouts, energies, advantages, weights, clipped updates, and again.

The algorithm of arXiv:2605.14558v1 stands in `iteration()`. `--algo` chooses the advantage, `--weights` the token
weights; they are independent, and `--weights uniform` is α = 1, β = 0 and nothing else.

P prompts, G rollouts each, B = P·G trajectories, T tokens.

    python train.py                                     # FrozenLake, GRPO, ActFocus, the tiny model, on 2 cores
    python train.py --env sokoban --algo ppo --weights uniform
    python train.py --resume_from_checkpoint runs/NAME

Differs from the paper: defaults marked "ours" fit two cores; a step whose gradient is not finite is skipped.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import checkpoint
import plots
from actfocus import gae, group_advantages, policy_loss, token_weights, whiten
from baselines import KINDS, filter_groups, kl_estimate
from checkpoint import State
from envs import ENVS, Env, Episode, make_env, oracle_player, play, random_player
from metrics import clipped, describe, rollout_metrics, summary, token_metrics
from policy import (
    TINY,
    TokenScores,
    load_critic,
    load_model,
    load_tokenizer,
    micro_batches,
    opening_text,
    score_tokens,
    turn_text,
)
from rollout import Batch, PromptTooLong, Trajectory, rollout
from sudoku import GIVENS

FIRST_TRAIN_SEED = 1_000_000  # evaluation levels lie below, the warm start's far above
MAX_BAD_STEPS = 5  # gradients in a row that are not finite, after which a run gives up
HUGE, ABOVE_0 = 1e9, 1e-12


def within(low: float, high: float, default: float) -> Any:
    """A number of `Config` and the interval it must lie in."""
    return field(default=default, metadata={"low": low, "high": high})


def one_of(*allowed: str, default: str) -> Any:
    """A name of `Config` and its choices."""
    return field(default=default, metadata={"allowed": allowed})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Names as in TRL where it has one, the paper's symbols for its own."""

    model: str = str(TINY)  # folder or hub name of policy, reference and critic; paper: Qwen2.5-Instruct
    env: str = one_of(*ENVS, default="frozenlake")  # the task
    algo: str = one_of("grpo", "ppo", default="grpo")  # the advantage: grpo or ppo
    weights: str = one_of("actfocus", "uniform", default="actfocus")  # token weights; uniform is α = 1, β = 0
    alpha: float = within(0, 1, 0.1)  # α, weight of reasoning tokens, §5.1
    beta: float = within(0, HUGE, 0.5)  # β, reach of the energy on action tokens, §5.1
    seed: int = within(0, 9_999, 0)  # of sampling, of the order of mini-batches and of the training levels
    max_steps: int = within(0, HUGE, 30)  # iterations; ours, paper 200
    num_prompts: int = within(1, HUGE, 8)  # P, prompts a step, §5.1
    num_generations: int = within(1, HUGE, 16)  # G, rollouts a prompt, §5.1
    mini_batch_size: int = within(1, HUGE, 32)  # trajectories an optimiser step, §5.1
    micro_batch_tokens: int = within(1, HUGE, 2048)  # tokens a forward pass; ours, leaves the gradient as it is
    learning_rate: float = within(ABOVE_0, HUGE, 1e-4)  # of the policy; ours for the tiny model, paper 1e-6
    critic_learning_rate: float = within(ABOVE_0, HUGE, 3e-4)  # of the critic (PPO); ours, paper 1e-5
    max_grad_norm: float = within(ABOVE_0, HUGE, 1.0)  # gradient clipping; ours
    clip_low: float = within(0, 1, 0.2)  # ε_low, Eq. (6)
    clip_high: float = within(0, HUGE, 0.28)  # ε_high, Eq. (6)
    gamma: float = within(0, 1, 1.0)  # γ of GAE, §5.1
    lam: float = within(0, 1, 1.0)  # λ of GAE, §5.1
    entropy_coef: float = within(0, HUGE, 0.001)  # entropy bonus, §5.1
    kl_coef: float = within(0, HUGE, 0.0)  # KL loss, Eq. (15); paper 0 but for WebShop with GRPO
    kl_kind: str = one_of(*KINDS, default="k1")  # estimator of that KL, §5.1
    filter_fraction: float = within(ABOVE_0, 1, 1.0)  # groups kept, of most varied returns (StarPO-S); ours
    temperature: float = within(ABOVE_0, HUGE, 1.0)  # of the rollouts, §5.1
    max_response_tokens: int = within(1, HUGE, 96)  # tokens a response; ours, paper 400
    max_context: int = within(1, HUGE, 1024)  # tokens a trajectory; ours, paper 3600
    prompt_style: str = one_of("brief", "paper", default="brief")  # brief or paper; ours
    max_turns: int = within(0, HUGE, 0)  # K, turns an episode; 0: the environment's own, §5.1
    actions_per_turn: int = within(0, HUGE, 0)  # actions an answer; 0: the environment's own, §5.1
    max_actions: int = within(0, HUGE, 0)  # actions an episode; 0: the environment's own, §5.1
    format_penalty: float = within(0, HUGE, 0.1)  # taken from the return for an invalid turn, §5.1
    success_rate: float = within(ABOVE_0, 1, 1.0)  # FrozenLake: probability that a move goes where it is meant to; ours
    frozen: float = within(0, 1, 0.8)  # FrozenLake: probability of ice
    coordinates: bool = True  # Sokoban: positions as text above the grid; ours, for the tiny model
    sudoku_level: str = one_of(*GIVENS, default="easy")  # Sudoku: easy has 10 givens, medium 9, hard 6
    hints: bool = True  # Sudoku: the legal digits of every blank below the board
    eval_steps: int = within(1, HUGE, 10)  # steps between evaluations, §5.1
    eval_prompts: int = within(1, HUGE, 128)  # fixed evaluation levels; ours, paper 32
    eval_samples: int = within(1, HUGE, 4)  # samples a level; ours, paper 16
    eval_temperature: float = within(ABOVE_0, HUGE, 0.5)  # of evaluation, §5.1
    save_steps: int = within(1, HUGE, 10)  # steps between checkpoints; ours
    output_dir: str = ""  # run folder; by default a new one under runs/

    def __post_init__(self):
        for name, value, limits in ((f.name, getattr(self, f.name), f.metadata) for f in fields(self)):
            if value not in limits.get("allowed", (value,)):
                raise ValueError(f"--{name} {value}: choose from {', '.join(limits['allowed'])}")
            if "low" in limits and not limits["low"] <= value <= limits["high"]:
                raise ValueError(f"--{name} {value}: must lie in [{limits['low']:g}, {limits['high']:g}]")
        if self.algo == "grpo" and self.num_generations < 2:
            raise ValueError("--num_generations 1: grpo compares the rollouts of a prompt and needs at least 2")
        kept = max(1, round(self.filter_fraction * self.num_prompts)) * self.num_generations
        if kept % self.mini_batch_size:
            raise ValueError(f"--mini_batch_size {self.mini_batch_size}: must divide the {kept} trajectories kept a "
                             "step (num_prompts x num_generations x filter_fraction)")


EXTENDABLE = {"max_steps", "eval_steps", "save_steps"}  # may differ when a run resumes

PRESETS = {
    "laptop": {},
    "smoke": dict(max_steps=2, num_prompts=2, num_generations=4, mini_batch_size=8, eval_prompts=8, eval_samples=2,
                  eval_steps=2, save_steps=1),
    "paper": dict(model="Qwen/Qwen2.5-0.5B-Instruct", max_steps=200, learning_rate=1e-6, critic_learning_rate=1e-5,
                  max_response_tokens=400, max_context=3600, prompt_style="paper", coordinates=False, eval_prompts=32,
                  eval_samples=16),
}
PAPER_FILTER = {("sokoban", "grpo"), ("sokoban", "ppo"), ("frozenlake", "ppo")}  # there it keeps 25 % of the groups


def train(config: Config, state: State, run: Path) -> None:
    """Iterations until `max_steps`, each logged, and where due evaluated and saved."""
    progress = tqdm(range(state.step, config.max_steps), initial=state.step, total=config.max_steps, disable=None)
    for step in progress:
        row, _ = iteration(config, state, step)
        state.step = step + 1
        record(config, state, run, {"step": state.step, **row}, progress)


def iteration(config: Config, state: State, step: int) -> tuple[dict[str, float], Batch]:
    """The algorithm: sample, score, weigh, update. Returns the step's metrics and its batch."""
    start = time.perf_counter()
    rows = sample(config, state, step)  # P·G trajectories under π_old
    returns = torch.tensor([row.episode.return_ for row in rows])
    kept = filter_groups(returns, config.num_generations, config.filter_fraction)
    batch = Batch.of([rows[i] for i in kept])
    sampled = time.perf_counter()
    reference = score_batch(state.reference, batch, config)
    batch.energy, batch.ref_logp = reference.energy, reference.logp  # Eₜ under π_ref, Eq. (4)
    scored = time.perf_counter()
    batch.advantages = ADVANTAGES[config.algo](config, state, batch)  # Aₜ, Eq. (3) or (12)
    alpha, beta = (config.alpha, config.beta) if config.weights == "actfocus" else (1.0, 0.0)
    batch.weights = token_weights(batch.energy, batch.is_action, batch.is_reasoning, alpha, beta)  # wₜ, Eq. (5)
    updated = update(config, state, batch)  # Eq. (6)
    seconds = {"seconds_rollout": sampled - start, "seconds_reference": scored - sampled,
               "seconds_update": time.perf_counter() - scored}
    return {**rollout_metrics(rows), **token_metrics(batch), **updated, **seconds}, batch


def sample(config: Config, state: State, step: int) -> list[Trajectory]:
    """G rollouts of each of the step's P prompts. Its levels are no other step's, whatever the seed."""
    first = FIRST_TRAIN_SEED * (1 + config.seed) + step * config.num_prompts
    episodes = make_episodes(config, range(first, first + config.num_prompts), config.num_generations)
    return rollout(state.policy, state.tokenizer, episodes, state.generator, config.temperature,
                   config.max_response_tokens, config.max_context)


def make_episodes(config: Config, seeds: Sequence[int], samples: int) -> list[Episode]:
    """`samples` episodes of each level, a level's adjacent; they share the level, not their luck."""
    return [Episode(build_env(config), seed, replica, config.prompt_style, config.format_penalty)
            for seed in seeds for replica in range(samples)]


def build_env(config: Config) -> Env:
    """The environment with the run's options, and with those of its budgets that the run sets."""
    env = make_env(config.env, **env_options(config))
    for budget in ("max_turns", "actions_per_turn", "max_actions"):
        setattr(env, budget, getattr(config, budget) or getattr(env, budget))
    return env


def env_options(config: Config) -> dict:
    """The settings that belong to the run's environment alone."""
    return {"sokoban": dict(coordinates=config.coordinates),
            "frozenlake": dict(success_rate=config.success_rate, frozen=config.frozen),
            "sudoku": dict(level=config.sudoku_level, hints=config.hints)}[config.env]


def score_batch(model: transformers.PreTrainedModel, batch: Batch, config: Config) -> TokenScores:
    """What a frozen model says of the whole batch, (B, T) each."""
    scores = TokenScores(*(torch.zeros(batch.tokens.shape) for _ in TokenScores._fields))
    with torch.no_grad():
        for rows in micro_batches(batch.lengths.tolist(), config.micro_batch_tokens):
            part = batch.take(rows)
            pieces = score_tokens(model, part.tokens, part.is_response, config.temperature)
            for whole, piece in zip(scores, pieces, strict=True):
                whole[rows, : piece.shape[1]] = piece
    return scores


def grpo_advantages(config: Config, state: State, batch: Batch) -> Tensor:
    """(B, T): the group advantage on every token of its row. Eq. (3)."""
    advantages = group_advantages(batch.returns, config.num_generations)
    return torch.where(batch.is_response, advantages[:, None], 0.0)


def ppo_advantages(config: Config, state: State, batch: Batch) -> Tensor:
    """(B, T): GAE with R(τ) on the last response token, whitened over response tokens. Eq. (12)."""
    values = torch.zeros(batch.tokens.shape)
    with torch.no_grad():
        for rows in micro_batches(batch.lengths.tolist(), config.micro_batch_tokens):
            part = batch.take(rows)
            values[rows, : part.tokens.shape[1]] = state.critic(part.tokens, part.is_response)
    advantages, batch.value_targets = gae(batch.final_rewards(), values, batch.is_response, config.gamma, config.lam)
    return whiten(advantages, batch.is_response)


ADVANTAGES = {"grpo": grpo_advantages, "ppo": ppo_advantages}


def update(config: Config, state: State, batch: Batch) -> dict[str, float]:
    """One epoch of optimiser steps over mini-batches; each is cut into micro-batches whose gradients add up."""
    sums = dict.fromkeys(("loss", "value_loss", "clip_fraction", "logp_gap_max"), 0.0)
    order = torch.randperm(len(batch.returns), generator=state.generator)
    mini_batches = [batch.take(rows) for rows in order.split(config.mini_batch_size)]
    norms, skipped = [], state.skipped
    for number, mini in enumerate(mini_batches):
        total_weight, tokens = mini.weights.sum().item(), int(mini.is_response.sum())
        for rows in micro_batches(mini.lengths.tolist(), config.micro_batch_tokens):
            part = mini.take(rows)
            scores = score_tokens(state.policy, part.tokens, part.is_response, config.temperature)
            loss = policy_loss(scores.logp, part.old_logp, part.advantages, part.weights, config.clip_low,
                               config.clip_high, total_weight)
            regulariser = -config.entropy_coef * scores.entropy
            if config.kl_coef:
                regulariser = regulariser + config.kl_coef * kl_estimate(scores.logp, part.ref_logp, config.kl_kind)
            (loss + regulariser[part.is_response].sum() / tokens).backward()
            sums["loss"] += loss.item() / len(mini_batches)
            if state.critic:
                error = state.critic(part.tokens, part.is_response) - part.value_targets
                value_loss = error.square().sum() / 2 / tokens
                value_loss.backward()
                sums["value_loss"] += value_loss.item() / len(mini_batches)
            log_ratio = torch.where(part.is_response, scores.logp.detach() - part.old_logp, 0.0)
            if number == 0:  # before the first optimiser step π_θ is π_old, so the ratio must be 1
                sums["logp_gap_max"] = max(sums["logp_gap_max"], log_ratio.abs().max().item())
            outside = clipped(log_ratio, part.advantages, config.clip_low, config.clip_high)
            sums["clip_fraction"] += outside / int(batch.is_response.sum())
        norms.append(optimizer_step(config, state))
    finite = [norm for norm in norms if math.isfinite(norm)]
    k3 = kl_estimate(batch.old_logp, batch.ref_logp, "k3")[batch.is_response]
    return {**sums, "kl_ref": k3.mean().item(), "grad_norm": sum(finite) / max(1, len(finite)),
            "skipped_steps": state.skipped - skipped}


def optimizer_step(config: Config, state: State) -> float:
    """Clip the gradient and step; a gradient that is not finite changes nothing, and five in a row end the run."""
    pairs = [(state.policy, state.optimizer)] + ([(state.critic, state.critic_optimizer)] if state.critic else [])
    norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm) for model, _ in pairs]
    good = all(norm.isfinite() for norm in norms)
    for _, optimizer in pairs:
        if good:
            optimizer.step()
        optimizer.zero_grad()
    state.skipped += not good
    state.bad_steps = 0 if good else state.bad_steps + 1
    if state.bad_steps == MAX_BAD_STEPS:
        raise FloatingPointError(f"the gradient was not finite {MAX_BAD_STEPS} times in a row (step {state.step + 1})")
    return norms[0].item()


def record(config: Config, state: State, run: Path, row: dict, progress: tqdm) -> None:
    """Log line, metrics, and what is due after this step: evaluation, then checkpoint."""
    seconds = row["seconds_rollout"] + row["seconds_reference"] + row["seconds_update"]
    progress.set_postfix(success=f"{row['success']:.2f}", ret=f"{row['return_mean']:.2f}", s=f"{seconds:.1f}")
    progress.write(f"step {row['step']:4d}  success {row['success']:.3f}  return {row['return_mean']:7.3f}  "
                   f"invalid {row['invalid_turns']:.3f}  action entropy {row['entropy_action']:.2f}  "
                   f"action gradient {row['gradient_share_action']:.2f}  kl {row['kl_ref']:.4f}  {seconds:5.1f} s",
                   file=sys.stdout)
    checkpoint.append_line(run / "metrics.jsonl", row)
    last = state.step == config.max_steps
    if last or state.step % config.eval_steps == 0:
        evaluate_step(config, state, run)
    if last or state.step % config.save_steps == 0:
        checkpoint.save(state, run)


def evaluate_step(config: Config, state: State, run: Path) -> dict:
    """Evaluate, keep the numbers and two episodes as text."""
    result, rows = evaluate_policy(config, state.policy, state.tokenizer)
    checkpoint.append_line(run / "eval.jsonl", {"step": state.step, **result})
    texts = [state.tokenizer.decode(row.tokens) + f"\nreturn {row.episode.return_:.1f}\n" for row in rows[:2]]
    (run / "samples" / f"step-{state.step}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    tqdm.write(f"evaluation at step {state.step}: {describe(result)}", file=sys.stdout)
    return result


def evaluate_policy(config: Config, policy, tokenizer) -> tuple[dict, list[Trajectory]]:
    """Success on the fixed evaluation levels 0, 1, …, with the same sampling noise every time."""
    generator = torch.Generator(policy.device).manual_seed(0)
    rows: list[Trajectory] = []
    at_once = max(1, 256 // config.eval_samples)  # levels whose rollouts share one cache
    for first in range(0, config.eval_prompts, at_once):
        episodes = make_episodes(config, range(first, min(first + at_once, config.eval_prompts)), config.eval_samples)
        rows += rollout(policy, tokenizer, episodes, generator, config.eval_temperature, config.max_response_tokens,
                        config.max_context)
    return summary([row.episode for row in rows], config.eval_samples), rows


def evaluate_player(config: Config, player) -> dict:
    """The same levels and budgets for a scripted player: the random floor, the oracle's ceiling."""
    per_replica = [play(build_env(config), player, range(config.eval_prompts), i) for i in range(config.eval_samples)]
    return summary([episode for level in zip(*per_replica, strict=True) for episode in level], config.eval_samples)


def build_state(config: Config) -> State:
    """Policy, frozen reference and critic, all copies of one model; Adam as in the paper."""
    policy, reference = load_model(config.model), load_model(config.model).requires_grad_(False)
    critic = load_critic(config.model) if config.algo == "ppo" else None
    critic_optimizer = torch.optim.Adam(critic.parameters(), config.critic_learning_rate) if critic else None
    tokenizer, levels = load_tokenizer(config.model), make_episodes(config, range(config.eval_prompts), 1)
    turn_text(tokenizer, "")  # refuses a chat template that cannot be followed
    texts = [opening_text(tokenizer, level.system(), level.user()) for level in levels]
    prompt = max(map(len, tokenizer(texts, add_special_tokens=False).input_ids))
    if prompt + config.max_response_tokens > config.max_context:
        raise ValueError(f"--max_context {config.max_context}: a prompt of {prompt} and a response of "
                         f"{config.max_response_tokens} tokens (--max_response_tokens) do not fit")
    return State(policy, reference, tokenizer, torch.optim.Adam(policy.parameters(), config.learning_rate),
                 torch.Generator().manual_seed(config.seed), critic, critic_optimizer)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like all others."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; --help lists all flags")


def config_parser(description: str) -> Parser:
    """A flag per field of `Config`; only flags that were given reach the namespace."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=_boolean if f.type is bool else f.type, help=f"default {f.default!r}")
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[Config, Path | None]:
    """Configuration and, when resuming, the checkpoint; a ValueError names a flag that is wrong."""
    parser = config_parser(__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="laptop is the default")
    parser.add_argument("--resume_from_checkpoint", type=Path, help="a run folder or a checkpoint-N in it")
    given = vars(parser.parse_args(argv))
    path = given.pop("resume_from_checkpoint", None)
    if path is not None:
        path = checkpoint.find_checkpoint(path)
        saved = {**asdict(Config()), **checkpoint.read_config(path.parent)}  # an older run lacks newer settings
        saved |= {"output_dir": str(path.parent), "preset": "as it was started"}
        for name, value in given.items():
            if name not in EXTENDABLE and value != saved[name]:
                raise ValueError(f"--{name} {value}: {path} belongs to a run with {name} {saved[name]}")
        del saved["preset"]
        return Config(**{**saved, **given}), path
    preset = given.pop("preset", "laptop")
    changed = dict(PRESETS[preset])
    if preset == "paper" and (given.get("env", Config.env), given.get("algo", Config.algo)) in PAPER_FILTER:
        changed["filter_fraction"] = 0.25
    if changed:
        print(f"preset {preset}:", " ".join(f"--{name} {value}" for name, value in changed.items()))
    return Config(**{**changed, **given}), None


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 for a user's mistake, 1 for a run that broke down."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config, path = parse(argv)
        state = build_state(config)
        if path:
            checkpoint.restore(state, path)
        run = path.parent if path else checkpoint.new_run(asdict(config))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if path:
        checkpoint.forget_later(run, state.step)
    else:
        checkpoint.save(state, run)
    if not checkpoint.read_lines(run / "eval.jsonl"):
        evaluate_step(config, state, run)
    try:
        train(config, state, run)
    except PromptTooLong as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"stopped: {error}; the last checkpoint is {checkpoint.find_checkpoint(run)}", file=sys.stderr)
        return 1
    report(config, run)
    return 0


def report(config: Config, run: Path) -> None:
    """Before and after, floor and ceiling, and where to look."""
    lines = checkpoint.read_lines(run / "eval.jsonl")
    floor, ceiling = (evaluate_player(config, player) for player in (random_player, oracle_player))
    plot = plots.learning_curves([run], run / "plots" / "learning.png", floor["success"], ceiling["success"])
    named = {"before": lines[0], "after": lines[-1], "random floor": floor, "oracle ceiling": ceiling}
    print(*(f"{name:>14}: {describe(result)}" for name, result in named.items()), sep="\n")
    print(f"run  {run}\nplot {plot}")


if __name__ == "__main__":
    sys.exit(main())
