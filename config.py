"""Every setting of a run, its limits, its presets, and the command line made of them.

A field of `Config` is a flag of train.py and evaluate.py. Its comment, which is also its --help, says what it is, its
symbol and its source: §5.1 of the paper (arXiv:2605.14558v1), or "ours" with the reason.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import checkpoint
from baselines import KINDS
from energy import SIGNALS
from envs import BUDGETS, ENVS
from policy import TINY
from sudoku import GIVENS

HUGE, ABOVE_0 = 1e9, 1e-12
ALGOS = ("grpo", "ppo", "dapo", "empg", "poad", "ntpo", "carl")
CRITIC = {"ppo", "poad", "ntpo"}  # those that have one


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
    dtype: str = one_of("float32", "bfloat16", default="float32")  # of matrix products; weights stay float32; ours
    device: str = "auto"  # of the models: cpu, cuda, cuda:1, mps, …; auto is a GPU where there is one; ours
    num_threads: int = within(0, HUGE, 0)  # of torch on the CPU, 0: its own choice; ours
    gradient_checkpointing: bool = False  # layers are run again in backward instead of kept; ours
    lora_rank: int = within(0, HUGE, 0)  # of the matrices that learn instead of all weights, 0: all weights; ours
    cache_dir: str = ""  # converted and warm-started models; ours, by default ~/.cache/actfocus
    warmstart_steps: int = within(0, HUGE, 0)  # supervised steps on scripted players before training; ours
    warmstart_learning_rate: float = within(ABOVE_0, HUGE, 1e-4)  # of those; ours
    env: str = one_of(*ENVS, default="frozenlake")  # the task
    algo: str = one_of(*ALGOS, default="grpo")  # the advantage, and how rollouts are made
    weights: str = one_of("actfocus", "uniform", "class_mean", default="actfocus")  # of tokens; uniform: α = 1, β = 0
    alpha: float = within(0, 1, 0.1)  # α, weight of reasoning tokens, §5.1
    beta: float = within(0, HUGE, 0.5)  # β, reach of the energy on action tokens, §5.1
    signal: str = one_of(*SIGNALS, default="energy")  # sₜ in place of Eₜ in Eq. (5), Eqs. (19)-(22)
    tag_weight: str = one_of("alpha", "one", default="alpha")  # of <think>, </think>, <answer>, </answer>; ours
    weight_stats: str = one_of("batch", "mini_batch", default="batch")  # what μ_E and σ_E are taken over; ours
    seed: int = within(0, 9_999, 0)  # of sampling, of the order of mini-batches and of the training levels
    max_steps: int = within(0, HUGE, 30)  # iterations; ours, paper 200
    num_prompts: int = within(1, HUGE, 8)  # P, prompts a step, §5.1
    num_generations: int = within(1, HUGE, 8)  # G, rollouts a prompt; ours, paper 16
    mini_batch_size: int = within(1, HUGE, 32)  # trajectories an optimiser step, §5.1
    micro_batch_tokens: int = within(1, HUGE, 2048)  # tokens a forward pass; ours, leaves the gradient as it is
    learning_rate: float = within(ABOVE_0, HUGE, 1e-4)  # of the policy; ours for the tiny model, paper 1e-6
    critic_learning_rate: float = within(ABOVE_0, HUGE, 3e-4)  # of the critic (PPO); ours, paper 1e-5
    max_grad_norm: float = within(ABOVE_0, HUGE, 1.0)  # gradient clipping; ours
    clip_low: float = within(0, 1, 0.2)  # ε_low, Eq. (6)
    clip_high: float = within(0, HUGE, 0.28)  # ε_high, Eq. (6)
    gamma: float = within(0, 1, 1.0)  # γ of GAE, §5.1
    lam: float = within(0, 1, 1.0)  # λ of GAE, §5.1
    whiten_mini_batches: bool = False  # advantages to mean 0, variance 1 in each mini-batch; POAD
    value_clip: float = within(0, HUGE, 0.0)  # how far a value may move from its old one, 0: any way; POAD 0.2
    max_kl: float = within(0, HUGE, 0.0)  # k3 KL to π_old above which the policy skips a step, 0: none; POAD 0.02
    kappa: float = within(0, HUGE, 1.0)  # κ, EMPG: how much certainty scales a step's advantage
    kappa_bonus: float = within(0, HUGE, 1.0)  # κ', EMPG: how fast the bonus falls with the next step's entropy
    zeta: float = within(0, HUGE, 0.05)  # ζ, EMPG: size of that bonus
    overlong_buffer: float = within(ABOVE_0, 1, 0.2)  # L_buf / L_max, DAPO: last part of a response that costs
    carl_first: int = within(1, HUGE, 1)  # N₀, CARL: rollouts of a prompt before forks begin
    entropy_coef: float = within(0, HUGE, 0.001)  # entropy bonus, §5.1
    kl_coef: float = within(0, HUGE, 0.0)  # KL loss, Eq. (15); paper 0 but for WebShop with GRPO
    kl_kind: str = one_of(*KINDS, default="k1")  # estimator of that KL, §5.1
    filter_fraction: float = within(ABOVE_0, 1, 1.0)  # groups kept, of most varied returns (StarPO-S); ours
    temperature: float = within(ABOVE_0, HUGE, 1.0)  # of the rollouts, §5.1
    max_response_tokens: int = within(1, HUGE, 96)  # tokens a response; ours, paper 400
    max_context: int = within(1, HUGE, 1024)  # tokens a trajectory; ours, paper 3600
    prompt_style: str = one_of("brief", "paper", default="brief")  # brief or paper; ours
    max_turns: int = within(0, HUGE, 0)  # K, turns an episode, 0: the environment's own, §5.1
    actions_per_turn: int = within(0, HUGE, 0)  # actions an answer, 0: the environment's own, §5.1
    max_actions: int = within(0, HUGE, 0)  # actions an episode, 0: the environment's own, §5.1
    format_penalty: float = within(0, HUGE, 0.1)  # taken from the return for an invalid turn, §5.1
    success_rate: float = within(ABOVE_0, 1, 1.0)  # FrozenLake: probability that a move goes where it is meant to; ours
    frozen: float = within(0, 1, 0.8)  # FrozenLake: probability p of ice; ours, the paper's is not said
    coordinates: bool = True  # Sokoban: positions as text above the grid; ours, for the tiny model
    sudoku_level: str = one_of(*GIVENS, default="easy")  # Sudoku: easy has 10 givens (ours), medium 9, hard 6
    hints: bool = True  # Sudoku: the legal digits of every blank below the board; ours
    webshop_data: str = ""  # WebShop: folder of the official files; by default the built-in shop
    results_per_page: int = within(1, 50, 10)  # WebShop: results a page, as in WebShop
    title_words: int = within(0, HUGE, 0)  # WebShop: words of a title that are shown, 0: all; ours
    webshop_strict: bool = False  # WebShop: the reward is 1 for a score of 1 and else 0, instead of the score; ours
    short_pages: bool = True  # WebShop: every button once, the goal on the search page only; ours, for the tiny model
    eval_steps: int = within(1, HUGE, 5)  # steps between evaluations; ours, paper 10
    eval_prompts: int = within(1, HUGE, 128)  # fixed evaluation levels; ours, paper 32
    eval_samples: int = within(1, HUGE, 1)  # samples a level; ours, paper 16
    eval_first: int = within(0, HUGE, 0)  # the first evaluation level; another than 0 where rates are tuned; ours
    eval_temperature: float = within(ABOVE_0, HUGE, 0.5)  # of evaluation, §5.1
    save_steps: int = within(1, HUGE, 10)  # steps between checkpoints; ours
    output_dir: str = ""  # run folder; by default a new one under runs/
    dry_run: bool = False  # show settings, memory, first prompt and token classes instead of training; ours

    @property
    def alpha_beta(self) -> tuple[float, float]:
        """α and β of the run's weights; uniform is α = 1, β = 0, and class means read neither."""
        return (self.alpha, self.beta) if self.weights == "actfocus" else (1.0, 0.0)

    def __post_init__(self):
        for name, value, limits in ((f.name, getattr(self, f.name), f.metadata) for f in fields(self)):
            if value not in limits.get("allowed", (value,)):
                raise ValueError(f"--{name} {value}: choose from {', '.join(limits['allowed'])}")
            if "low" in limits and not limits["low"] <= value <= limits["high"]:
                raise ValueError(f"--{name} {value}: must lie in [{limits['low']:g}, {limits['high']:g}]")
        if self.algo not in CRITIC and self.num_generations < 2:
            raise ValueError(f"--num_generations 1: {self.algo} compares the rollouts of a prompt and needs at least 2")
        if self.algo == "carl" and self.carl_first > self.num_generations:
            raise ValueError(f"--carl_first {self.carl_first}: must not exceed num_generations {self.num_generations}")
        if self.algo == "dapo" and self.filter_fraction < 1:
            raise ValueError(f"--filter_fraction {self.filter_fraction}: dapo chooses its groups itself; leave it at 1")
        kept = max(1, round(self.filter_fraction * self.num_prompts)) * self.num_generations
        if kept % self.mini_batch_size:
            raise ValueError(f"--mini_batch_size {self.mini_batch_size}: must divide the {kept} trajectories kept a "
                             "step (num_prompts x num_generations x filter_fraction)")


