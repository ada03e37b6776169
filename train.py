"""Trains a language-model agent: rollouts, energies, advantages, weights, clipped updates, and again.

The algorithm of arXiv:2605.14558v1 stands in `iteration()`. `--algo` chooses the advantage, `--weights` the token
weights; they are independent, and `--weights uniform` is α = 1, β = 0 and nothing else.

P prompts, G rollouts each, B = P·G trajectories, T tokens.

    python train.py                                     # FrozenLake, GRPO, ActFocus, the tiny model, on 2 cores
    python train.py --env sokoban --algo ppo --weights uniform
    python train.py --resume_from_checkpoint runs/NAME

Differs from the paper: defaults marked "ours" fit two cores; a step whose gradient is not finite is skipped.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import checkpoint
import parallel
import plots
from ablation import class_mean_weights, tag_mask, weight_signal
from actfocus import policy_loss, token_weights, whiten
from baselines import kl_estimate, value_loss
from checkpoint import State
from config import Config, parse
from envs import oracle_player, play, random_player
from memory import EVALUATED, advice, is_out_of_memory, memory_line
from methods import METHODS, all_ranks, build_env, evaluation_levels, make_episodes, noise, own_micro_batches
from metrics import clipped, describe, rollout_metrics, summary, token_metrics
from policy import TokenScores, precision, score_tokens, trainable
from rollout import Batch, PromptTooLong, Trajectory, rollout
from startup import build_state, dry_run, start_model

SUMS = ("loss", "value_loss", "clipped", "logp_gap_max")  # what the micro-batches of a step add up
MAX_BAD_STEPS = 5  # gradients in a row that are not finite, after which a run gives up


def train(config: Config, state: State, run: Path) -> None:
    """Iterations until `max_steps`, each logged, and where due evaluated and saved."""
    progress = tqdm(range(state.step, config.max_steps), initial=state.step, total=config.max_steps,
                    disable=True if parallel.rank() else None)
    for step in progress:
        row, _ = iteration(config, state, step)
        state.step = step + 1
        record(config, state, run, {"step": state.step, **row}, progress)


def iteration(config: Config, state: State, step: int) -> tuple[dict[str, float], Batch]:
    """The algorithm: sample, score, weigh, update. Returns the step's metrics and its batch."""
    start, method = time.perf_counter(), METHODS[config.algo]
    sampled_rows = method.sample(config, state, step)  # P·G trajectories under π_old
    returns = torch.tensor([row.episode.return_ for row in sampled_rows])
    rows = [sampled_rows[i] for i in method.keep(config, returns)]
    batch = Batch.of(rows)
    sampled = time.perf_counter()
    reference = score_batch(state.reference, batch, config)
    batch.energy, batch.ref_logp = reference.energy, reference.logp  # Eₜ under π_ref, Eq. (4)
    scored = time.perf_counter()
    batch.advantages = method.advantages(config, state, batch, rows)  # Aₜ, Eq. (3) or (12)
    batch.signal = weight_signal(config.signal, reference, batch.old_logp)  # Eₜ, or what the ablation tries instead
    batch.is_tag = tag_mask(config.tag_weight, rows, state.tokenizer)
    batch.weights = weigh(config, batch)  # wₜ, Eq. (5)
    updated = update(config, state, batch)  # Eq. (6)
    seconds = {"seconds_rollout": sampled - start, "seconds_reference": scored - sampled,
               "seconds_update": time.perf_counter() - scored}
    return {**rollout_metrics(sampled_rows), **token_metrics(batch), **updated, **seconds}, batch


def score_batch(model: transformers.PreTrainedModel, batch: Batch, config: Config) -> TokenScores:
    """What a frozen model says of the whole batch, (B, T) each."""
    scores = TokenScores(*(torch.zeros(batch.tokens.shape) for _ in TokenScores._fields))
    with torch.no_grad(), precision(config.dtype, model.device):
        for index in own_micro_batches(config, batch):
            part = batch.take(index, model.device)
            pieces = score_tokens(model, part.tokens, part.is_response, config.temperature)
            for whole, piece in zip(scores, pieces, strict=True):
                whole[index, : piece.shape[1]] = piece.cpu()
    parallel.add_up(scores)  # zeros where another rank has the row
    return scores


def weigh(config: Config, batch: Batch, index: slice | Tensor = slice(None)) -> Tensor:
    """(B, T): wₜ of the rows at `index`, standardised over their own action tokens. Eq. (5)."""
    is_action, is_reasoning = batch.is_action[index], batch.is_reasoning[index]
    if config.weights == "class_mean":
        return class_mean_weights(is_action, is_reasoning)
    weights = token_weights(batch.signal[index], is_action, is_reasoning, *config.alpha_beta)
    return weights if batch.is_tag is None else torch.where(batch.is_tag[index] & is_reasoning, 1.0, weights)


