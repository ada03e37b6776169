"""Trains a language-model agent: rollouts, energies, advantages, weights, clipped updates, and again.

The algorithm of arXiv:2605.14558v1 stands in `train()`. `--algo` chooses the advantage, `--weights` the token weights; they are
independent, and `--weights uniform` is α = 1, β = 0 and nothing else.

P prompts, G rollouts each, B = P·G trajectories, T tokens.

    python train.py                                     # FrozenLake, GRPO, ActFocus, the tiny model, on 2 cores
    python train.py --env sokoban --algo ppo --weights uniform
    python train.py --resume_from_checkpoint runs/NAME

Differs from the paper: defaults marked "ours" fit two cores; a step whose gradient is not finite is skipped.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import checkpoint
import plots
from actfocus import gae, group_advantages, policy_loss, token_weights, whiten
from baselines import KINDS, filter_groups, kl_estimate
from envs import ENVS, Env, Episode, make_env, oracle_player, play, random_player
from policy import TINY, Critic, TokenScores, load_critic, load_model, load_tokenizer, micro_batches, score_tokens
from rollout import Batch, Trajectory, rollout, success_interval

FIRST_TRAIN_SEED = 1_000_000  # evaluation levels lie below, the warm start's far above
MAX_BAD_STEPS = 5


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Names as in TRL where it has one, the paper's symbols for its own."""

    model: str = str(TINY)  # folder or hub name of policy, reference and critic; paper: Qwen2.5-Instruct
    env: str = "frozenlake"  # the task
    algo: str = "grpo"  # the advantage: grpo or ppo
    weights: str = "actfocus"  # the token weights: actfocus, or uniform (α = 1, β = 0)
    alpha: float = 0.1  # α, weight of reasoning tokens, §5.1
    beta: float = 0.5  # β, reach of the energy on action tokens, §5.1
    seed: int = 0  # of sampling, of the order of mini-batches and of the training levels
    max_steps: int = 40  # iterations; ours, paper 200
    num_prompts: int = 8  # P, prompts a step, §5.1
    num_generations: int = 16  # G, rollouts a prompt, §5.1
    mini_batch_size: int = 32  # trajectories an optimiser step, §5.1
    micro_batch_tokens: int = 4096  # tokens a forward pass; ours, changes memory and speed, not the gradient
    learning_rate: float = 3e-4  # of the policy; ours for the tiny model, paper 1e-6
    critic_learning_rate: float = 1e-3  # of the critic (PPO); ours for the tiny model, paper 1e-5
    max_grad_norm: float = 1.0  # gradient clipping; ours
    clip_low: float = 0.2  # ε_low, Eq. (6)
    clip_high: float = 0.28  # ε_high, Eq. (6)
    gamma: float = 1.0  # γ of GAE, §5.1
    lam: float = 1.0  # λ of GAE, §5.1
    entropy_coef: float = 0.001  # entropy bonus, §5.1
    kl_coef: float = 0.0  # KL to the reference in the loss, Eq. (15); paper 0 but for WebShop with GRPO
    kl_kind: str = "k1"  # estimator of that KL, §5.1
    filter_fraction: float = 1.0  # share of prompt groups kept, those of most varied returns (StarPO-S); ours
    temperature: float = 1.0  # of the rollouts, §5.1
    max_response_tokens: int = 96  # tokens a response; ours, paper 400
    max_context: int = 1024  # tokens a trajectory; ours, paper 3600
    prompt_style: str = "brief"  # brief or paper; ours
    max_turns: int = 5  # K, turns an episode, §5.1
    actions_per_turn: int = 2  # actions an answer, §5.1
    max_actions: int = 10  # actions an episode, §5.1
    format_penalty: float = 0.1  # taken from the return for an invalid turn, §5.1
    success_rate: float = 1.0  # FrozenLake: probability that a move goes where it is meant to; ours
    frozen: float = 0.8  # FrozenLake: probability of ice
    coordinates: bool = True  # Sokoban: positions as text above the grid; ours, for the tiny model
    eval_steps: int = 10  # steps between evaluations, §5.1
    eval_prompts: int = 128  # fixed evaluation levels; ours, paper 32
    eval_samples: int = 4  # samples a level; ours, paper 16
    eval_temperature: float = 0.5  # of evaluation, §5.1
    save_steps: int = 10  # steps between checkpoints; ours
    output_dir: str = ""  # run folder; by default a new one under runs/

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)}: choose from {', '.join(allowed)}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"--{name} {getattr(self, name)}: must lie in [{low:g}, {high:g}]")
        if self.algo == "grpo" and self.num_generations < 2:
            raise ValueError("--num_generations 1: grpo compares the rollouts of a prompt and needs at least 2")
        kept = max(1, round(self.filter_fraction * self.num_prompts)) * self.num_generations
        if kept % self.mini_batch_size:
            raise ValueError(f"--mini_batch_size {self.mini_batch_size}: must divide the {kept} trajectories kept a step "
                             f"(num_prompts x num_generations x filter_fraction)")


