"""Makes `models/tiny`, the stand-in for a base model: it knows the format and plays a little better than chance.

Ours, not the paper's (arXiv:2605.14558v1 starts from Qwen2.5-Instruct). Scripted players write transcripts of all
environments in the form of rollouts; a small Llama learns their responses. The reasoning looks at the state and muses,
and never names the move. First the moves are optimal, so that the mapping is learnt; then they are optimal only with
a falling probability (`STAGES`), which leaves a soft policy with knowledge under it.

    python warmstart.py --output_dir models/new --seed 0      # two hours on one core
    python warmstart.py --output_dir models/named --committed      # from models/tiny, thoughts that end with the move
    python warmstart.py --output_dir models/smollm2 --model smollm2 --env frozenlake     # any model, one game's format
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from config import Config, Parser, usual_settings
from envs import Cell, Env, Episode, make_env
from methods import build_env
from policy import (
    TINY,
    load_model,
    load_tokenizer,
    micro_batches,
    opening_text,
    pad,
    pick_device,
    place_beside,
    precision,
    save_whole,
    score_tokens,
    turn_text,
)
from rollout import load_policy, token_pieces
from smollm2 import source_model

GAMES = {"frozenlake": {}, "sokoban": {"coordinates": True}, "sudoku": {},
         "webshop": {"results_per_page": 4, "short_pages": True}}
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
FIRST_SEED = 2**40  # levels of the warm start: far from those of training and evaluation
STAGES = (  # learning rate, then steps and each game's probability of an optimal move, in the order of GAMES
    (1.5e-3, ((1700, (1.0, 1.0, 1.0, 1.0)), (400, (0.4, 0.4, 0.4**0.5, 0.4**0.5)))),
    (5e-4, ((300, (0.15, 0.15, 0.15**0.75, 0.15**0.5)),)),  # each stage starts its optimiser anew
)
SAMPLED = dict(zip(GAMES, (0.5, 0.5, 0.5**0.5, 0.5**0.5), strict=True))  # players whose words make the tokenizer
ACTION_WEIGHT = 5.0  # an action token counts this much more than a reasoning token
ROWS = {"frozenlake": 12, "sokoban": 12, "sudoku": 10, "webshop": 6}  # transcripts a step; WebShop's are long and easy
ROWS_OF_ONE, SKILL_OF_ONE = 8, 0.4  # transcripts a step, and their players, where a model learns one game only
COMMITTED = {"frozenlake": "I go", "sokoban": "I go", "sudoku": "I put"}  # how a thought begins to name its moves
COMMITTED_STEPS = 300  # each: optimal moves, so that the thought learns to choose; then the last skills of STAGES
PLAIN = SimpleNamespace(chat_template=None)  # turns are lines
# A coordinate, a map's cell, a word: one token each.
WORD = r" ?\[\d\]| ?\d,\d| ?\(\d+, \d+\)| ?[A-Z]?[a-z]+| ?[A-Z]| ?\|\|| ?\d| ?[^\sA-Za-z0-9]|\s"

MUSINGS = {
    "frozenlake": [
        "Let me look at the map with care.", "No hurry, one thing after another.",
        "Ice can be thin where nobody looks.", "Every hole ends the walk at once.",
        "The way need not be straight.", "I keep my balance and think it over.",
        "It is cold out here, but the sky is clear.", "I go over the cells one by one.",
    ],
    "sokoban": [
        "Let me look at the room with care.", "No hurry, one thing after another.",
        "A box in a corner is stuck for good.", "Boxes can be pushed but never pulled.",
        "First I have to stand on the far side.", "Walls leave little space here.",
        "It is quiet in the store house today.", "I go over the cells one by one.",
    ],
    "sudoku": [
        "Let me look at the board with care.", "No hurry, one thing after another.",
        "Every digit stands once in each row.", "A box of four has room for four digits.",
        "What is given stays as it is.", "I would rather check it twice.",
        "It is a small board, but a tricky one.", "I go over the cells one by one.",
    ],
    "webshop": [
        "Let me look at the page with care.", "No hurry, one thing after another.",
        "A good price is only half of it.", "The right kind matters more than the brand.",
        "I can always go back.", "Nothing is bought before I say so.",
        "It is a quiet day for a little shopping.", "I go over the lines one by one.",
    ],
}


MUSES = {"frozenlake": (1, 3), "sokoban": (1, 3), "sudoku": (3, 5), "webshop": (3, 5)}  # how many: from, below


def reasoning(game: str, env: Env, rng: np.random.Generator) -> str:
    """What the player thinks: true facts of the state and idle remarks, in random order, without the move."""
    musings = [str(text) for text in rng.choice(MUSINGS[game], size=rng.integers(*MUSES[game]), replace=False)]
    sentences = FACTS[game](env, rng) + musings
    return " ".join(sentences[i] for i in rng.permutation(len(sentences)))


def _frozenlake_facts(env: Env, rng: np.random.Generator) -> list[str]:
    standing = str(rng.choice(["I stand at", "I am now at", "My place is"]))
    holes = "There is one hole" if len(env.holes) == 1 else f"There are {len(env.holes)} holes"
    return [f"{standing} {env.player}.", _where("The goal", env.player, env.goal, rng),
            f"{holes} to keep in mind."]


def _sokoban_facts(env: Env, rng: np.random.Generator) -> list[str]:
    player, (box,) = env.state
    (target,) = env.targets
    return [_where("The box", player, box, rng), _where("The target", box, target, rng, "it")]


def _sudoku_facts(env: Env, rng: np.random.Generator) -> list[str]:
    row = int(rng.integers(4))
    missing = sorted({1, 2, 3, 4} - set(env.board[4 * row : 4 * row + 4]))
    misses = f"misses {' and '.join(map(str, missing))}" if missing else "is full"
    return [f"{env.board.count(0)} blanks are left.", f"Row {row + 1} {misses}."]


def _webshop_facts(env: Env, rng: np.random.Generator) -> list[str]:
    goal, page = env.goal, env.page
    wanted = env.products[goal.asin].instruction.removeprefix("Find me ")
    asked = ", ".join(goal.options.values())
    facts = [f"I want {wanted}.", f"It should be {asked}." if asked else "Any make will do."]
    if page.name == "item":
        facts[0] = f"So far I chose {', '.join(value for _, value in page.chosen) or 'nothing'}."
    return facts


def _where(name: str, origin: Cell, place: Cell, rng: np.random.Generator, other: str = "me") -> str:
    """Where a thing lies as seen from another: a fact about the state, not a move."""
    down, across = place[0] - origin[0], place[1] - origin[1]
    rows = f"{abs(down)} {'below' if down > 0 else 'above'}" if down else "in the row"
    columns = f"{abs(across)} to the {'east' if across > 0 else 'west'}" if across else "in the column"
    verb = str(rng.choice(["is", "lies", "waits"]))
    return f"{name} at {place} {verb} {rows} and {columns} of {other}."


FACTS = {"frozenlake": _frozenlake_facts, "sokoban": _sokoban_facts, "sudoku": _sudoku_facts, "webshop": _webshop_facts}


def transcript(
    game: str, seed: int, skill: float, tokenizer: PreTrainedTokenizerBase = PLAIN, env: Env | None = None,
    style: str = "brief",
) -> list[tuple[str, bool]]:
    """One episode of a player whose moves are optimal with probability `skill`: (text, is it a response) in order.

    The text between responses is what a rollout puts there: plain lines, or the tokenizer's chat template; by default
    in the tiny model's environments.
    FrozenLake and Sokoban start up to five random moves into the level, so that states off the best path are seen.
    """
    rng = np.random.default_rng([seed, 2])
    env = env or make_env(game, **GAMES[game])
    episode = Episode(env, seed, style=style)
    if game in ("frozenlake", "sokoban"):
        _wander(episode, rng)
    parts = [(opening_text(tokenizer, episode.system(), episode.user()), False)]

    def choose(best: list[str]) -> str:
        if rng.random() >= skill:
            best = env.legal_actions()
        if best[0].startswith("search"):  # for what the instruction says of the product, without options and price
            return f"search[{env.products[env.goal.asin].instruction.removeprefix('Find me ')}]"
        return str(rng.choice(best))

    while not episode.done:
        moves = env.solve(choose)[: env.actions_per_turn] or [str(rng.choice(env.legal_actions()))]
        answer = " || ".join(moves)
        thought = reasoning(game, env, rng)
        parts.append((f"<think>{thought}</think><answer>{answer}</answer>", True))
        if message := episode.act(answer):
            parts.append((turn_text(tokenizer, message), False))
    return parts


def committed(
    game: str, seed: int, skill: float, tokenizer: PreTrainedTokenizerBase = PLAIN
) -> list[tuple[str, bool]]:
    """`transcript` with thoughts that end with the moves: the decision is a reasoning token, the answer repeats it."""
    parts = transcript(game, seed, skill, tokenizer)
    return [(_commit(game, text) if is_response else text, is_response) for text, is_response in parts]


def _commit(game: str, response: str) -> str:
    """The moves as words that are one token each in the answer too: Left, or a digit and its row,column."""
    thought, answer = response.removesuffix("</answer>").split("</think><answer>")
    moves = answer.split(" || ")
    if game == "sudoku":
        moves = [f"{digit} at {row},{column}" for row, column, digit in (move.split(",") for move in moves)]
    return f"{thought} {COMMITTED[game]} {' and '.join(moves)}.</think><answer>{answer}</answer>"


def commit_tiny(folder: Path, seed: int, shrink: int) -> None:
    """Continue models/tiny on `committed` transcripts, and save it as `folder`."""
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    learning_rate, phases = STAGES[-1]
    skills = [skill for skill in (dict.fromkeys(GAMES, 1.0), dict(zip(GAMES, phases[-1][1], strict=True)))
              for _ in range(max(1, COMMITTED_STEPS // shrink))]
    rows = {game: ROWS[game] for game in COMMITTED}
    train(model, tokenizer, skills, learning_rate, 1000 + seed, rows, write=committed)
    save_whole(folder, model, tokenizer)


def _wander(episode: Episode, rng: np.random.Generator) -> None:
    """Random moves before the first turn; taken back if they end the episode or spoil it."""
    env, moves = episode.env, rng.integers(6)
    for _ in range(min(moves, env.max_actions)):
        episode.observation, *_ = env.step(str(rng.choice(env.actions)))
    if not env.solve():
        episode.observation, _ = env.reset(episode.seed)
    env.actions_left = env.max_actions


def build_tokenizer(texts: Iterator[str], vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """Byte-level BPE within the words of WORD, so any text has tokens; a tag, and a product's number, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|pad|>", "<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    whole = [*TAGS, *(number.lower() for number in sorted(make_env("webshop").products))]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in whole])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")


