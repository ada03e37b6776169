"""methods.py and what stands on it: forks, trees, dynamic sampling, every method's advantage, the update's knobs."""

import copy
import json
import math
import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import literal
import numpy as np
import pytest
import torch
from tiny import assert_same_run, config, flags

import evaluate
import methods
import train
from actfocus import classify_tokens, group_advantages
from config import ALGO_SETTINGS, ALGOS, CRITIC, Config, parse
from envs import ENVS, Episode, make_env, random_player
from methods import METHODS, grow_trees, keep_varied, most_critical, per_turn, prefix_tree
from policy import load_model, load_tokenizer, score_tokens
from rollout import Batch, Trajectory, play_on, rollout, token_pieces

pytest_plugins = ["tiny"]

QUIET = {"entropy_coef": 0.0, "kl_coef": 0.0, "weights": "uniform"}  # nothing but the advantages moves the policy


# Forks


def seen(episode):
    """What an episode looks like from outside; equal before and after if nothing touched it."""
    return copy.deepcopy((episode.observation, episode.rewards, episode.answers, episode.env.actions_left,
                          episode.done, episode.success, episode.invalid_turns, episode.reseeds))


def wander(episode, rng, turns=99):
    """Random turns, some of them invalid; what the episode looked like before each and at the end."""
    before = [seen(episode)]
    while not episode.done and len(before) <= turns:
        answer = " || ".join(random_player(episode.env, rng))
        episode.act(answer if rng.random() > 0.2 else None)
        before.append(seen(episode))
    return before


@pytest.mark.parametrize("name", ENVS)
def test_a_fork_before_a_turn_has_the_same_history_and_leaves_the_original_alone(name):
    checked = 0
    for seed in range(8):
        env = make_env(name)
        env.max_turns -= seed % 2  # a run may set its own budgets
        episode = Episode(env, seed, 1, "brief", 0.25)
        before = wander(episode, np.random.default_rng(seed))
        for turn in range(len(episode.rewards)):
            fork = episode.fork(turn, replica=7)
            assert seen(fork)[:-1] == before[turn][:-1] and fork.reseeds == {turn: 7}
            assert (fork.seed, fork.replica, fork.style, fork.format_penalty) == (seed, 1, "brief", 0.25)
            assert fork.env is not env and fork.env.max_turns == env.max_turns and not fork.done
            wander(fork, np.random.default_rng(100 + seed))
            assert fork.done and seen(episode) == before[-1]
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("name", ENVS)
def test_where_nothing_is_left_to_luck_the_same_answers_after_a_fork_give_the_same_episode(name):
    for seed in range(4):
        episode = Episode(make_env(name), seed)
        end = wander(episode, np.random.default_rng(seed))[-1]
        for turn in range(len(episode.rewards)):
            fork = episode.fork(turn, replica=3)
            for answer in episode.answers[turn:]:
                fork.act(answer)
            assert seen(fork)[:-1] == end[:-1]


@pytest.mark.parametrize("name", ENVS)
def test_a_fork_of_a_fork_repeats_the_forks_history_with_its_luck(name):
    options = {"success_rate": 1 / 3, "frozen": 1.0} if name == "frozenlake" else {}
    forks_of_forks = 0
    for seed in range(12):
        episode = Episode(make_env(name, **options), seed)
        wander(episode, np.random.default_rng(seed), turns=3)
        if len(episode.answers) < 2:
            continue
        fork = episode.fork(1, replica=5)
        before = wander(fork, np.random.default_rng(50 + seed))
        for turn in range(1, len(fork.rewards)):
            again = fork.fork(turn, replica=6)
            assert seen(again)[:-1] == before[turn - 1][:-1]
            assert again.reseeds == ({1: 6} if turn == 1 else {1: 5, turn: 6})
            assert again.fork(1, replica=4).reseeds == {1: 4}  # luck that a later fork had does not come back
            forks_of_forks += 1
    assert forks_of_forks > 12


def test_on_slippery_ice_forks_differ_in_their_luck_by_replica_and_by_nothing_else():
    ways = {}
    for seed in range(20):
        episode = Episode(make_env("frozenlake", success_rate=1 / 3, frozen=1.0), seed)
        if not episode.act("Left || Up"):
            continue
        fork = episode.fork(1, replica=5)
        if not fork.act("Left || Up"):
            continue
        for replica in (8, 9, 8):
            again, shown = fork.fork(2, replica), []
            assert again.observation == fork.observation
            while not again.done:
                again.act("Left || Up")
                shown.append(again.observation)
            assert ways.setdefault((seed, replica), shown) == shown
    different = [way != ways[seed, 9] for (seed, replica), way in ways.items() if replica == 8]
    assert len(different) > 10 and sum(different) >= 0.8 * len(different)


@pytest.fixture(scope="module")
def played(tiny):
    """Policy, tokenizer, and ragged rollouts on slippery ice."""
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    episodes = [Episode(make_env("frozenlake", success_rate=0.5), 40 + level, replica, "brief")
                for level in range(3) for replica in range(3)]
    generator = torch.Generator().manual_seed(0)
    return model, tokenizer, rollout(model, tokenizer, episodes, generator, 1.0, 30, 512)


def columns(row, end=None):
    """Copies of a trajectory's per-token lists up to `end`."""
    return [list(column[:end]) for column in
            (row.tokens, row.is_response, row.is_action, row.logp, row.entropy, row.score_norm)]