INF = math.inf
TINIEST = 1e-12  # stands for "above 0"
CHOICES = {"env": tuple(ENVS), "algo": ("grpo", "ppo"), "weights": ("actfocus", "uniform"), "kl_kind": KINDS,
           "prompt_style": ("brief", "paper")}
COUNTS = ("num_prompts", "num_generations", "mini_batch_size", "micro_batch_tokens", "max_response_tokens", "max_context",
          "max_turns", "actions_per_turn", "max_actions", "eval_steps", "eval_prompts", "eval_samples", "save_steps")
RANGES = {**dict.fromkeys(COUNTS, (1, INF)), "alpha": (0, 1), "beta": (0, INF), "seed": (0, 9_999), "max_steps": (0, INF),
          **dict.fromkeys(("learning_rate", "critic_learning_rate", "max_grad_norm", "temperature", "eval_temperature",
                           "clip_high"), (TINIEST, 1e9)),
          **dict.fromkeys(("clip_low", "gamma", "lam", "frozen"), (0, 1)), "filter_fraction": (TINIEST, 1),
          "success_rate": (TINIEST, 1), **dict.fromkeys(("entropy_coef", "kl_coef", "format_penalty"), (0, INF))}
EXTENDABLE = {"max_steps", "eval_steps", "save_steps", "output_dir"}  # may differ when a run resumes

PRESETS = {
    "laptop": {},
    "smoke": dict(max_steps=2, num_prompts=2, num_generations=4, mini_batch_size=8, eval_prompts=8, eval_samples=2, eval_steps=2,
                  save_steps=1),
    "paper": dict(model="Qwen/Qwen2.5-0.5B-Instruct", max_steps=200, learning_rate=1e-6, critic_learning_rate=1e-5,
                  max_response_tokens=400, max_context=3600, prompt_style="paper", coordinates=False, eval_prompts=32,
                  eval_samples=16),
}
PAPER_FILTER = {("sokoban", "grpo"), ("sokoban", "ppo"), ("frozenlake", "ppo")}  # where the paper keeps 25 % of the groups


@dataclass
class State:
    """What changes while a run goes on."""

    policy: transformers.PreTrainedModel
    reference: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    skipped: int = 0  # optimiser steps whose gradient was not finite
    bad_steps: int = 0  # how many of them in a row
    metrics: dict = field(default_factory=dict)  # of the step in progress


def train(config: Config, state: State, run: Path) -> None:
    """The algorithm: each iteration samples, scores, weighs and updates. Eqs. (3)-(6)."""
    progress = tqdm(range(state.step, config.max_steps), initial=state.step, total=config.max_steps, disable=None)
    for step in progress:
        start = time.perf_counter()
        rows = sample(config, state, step)  # P·G trajectories under π_old
        returns = torch.tensor([row.episode.return_ for row in rows])
        kept = filter_groups(returns, config.num_generations, config.filter_fraction)
        batch = Batch.of([rows[i] for i in kept])
        sampled = time.perf_counter()
        reference = score_batch(state.reference, batch, config)
        batch.energy, batch.ref_logp = reference.energy, reference.logp  # Eₜ under π_ref, Eq. (4)
        batch.advantages = ADVANTAGES[config.algo](config, state, batch)  # Aₜ
        alpha, beta = (config.alpha, config.beta) if config.weights == "actfocus" else (1.0, 0.0)
        batch.weights = token_weights(batch.energy, batch.is_action, batch.is_reasoning, alpha, beta)  # wₜ, Eq. (5)
        updated = update(config, state, batch)  # Eq. (6)
        state.step = step + 1
        seconds = {"seconds_rollout": sampled - start, "seconds_update": time.perf_counter() - sampled}
        row = {"step": state.step, **rollout_metrics(rows), **token_metrics(batch, reference), **updated, **seconds}
        record(config, state, run, row, progress)


