"""How fast and how large, as ratios of whole parts of the loop to bare work of the same model, measured in one run.

    python evaluate.py --bench                      # the tiny model: rollout, update, steps of every method
    python evaluate.py --bench --model smollm2      # 135 M parameters: rollout, update, memory; minutes on one core

Times are CPU time of one thread; peak memory is the process's own, as Linux counts it. Equations as in
arXiv:2605.14558v1.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import train
from actfocus import answer_span, policy_loss
from checkpoint import State
from config import ALGO_SETTINGS, Config
from methods import METHODS, make_episodes, own_micro_batches
from policy import micro_batches, opening_text, precision, recompute_layers, turn_text
from rollout import Batch, Engine, rollout
from startup import build_state

ROUNDS = 3  # a large model is timed once
LARGE = 10_000_000  # parameters, from which on those parts are left out that the tiny model shows as well


def bench(config: Config) -> None:
    """Ratios of whole parts of the loop to bare work of the model, measured in turn in this process, on one thread."""
    torch.set_num_threads(1)  # as in the runs of results/; a pool of threads would be timed as well
    if config.lora_rank:
        raise ValueError(f"--lora_rank {config.lora_rank}: not with --bench, which starts each step from the reference")
    if config.algo != "grpo" or config.filter_fraction < 1:
        raise ValueError(f"--algo {config.algo} --filter_fraction {config.filter_fraction}: --bench compares all "
                         "methods with grpo, of all groups")
    state = build_state(config)
    large = state.policy.num_parameters() > LARGE
    rounds = 1 if large else ROUNDS
    print(f"{config.env}, {config.model}, {config.dtype}, {config.num_prompts} x {config.num_generations} trajectories,"
          f" 1 thread; median [least, most] of {rounds} rounds")
    _time_rollout(replace(config, max_turns=1), state, rounds)  # to warm up
    for style, wanted in (("brief", 3 if large else 2), ("paper", 3)):
        styled = replace(config, prompt_style=style, max_context=4096)
        ours, bare, loop = zip(*(_time_rollout(styled, state, i) for i in range(rounds)), strict=True)
        print(f"rollout / its bare forward passes, {style} prompts: {_ratio(ours, bare)} (wanted: at most 1.25)")
        print(f"generate loop / rollout, per sampled token, {style} prompts: {_ratio(loop, ours)} (at least {wanted})")
    _, batch = train.iteration(config, state, 0)
    works = (lambda: train.update(config, state, batch), lambda: _bare_update(config, state, batch))
    ours, bare = zip(*([_timed(work) for work in works] for _ in range(rounds)), strict=True)
    print(f"update / bare forward and backward, same tokens unpadded: {_ratio(ours, bare)} (at most 1.25)")
    _bench_memory(config, state, batch)
    if not large:
        _bench_steps(config, build_state(config), rounds)  # of its own, as _bench_memory's recomputes its layers


def _bench_memory(config: Config, state: State, batch: Batch) -> None:
    """Peak memory of one micro-batch's gradients above what was there, against logits of all tokens at once."""
    shares = own_micro_batches(config, batch)
    part = batch.take(max(shares, key=lambda rows: batch.lengths[rows].sum()))

    def gradients() -> None:
        sums = dict.fromkeys(train.SUMS, 0.0)
        train.add_gradients(config, state, part, sums, first=True)
        state.optimizer.zero_grad()

    def peaks(work: Callable[[], object]) -> list[int]:  # what the allocator keeps differs from time to time
        return [peak - before for peak, before in (_peak(work) for _ in range(ROUNDS))]

    naive, ours = peaks(lambda: _naive_gradients(config, state, part)), peaks(gradients)
    recompute_layers(state.policy)
    vocabulary = len(state.policy.get_output_embeddings().weight)
    print(f"memory of an update / with logits of all tokens ({statistics.median(naive) / 1e9:.2f} GB), "
          f"{part.tokens.numel()} tokens, V = {vocabulary}: {_ratio(ours, naive)}; "
          f"with --gradient_checkpointing: {_ratio(peaks(gradients), naive)} (wanted: at most 0.4)")


def _bench_steps(config: Config, state: State, rounds: int) -> None:
    """Whole steps: with weights and without, and of every method."""
    steps = [[_step(replace(config, weights=w), state) for w in ("actfocus", "uniform")] for _ in range(rounds)]
    for name, i in (("time", 0), ("peak memory", 1)):
        focus, uniform = zip(*([step[i] for step in pair] for pair in steps), strict=True)
        print(f"step with ActFocus / step with uniform, {name}: {_ratio(focus, uniform)} (at most 1.01 beyond noise)")
    print(f"share of a step that the reference pass takes: {statistics.median(step[0][2] for step in steps):.2f}")
    for algo in METHODS:
        rival = replace(config, algo=algo, weights="uniform", **ALGO_SETTINGS.get(algo, {}))
        state = build_state(rival)
        ratio = _ratio([_step(rival, state)[0] for _ in range(rounds)], [pair[1][0] for pair in steps])
        print(f"step of {algo} / step of grpo, both uniform: {ratio}")


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time()  # of this thread's work alone, so that a busy machine disturbs little
    work()
    return time.process_time() - start


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