BY_MODEL = {"smollm2": dict(warmstart_steps=180, warmstart_learning_rate=3e-4, dtype="bfloat16")}  # its start; ours
LAPTOP_BY_MODEL = {  # what fits it on two cores; ours
    "smollm2": dict(learning_rate=1e-5, num_prompts=4, mini_batch_size=16, max_steps=24, eval_steps=8, eval_prompts=32),
}
BENCH = {"smollm2": dict(num_prompts=2)}  # minutes on one core; ours
EXTENDABLE = {"max_steps", "eval_steps", "save_steps", "device", "num_threads", "micro_batch_tokens",
              "gradient_checkpointing", "dry_run"}  # may differ when a run resumes; none changes what is computed

PRESETS = {
    "laptop": {},
    "smoke": dict(max_steps=2, num_prompts=2, num_generations=4, mini_batch_size=8, eval_prompts=8, eval_samples=2,
                  eval_steps=2, save_steps=1),
    "paper": dict(model="Qwen/Qwen2.5-0.5B-Instruct", max_steps=200, learning_rate=1e-6, critic_learning_rate=1e-5,
                  max_response_tokens=400, max_context=3600, prompt_style="paper", coordinates=False,
                  short_pages=False, num_generations=16, eval_steps=10, eval_prompts=32, eval_samples=16),
}
_LONG = {"sudoku": dict(max_context=1536), "webshop": dict(max_context=2048, results_per_page=4)}
BY_ENV = {  # what a preset sets for one environment
    "laptop": _LONG | {"sokoban": dict(max_steps=40), "sudoku": _LONG["sudoku"] | dict(max_steps=40),
                       "webshop": _LONG["webshop"] | dict(max_steps=20, mini_batch_size=16)},
    "smoke": _LONG,
    "paper": {"webshop": dict(num_prompts=16, num_generations=8, max_steps=100, max_context=8192, eval_prompts=256,
                              eval_samples=1)},
}
_FILTER = dict(filter_fraction=0.25)
PAPER_BY_ALGO = {  # the trajectory filter keeps 25 % of the groups; a KL loss on WebShop only
    ("sokoban", "grpo"): _FILTER, ("sokoban", "ppo"): _FILTER, ("sudoku", "grpo"): _FILTER, ("sudoku", "ppo"): _FILTER,
    ("frozenlake", "ppo"): _FILTER, ("webshop", "grpo"): dict(kl_coef=0.001),
}
_POAD = dict(gamma=0.95, lam=0.95, clip_high=0.2, whiten_mini_batches=True, value_clip=0.2, max_kl=0.02,
             entropy_coef=0.01)
