"""Looks at a trained agent: success on fixed levels, coloured tokens, learning curves, the diagnosis, the bench.

    python evaluate.py runs/NAME                    # success, 95 % interval, random floor, oracle ceiling
    python evaluate.py runs/NAME --show_tokens      # two episodes, every token coloured by class and weight
    python evaluate.py runs/NAME --html page.html   # the same as a page, with the numbers of every token (viewer.py)
    python evaluate.py --floors                     # random floor and oracle ceiling of every game, or of --env
    python evaluate.py --plot runs/A runs/B         # learning curves and gradient mass of several runs, and a table
    python evaluate.py models/tiny --bottleneck     # Figures 1-2 of arXiv:2605.14558v1; fewer than 256 --groups 64
    python evaluate.py --bench                      # how fast, as ratios measured in one run
    python evaluate.py --bench --model smollm2      # the same with 135 M parameters, and the memory of an update

A folder of a run brings its own settings; every flag of train.py overrides them.
P prompts, G rollouts each, B = P·G rows, T tokens.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import checkpoint
import diagnosis
import tables
import viewer
from bench import bench
from config import BENCH, Config, config_parser, of_run, usual_settings
from envs import ENVS, oracle_player, random_player
from memory import advice, is_out_of_memory
from methods import env_options
from metrics import describe
from policy import TINY, check_positions, load_tokenizer, pick_device
from rollout import load_policy, token_pieces
from startup import start_model
from train import evaluate_player, evaluate_policy


def parse(argv: Sequence[str] | None) -> tuple[dict, Config, Path]:
    """What to do, the settings, and the model folder to look at."""
    parser = config_parser(__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="run, checkpoint, model folder or hub name; by default --model")
    for name, what in (("show_tokens", "print two episodes, every token coloured by class and weight"),
                       ("bottleneck", "Figures 1 and 2: does a class's energy go with the spread of returns?"),
                       ("bench", "time and memory, as ratios to bare work of the same model"),
                       ("floors", "random player and oracle on all four games, or on --env")):
        parser.add_argument(f"--{name}", action="store_true", default=False, help=what)
    parser.add_argument("--plot", nargs="+", type=Path, metavar="RUN", help="curves, gradient mass, table of these")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write two episodes with all numbers of every token")
    parser.add_argument("--csv", type=Path, metavar="TABLE", help="with --bottleneck: append its rows to this file")
    parser.add_argument("--groups", type=int, metavar="P", help="with --bottleneck: so many groups, by default 256")
    parser.add_argument("--beside", metavar="FOLDER", help="with --html: this model on the same level beside it")
    given = vars(parser.parse_args(argv))
    actions = ("show_tokens", "bottleneck", "bench", "floors", "plot", "html")
    todo = {name: given.pop(name, None) for name in (*actions, "beside", "csv", "groups")}
    folder = given.pop("folder", given.get("model", str(TINY)))
    if len(asked := [f"--{name}" for name in actions if todo[name]]) > 1:
        raise ValueError(f"{' '.join(asked)}: one at a time")
    if todo["csv"] and not (todo["bottleneck"] and todo["csv"].parent.is_dir()):
        raise ValueError(f"--csv {todo['csv']}: goes with --bottleneck, and its folder must exist")
    if todo["groups"] is not None and not (todo["bottleneck"] and todo["groups"] >= 3):
        raise ValueError(f"--groups {todo['groups']}: goes with --bottleneck, which needs at least 3 groups")
    if todo["bench"]:
        given = {**BENCH.get(given.get("model"), {}), **given}
    if todo["beside"]:
        if not todo["html"]:
            raise ValueError("--beside: needs --html PAGE, the page to write")
        todo["beside"] = settings_of(Path(todo["beside"]), given)
    if todo["floors"]:
        games = [given["env"]] if "env" in given else ENVS
        todo["floors"] = [settings_of(Path(folder), {**given, "env": env})[0] for env in games]
    return todo, *settings_of(Path(folder), given)


def settings_of(folder: Path, given: dict) -> tuple[Config, Path]:
    """A folder's own settings under the flags that were given, and the folder of its model."""
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    if "config" in checkpoint.read_about(run):
        config = replace(of_run(run), **given)
        check_positions(config.model, config.max_context)
        return config, checkpoint.find_checkpoint(folder)
    name, env, algo = given.get("model", str(folder)), given.get("env", Config.env), given.get("algo", Config.algo)
    config = Config(**{**usual_settings(env, algo, name), **given, "model": name})
    started = start_model(config)
    return replace(config, model=started), Path(started) if folder == Path(name) else folder


def report(config: Config, folder: Path) -> None:
    """Success on the evaluation levels beside what chance and the solver reach there."""
    policy = load_policy(str(folder), pick_device(config.device))
    result, _ = evaluate_policy(config, policy, load_tokenizer(str(folder)))
    options = ", ".join(f"{name} {value}" for name, value in env_options(config).items())
    print(f"{config.env}, temperature {config.eval_temperature}, {options}, {folder}")
    floor, ceiling = (evaluate_player(config, player) for player in (random_player, oracle_player))
    for name, part in (("policy", result), ("random floor", floor), ("oracle ceiling", ceiling)):
        print(f"{name:>14}: {describe(part)}, return {part['return_mean']:.2f}")


def floors(configs: Sequence[Config]) -> None:
    """What chance and the solver reach on the evaluation levels of every environment."""
    for config in configs:
        for name, player in (("random floor", random_player), ("oracle ceiling", oracle_player)):
            print(f"{config.env:>10}, {name:>14}: {describe(evaluate_player(config, player))}")


def show_tokens(config: Config, folder: Path, episodes: int = 2) -> None:
    """Print episodes: observations dim, reasoning blue, action tokens on red that deepens with their weight."""
    scene = viewer.stage(config, folder)
    rows, batch, (alpha, beta) = scene.rows, scene.batch, config.alpha_beta
    print("\x1b[2mprompt and observation, weight 0\x1b[0m", end="   ")
    if config.weights != "class_mean":  # whose weights are of the batch
        print(f"\x1b[34mreasoning, weight {alpha}\x1b[0m   action, weight "
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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 for a user's mistake."""
    transformers.utils.logging.disable_progress_bar()
    try:
        todo, config, folder = parse(argv)
        torch.set_num_threads(config.num_threads or torch.get_num_threads())
        if todo["plot"]:
            tables.compare(todo["plot"], Path(config.output_dir or "runs"))
        elif todo["floors"]:
            floors(todo["floors"])
        elif todo["bench"]:
            bench(config)
        elif todo["bottleneck"]:
            diagnosis.diagnose(config, folder, todo["csv"], todo["groups"])
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
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(advice(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
