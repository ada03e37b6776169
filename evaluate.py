"""Looks at a trained agent: success on fixed levels, coloured tokens, learning curves, the diagnosis, the bench.

    python evaluate.py runs/NAME                    # success, 95 % interval, random floor, oracle ceiling
    python evaluate.py runs/NAME --show_tokens      # two episodes, every token coloured by class and weight
    python evaluate.py runs/NAME --html page.html   # the same as a page, with the numbers of every token (viewer.py)
    python evaluate.py --floors                     # random floor and oracle ceiling of every environment
    python evaluate.py --plot runs/A runs/B         # learning curves of several runs
    python evaluate.py models/tiny --bottleneck     # Figures 1-2 of arXiv:2605.14558v1 on this model
    python evaluate.py --bench                      # how fast, as ratios measured in one run

A folder of a run brings its own settings; every flag of train.py overrides them.
P prompts, G rollouts each, B = P·G rows, T tokens.
"""

import csv
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

import checkpoint
import plots
import train
import viewer
from actfocus import answer_span
from checkpoint import State
from config import ALGO_SETTINGS, BY_ENV, Config, config_parser
from energy import action_bottleneck, group_means
from envs import ENVS, oracle_player, random_player
from methods import METHODS, env_options, make_episodes
from metrics import describe, mean_interval
from policy import TINY, load_model, load_tokenizer, micro_batches, opening_text, pick_device, turn_text
from rollout import Batch, Engine, Trajectory, rollout, token_pieces
from train import build_state, evaluate_player, evaluate_policy, score_batch

BOTTLENECK_PROMPTS = 256  # groups of the diagnosis
ROUNDS = 3  # of the bench


def parse(argv: Sequence[str] | None) -> tuple[dict, Config, Path]:
    """What to do, the settings, and the model folder to look at."""
    parser = config_parser(__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=str(TINY), help="run, checkpoint or model folder")
    for name in ("show_tokens", "bottleneck", "bench", "floors"):
        parser.add_argument(f"--{name}", action="store_true", default=False)
    parser.add_argument("--plot", nargs="+", type=Path, metavar="RUN", help="curves and table of these runs")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write two episodes with all numbers of every token")
    parser.add_argument("--beside", metavar="FOLDER", help="with --html: this model on the same level beside it")
    given = vars(parser.parse_args(argv))
    names = ("show_tokens", "bottleneck", "bench", "floors", "plot", "html", "beside")
    todo, folder = {name: given.pop(name, None) for name in names}, given.pop("folder")
    if todo["beside"]:
        if not todo["html"]:
            raise ValueError("--beside: needs --html PAGE, the page to write")
        todo["beside"] = settings_of(Path(todo["beside"]), given)
    return todo, *settings_of(Path(folder), given)


def settings_of(folder: Path, given: dict) -> tuple[Config, Path]:
    """A folder's own settings under the flags that were given, and the folder of its model."""
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    if (run / "eval.jsonl").exists():
        folder = checkpoint.find_checkpoint(folder)
        given = {**checkpoint.read_config(run), **given}
    else:
        env = given.get("env", Config.env)
        given = {"model": str(folder), **BY_ENV["laptop"].get(env, {}), **given}
    return Config(**given), folder


def report(config: Config, folder: Path) -> None:
    """Success on the evaluation levels beside what chance and the solver reach there."""
    policy = load_model(str(folder), pick_device(config.device))
    result, _ = evaluate_policy(config, policy, load_tokenizer(str(folder)))
    options = ", ".join(f"{name} {value}" for name, value in env_options(config).items())
    print(f"{config.env}, temperature {config.eval_temperature}, {options}, {folder}")
    floor, ceiling = (evaluate_player(config, player) for player in (random_player, oracle_player))
    for name, part in (("policy", result), ("random floor", floor), ("oracle ceiling", ceiling)):
        print(f"{name:>14}: {describe(part)}, return {part['return_mean']:.2f}")


def floors(config: Config) -> None:
    """What chance and the solver reach on the evaluation levels of every environment."""
    for env in ENVS:
        for name, player in (("random floor", random_player), ("oracle ceiling", oracle_player)):
            print(f"{env:>10}, {name:>14}: {describe(evaluate_player(replace(config, env=env), player))}")