ALGO_SETTINGS = {  # what the methods' own papers set otherwise
    "dapo": dict(entropy_coef=0.0),
    "poad": _POAD,
    "ntpo": _POAD,
    "carl": dict(clip_high=0.2, entropy_coef=0.0),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like all others."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; --help lists all flags")


def config_parser(description: str) -> Parser:
    """A flag per field of `Config`; only flags that were given reach the namespace. --flag alone is --flag true."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    for f in fields(Config):
        kind = dict(type=_boolean, nargs="?", const=True) if f.type is bool else dict(type=f.type)
        choices = f"; one of {', '.join(f.metadata['allowed'])}" if "allowed" in f.metadata else ""
        parser.add_argument(f"--{f.name}", help=f"{comments[f.name]}{choices}; default {f.default!r}", **kind)
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[Config, Path | None]:
    """Configuration and, when resuming, the checkpoint; a ValueError names a flag that is wrong."""
    parser = config_parser("Trains a language-model agent.")
    parser.add_argument("--preset", choices=list(PRESETS), help="laptop is the default")
    parser.add_argument("--resume_from_checkpoint", type=Path, help="a run folder or a checkpoint-N in it")
    given = vars(parser.parse_args(argv))
    path = given.pop("resume_from_checkpoint", None)
    if path is not None:
        path = checkpoint.find_checkpoint(path)
        saved = {**vars(of_run(path.parent)), "output_dir": str(path.parent), "preset": "as it was started"}
        for name, value in given.items():
            if name not in EXTENDABLE and value != saved[name]:
                raise ValueError(f"--{name} {value}: {path} belongs to a run with {name} {saved[name]}")
        del saved["preset"]
        return Config(**{**saved, **given}), path
    preset = given.pop("preset", "laptop")
    env, algo, model = (given.get(name, getattr(Config, name)) for name in ("env", "algo", "model"))
    changed = {}
    for name, settings in chosen_settings(preset, env, algo, model).items():
        if settings:
            print(f"{name}:", " ".join(f"--{key} {value}" for key, value in settings.items()))
        changed |= settings
    return Config(**{**changed, **given}), None


def chosen_settings(preset: str, env: str, algo: str, model: str = "") -> dict[str, dict]:
    """What is not as `Config` has it, by its reason; later ones win."""
    of_paper = PAPER_BY_ALGO.get((env, algo), {}) if preset == "paper" else {}
    of_model = BY_MODEL.get(model, {}) | (LAPTOP_BY_MODEL.get(model, {}) if preset == "laptop" else {})
    return {f"preset {preset}": PRESETS[preset], f"{env} in preset {preset}": BY_ENV[preset].get(env, {}) | of_paper,
            f"algo {algo}": ALGO_SETTINGS.get(algo, {}), f"model {model}": of_model}


def usual_settings(env: str, algo: str, model: str = "") -> dict:
    """All of `chosen_settings` of the laptop's preset at once."""
    parts = chosen_settings("laptop", env, algo, model).values()
    return {name: value for part in parts for name, value in part.items()}