def build_model(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of about a million parameters."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, pad_token_id=0, eos_token_id=1,
    ))


def encode(tokenizer: PreTrainedTokenizerBase, parts: list[tuple[str, bool]]) -> tuple[list[int], list[float]]:
    """Token ids of a transcript and their weights in the loss: 0 prompt, 1 thought, ACTION_WEIGHT after `<answer>`."""
    ids, weights = [], []
    for text, is_response in parts:
        part = tokenizer.encode(text, add_special_tokens=False)
        ids += part
        if is_response:
            ends, answer = np.cumsum([len(piece) for piece in token_pieces(tokenizer, part)]), text.index("<answer>")
            weights += [ACTION_WEIGHT if end > answer + len("<answer>") else 1.0 for end in ends]
        else:
            weights += [0.0] * len(part)
    return ids, weights


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skills: list[dict[str, float]], learning_rate: float,
    seed: int, rows: dict[str, int] = ROWS, dtype: str = "float32",
    write: Callable[..., list[tuple[str, bool]]] = transcript, longest: int | None = None,
) -> None:
    """Weighted cross-entropy on response tokens of what players of the given skills `write`, a game's each step.

    Of a transcript the first `longest` tokens are learnt, all by default.

    Careful: `skills` sets the number of steps too. The learning rate warms up and decays linearly.
    """
    steps, warm_up = len(skills), min(100, max(1, len(skills) // 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, max(0.05, 1 - step / steps))
    )
    games, start = [game for game, count in rows.items() for _ in range(count)], time.time()
    for step, skill in enumerate(skills):
        first = FIRST_SEED + (seed * 100_000 + step) * len(games)
        texts = [write(game, first + i, skill[game], tokenizer) for i, game in enumerate(games)]
        coded = [tuple(column[:longest] for column in encode(tokenizer, parts)) for parts in texts]
        total = sum(sum(weights) for _, weights in coded)
        loss = 0.0
        for batch in micro_batches([len(ids) for ids, _ in coded], 2048):
            tokens = pad([coded[i][0] for i in batch], torch.int64).to(model.device)
            weights = pad([coded[i][1] for i in batch], torch.float32).to(model.device)
            with precision(dtype, model.device):
                logp = score_tokens(model, tokens, weights > 0).logp
            part = -(weights * logp).sum() / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss:.4f}  {time.time() - start:6.0f} s", flush=True)