def sample(config: Config, state: State, step: int) -> list[Trajectory]:
    """G rollouts of each of the step's P prompts. Its levels are no other step's, whatever the seed."""
    first = FIRST_TRAIN_SEED * (1 + config.seed) + step * config.num_prompts
    episodes = make_episodes(config, range(first, first + config.num_prompts), config.num_generations)
    return rollout(state.policy, state.tokenizer, episodes, state.generator, config.temperature, config.max_response_tokens,
                   config.max_context)


def make_episodes(config: Config, seeds: Sequence[int], samples: int) -> list[Episode]:
    """`samples` episodes of each level, a level's adjacent; they share the level, not their luck."""
    return [Episode(build_env(config), seed, replica, config.prompt_style, config.format_penalty)
            for seed in seeds for replica in range(samples)]


def build_env(config: Config) -> Env:
    """The environment with the run's options and budgets."""
    options = {"sokoban": dict(coordinates=config.coordinates),
               "frozenlake": dict(success_rate=config.success_rate, frozen=config.frozen)}
    env = make_env(config.env, **options[config.env])
    env.max_turns, env.actions_per_turn, env.max_actions = config.max_turns, config.actions_per_turn, config.max_actions
    return env


def score_batch(model: transformers.PreTrainedModel, batch: Batch, config: Config) -> TokenScores:
    """What a frozen model says of the whole batch, (B, T) each."""
    scores = TokenScores(*(torch.zeros(batch.tokens.shape) for _ in TokenScores._fields))
    with torch.no_grad():
        for rows in micro_batches(batch.lengths.tolist(), config.micro_batch_tokens):
            part = batch.take(rows)
            for whole, piece in zip(scores, score_tokens(model, part.tokens, part.is_response, config.temperature), strict=True):
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
    sums = {"loss": 0.0, "clip_fraction": 0.0, "kl_ref": 0.0, "value_loss": 0.0, "logp_gap_max": 0.0}
    order = torch.randperm(len(batch.returns), generator=state.generator)
    mini_batches = [batch.take(rows) for rows in order.split(config.mini_batch_size)]
    norms, skipped = [], state.skipped
    for number, mini in enumerate(mini_batches):
        total_weight, tokens = mini.weights.sum().item(), int(mini.is_response.sum())
        for rows in micro_batches(mini.lengths.tolist(), config.micro_batch_tokens):
            part = mini.take(rows)
            scores = score_tokens(state.policy, part.tokens, part.is_response, config.temperature)
            loss = policy_loss(scores.logp, part.old_logp, part.advantages, part.weights, config.clip_low, config.clip_high,
                               total_weight)
            kl = kl_estimate(scores.logp, part.ref_logp, config.kl_kind)[part.is_response].sum() / tokens
            entropy = scores.entropy.sum() / tokens
            (loss + config.kl_coef * kl - config.entropy_coef * entropy).backward()
            sums["loss"] += loss.item() / len(mini_batches)
            if number == 0:  # before the first optimiser step π_θ is π_old, so the ratio must be 1
                gap = (scores.logp.detach() - part.old_logp)[part.is_response].abs().max().item()
                sums["logp_gap_max"] = max(sums["logp_gap_max"], gap)
            sums["clip_fraction"] += clipped(scores.logp.detach(), part, config) / int(batch.is_response.sum())
            if state.critic:
                value_loss = (state.critic(part.tokens, part.is_response) - part.value_targets).square().sum() / 2 / tokens
                value_loss.backward()
                sums["value_loss"] += value_loss.item() / len(mini_batches)
        norms.append(optimizer_step(config, state))
    k3 = kl_estimate(batch.old_logp, batch.ref_logp, "k3")[batch.is_response]
    sums["kl_ref"] = k3.mean().item()
    finite = [norm for norm in norms if math.isfinite(norm)]
    sums["grad_norm"] = float(np.mean(finite)) if finite else 0.0
    return {**sums, "skipped_steps": state.skipped - skipped}


def clipped(logp: Tensor, part: Batch, config: Config) -> int:
    """How many response tokens' gradient the clip has cut off."""
    ratio = torch.where(part.is_response, logp - part.old_logp, 0.0).exp()
    high = (ratio > 1 + config.clip_high) & (part.advantages > 0)
    low = (ratio < 1 - config.clip_low) & (part.advantages < 0)
    return int((high | low).sum())


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


