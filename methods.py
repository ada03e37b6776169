"""The methods as a table: how each makes its rollouts, which of them it keeps, and its advantage.

Everything else of a step is common to all (`train.iteration`), and the token weights are none of their business.
The formulas stand in actfocus.py and baselines.py; here they meet the batch. B rows, T tokens, K turns, S states.

Differs from the papers: CARL counts N₀ + forks = G, so that every method gets as many rollouts; DAPO gives up after
DAPO_ROUNDS rounds and fills the batch with groups of equal returns.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import parallel
from actfocus import gae, group_advantages, whiten
from baselines import (
    criticality,
    edge_advantages,
    empg_advantages,
    filter_groups,
    ntpo_gae,
    overlong_penalty,
    poad_gae,
    tree_values,
    update_set,
    varied_groups,
)
from checkpoint import State
from config import Config
from envs import BUDGETS, Env, Episode, make_env
from policy import micro_batches, precision
from rollout import Batch, Trajectory, play_on, rollout
from webshop import FIRST_TRAIN_SEED

MAX_LEVELS = 100_000  # of one seed's steps; DAPO's later rounds draw theirs beyond
DAPO_ROUNDS = 8  # at most, of P prompts each


def play_levels(config: Config, state: State, levels: Sequence[int], samples: int = 0) -> list[Trajectory]:
    """G rollouts (or `samples`) of each level, a level's adjacent."""
    episodes = make_episodes(config, levels, samples or config.num_generations)
    with precision(config.dtype, state.policy.device):
        return rollout(state.policy, state.tokenizer, episodes, noise(state.generator), *rollout_settings(config))


def play_trees(config: Config, state: State, levels: Sequence[int]) -> list[Trajectory]:
    """N₀ rollouts of each level, then forks where the policy is least sure, G in all. CARL."""
    def play(forks: list[Trajectory]) -> list[Trajectory]:
        with precision(config.dtype, state.policy.device):
            return play_on(state.policy, state.tokenizer, forks, noise(state.generator), *rollout_settings(config))

    return grow_trees(play_levels(config, state, levels, config.carl_first), config.num_generations, play)


def sample(config: Config, state: State, step: int, again: int = 0) -> list[Trajectory]:
    """G rollouts of each of the step's P prompts, shared out over the ranks; new levels every step.

    Two levels of a run differ up to MAX_LEVELS prompts; in WebShop its goals come round again (878 in our shop).
    """
    first = FIRST_TRAIN_SEED * (1 + config.seed) + step * config.num_prompts + again * MAX_LEVELS
    levels = parallel.block(range(first, first + config.num_prompts))
    return all_ranks(lambda: METHODS[config.algo].play(config, state, levels))


def sample_until_varied(config: Config, state: State, step: int) -> list[Trajectory]:
    """New prompts until P of them have returns that are not all equal. DAPO's dynamic sampling."""
    rows: list[Trajectory] = []
    for again in range(DAPO_ROUNDS):
        rows += sample(config, state, step, again)
        returns = torch.tensor([row.episode.return_ for row in rows]).view(-1, config.num_generations)
        if (returns != returns[:, :1]).any(1).sum() >= config.num_prompts:
            break
    return rows


def all_ranks(play: Callable[[], list[Trajectory]]) -> list[Trajectory]:
    """What every rank plays, finished and in order of the prompts: the batch does not depend on how many ranks."""
    rows = parallel.agree(play)
    if not parallel.running():
        return rows
    for row in rows:
        row.episode.env = None  # it has done its work, and a whole shop would have to be sent
    return [row for part in parallel.gather(rows) for row in part]


def noise(generator: torch.Generator) -> torch.Generator | None:
    """One generator of all sampling; with ranks none, so that every trajectory draws its own numbers on any of them."""
    return None if parallel.running() else generator


def rollout_settings(config: Config) -> tuple[float, int, int]:
    """Temperature and budgets, as `rollout` takes them."""
    return config.temperature, config.max_response_tokens, config.max_context


def make_episodes(config: Config, seeds: Sequence[int], samples: int) -> list[Episode]:
    """`samples` episodes of each level, a level's adjacent; they share the level, not their luck."""
    return [Episode(build_env(config), seed, replica, config.prompt_style, config.format_penalty)
            for seed in seeds for replica in range(samples)]


def build_env(config: Config) -> Env:
    """The environment with the run's options, and with those of its budgets that the run sets."""
    env = make_env(config.env, **env_options(config))
    for budget in BUDGETS:
        setattr(env, budget, getattr(config, budget) or getattr(env, budget))
    return env


def env_options(config: Config) -> dict:
    """The settings that belong to the run's environment alone."""
    return {"sokoban": dict(coordinates=config.coordinates),
            "frozenlake": dict(success_rate=config.success_rate, frozen=config.frozen),
            "sudoku": dict(level=config.sudoku_level, hints=config.hints),
            "webshop": dict(data=config.webshop_data or None, results_per_page=config.results_per_page,
                            title_words=config.title_words, strict=config.webshop_strict,
                            short_pages=config.short_pages)}[config.env]