def test_play_on_continues_forked_prefixes_with_the_numbers_of_a_bare_forward_pass(played):
    model, tokenizer, rows = played
    turns = [i % len(row.spans) for i, row in enumerate(rows)]
    assert 0 in turns and max(turns) > 1
    originals = [(columns(row), list(row.spans), seen(row.episode)) for row in rows]
    forks = [row.fork(turn, 9) for row, turn in zip(rows, turns, strict=True)]
    again = play_on(model, tokenizer, forks, torch.Generator().manual_seed(1), 0.8, 30, 512)
    assert all(one is other for one, other in zip(again, forks, strict=True))
    assert originals == [(columns(row), row.spans, seen(row.episode)) for row in rows]
    for row, turn, fork in zip(rows, turns, forks, strict=True):
        start = row.spans[turn][0]
        assert columns(fork, start) == columns(row, start) and fork.spans[:turn] == row.spans[:turn]
        assert fork.first_turn == turn and fork.episode.done and len(fork.spans) == len(fork.episode.rewards)
        inside = {t for start, end in fork.spans for t in range(start, end)}
        assert [bool(flag) for flag in fork.is_response] == [t in inside for t in range(len(fork.tokens))]
        assert len({len(column) for column in columns(fork)}) == 1
        for (start, end), answer in zip(fork.spans, fork.episode.answers, strict=True):
            pieces = token_pieces(tokenizer, fork.tokens[start:end])
            assert fork.is_action[start:end] == classify_tokens(pieces)[1].tolist()
            assert answer is None or f"<answer>{answer}</answer>" in "".join(pieces)
        outside = [t for t in range(len(fork.tokens)) if t not in inside]
        assert not any(fork.is_action[t] or fork.logp[t] or fork.entropy[t] for t in outside)
    assert sum(fork.tokens != row.tokens for fork, row in zip(forks, rows, strict=True)) > 6
    batch = Batch.of(forks)
    fresh = batch.is_response & (batch.turn >= torch.tensor(turns)[:, None])
    gaps = {heat: (score_tokens(model, batch.tokens, batch.is_response, heat).logp - batch.old_logp).abs()
            for heat in (0.8, 1.0)}
    assert gaps[0.8][fresh].max() < 1e-4 and gaps[1.0][batch.is_response & ~fresh].max() < 1e-4
    assert gaps[1.0][fresh].max() > 0.01  # and the comparison can fail


def test_rows_with_the_same_prefix_continue_from_one_reading_of_it(played):
    model, tokenizer, rows = played
    row = max(rows, key=lambda row: len(row.spans))
    turn = len(row.spans) - 1
    forks = [row.fork(turn, replica) for replica in (4, 5, 6)] + [rows[0].fork(0, 4)]
    play_on(model, tokenizer, forks, torch.Generator().manual_seed(2), 1.0, 30, 512)
    batch = Batch.of(forks)
    gap = score_tokens(model, batch.tokens, batch.is_response).logp - batch.old_logp
    assert gap.abs().max() < 1e-4 and len({tuple(fork.tokens) for fork in forks[:3]}) == 3


# CARL


@dataclass
class Leaf:
    """The environment's side of a hand-made trajectory."""

    seed: int
    return_: float
    rewards: list = field(default_factory=list)
    lucks: tuple = ()

    def fork(self, turn, replica):
        return Leaf(self.seed, math.nan, self.rewards[:turn], (*self.lucks, (turn, replica)))


def write_turn(row, response, reward=0.0):
    """One response; token i has log-prob -i / 10, entropy i / 100, and its last token is an action token."""
    start = len(row.tokens)
    for token in response:
        row.write(token, -token / 10, token / 100, 1.0)
    row.is_action += [False] * (len(response) - 1) + [True]
    row.spans.append((start, len(row.tokens)))
    row.episode.rewards.append(reward)


def fake(level, return_, *turns, first_turn=0):
    """A trajectory of responses, each with the observation after it, if any, e.g. ([1, 2], [7]), ([3],)."""
    row = Trajectory.start(Leaf(level, return_), [9])
    row.first_turn = first_turn
    for k, (response, *observation) in enumerate(turns):
        write_turn(row, response, return_ * (k == len(turns) - 1))
        for ids in observation:
            row.read(ids)
    return row


def small_tree():
    """Level 5: A, its fork B before turn 1, and C from the root. Level 6: D, which wrote what A wrote.

        (9) ─ 1 2 · 7 ─┬─ 3               A: 1
         │             └─ 4 4 · 8 ─ 5     B: 0
         └── 6 · 7 ─── 3                  C: -.1
    """
    return [fake(5, 1.0, ([1, 2], [7]), ([3],)), fake(5, 0.0, ([1, 2], [7]), ([4, 4], [8]), ([5],), first_turn=1),
            fake(5, -0.1, ([6], [7]), ([3],)), fake(6, 1.0, ([1, 2], [7]), ([3],))]


def test_the_prefix_tree_of_four_hand_made_rollouts():
    parent, states = prefix_tree(small_tree())
    assert parent == [-1, 0, 1, 1, 3, 0, 5, -1, 7, 8]
    assert states == [[0, 1, 2], [0, 1, 3, 4], [0, 5, 6], [7, 8, 9]]


def test_equal_texts_with_different_returns_are_two_leaves_and_with_equal_ones_the_same():
    one, other = fake(5, 1.0, ([3],)), fake(5, 0.0, ([3],))
    assert prefix_tree([one, other, one]) == ([-1, 0, 0], [[0, 1], [0, 2], [0, 1]])