def update(config: Config, state: State, batch: Batch) -> dict[str, float]:
    """One epoch of optimiser steps over mini-batches; each is cut into micro-batches whose gradients add up."""
    order = torch.randperm(len(batch.returns), generator=state.generator).split(config.mini_batch_size)
    for index in order:  # Careful: in the batch itself, whose metrics are read afterwards
        if config.weight_stats == "mini_batch":
            batch.weights[index] = weigh(config, batch, index)
        if config.whiten_mini_batches:
            batch.advantages[index] = whiten(batch.advantages[index], batch.is_response[index])
    minis = [mini for index in order if (mini := batch.take(index)).is_response.any()]
    sums = dict.fromkeys(SUMS, 0.0)
    norms, skipped, over_kl = [], state.skipped, 0
    for number, mini in enumerate(minis):
        kl = add_gradients(config, state, mini, sums, first=number == 0)
        too_far = 0 < config.max_kl < kl
        over_kl += too_far
        norms.append(optimizer_step(config, state, policy_too=not too_far))
    sums = parallel.total(sums)
    finite = [norm for norm in norms if math.isfinite(norm)]
    tokens, count = max(1, int(batch.is_response.sum())), max(1, len(minis))
    k3 = kl_estimate(batch.old_logp, batch.ref_logp, "k3")[batch.is_response]
    return {"loss": sums["loss"] / count, "value_loss": sums["value_loss"] / count,
            "clip_fraction": sums["clipped"] / tokens, "logp_gap_max": sums["logp_gap_max"],
            "kl_ref": k3.sum().item() / tokens, "grad_norm": sum(finite) / max(1, len(finite)),
            "skipped_steps": state.skipped - skipped, "over_kl_steps": over_kl}


def add_gradients(config: Config, state: State, mini: Batch, sums: dict[str, float], first: bool) -> float:
    """Loss and gradient of one mini-batch, a micro-batch at a time; every mean is over the whole mini-batch.

    Each rank adds its rows' share to `sums`; the gradients, and the k3 KL to π_old it returns, are those of all ranks.
    """
    total_weight, tokens, kl = mini.weights.sum().item(), int(mini.is_response.sum()), 0.0
    for index in own_micro_batches(config, mini):
        part = mini.take(index, state.policy.device)
        with precision(config.dtype, state.policy.device):
            scores = score_tokens(state.policy, part.tokens, part.is_response, config.temperature)
            values = state.critic(part.tokens, part.is_response) if state.critic else None
        loss = policy_loss(scores.logp, part.old_logp, part.advantages, part.weights, config.clip_low,
                           config.clip_high, total_weight)
        regulariser = -config.entropy_coef * scores.entropy
        if config.kl_coef:
            regulariser = regulariser + config.kl_coef * kl_estimate(scores.logp, part.ref_logp, config.kl_kind)
        (loss + regulariser[part.is_response].sum() / tokens).backward()
        sums["loss"] += loss.item()
        if state.critic:
            error = value_loss(values, part.values, part.value_targets, config.value_clip).sum() / tokens
            error.backward()
            sums["value_loss"] += error.item()
        log_ratio = torch.where(part.is_response, scores.logp.detach() - part.old_logp, 0.0)
        if first:  # before the first optimiser step π_θ is π_old, so the ratio must be 1
            sums["logp_gap_max"] = max(sums["logp_gap_max"], log_ratio.abs().nan_to_num(nan=math.inf).max().item())
        sums["clipped"] += clipped(log_ratio, part.advantages, config.clip_low, config.clip_high)
        kl += kl_estimate(-log_ratio, torch.zeros_like(log_ratio), "k3").sum().item() / tokens
    for model, _ in state.learners:
        parallel.add_up(gradients(model))
    return sum(parallel.gather(kl))


def gradients(model: torch.nn.Module) -> Iterator[Tensor]:
    """Of every parameter that learns, zeros where a rank had no row to make them from."""
    for parameter in trainable(model):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        yield parameter.grad


def optimizer_step(config: Config, state: State, policy_too: bool = True) -> float:
    """Clip the gradient and step; a gradient that is not finite changes nothing, and five in a row end the run."""
    norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm) for model, _ in state.learners]
    good = all(norm.isfinite() for norm in norms)
    for model, optimizer in state.learners:
        if good and (policy_too or model is not state.policy):
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
                   f"action gradient {row['gradient_share_action']:.2f}  kl {row['kl_ref']:z.4f}  {seconds:5.1f} s",
                   file=sys.stdout)
    parallel.on_first(lambda: checkpoint.append_line(run / "metrics.jsonl", row))
    last = state.step == config.max_steps
    if last or state.step % config.eval_steps == 0:
        evaluate_step(config, state, run)
    if last or state.step % config.save_steps == 0:
        parallel.on_first(lambda: checkpoint.save(state, run))