def bring_to_format(config: Config, name: str, folder: Path, seed: int = 0) -> None:
    """Teach any language model the format on the run's game, prompts and budgets; `folder` appears whole or not at all.

    Its players are weak, so that it learns the form and little of the game.
    """
    def write(game: str, seed: int, skill: float, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
        return transcript(game, seed, skill, tokenizer, build_env(config), config.prompt_style)

    place_beside(folder).rmdir()  # now, or all steps are lost in the end
    game, steps, learning_rate = config.env, config.warmstart_steps, config.warmstart_learning_rate
    model, tokenizer = load_policy(name, pick_device(config.device)), load_tokenizer(name)
    print(f"warm start of {name} on {game}: {steps} steps of {ROWS_OF_ONE} transcripts at {learning_rate:g}")
    train(model, tokenizer, [{game: SKILL_OF_ONE}] * steps, learning_rate, seed, {game: ROWS_OF_ONE}, config.dtype,
          write, config.max_context)
    save_whole(folder, model, tokenizer)


def make_tiny(folder: Path, seed: int, shrink: int) -> None:
    """Tokenizer and model from nothing, on all games."""
    samples = (transcript(game, FIRST_SEED - 1 - i, SAMPLED[game]) for game in GAMES for i in range(1000))
    tokenizer = build_tokenizer("".join(text for text, _ in parts) for parts in samples)
    model = build_model(len(tokenizer))
    for stage, (learning_rate, phases) in enumerate(STAGES):
        skills = [dict(zip(GAMES, skill, strict=True))
                  for steps, skill in phases for _ in range(max(1, steps // shrink))]
        train(model, tokenizer, skills, learning_rate, len(STAGES) * seed + stage)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 for a user's mistake."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the levels, and of new weights")
    parser.add_argument("--shrink", type=int, default=1, help="divide all steps by this, for a quick try")
    parser.add_argument("--committed", action="store_true", help="continue models/tiny on thoughts that name the move")
    parser.add_argument("--model", help="instead: teach this model, a folder, hub name or smollm2, one game's format")
    parser.add_argument("--env", default=Config.env, help="with --model: the game")
    parser.add_argument("--steps", type=int, default=60, help="with --model: of 8 transcripts each")
    parser.add_argument("--learning_rate", type=float, default=Config.warmstart_learning_rate, help="with --model")
    parser.add_argument("--prompt_style", default=Config.prompt_style, help="with --model: brief or paper")
    parser.add_argument("--max_context", type=int, help="with --model: tokens of a transcript; the game's by default")
    parser.add_argument("--dtype", default=Config.dtype, help="with --model: float32 or bfloat16")
    parser.add_argument("--cache_dir", default=Config.cache_dir, help="with --model smollm2: where it is converted")
    try:
        args = parser.parse_args(argv)
        if args.shrink < 1:
            raise ValueError(f"--shrink {args.shrink}: must be at least 1")
        if args.output_dir.exists():
            raise ValueError(f"--output_dir {args.output_dir}: exists already")
        if args.model and (args.committed or args.shrink > 1 or args.steps < 1):
            raise ValueError("--model goes with --steps of at least 1, not with --committed or --shrink")
        torch.manual_seed(args.seed)
        if args.model:
            own = dict(model=args.model, env=args.env, warmstart_steps=args.steps, prompt_style=args.prompt_style,
                       warmstart_learning_rate=args.learning_rate, dtype=args.dtype, cache_dir=args.cache_dir)
            own |= {} if args.max_context is None else {"max_context": args.max_context}
            config = Config(**{**usual_settings(args.env, Config.algo), **own})
            bring_to_format(config, source_model(config), args.output_dir, args.seed)
        else:
            place_beside(args.output_dir).rmdir()
            (commit_tiny if args.committed else make_tiny)(args.output_dir, args.seed, args.shrink)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