def evaluation_levels(config: Config) -> range:
    """Levels from `eval_first` on.

    Raises:
        ValueError: the run trains on some, or WebShop has not as many goals: one met twice is no news.
    """
    levels = range(config.eval_first, config.eval_first + config.eval_prompts)
    trained = range(first := FIRST_TRAIN_SEED * (1 + config.seed), first + FIRST_TRAIN_SEED)
    if max(levels[0], trained[0]) <= min(levels[-1], trained[-1]):
        raise ValueError(f"--eval_first {config.eval_first}: of its {config.eval_prompts} levels some are those that "
                         f"--seed {config.seed} trains on, {trained[0]} to {trained[-1]}")
    goals = count_levels(config)
    if config.eval_prompts > goals:
        raise ValueError(f"--eval_prompts {config.eval_prompts}: this shop has {goals} goals to evaluate on; choose "
                         "at most as many, or the official files with --webshop_data")
    return levels


def count_levels(config: Config) -> int:
    """How many evaluation levels there are; in WebShop as many as the goals that they are drawn from."""
    return len(build_env(config).goals_of(config.eval_first)) if config.env == "webshop" else FIRST_TRAIN_SEED


def prefix_tree(rows: Sequence[Trajectory]) -> tuple[list[int], list[list[int]]]:
    """CARL's tree of the rows: a state is an exact prefix, an action the response that leads from one to the next.

    Returns:
        parent: of each of S states, -1 at a root; a child's number is larger.   states: each row's, root to leaf.
    """
    number, parent, states = {}, [], []
    for row in rows:
        level = row.episode.seed
        prefixes = [(level, tuple(row.tokens[:start])) for start, _ in row.spans]
        path = []
        for state in [*prefixes, (level, tuple(row.tokens), row.episode.return_)]:  # no observation follows the last
            if state not in number:
                number[state] = len(parent)
                parent.append(path[-1] if path else -1)
            path.append(number[state])
        states.append(path)
    return parent, states