class _Recorder(Engine):
    """Keeps what every forward pass was called with."""

    def __init__(self, model):
        super().__init__(model)
        self.calls = []

    def forward(self, pending, start, seen):
        self.calls.append(([list(ids) for ids in pending], start, list(seen)))
        return super().forward(pending, start, seen)


def _time_rollout(config: Config, state: State, number: int) -> tuple[float, float, float]:
    """Seconds a sampled token: our rollout, its forward passes alone, the generate loop."""
    levels = range(10_000 * (number + 1), 10_000 * (number + 1) + config.num_prompts)
    engine, episodes, rows = _Recorder(state.policy), make_episodes(config, levels, config.num_generations), []
    settings = config.temperature, config.max_response_tokens, config.max_context, engine
    with torch.no_grad(), precision(config.dtype, state.policy.device):
        ours = _timed(lambda: rows.extend(rollout(state.policy, state.tokenizer, episodes, state.generator, *settings)))
        bare = _timed(lambda: [Engine.forward(engine, *call) for call in engine.calls])
        episodes, count = make_episodes(config, levels, config.num_generations), []
        loop = _timed(lambda: count.append(_generate_loop(config, state, episodes)))
    tokens = sum(sum(row.is_response) for row in rows)
    return ours / tokens, bare / tokens, loop / count[0]


def _generate_loop(config: Config, state: State, episodes: list) -> int:
    """The usual way: one `generate` a turn over the whole history, left-padded. Returns the sampled tokens."""
    tokenizer, device, pad_token = state.tokenizer, state.policy.device, 0
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("</answer>", tokenizer.eos_token_id)}
    stop = {} if len(ends) == 2 else dict(stop_strings=["</answer>"], tokenizer=tokenizer)
    histories = [tokenizer.encode(opening_text(tokenizer, e.system(), e.user()), add_special_tokens=False)
                 for e in episodes]
    live, count = list(range(len(episodes))), 0
    while live:
        width = max(len(histories[i]) for i in live)
        tokens = torch.tensor([[pad_token] * (width - len(histories[i])) + histories[i] for i in live], device=device)
        mask = torch.tensor([[0] * (width - len(histories[i])) + [1] * len(histories[i]) for i in live], device=device)
        out = state.policy.generate(
            tokens, attention_mask=mask, do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0,
            pad_token_id=pad_token, max_new_tokens=config.max_response_tokens, eos_token_id=list(ends), **stop,
        )[:, width:].tolist()
        for i, response in zip(list(live), out, strict=True):
            response = response[: _length(tokenizer, response, ends)]
            count += len(response)
            text = tokenizer.decode(response)
            span = answer_span(text)
            message = episodes[i].act(text[slice(*span)] if span else None)
            if message is None:
                live.remove(i)
            else:
                histories[i] += response + tokenizer.encode(turn_text(tokenizer, message), add_special_tokens=False)
    return count


def _length(tokenizer: PreTrainedTokenizerBase, response: list[int], ends: set[int]) -> int:
    """Tokens up to the one that ends the response; `generate` pads the others' rows."""
    stops = (t for t, token in enumerate(response, 1) if token in ends or "</answer>" in tokenizer.decode(response[:t]))
    return next(stops, len(response))


def _bare_update(config: Config, state: State, batch: Batch) -> None:
    """Forward and backward of transformers' own loss on the batch's tokens, cut into full rows of their mean length."""
    length = int(batch.lengths.float().mean())
    stream = torch.cat([row[:n] for row, n in zip(batch.tokens, batch.lengths, strict=True)])
    rows = stream[: len(stream) // length * length].view(-1, length)
    rows = rows.to(state.policy.device)
    for part in micro_batches([length] * len(rows), config.micro_batch_tokens):
        with precision(config.dtype, state.policy.device):
            loss = state.policy(input_ids=rows[part], labels=rows[part], use_cache=False).loss
        loss.backward()
    state.optimizer.zero_grad()


def _naive_gradients(config: Config, state: State, part: Batch) -> None:
    """Eq. (6) as it is written down first: logits of every token, their log-softmax, and backward through it all."""
    part = part.take(range(len(part.tokens)), state.policy.device)
    with precision(config.dtype, state.policy.device):
        logits = state.policy(input_ids=part.tokens, use_cache=False).logits[:, :-1].float() / config.temperature
    logq = logits.log_softmax(-1)  # (B, T - 1, V)
    logp = logq.gather(-1, part.tokens[:, 1:, None]).squeeze(-1)
    entropy = -(logq.exp() * logq).sum(-1)
    columns = (part.old_logp[:, 1:], part.advantages[:, 1:], part.weights[:, 1:])
    (policy_loss(logp, *columns) - config.entropy_coef * entropy[part.is_response[:, 1:]].mean()).backward()
    state.optimizer.zero_grad()


def _peak(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes in use by the process at the peak of a piece of work, and before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc: what earlier steps left free is not this one's
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM"), before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _step(config: Config, state: State) -> tuple[float, float, float]:
    """One iteration from the same weights, levels and noise: seconds, peak memory, share of the reference pass."""
    state.policy.load_state_dict(state.reference.state_dict())
    state.generator.manual_seed(0)
    metrics, seconds = [], []
    peak, _ = _peak(lambda: seconds.append(_timed(lambda: metrics.append(train.iteration(config, state, 0)[0]))))
    return seconds[0], peak, metrics[0]["seconds_reference"] / seconds[0]