def of_run(run: Path) -> Config:
    """The settings a run was started or last resumed with; one that is older than a setting has its default.

    Raises:
        ValueError: no run folder, or a setting that there is no more.
    """
    usual, saved = vars(Config()), checkpoint.read_config(run)
    if unknown := sorted(saved.keys() - usual.keys()):
        raise ValueError(f"{run}: was started with a setting that there is no more: {', '.join(unknown)}")
    return Config(**{**usual, **saved})


def departures(config: Config) -> dict:
    """What sets a run apart from others of its environment, method and weights: settings unlike their usual values.

    Left out are the seed and what changes no number but by rounding: folders, checkpoints, device, threads, how much
    of a batch is in memory at once; and, under other weights, what only ActFocus reads.
    """
    unread = {"env", "algo", "weights", "seed", "output_dir", "cache_dir", "save_steps", "micro_batch_tokens",
              "gradient_checkpointing", "device", "num_threads"}
    usual = {**vars(Config()), **usual_settings(config.env, config.algo)}
    own = {**vars(config), "model": Path(config.model).name}
    usual["model"] = Path(usual["model"]).name
    for budget in BUDGETS:
        if own[budget] == getattr(ENVS[config.env], budget):
            unread.add(budget)
    if config.weights != "actfocus":
        unread |= {"alpha", "beta", "signal", "tag_weight"}
    if config.weights == "uniform":
        unread.add("weight_stats")  # which class_mean reads
    return {name: value for name, value in own.items() if name not in unread and value != usual[name]}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