def grow_trees(
    rows: Sequence[Trajectory], group_size: int, play: Callable[[list[Trajectory]], list[Trajectory]]
) -> list[Trajectory]:
    """CARL: fork every tree at its most critical state, one fork a round, until it has `group_size` rollouts.

    Args:
        rows: whole rollouts, N₀ of each level, a level's adjacent.   play: continues forked prefixes to their ends.
    Returns:
        Rollouts, `group_size` of each level, a level's adjacent; `first_turn` says what a fork copied.
    """
    trees: dict[int, list[Trajectory]] = {}
    for row in rows:
        trees.setdefault(row.episode.seed, []).append(row)
    for count in range(len(rows) // len(trees), group_size):
        forks = [tree[b].fork(k, replica=count) for tree in trees.values() for b, k in [most_critical(tree)]]
        for tree, row in zip(trees.values(), play(forks), strict=True):
            tree.append(row)
    return [row for tree in trees.values() for row in tree]


def most_critical(tree: Sequence[Trajectory]) -> tuple[int, int]:
    """(row, turn) of the state with the largest H(s) / n(s), the first of equals. CARL."""
    parent, states = prefix_tree(tree)
    actions = [(b, k) for b, row in enumerate(tree) for k in range(row.first_turn, len(row.spans))]
    source = torch.tensor([states[b][k] for b, k in actions])
    spans = [(tree[b], *tree[b].spans[k]) for b, k in actions]
    surprise = torch.tensor([-sum(row.logp[start:end]) / (end - start) for row, start, end in spans])
    best = int(criticality(surprise, source, len(parent)).argmax())
    return actions[(source == best).nonzero()[0].item()]


def keep_spread(config: Config, returns: Tensor) -> list[int]:
    """Rows of the groups whose returns vary most. StarPO-S; by default all."""
    return filter_groups(returns, config.num_generations, config.filter_fraction)


def keep_varied(config: Config, returns: Tensor) -> list[int]:
    """Rows of the first P groups whose returns vary at all. DAPO."""
    return varied_groups(returns, config.num_generations, config.num_prompts)


def grpo(config: Config, state: State, batch: Batch, rows: Sequence[Trajectory]) -> Tensor:
    """(B, T): the group advantage on every token of its row. Eq. (3)."""
    return _spread(group_advantages(batch.returns, config.num_generations)[:, None], batch)


def ppo(config: Config, state: State, batch: Batch, rows: Sequence[Trajectory]) -> Tensor:
    """(B, T): GAE with R(τ) on the last response token, whitened over response tokens. Eq. (12)."""
    batch.values = critic_values(config, state, batch)
    rewards = batch.final_rewards()
    advantages, batch.value_targets = gae(rewards, batch.values, batch.is_response, config.gamma, config.lam)
    return whiten(advantages, batch.is_response)


def dapo(config: Config, state: State, batch: Batch, rows: Sequence[Trajectory]) -> Tensor:
    """(B, T): GRPO's advantage of returns from which too long responses took something. DAPO."""
    _, lengths = per_turn(batch.entropy, batch)
    limit = config.max_response_tokens
    returns = batch.returns + overlong_penalty(lengths, limit, config.overlong_buffer * limit).sum(1)
    return _spread(group_advantages(returns, config.num_generations)[:, None], batch)


def empg(config: Config, state: State, batch: Batch, rows: Sequence[Trajectory]) -> Tensor:
    """(B, T): GRPO's advantage modulated by how sure the policy was at each step. EMPG."""
    total, count = per_turn(batch.entropy, batch)
    advantages = group_advantages(batch.returns, config.num_generations)
    settings = config.kappa, config.kappa_bonus, config.zeta
    return _spread(empg_advantages(advantages, total / count.clamp(min=1), count > 0, *settings), batch)


def poad(config: Config, state: State, batch: Batch, rows: Sequence[Trajectory]) -> Tensor:
    """(B, T): GAE over per-turn rewards, discounted between turns only. POAD."""
    return _turn_gae(config, state, batch, poad_gae)


def ntpo(config: Config, state: State, batch: Batch, rows: Sequence[Trajectory]) -> Tensor:
    """(B, T): the same, discounted between all tokens. NTPO."""
    return _turn_gae(config, state, batch, ntpo_gae)


def carl(config: Config, state: State, batch: Batch, rows: Sequence[Trajectory]) -> Tensor:
    """(B, T): V(child) - V(parent) where a state has several children; all else leaves the batch. CARL."""
    numbers, states = prefix_tree(rows)
    parent, leaf_values = torch.tensor(numbers), torch.zeros(len(numbers))
    leaf_values[[path[-1] for path in states]] = batch.returns
    edges, chosen = edge_advantages(parent, tree_values(parent, leaf_values)), update_set(parent)
    advantages, trained = torch.zeros(batch.tokens.shape), torch.zeros_like(batch.is_response)
    for b, row in enumerate(rows):
        for k in range(row.first_turn, len(row.spans)):
            span, child = slice(*row.spans[k]), states[b][k + 1]
            advantages[b, span], trained[b, span] = edges[child], chosen[child]
    batch.keep(trained)
    return torch.where(trained, advantages, 0.0)


class Method(NamedTuple):
    """What sets one method apart."""

    advantages: Callable[[Config, State, Batch, Sequence[Trajectory]], Tensor]
    play: Callable[[Config, State, Sequence[int]], list[Trajectory]] = play_levels
    sample: Callable[[Config, State, int], list[Trajectory]] = sample
    keep: Callable[[Config, Tensor], list[int]] = keep_spread


METHODS = {
    "grpo": Method(grpo),
    "ppo": Method(ppo),
    "dapo": Method(dapo, sample=sample_until_varied, keep=keep_varied),
    "empg": Method(empg),
    "poad": Method(poad),
    "ntpo": Method(ntpo),
    "carl": Method(carl, play_trees),
}


def critic_values(config: Config, state: State, batch: Batch) -> Tensor:
    """(B, T): V before every response token, without gradient."""
    values = torch.zeros(batch.tokens.shape)
    with torch.no_grad(), precision(config.dtype, state.policy.device):
        for index in own_micro_batches(config, batch):
            part = batch.take(index, state.policy.device)
            values[index, : part.tokens.shape[1]] = state.critic(part.tokens, part.is_response).cpu()
    parallel.add_up([values])
    return values


def own_micro_batches(config: Config, batch: Batch) -> list[list[int]]:
    """Row numbers for each of this rank's forward passes over the batch."""
    return micro_batches(batch.lengths.tolist(), config.micro_batch_tokens, parallel.rank(), parallel.ranks())


def per_turn(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums of a (B, T) quantity over each response, and its number of tokens; (B, K) each."""
    turn, shape = batch.turn.clamp(min=0), (len(values), int(batch.turn.max()) + 1)
    sums = torch.zeros(shape).scatter_add(1, turn, torch.where(batch.is_response, values, 0.0))
    return sums, torch.zeros(shape).scatter_add(1, turn, batch.is_response.float())


def _spread(values: Tensor, batch: Batch) -> Tensor:
    """(B, K) or (B, 1) → (B, T): every response token has what its turn has."""
    columns = batch.turn.clamp(min=0, max=values.shape[1] - 1)
    return torch.where(batch.is_response, values.gather(1, columns), 0.0)


def _turn_gae(config: Config, state: State, batch: Batch, backup: Callable) -> Tensor:
    batch.values = critic_values(config, state, batch)
    advantages, batch.value_targets = backup(batch.rewards, batch.values, batch.is_response, batch.is_turn_end,
                                             config.gamma, config.lam)
    return advantages