def rollout_metrics(rows: Sequence[Trajectory]) -> dict[str, float]:
    """What the step's trajectories were like, before any is filtered out."""
    episodes = [row.episode for row in rows]
    returns = np.array([episode.return_ for episode in episodes])
    groups = {}
    for episode, value in zip(episodes, returns, strict=True):
        groups.setdefault(episode.seed, set()).add(value)
    turns = sum(len(episode.rewards) for episode in episodes)
    return {
        "success": float(np.mean([episode.success for episode in episodes])),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "equal_groups": float(np.mean([len(values) == 1 for values in groups.values()])),
        "turns": turns / len(rows),
        "invalid_turns": sum(episode.invalid_turns for episode in episodes) / turns,
        "response_tokens": float(np.mean([end - start for row in rows for start, end in row.spans])),
    }


def token_metrics(batch: Batch, reference: TokenScores) -> dict[str, float]:
    """Reasoning and action tokens apart: how many, how sure, and whose the gradient is. Eq. (7)."""
    mass = batch.advantages.abs() * batch.score_norm  # |Aₜ| · ‖∇ log π(yₜ)‖ at the logits, ratio 1
    metrics = {}
    for name, mask in (("reasoning", batch.is_reasoning), ("action", batch.is_action)):
        count = mask.sum().clamp(min=1)
        metrics |= {
            f"tokens_{name}": int(mask.sum()),
            f"weight_share_{name}": _share(batch.weights, mask),
            f"gradient_share_{name}": _share(batch.weights * mass, mask),
            f"gradient_share_{name}_uniform": _share(mass, mask),
            f"entropy_{name}": (batch.entropy[mask].sum() / count).item(),
            f"energy_{name}": (batch.energy[mask].sum() / count).item(),
        }
    return metrics


def _share(values: Tensor, mask: Tensor) -> float:
    return (values[mask].sum() / values.sum().clamp(min=TINIEST)).item()


def record(config: Config, state: State, run: Path, row: dict, progress: tqdm) -> None:
    """Log line, metrics, and what is due after this step: evaluation, then checkpoint."""
    seconds = row["seconds_rollout"] + row["seconds_update"]
    progress.set_postfix(success=f"{row['success']:.2f}", ret=f"{row['return_mean']:.2f}", s=f"{seconds:.1f}")
    progress.write(f"step {row['step']:4d}  success {row['success']:.3f}  return {row['return_mean']:7.3f}  invalid "
                   f"{row['invalid_turns']:.3f}  entropy a/r {row['entropy_action']:.2f}/{row['entropy_reasoning']:.2f}  "
                   f"gradient a {row['gradient_share_action']:.2f}  kl {row['kl_ref']:.4f}  {seconds:5.1f} s", file=sys.stdout)
    checkpoint.append_line(run / "metrics.jsonl", row)
    last = state.step == config.max_steps
    if last or state.step % config.eval_steps == 0:
        evaluate_step(config, state, run)
    if last or state.step % config.save_steps == 0:
        save(state, run)