def test_most_critical_is_the_surprise_of_a_state_over_its_visits():
    a, b, c, _ = small_tree()
    # surprise of an action, nats a token: 1 2 → .15, 3 → .3, 4 4 → .4, 5 → .5, 6 → .6
    assert most_critical([a]) == (0, 1)  # root .15, s₁ .3
    assert most_critical([a, b]) == (1, 2)  # root .15, s₁ (.3 + .4) / 2 / 2 = .175, s₃ .5
    assert most_critical([a, b, c]) == (1, 2)  # root (.15 + .6) / 2 / 2 = .1875, s₅ .3
    d = fake(5, 0.0, ([1, 2], [7]), ([4, 4], [8]), ([1],), first_turn=2)
    assert most_critical([a, b, c, d]) == (2, 1)  # s₃ (.5 + .1) / 2 / 2 = .15, so s₅ with its .3 is first
    assert most_critical([c, a]) == (0, 1)  # the first row that stands at the state


def test_a_copied_prefix_is_no_second_visit_and_among_equals_the_first_state_wins():
    one = fake(5, 0.0, ([3], [7]), ([4],))
    two = fake(5, 0.0, ([3], [7]), ([4, 4],), first_turn=1)
    assert most_critical([one, two]) == (0, 0)  # root .3; counted twice it were .15, below the .2 of the second state
    assert most_critical([fake(5, 0.0, ([3], [7]), ([3],))]) == (0, 0)


def naive_prefix(tree):
    """Tokens of the state with the largest H(s) / n(s), by dictionary; the state that appeared first among equals."""
    visits = {}
    for row in tree:
        for k, (start, end) in enumerate(row.spans):
            actions = visits.setdefault(tuple(row.tokens[:start]), [])
            if k >= row.first_turn:
                actions.append(-sum(row.logp[start:end]) / (end - start))
    best = max(visits, key=lambda state: round(sum(visits[state]) / len(visits[state]) ** 2, 6))
    return list(best)


def random_rest(row, rng):
    """Write up to three more turns with few different tokens, so that rollouts coincide now and then."""
    turns = rng.randint(1, 3)
    for k in range(turns):
        write_turn(row, [rng.randint(1, 4) for _ in range(rng.randint(1, 2))])
        if k < turns - 1:
            row.read([7] * rng.randint(1, 2))
    row.episode.return_ = rng.choice([0.0, 0.5, 1.0])


@pytest.mark.parametrize("first", [1, 8])
def test_grown_trees_have_g_rollouts_a_level_and_forks_stand_at_the_most_critical_state(first):
    rng, calls = random.Random(first), []

    def play(forks):
        calls.append([(fork.episode.seed, fork.episode.lucks[-1]) for fork in forks])
        for fork in forks:
            random_rest(fork, rng)
        return forks

    rows = []
    for level in (4, 2, 11):
        for _ in range(first):
            rows.append(Trajectory.start(Leaf(level, math.nan), [9]))
            random_rest(rows[-1], rng)
    given = [columns(row) for row in rows]
    grown = grow_trees(rows, 16, play)
    assert [row.episode.seed for row in grown] == [4] * 16 + [2] * 16 + [11] * 16
    assert len(calls) == 16 - first and all([seed for seed, _ in call] == [4, 2, 11] for call in calls)
    for level in range(3):
        tree = grown[16 * level : 16 * level + 16]
        assert [columns(row) for row in tree[:first]] == given[first * level : first * level + first]
        assert all(row.first_turn == 0 and not row.episode.lucks for row in tree[:first])
        for count in range(first, 16):
            fork, k = tree[count], tree[count].first_turn
            shared = fork.spans[k][0]
            assert fork.tokens[:shared] == naive_prefix(tree[:count])
            sources = [row for row in tree[:count] if columns(row, shared) == columns(fork, shared)
                       and row.spans[:k] == fork.spans[:k] and row.spans[k][0] == shared]
            assert sources and fork.episode.lucks[-1] == (k, count)  # a replica that no other rollout of the level has


@pytest.mark.parametrize("first", [1, 4])
def test_trees_of_the_model_share_their_prefixes_and_are_trained_with_a_ratio_of_1(tiny, first):
    settings = config(tiny, algo="carl", num_generations=6, mini_batch_size=12, carl_first=first, success_rate=0.8)
    state = train.build_state(settings)
    rows = methods.sample(settings, state, 0)
    levels = [methods.FIRST_TRAIN_SEED] * 6 + [methods.FIRST_TRAIN_SEED + 1] * 6
    assert [row.episode.seed for row in rows] == levels
    for group in (rows[:6], rows[6:]):
        assert all(row.first_turn == 0 for row in group[:first])
        for count in range(first, 6):
            end = group[count].spans[group[count].first_turn][0]
            assert any(columns(row, end) == columns(group[count], end) for row in group[:count])
    batch = Batch.of(rows)
    gap = score_tokens(state.policy, batch.tokens, batch.is_response).logp - batch.old_logp
    assert gap.abs().max() < 1e-4


def carl_batch():
    rows = small_tree()
    batch = Batch.of(rows)
    batch.energy = torch.zeros(batch.tokens.shape)
    batch.ref_logp = batch.old_logp
    batch.advantages = METHODS["carl"].advantages(None, None, batch, rows)
    return batch