def evaluate_step(config: Config, state: State, run: Path) -> dict:
    """Evaluate, keep the numbers and two episodes as text."""
    result, rows = evaluate_policy(config, state.policy, state.tokenizer)

    def write() -> None:
        checkpoint.append_line(run / "eval.jsonl", {"step": state.step, **result})
        texts = [state.tokenizer.decode(row.tokens) + f"\nreturn {row.episode.return_:.1f}\n" for row in rows[:2]]
        (run / "samples").mkdir(exist_ok=True)
        (run / "samples" / f"step-{state.step}.txt").write_text("\n\n".join(texts), encoding="utf-8")

    parallel.on_first(write)
    tqdm.write(f"evaluation at step {state.step}: {describe(result)}", file=sys.stdout)
    return result


def evaluate_policy(config: Config, policy, tokenizer) -> tuple[dict, list[Trajectory]]:
    """Success on the fixed evaluation levels 0, 1, …, with the same sampling noise every time."""
    generator = noise(torch.Generator().manual_seed(0))
    at_once = max(1, EVALUATED // config.eval_samples)  # levels whose rollouts share one cache

    def play_block() -> list[Trajectory]:
        levels, rows = parallel.block(evaluation_levels(config)), []
        for first in range(0, len(levels), at_once):
            episodes = make_episodes(config, levels[first : first + at_once], config.eval_samples)
            with precision(config.dtype, policy.device):
                rows += rollout(policy, tokenizer, episodes, generator, config.eval_temperature,
                                config.max_response_tokens, config.max_context)
        return rows

    rows = all_ranks(play_block)
    return summary([row.episode for row in rows], config.eval_samples), rows


def evaluate_player(config: Config, player) -> dict:
    """The same levels and budgets for a scripted player: the random floor, the oracle's ceiling."""
    levels = evaluation_levels(config)
    per_replica = [play(build_env(config), player, levels, i) for i in range(config.eval_samples)]
    return summary([episode for level in zip(*per_replica, strict=True) for episode in level], config.eval_samples)


def prepare(config: Config, path: Path | None) -> State:
    """What a run starts from, or resumes from."""
    if config.num_prompts % parallel.ranks():
        raise ValueError(f"--num_prompts {config.num_prompts}: not divisible by the {parallel.ranks()} ranks")
    print(memory_line(config, config.model))
    if path:
        checkpoint.check_start(path.parent, Path(config.model))
    state = build_state(config)
    if path:
        checkpoint.restore(state, path)
        if config.max_steps < state.step:
            raise ValueError(f"--max_steps {config.max_steps}: {path} has done {state.step} already")
    return state


def open_run(config: Config, state: State, path: Path | None) -> Path:
    """The run folder, new or without what came after the checkpoint."""
    if not path:
        return checkpoint.new_run(asdict(config), str(state.policy.device))
    checkpoint.lock(path.parent)
    checkpoint.forget_later(path.parent, state.step)
    checkpoint.update_config(path.parent, asdict(config))
    return path.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 for a user's mistake, 1 for a run that broke down; on every rank the same."""
    parallel.start()
    try:
        return parallel.stop(launch(argv))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(advice(error), file=sys.stderr)
        return 2  # at once: the other ranks may be waiting for this one, and the launcher ends them
    finally:
        checkpoint.unlock()


def launch(argv: Sequence[str] | None) -> int:
    """A run from its command line to its report; of several ranks the first one writes."""
    transformers.utils.logging.disable_progress_bar()
    writes = parallel.rank() == 0
    try:
        config, path = parallel.agree(lambda: parse(argv))
        torch.set_num_threads(config.num_threads or torch.get_num_threads())
        if config.dry_run:
            parallel.agree(lambda: dry_run(config))
            return 0
        model = parallel.agree(lambda: start_model(config) if writes and not path else config.model)
        config = replace(config, model=parallel.gather(model)[0])
        state = parallel.agree(lambda: prepare(config, path))
        run = parallel.on_first(lambda: open_run(config, state, path))
        run, evaluated = parallel.gather((run, writes and checkpoint.read_lines(run / "eval.jsonl")))[0]
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        return 2
    try:
        if not path:
            parallel.on_first(lambda: checkpoint.save(state, run))
        if not evaluated:
            evaluate_step(config, state, run)
        train(config, state, run)
        if writes:
            report(config, run)
    except PromptTooLong as error:
        complain(f"error: {error}")
        return 2
    except OSError as error:  # a full disk
        complain(f"error: {error}; --resume_from_checkpoint {run} goes on from its last checkpoint, if it has one")
        return 2
    except FloatingPointError as error:
        complain(f"stopped: {error}; the last checkpoint is {checkpoint.find_checkpoint(run)}")
        return 1
    return 0


def complain(line: str) -> None:
    """Why a run ends, once."""
    if parallel.rank() == 0:
        sys.stdout.flush()  # in a log of both, what is buffered would come after the reason
        print(line, file=sys.stderr)


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