def compare(runs: Sequence[Path], out: Path) -> None:
    """Learning curves of several runs as a figure, all their evaluations as a table, and a line for each setting."""
    plot = plots.learning_curves(runs, out / "learning.png")
    settings = ("env", "algo", "weights", "alpha", "beta", "seed", "learning_rate", "success_rate", "coordinates",
                "sudoku_level", "hints")
    rows = []
    for run in runs:
        about = json.loads((run / "config.json").read_text())
        chosen = {name: about["config"].get(name) for name in settings}  # a run may be older than a setting
        chosen |= {name: about[name] for name in ("commit", "torch", "threads")}
        rows += [{**chosen, **line} for line in checkpoint.read_lines(run / "eval.jsonl")]
    with (out / "evaluations.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(*result_rows(runs), f"plot {plot}\ntable {out / 'evaluations.csv'}", sep="\n")


def result_rows(runs: Sequence[Path]) -> list[str]:
    """A Markdown row for each setting: seeds, steps, success before and after, 95 % interval, minutes of training.

    Several seeds: Student's interval of their mean. One seed: that of its evaluation, over levels.
    """
    settings: dict[tuple, list[tuple]] = {}
    for run in runs:
        config, lines = checkpoint.read_config(run), checkpoint.read_lines(run / "eval.jsonl")
        metrics = checkpoint.read_lines(run / "metrics.jsonl")
        seconds = sum(value for row in metrics for name, value in row.items() if name.startswith("seconds_"))
        settings.setdefault((config["env"], config["algo"], config["weights"]), []).append((config, lines, seconds))
    table = []
    for (env, algo, weights), members in sorted(settings.items()):
        last = [lines[-1] for _, lines, _ in members]
        low, high = mean_interval([line["success"] for line in last]) if last[1:] else (last[0]["low"], last[0]["high"])
        seeds = " ".join(str(config["seed"]) for config, _, _ in members)
        before, after = (statistics.mean(lines[i]["success"] for _, lines, _ in members) for i in (0, -1))
        steps = "-".join(map(str, sorted({line["step"] for line in last})))
        minutes = statistics.mean(seconds for _, _, seconds in members) / 60
        table.append(f"| {env} | {algo} | {weights} | {seeds} | {steps} | {100 * before:.1f} | {100 * after:.1f} "
                     f"[{100 * low:.1f}, {100 * high:.1f}] | {minutes:.0f} |")
    return table


def scored_rollouts(config: Config, folder: Path, prompts: int) -> tuple[list[Trajectory], Batch, Tensor]:
    """Rollouts of the model in `folder` on evaluation levels, with the reference's energies and (B, T) entropies."""
    device, tokenizer = pick_device(config.device), load_tokenizer(str(folder))
    policy, reference = (load_model(name, device) for name in (str(folder), config.model))
    generator, rows = torch.Generator().manual_seed(config.seed), []
    for first in range(0, prompts, 16):
        levels = range(first, min(first + 16, prompts))
        rows += rollout(policy, tokenizer, make_episodes(config, levels, config.num_generations), generator,
                        config.temperature, config.max_response_tokens, config.max_context)
    batch = Batch.of(rows)
    scores = score_batch(reference, batch, config)
    batch.energy = scores.energy
    return rows, batch, scores.entropy


def show_tokens(config: Config, folder: Path, episodes: int = 2) -> None:
    """Print episodes: observations dim, reasoning blue, action tokens on red that deepens with their weight."""
    scene = viewer.stage(config, folder)
    rows, batch, (alpha, beta) = scene.rows, scene.batch, config.alpha_beta
    print(f"\x1b[2mprompt and observation, weight 0\x1b[0m   \x1b[34mreasoning, weight {alpha}\x1b[0m   action, weight "
          + " ".join(_paint("action", 1 + beta * i / 4, beta, f" {1 + beta * i / 4:.2f} ") for i in range(5)))
    for b in range(0, len(rows), config.num_generations)[:episodes]:
        row, out = rows[b], []
        for t, piece in enumerate(token_pieces(scene.tokenizer, row.tokens)):
            kind = "action" if row.is_action[t] else "reasoning" if row.is_response[t] else "prompt"
            out.append(_paint(kind, batch.weights[b, t].item(), beta, piece))
        print(f"\nlevel {row.episode.seed}, return {row.episode.return_:.1f}, success {row.episode.success}")
        print("".join(out), *_action_table(scene, b), sep="\n")
    if scene.missing:
        print(f"advantages not shown: {scene.missing}")


def _action_table(scene: viewer.Scene, b: int) -> list[str]:
    """Lines: the action tokens of a rollout, turn by turn, with their numbers."""
    row, batch, lines = scene.rows[b], scene.batch, ["turn  energy  weight  advantage  action token"]
    for k, (start, end) in enumerate(row.spans):
        for t, piece in enumerate(token_pieces(scene.tokenizer, row.tokens[start:end]), start):
            if row.is_action[t]:
                advantage = "-" if scene.missing else f"{batch.advantages[b, t]:+.2f}"
                lines.append(f"{k + 1:4d} {batch.energy[b, t]:7.2f} {batch.weights[b, t]:7.2f} {advantage:>10}  "
                             f"{piece.strip()}")
    return lines


def _paint(kind: str, weight: float, beta: float, text: str) -> str:
    reds = (224, 217, 210, 203, 196)  # of the terminal's 256 colours, from pale to full red
    code = {"prompt": "2", "reasoning": "34"}.get(kind) or f"30;48;5;{reds[viewer.intensity(True, weight, beta)]}"
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def bottleneck(config: Config, folder: Path) -> None:
    """The diagnosis: where does uncertainty tell how much the returns of a prompt vary?"""
    rows, batch, entropy = scored_rollouts(config, folder, BOTTLENECK_PROMPTS)
    group_size, energy, returns = config.num_generations, batch.energy, batch.returns
    result = action_bottleneck(energy, batch.is_action, batch.is_reasoning, returns, group_size)
    by_entropy = action_bottleneck(entropy, batch.is_action, batch.is_reasoning, returns, group_size)
    success = statistics.mean(row.episode.success for row in rows)
    print(f"{config.env}, {folder}: {result['num_groups']} groups x {group_size}, mean success {success:.3f}, "
          f"action tokens {100 * result['action_fraction']:.1f} % of the response")
    for name in ("action", "reasoning", "response"):
        print(f"{name:>10}  energy ρ {result[f'rho_{name}']:+.3f} (p {result[f'p_{name}']:.1e})   "
              f"entropy ρ {by_entropy[f'rho_{name}']:+.3f} (p {by_entropy[f'p_{name}']:.1e})")
    masks = {"action": batch.is_action, "reasoning": batch.is_reasoning, "response": batch.is_response}
    means = {name: group_means(energy, mask, group_size) for name, mask in masks.items()}
    out = folder.parent / "plots" if folder.name.startswith("checkpoint-") else Path("runs") / "bottleneck"
    plot = plots.bottleneck(result, means, returns.view(-1, group_size).std(1).numpy(),
                            out / f"bottleneck-{config.env}-{folder.name}.png")
    print(f"plot {plot}")


def bench(config: Config) -> None:
    """Ratios of whole parts of the loop to bare work of the model, measured in turn in this process, on one thread."""
    torch.set_num_threads(1)  # as in the runs of results/; a pool of threads would be timed as well
    state = build_state(config)
    print(f"{config.env}, {config.model}, {config.num_prompts} x {config.num_generations} trajectories, "
          f"1 thread; median [least, most] of {ROUNDS} rounds")
    _time_rollout(config, state, ROUNDS)  # to warm up
    for style, wanted in (("brief", 2), ("paper", 3)):
        styled = replace(config, prompt_style=style, max_context=4096)
        ours, bare, loop = zip(*(_time_rollout(styled, state, i) for i in range(ROUNDS)), strict=True)
        print(f"rollout / its bare forward passes, {style} prompts: {_ratio(ours, bare)} (wanted: at most 1.25)")
        print(f"generate loop / rollout, per sampled token, {style} prompts: {_ratio(loop, ours)} (at least {wanted})")
    _, batch = train.iteration(config, state, 0)
    works = (lambda: train.update(config, state, batch), lambda: _bare_update(config, state, batch))
    ours, bare = zip(*([_timed(work) for work in works] for _ in range(ROUNDS)), strict=True)
    print(f"update / bare forward and backward, same tokens unpadded: {_ratio(ours, bare)} (at most 1.25)")
    steps = [[_step(replace(config, weights=w), state) for w in ("actfocus", "uniform")] for _ in range(ROUNDS)]
    for name, i in (("time", 0), ("peak memory", 1)):
        focus, uniform = zip(*([step[i] for step in pair] for pair in steps), strict=True)
        print(f"step with ActFocus / step with uniform, {name}: {_ratio(focus, uniform)} (at most 1.01 beyond noise)")
    print(f"share of a step that the reference pass takes: {statistics.median(step[0][2] for step in steps):.2f}")
    for algo in METHODS:
        rival = replace(config, algo=algo, weights="uniform", **ALGO_SETTINGS.get(algo, {}))
        state = build_state(rival)
        ratio = _ratio([_step(rival, state)[0] for _ in range(ROUNDS)], [pair[1][0] for pair in steps])
        print(f"step of {algo} / step of grpo, both uniform: {ratio}")


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


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
    ours = _timed(lambda: rows.extend(rollout(state.policy, state.tokenizer, episodes, state.generator, *settings)))
    with torch.no_grad():
        bare = _timed(lambda: [Engine.forward(engine, *call) for call in engine.calls])
    episodes, count = make_episodes(config, levels, config.num_generations), []
    loop = _timed(lambda: count.append(_generate_loop(config, state, episodes)))
    tokens = sum(sum(row.is_response) for row in rows)
    return ours / tokens, bare / tokens, loop / count[0]


@torch.no_grad()
def _generate_loop(config: Config, state: State, episodes: list) -> int:
    """The usual way: one `generate` a turn over the whole history, left-padded. Returns the sampled tokens."""
    tokenizer, stop = state.tokenizer, state.tokenizer.convert_tokens_to_ids("</answer>")
    histories = [tokenizer.encode(opening_text(tokenizer, e.system(), e.user())) for e in episodes]
    live, count = list(range(len(episodes))), 0
    while live:
        width = max(len(histories[i]) for i in live)
        tokens = torch.tensor([[0] * (width - len(histories[i])) + histories[i] for i in live])
        mask = torch.tensor([[0] * (width - len(histories[i])) + [1] * len(histories[i]) for i in live])
        out = state.policy.generate(
            tokens, attention_mask=mask, do_sample=True, temperature=config.temperature, top_k=0, pad_token_id=0,
            max_new_tokens=config.max_response_tokens, eos_token_id=[stop, tokenizer.eos_token_id],
        )[:, width:].tolist()
        for i, response in zip(list(live), out, strict=True):
            ends = [t for t, token in enumerate(response) if token in (stop, tokenizer.eos_token_id)]
            response = response[: ends[0] + 1] if ends else response
            count += len(response)
            text = tokenizer.decode(response)
            span = answer_span(text)
            message = episodes[i].act(text[slice(*span)] if span else None)
            if message is None:
                live.remove(i)
            else:
                histories[i] += response + tokenizer.encode(turn_text(tokenizer, message), add_special_tokens=False)
    return count


def _bare_update(config: Config, state: State, batch: Batch) -> None:
    """Forward and backward of transformers' own loss on the batch's tokens, cut into full rows of their mean length."""
    length = int(batch.lengths.float().mean())
    stream = torch.cat([row[:n] for row, n in zip(batch.tokens, batch.lengths, strict=True)])
    rows = stream[: len(stream) // length * length].view(-1, length)
    for part in micro_batches([length] * len(rows), config.micro_batch_tokens):
        state.policy(input_ids=rows[part], labels=rows[part], use_cache=False).loss.backward()
    state.optimizer.zero_grad()


def _step(config: Config, state: State) -> tuple[float, float, float]:
    """One iteration from the same weights, levels and noise: seconds, peak memory, share of the reference pass."""
    state.policy.load_state_dict(state.reference.state_dict())
    state.generator.manual_seed(0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc: what earlier steps left free is not this one's
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    metrics = []
    seconds = _timed(lambda: metrics.append(train.iteration(config, state, 0)[0]))
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return seconds, peak, metrics[0]["seconds_reference"] / seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 for a user's mistake."""
    transformers.utils.logging.disable_progress_bar()
    try:
        todo, config, folder = parse(argv)
        if todo["plot"]:
            compare(todo["plot"], Path(config.output_dir or "runs"))
        elif todo["floors"]:
            floors(config)
        elif todo["bench"]:
            bench(config)
        elif todo["bottleneck"]:
            bottleneck(config, folder)
        elif todo["html"]:
            sides = [(config, folder), *([todo["beside"]] if todo["beside"] else [])]
            print(f"page {todo['html']} ({viewer.write_page(todo['html'], sides) / 1000:.0f} kB)")
        elif todo["show_tokens"]:
            show_tokens(config, folder)
        else:
            report(config, folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