def test_carls_advantages_on_a_hand_made_tree():
    # V(s₃) = 0, B's leaf; V(s₁) = (1 + 0) / 2 = .5; V(s₅) = -.1, C's leaf; V(root) = (.5 - .1) / 2 = .2
    # A: .5 - .2 = .3, then 1 - .5 = .5   B: turn 0 is A's, then 0 - .5 = -.5, then an only child   C: -.1 - .2 = -.3
    batch = carl_batch()
    assert batch.tokens[1].tolist() == [9, 1, 2, 7, 4, 4, 8, 5]
    torch.testing.assert_close(batch.advantages, torch.tensor([
        [0, 0.3, 0.3, 0, 0.5, 0, 0, 0],
        [0, 0, 0, 0, -0.5, -0.5, 0, 0],
        [0, -0.3, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]))


def test_carl_trains_a_shared_prefix_once_and_only_children_never():
    batch = carl_batch()
    assert batch.is_response.nonzero().tolist() == [[0, 1], [0, 2], [0, 4], [1, 4], [1, 5], [2, 1]]
    assert batch.is_action.nonzero().tolist() == [[0, 2], [0, 4], [1, 5], [2, 1]]
    assert batch.is_reasoning.nonzero().tolist() == [[0, 1], [1, 4]]
    assert batch.lengths.tolist() == [5, 6, 2, 1]


@pytest.mark.parametrize("options, loss", [
    ({"weights": "uniform"}, 0.2 / 6),  # Σ A = 2 · .3 + .5 - 2 · .5 - .3 = -.2 of 6 tokens
    ({"alpha": 0.1, "beta": 0.0}, 0.02 / 4.2),  # Σ wA = .03 + .3 + .5 - .05 - .5 - .3 = -.02; Σ w = 2 · .1 + 4
])
def test_carls_dropped_turns_have_no_weight_and_leave_the_mean(tiny, options, loss):
    settings = config(tiny, algo="carl", num_generations=2, mini_batch_size=4, entropy_coef=0.0, **options)
    state = train.build_state(settings)
    rows = small_tree()
    for row in rows:  # the log-probs the model itself gives
        scores = score_tokens(state.policy, torch.tensor([row.tokens]), torch.tensor([row.is_response]).bool())
        row.logp = scores.logp[0].tolist()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "carl", METHODS["carl"]._replace(sample=lambda *_: rows))
        patch.setattr(train, "rollout_metrics", lambda rows: {})  # hand-made rows are no whole episodes
        metrics, batch = train.iteration(settings, state, 0)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6) and metrics["logp_gap_max"] < 1e-4
    assert (metrics["tokens_reasoning"], metrics["tokens_action"]) == (2, 4)
    assert ((batch.weights > 0) == batch.is_response).all() and (batch.advantages[~batch.is_response] == 0).all()


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def unchanged(model, before):
    return all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


LEVELS = range(methods.FIRST_TRAIN_SEED, methods.FIRST_TRAIN_SEED + 2)  # of a first step


def test_a_tree_without_forks_trains_nothing_and_moves_no_weight(tiny):
    settings = config(tiny, algo="carl", mini_batch_size=2, entropy_coef=0.1)
    state = train.build_state(settings)
    rows, before = methods.play_levels(settings, state, LEVELS, 1), parameters(state.policy)
    assert len(rows) == 2
    batch = Batch.of(rows)
    batch.ref_logp = batch.old_logp
    batch.advantages = METHODS["carl"].advantages(settings, state, batch, rows)
    batch.weights = batch.is_response.float()
    assert not batch.is_response.any() and (batch.advantages == 0).all()
    metrics = train.update(settings, state, batch)
    assert unchanged(state.policy, before) and not state.optimizer.state
    assert metrics["loss"] == metrics["grad_norm"] == metrics["logp_gap_max"] == 0


def test_forks_whose_returns_are_all_equal_move_no_weight(tiny, monkeypatch):
    settings = config(tiny, algo="carl", **QUIET)
    state = train.build_state(settings)
    before = parameters(state.policy)

    def lose(*arguments):
        rows = methods.sample(*arguments)
        for row in rows:
            row.episode.rewards = [0.0] * len(row.spans)
        return rows

    monkeypatch.setitem(METHODS, "carl", METHODS["carl"]._replace(sample=lose))
    _, batch = train.iteration(settings, state, 0)
    assert batch.is_response.any() and (batch.advantages == 0).all() and unchanged(state.policy, before)


# DAPO