def evaluate_step(config: Config, state: State, run: Path) -> dict:
    """Evaluate, keep the numbers and two episodes as text."""
    result, rows = evaluate_policy(config, state.policy, state.tokenizer)
    checkpoint.append_line(run / "eval.jsonl", {"step": state.step, **result})
    texts = [state.tokenizer.decode(row.tokens) + f"\nreturn {row.episode.return_:.1f}\n" for row in rows[:2]]
    (run / "samples" / f"step-{state.step}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    tqdm.write(f"evaluation at step {state.step}: {describe(result)}", file=sys.stdout)
    return result


def describe(result: dict) -> str:
    """An evaluation in one line."""
    return (f"success {100 * result['success']:.1f} %, 95 % interval [{100 * result['low']:.1f}, {100 * result['high']:.1f}], "
            f"n = {result['n']} episodes on {result['prompts']} levels")


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


def summary(episodes: Sequence[Episode], samples: int) -> dict:
    """Success, its 95 % interval, mean return and n."""
    success = np.array([episode.success for episode in episodes], dtype=float).reshape(-1, samples)
    low, high = success_interval(success)
    return {"success": float(success.mean()), "low": low, "high": high, "prompts": len(success), "n": success.size,
            "return_mean": float(np.mean([episode.return_ for episode in episodes]))}


def build_state(config: Config) -> State:
    """Policy, frozen reference and critic, all copies of one model; Adam as in the paper."""
    policy, reference = load_model(config.model), load_model(config.model).requires_grad_(False)
    critic = load_critic(config.model) if config.algo == "ppo" else None
    state = State(policy, reference, load_tokenizer(config.model), torch.optim.Adam(policy.parameters(), config.learning_rate),
                  torch.Generator().manual_seed(config.seed), critic)
    if critic:
        state.critic_optimizer = torch.optim.Adam(critic.parameters(), config.critic_learning_rate)
    return state


def save(state: State, run: Path) -> None:
    """A checkpoint of everything that changes."""
    parts = {"optimizer": state.optimizer.state_dict(), "generator": state.generator.get_state(), "step": state.step,
             "skipped": state.skipped, "bad_steps": state.bad_steps}
    if state.critic:
        parts |= {"critic": state.critic.state_dict(), "critic_optimizer": state.critic_optimizer.state_dict()}
    checkpoint.save_checkpoint(run, state.step, state.policy, state.tokenizer, parts)


def resume(config: Config, path: Path) -> State:
    """The state as it was when the checkpoint was written; later lines of the run are cut."""
    state, saved = build_state(config), checkpoint.load_state(path)
    state.policy.load_state_dict(load_model(str(path)).state_dict())
    state.optimizer.load_state_dict(saved["optimizer"])
    state.generator.set_state(saved["generator"])
    state.step, state.skipped, state.bad_steps = saved["step"], saved["skipped"], saved["bad_steps"]
    if state.critic:
        state.critic.load_state_dict(saved["critic"])
        state.critic_optimizer.load_state_dict(saved["critic_optimizer"])
    return state


def parse(argv: Sequence[str] | None = None) -> tuple[Config, Path | None]:
    """Configuration and, when resuming, the checkpoint; a ValueError names a flag that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=list(PRESETS), help="laptop is the default")
    parser.add_argument("--resume_from_checkpoint", type=Path, help="a run folder or a checkpoint-N in it")
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", type=_boolean if f.type is bool else f.type, help=f"default {f.default!r}")
    given = vars(parser.parse_args(argv))
    preset, path = given.pop("preset", "laptop"), given.pop("resume_from_checkpoint", None)
    if path is not None:
        path = checkpoint.find_checkpoint(path)
        saved = json.loads((path.parent / "config.json").read_text())["config"]
        for name, value in given.items():
            if name not in EXTENDABLE and value != saved[name]:
                raise ValueError(f"--{name} {value}: {path} belongs to a run with {name} {saved[name]}")
        return Config(**{**saved, **given, "output_dir": str(path.parent)}), path
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


def new_run_folder(config: Config) -> Path:
    """An empty run folder; nothing that exists is written over."""
    if config.output_dir:
        run = Path(config.output_dir)
        if run.exists() and any(run.iterdir()):
            raise ValueError(f"--output_dir {run}: is not empty; choose another or --resume_from_checkpoint {run}")
    else:
        stem = Path("runs") / f"{config.env}-{config.algo}-{config.weights}-seed{config.seed}"
        run = next(p for i in range(1, 10_000) if not (p := stem if i == 1 else Path(f"{stem}-{i}")).exists())
    for folder in ("samples", "plots"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=TINY.parent.parent)
    about = {"commit": git.stdout.strip() or "unknown", "python": platform.python_version(), "torch": torch.__version__,
             "transformers": transformers.__version__, "device": "cpu", "threads": torch.get_num_threads(),
             "machine": platform.machine()}
    (run / "config.json").write_text(json.dumps({"config": asdict(config), **about}, indent=2) + "\n", encoding="utf-8")
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 for a user's mistake, 1 for a run that broke down."""
    transformers.utils.logging.disable_progress_bar()
    try:
        config, path = parse(argv)
        state = resume(config, path) if path else build_state(config)
        run = path.parent if path else new_run_folder(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if path:
        for name in ("metrics.jsonl", "eval.jsonl"):
            checkpoint.cut_lines(run / name, state.step)
    else:
        evaluate_step(config, state, run)
        save(state, run)
    try:
        train(config, state, run)
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
    for name, result in (("before", lines[0]), ("after", lines[-1]), ("random floor", floor), ("oracle ceiling", ceiling)):
        print(f"{name:>14}: {describe(result)}")
    print(f"run  {run}\nplot {plot}")


if __name__ == "__main__":
    sys.exit(main())