def rounds(returns):
    """A sampler whose rounds have these returns, P · G each, and the rounds that were asked for."""
    asked = []

    def sample(config, state, step, again=0, samples=0):
        asked.append(again)
        return [fake(100 * again + i // config.num_generations, value, ([3],))
                for i, value in enumerate(returns[again])]

    return sample, asked


EQUAL, VARIED = [1.0, 1.0], [0.0, 1.0]


def dapo_rows(monkeypatch, returns):
    """Levels of the groups that DAPO trains, two groups of two, and the rounds it sampled."""
    sample, asked = rounds(returns)
    monkeypatch.setattr(methods, "sample", sample)
    settings = Config(algo="dapo", num_prompts=2, num_generations=2, mini_batch_size=4)
    rows = METHODS["dapo"].sample(settings, None, 3)
    kept = METHODS["dapo"].keep(settings, torch.tensor([row.episode.return_ for row in rows]))
    assert METHODS["dapo"].keep is keep_varied and len(kept) == 4 and kept == sorted(kept)
    assert all(one % 2 == 0 and other == one + 1 for one, other in zip(kept[::2], kept[1::2], strict=True))
    return [rows[i].episode.seed for i in kept[::2]], asked


def test_dapo_samples_again_until_enough_groups_are_varied_and_keeps_them_in_order(monkeypatch):
    assert dapo_rows(monkeypatch, [VARIED + VARIED]) == ([0, 1], [0])
    assert dapo_rows(monkeypatch, [EQUAL + VARIED, EQUAL + EQUAL, VARIED + VARIED]) == ([1, 200], [0, 1, 2])
    assert dapo_rows(monkeypatch, [EQUAL + EQUAL, VARIED + EQUAL, EQUAL + VARIED]) == ([100, 201], [0, 1, 2])


def test_dapo_gives_up_after_its_rounds_and_tops_up_with_equal_groups(monkeypatch):
    never = [EQUAL + EQUAL] * methods.DAPO_ROUNDS
    assert dapo_rows(monkeypatch, [*never, VARIED + VARIED]) == ([0, 1], list(range(methods.DAPO_ROUNDS)))
    once = [EQUAL + EQUAL] * (methods.DAPO_ROUNDS - 1) + [EQUAL + VARIED]
    last = 100 * (methods.DAPO_ROUNDS - 1) + 1
    assert dapo_rows(monkeypatch, once) == ([0, last], list(range(methods.DAPO_ROUNDS)))


def test_dapos_later_rounds_and_steps_have_levels_of_their_own(tiny, monkeypatch):
    settings, asked = config(tiny, algo="dapo", num_prompts=3, mini_batch_size=12), []

    def note(config, levels, samples):
        asked.append((list(levels), samples))
        return []

    monkeypatch.setattr(methods, "make_episodes", note)
    monkeypatch.setattr(methods, "rollout", lambda *_: [fake(0, 1.0, ([3],)) for _ in range(12)])
    state = SimpleNamespace(policy=SimpleNamespace(device=torch.device("cpu")), tokenizer=None, generator=None)
    for step in range(3):
        assert len(METHODS["dapo"].sample(settings, state, step)) == 12 * methods.DAPO_ROUNDS
    levels = [level for levels, _ in asked for level in levels]
    assert len(asked) == 3 * methods.DAPO_ROUNDS and len(set(levels)) == len(levels) == 9 * methods.DAPO_ROUNDS
    assert min(levels) == methods.FIRST_TRAIN_SEED and max(levels) < 2 * methods.FIRST_TRAIN_SEED
    assert {samples for _, samples in asked} == {4}


def test_dapo_takes_from_overlong_rows_only_and_a_group_without_them_is_grpos():
    # L_max 10, buffer 2: 8 tokens cost nothing, 9 cost .5, 10 cost 1
    groups = [(1, [4]), (1, [3, 10]), (0, [8]), (0, [9, 2]), (1, [4]), (0, [8]), (0, [1, 1]), (1, [2])]
    rows = [fake(i // 4, float(return_), *(([1] * length, [7]) for length in lengths))
            for i, (return_, lengths) in enumerate(groups)]
    batch, settings = Batch.of(rows), Config(algo="dapo", num_generations=4, max_response_tokens=10)
    got = METHODS["dapo"].advantages(settings, None, batch, rows)
    plain = METHODS["grpo"].advantages(settings, None, batch, rows)
    assert got.shape == plain.shape == batch.tokens.shape and (got[~batch.is_response] == 0).all()
    rowwise = torch.stack([got[b][batch.is_response[b]].unique() for b in range(8)])[:, 0]  # one number a row
    torch.testing.assert_close(rowwise[:4], group_advantages(torch.tensor([1, 0, 0, -0.5]), 4))
    # mean .125, deviations .875, -.125, -.125, -.625; variance (.7656 + 2 · .0156 + .3906) / 3 = .3958, std .6292
    assert rowwise[:4].tolist() == pytest.approx([1.3908, -0.1987, -0.1987, -0.9934], abs=1e-3)
    assert got[4:].equal(plain[4:])


# Advantages on ragged rows


def ragged(seed, rows=6):
    """Random trajectories, P = 3 groups of 2, with observations of random lengths between their responses."""
    rng, made = random.Random(seed), []
    for b in range(rows):
        turns = [([rng.randint(1, 50) for _ in range(rng.randint(1, 5))], [7] * rng.randint(1, 4))
                 for _ in range(rng.randint(1, 4))]
        if b % 2:
            turns[-1] = turns[-1][:1]  # this one ends with its response, the other reads one observation more
        made.append(fake(b // 2, rng.random(), *turns))
        made[-1].episode.rewards = [rng.uniform(-1, 1) for _ in turns]
    return made


@pytest.mark.parametrize("seed", range(5))
def test_per_turn_and_spread_are_loops_over_the_spans(seed):
    rows = ragged(seed)
    batch = Batch.of(rows)
    values = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(seed))
    sums, counts = per_turn(torch.where(batch.is_response, values, float("nan")), batch)
    most = max(len(row.spans) for row in rows)
    assert sums.shape == counts.shape == (6, most)
    by_turn = torch.randn(6, most, generator=torch.Generator().manual_seed(seed + 100))
    spread, by_row = methods._spread(by_turn, batch), methods._spread(by_turn[:, :1], batch)
    expected, expected_by_row = torch.zeros(batch.tokens.shape), torch.zeros(batch.tokens.shape)
    for b, row in enumerate(rows):
        for k in range(most):
            start, end = row.spans[k] if k < len(row.spans) else (0, 0)
            assert sums[b, k].item() == pytest.approx(sum(values[b, start:end].tolist()), abs=1e-5)
            assert counts[b, k] == end - start
            expected[b, start:end], expected_by_row[b, start:end] = by_turn[b, k], by_turn[b, 0]
    assert spread.equal(expected) and by_row.equal(expected_by_row)


@pytest.mark.parametrize("seed", range(3))
def test_empg_gives_every_token_of_a_turn_the_turns_advantage(seed):
    rows = ragged(seed)
    batch = Batch.of(rows)
    settings = Config(algo="empg", num_generations=2, mini_batch_size=16, kappa=0.7, kappa_bonus=1.3, zeta=0.2)
    got = METHODS["empg"].advantages(settings, None, batch, rows)
    entropies = [[sum(row.entropy[start:end]) / (end - start) for start, end in row.spans] for row in rows]
    advantages = group_advantages(torch.tensor([row.episode.return_ for row in rows]), 2).tolist()
    expected = literal.empg_advantages(advantages, entropies, 0.7, 1.3, 0.2)
    for b, row in enumerate(rows):
        for (start, end), value in zip(row.spans, expected[b], strict=True):
            assert got[b, start:end].unique().numel() == 1 and got[b, start].item() == pytest.approx(value, abs=1e-5)
    assert (got[~batch.is_response] == 0).all()


def test_ppos_advantage_is_gae_with_the_runs_discounts_and_whitened(monkeypatch):
    rows = ragged(1)
    batch = Batch.of(rows)
    values = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(methods, "critic_values", lambda *_: values)
    got = METHODS["ppo"].advantages(Config(algo="ppo", gamma=0.9, lam=0.8), None, batch, rows)
    expected = []
    for row, own, mask in zip(rows, values, batch.is_response, strict=True):
        own = own[mask].tolist()
        rewards = [0.0] * (len(own) - 1) + [row.episode.return_]
        expected += literal.gae(rewards, own, [True] * len(own), 0.9, 0.8)
    assert got[batch.is_response].tolist() == pytest.approx(literal.whiten(expected, 1e-8), abs=1e-4)
    assert (got[~batch.is_response] == 0).all()


@pytest.mark.parametrize("env, option, value, attribute", [
    ("sokoban", "coordinates", False, "coordinates"), ("frozenlake", "success_rate", 0.7, "success_rate"),
    ("frozenlake", "frozen", 0.6, "frozen"), ("sudoku", "sudoku_level", "hard", "level"),
    ("sudoku", "hints", False, "hints"), ("webshop", "results_per_page", 7, "results_per_page"),
    ("webshop", "title_words", 3, "title_words"), ("webshop", "webshop_strict", True, "strict"),
    ("webshop", "short_pages", False, "short_pages"), ("webshop", "max_turns", 5, "max_turns"),
    ("sokoban", "actions_per_turn", 1, "actions_per_turn"), ("sokoban", "max_actions", 7, "max_actions"),
])
def test_a_games_settings_reach_the_game(env, option, value, attribute):
    assert getattr(methods.build_env(Config(env=env)), attribute) != value
    assert getattr(methods.build_env(Config(env=env, **{option: value})), attribute) == value


def test_the_official_files_the_prompts_style_and_the_penalty_reach_the_episode(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path / "nothing")):
        methods.build_env(Config(env="webshop", webshop_data=str(tmp_path / "nothing")))
    brief, whole = (methods.make_episodes(Config(prompt_style=style, format_penalty=0.7), [0], 1)[0]
                    for style in ("brief", "paper"))
    assert len(whole.system() + whole.user()) > 2 * len(brief.system() + brief.user())
    whole.act(None)
    assert whole.return_ == -0.7


@pytest.mark.parametrize("algo", ["poad", "ntpo"])
def test_poad_and_ntpo_are_their_recursions_over_tokens_and_step_over_observations(algo, monkeypatch):
    for seed in range(5):
        rows = ragged(seed)
        batch = Batch.of(rows)
        values = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(seed))
        monkeypatch.setattr(methods, "critic_values", lambda *_, values=values: values)
        got = METHODS[algo].advantages(Config(algo=algo, gamma=0.9, lam=0.8), None, batch, rows)
        assert batch.values is values and (got[~batch.is_response] == 0).all()
        assert (batch.value_targets[~batch.is_response] == 0).all()
        for b, row in enumerate(rows):
            actions = [values[b, start:end].tolist() for start, end in row.spans]
            expected = getattr(literal, f"{algo}_gae")(actions, row.episode.rewards, 0.9, 0.8)
            for (start, end), action, own in zip(row.spans, expected, actions, strict=True):
                assert got[b, start:end].tolist() == pytest.approx(action, abs=1e-5)
                targets = [a + v for a, v in zip(action, own, strict=True)]
                assert batch.value_targets[b, start:end].tolist() == pytest.approx(targets, abs=1e-5)


# Whole steps


@pytest.fixture(scope="module", params=ALGOS)
def steps(request, tiny):
    """Metrics, batch and new weights of one step: with ActFocus, with uniform weights, with α = 1 and β = 0."""
    results = []
    for options in ({"weights": "actfocus"}, {"weights": "uniform"}, {"alpha": 1.0, "beta": 0.0}):
        settings = config(tiny, algo=request.param, mini_batch_size=4, max_turns=3, seed=3, **options)
        state = train.build_state(settings)
        metrics, batch = train.iteration(settings, state, 0)
        results.append((metrics, batch, parameters(state.policy), state))
    return request.param, results


def test_every_method_makes_a_step_with_either_weights(steps, tiny):
    algo, results = steps
    before = parameters(load_model(str(tiny)))
    for metrics, batch, after, state in results:
        assert all(math.isfinite(value) for value in metrics.values()) and metrics["logp_gap_max"] < 1e-4
        assert metrics["skipped_steps"] == 0 and metrics["trajectories"] % 8 == 0 and len(batch.returns) == 8
        assert (batch.advantages[~batch.is_response] == 0).all() and ((batch.weights > 0) == batch.is_response).all()
        assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert bool(state.critic) == (algo in CRITIC) == (metrics["value_loss"] > 0)
    assert sorted(METHODS) == sorted(ALGOS)


def test_uniform_weights_are_alpha_1_and_beta_0_bit_for_bit_with_every_method(steps):
    _, ((_, _, focus, _), (metrics, batch, uniform, state), (same, twin, limit, other)) = steps
    assert all(torch.equal(one, two) for one, two in zip(uniform, limit, strict=True))
    assert batch.weights.equal(batch.is_response.float()) and batch.weights.equal(twin.weights)
    assert {k: v for k, v in metrics.items() if "seconds" not in k} == {k: v for k, v in same.items()
                                                                       if "seconds" not in k}
    if state.critic:
        pairs = zip(state.critic.parameters(), other.critic.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
    assert any(not torch.equal(one, two) for one, two in zip(uniform, focus, strict=True))


def prepared(tiny, **options):
    """State and a batch ready for the update, with advantages and critic values no two tokens share."""
    settings = config(tiny, entropy_coef=0.0, **options)
    state = train.build_state(settings)
    rows = methods.sample(settings, state, 0)
    batch = Batch.of(rows)
    batch.ref_logp, generator = batch.old_logp, torch.Generator().manual_seed(7)
    batch.advantages, batch.values, batch.value_targets = (
        torch.where(batch.is_response, torch.randn(batch.tokens.shape, generator=generator), 0.0) for _ in range(3)
    )
    batch.weights = batch.is_response.float()
    return settings, state, batch


@pytest.mark.parametrize("on", [True, False])
def test_whiten_mini_batches_gives_each_of_them_mean_0_and_variance_1(tiny, monkeypatch, on):
    settings, state, batch = prepared(tiny, algo="poad", whiten_mini_batches=on, mini_batch_size=2)
    batch.advantages = torch.where(batch.is_response, 3 * batch.advantages + batch.returns[:, None] + 5, 0.0)
    given, add_gradients = [], train.add_gradients

    def spy(config, state, mini, *rest, **named):
        given.append(mini.advantages[mini.is_response].clone())
        add_gradients(config, state, mini, *rest, **named)

    monkeypatch.setattr(train, "add_gradients", spy)
    whole = batch.advantages.clone()
    train.update(settings, state, batch)
    assert len(given) == 4 and batch.advantages.equal(whole) != on
    for advantages in given:
        assert (abs(advantages.mean()) < 1e-4 and abs(advantages.var(correction=0) - 1) < 1e-3) == on
    assert sorted(torch.cat(given).tolist()) == sorted(batch.advantages[batch.is_response].tolist())


@pytest.mark.parametrize("algo", ["grpo", "ppo", "poad", "ntpo"])
def test_the_shares_of_the_gradient_that_are_logged_are_of_the_advantages_and_weights_that_are_trained(
    tiny, monkeypatch, algo
):
    settings = config(tiny, algo=algo, mini_batch_size=2, weight_stats="mini_batch", **ALGO_SETTINGS.get(algo, {}))
    mass, add_gradients = {True: 0.0, False: 0.0}, train.add_gradients

    def spy(config, state, mini, *rest, **named):
        pull = mini.weights * mini.advantages.abs() * mini.score_norm
        for is_action in mass:
            mass[is_action] += pull[mini.is_response & (mini.is_action == is_action)].sum().item()
        return add_gradients(config, state, mini, *rest, **named)

    monkeypatch.setattr(train, "add_gradients", spy)
    row, _ = train.iteration(settings, train.build_state(settings), 0)
    assert row["gradient_share_action"] == pytest.approx(mass[True] / (mass[True] + mass[False]), rel=1e-4)


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_the_value_loss_is_half_the_worse_square_of_the_value_and_its_clipped_twin(tiny, clip):
    settings, state, batch = prepared(tiny, algo="poad", value_clip=clip)
    torch.nn.init.normal_(state.critic.head.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        values = state.critic(batch.tokens, batch.is_response)
    expected = [literal.value_loss(*(tensor[b, t].item() for tensor in (values, batch.values, batch.value_targets)),
                                   clip) for b, t in batch.is_response.nonzero().tolist()]
    metrics = train.update(settings, state, batch)  # one mini-batch, so the critic is still what it was
    assert metrics["value_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("shift, held", [(1.0, True), (-1.0, False)])
def test_above_max_kl_the_policy_keeps_its_weights_while_the_critic_moves(tiny, shift, held):
    # k3 of KL(π_old‖π_θ): a log-ratio of 1 at every token gives e - 1 - 1 = .718, of -1 1/e + 1 - 1 = .368
    settings, state, batch = prepared(tiny, algo="poad", max_kl=0.5, learning_rate=1e-6, mini_batch_size=2)
    batch.old_logp = torch.where(batch.is_response, batch.old_logp - shift, 0.0)
    policy, critic = parameters(state.policy), parameters(state.critic)
    metrics = train.update(settings, state, batch)
    assert metrics["over_kl_steps"] == 4 * held and metrics["skipped_steps"] == 0
    assert unchanged(state.policy, policy) == held and not unchanged(state.critic, critic)
    assert all(parameter.grad is None for parameter in state.policy.parameters())  # nothing is left for the next step


def test_the_kl_of_one_mini_batch_holds_up_no_other(tiny):
    settings, state, batch = prepared(tiny, algo="poad", max_kl=0.5, learning_rate=1e-6, mini_batch_size=1)
    state.generator.manual_seed(5)
    first = torch.randperm(8, generator=torch.Generator().manual_seed(5))[0]
    batch.old_logp[first] -= batch.is_response[first].float()
    assert train.update(settings, state, batch)["over_kl_steps"] == 1
    assert {int(entry["step"]) for entry in state.optimizer.state.values()} == {7}


def test_without_max_kl_no_step_is_left_out(tiny):
    settings, state, batch = prepared(tiny, max_kl=0.0)
    batch.old_logp = torch.where(batch.is_response, batch.old_logp - 1, 0.0)
    before = parameters(state.policy)
    assert train.update(settings, state, batch)["over_kl_steps"] == 0 and not unchanged(state.policy, before)


def test_mini_batches_without_a_trained_token_are_left_out(tiny, monkeypatch):
    settings, state, batch = prepared(tiny, mini_batch_size=1)
    kept = torch.zeros_like(batch.is_response)
    kept[[1, 4, 6]] = True
    batch.keep(kept)
    batch.weights, stepped = batch.is_response.float(), []
    optimizer_step = train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", lambda *a, **b: stepped.append(1) or optimizer_step(*a, **b))
    metrics = train.update(settings, state, batch)
    assert len(stepped) == 3 and {int(entry["step"]) for entry in state.optimizer.state.values()} == {3}
    assert metrics["grad_norm"] > 0 and metrics["logp_gap_max"] < 1e-4


# Settings


@pytest.mark.parametrize("options, part", [
    ({"algo": "carl", "carl_first": 9}, "--carl_first 9: must not exceed num_generations 8"),
    ({"algo": "dapo", "filter_fraction": 0.5}, "--filter_fraction 0.5: dapo chooses its groups itself"),
    *(({"algo": algo, "num_generations": 1, "num_prompts": 32}, f"--num_generations 1: {algo}")
      for algo in ("grpo", "dapo", "empg", "carl")),
    ({"carl_first": 0}, "--carl_first 0: must lie in"),
    ({"overlong_buffer": 0.0}, "--overlong_buffer 0.0"),
    ({"overlong_buffer": 1.5}, "--overlong_buffer 1.5"),
    ({"max_kl": -0.1}, "--max_kl -0.1"),
    ({"value_clip": float("nan")}, "--value_clip nan"),
])
def test_settings_that_do_not_go_together_are_one_clear_line(options, part):
    with pytest.raises(ValueError) as error:
        Config(**options)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("algo", sorted(CRITIC))
def test_methods_with_a_critic_need_no_group(algo):
    assert Config(algo=algo, num_generations=1, num_prompts=32).num_generations == 1


def test_a_methods_own_settings_apply_and_given_flags_win(capsys):
    settings, _ = parse(["--algo", "poad"])
    assert "algo poad: --gamma 0.95 --lam 0.95 --clip_high 0.2" in capsys.readouterr().out
    assert {name: getattr(settings, name) for name in ALGO_SETTINGS["poad"]} == ALGO_SETTINGS["poad"]
    assert (settings.max_kl, settings.value_clip, settings.whiten_mini_batches) == (0.02, 0.2, True)
    assert settings == replace(Config(algo="poad"), **ALGO_SETTINGS["poad"])
    settings, _ = parse(["--gamma", "0.5", "--whiten_mini_batches", "false", "--algo", "ntpo", "--preset", "smoke"])
    assert (settings.gamma, settings.lam, settings.whiten_mini_batches, settings.max_steps) == (0.5, 0.95, False, 2)
    assert parse(["--algo", "carl"])[0].clip_high == parse(["--algo", "carl"])[0].clip_low
    assert parse(["--algo", "grpo"])[0] == Config() and parse(["--algo", "ppo"])[0] == Config(algo="ppo")


def test_a_models_own_settings_leave_a_chosen_preset_alone():
    def settings(*given):
        chosen = parse([*given, "--model", "smollm2"])[0]
        return chosen.max_steps, chosen.num_prompts, chosen.warmstart_steps, chosen.dtype

    assert settings() == (24, 4, 180, "bfloat16")
    assert settings("--preset", "smoke") == (2, 2, 180, "bfloat16")
    assert settings("--preset", "paper") == (200, 8, 180, "bfloat16")


@pytest.mark.parametrize("algo", ["carl", "poad"])
def test_a_run_that_was_killed_and_resumed_equals_the_uninterrupted_one_and_keeps_its_settings(
    tiny, tmp_path, monkeypatch, algo
):
    options = {"model": tiny, "algo": algo, "lam": 0.9, "max_steps": 3, "eval_steps": 3, "success_rate": 0.8,
               "max_turns": 2}
    monkeypatch.setattr(train, "report", lambda *_: None)  # floors and a plot, of which nothing is looked at here
    assert train.main(flags(**options, output_dir=tmp_path / "whole")) == 0
    iteration = train.iteration

    def killed(config, state, step):
        if step == 2:
            raise KeyboardInterrupt
        return iteration(config, state, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "iteration", killed)
        train.main(flags(**options, output_dir=tmp_path / "run"))
    assert train.main(["--resume_from_checkpoint", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    _, seen_by_evaluate, _ = evaluate.parse([str(tmp_path / "run")])
    resumed, _ = parse(["--resume_from_checkpoint", str(tmp_path / "run")])
    own = ALGO_SETTINGS[algo] | {"lam": 0.9, "algo": algo}
    for settings in (seen_by_evaluate, resumed):
        assert {name: getattr(settings, name) for name in own} == own


def test_a_run_from_before_the_methods_own_settings_existed_resumes_without_them(tiny, tmp_path):
    assert train.main(flags(model=tiny, algo="poad", output_dir=tmp_path / "run", max_steps=0)) == 0
    path = tmp_path / "run" / "config.json"
    about = json.loads(path.read_text())
    about["config"] |= {"gamma": 1.0, "max_kl": 0.0}
    del about["config"]["value_clip"], about["config"]["carl_first"]
    path.write_text(json.dumps(about))
    for settings in (parse(["--resume_from_checkpoint", str(tmp_path / "run")])[0],
                     evaluate.parse([str(tmp_path / "run")])[1]):
        assert (settings.gamma, settings.max_kl, settings.value_clip, settings.carl_first) == (1.0, 0.0, 0.0, 1)
