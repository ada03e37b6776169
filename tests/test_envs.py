"""envs.py: the rules of the games against hand-drawn rooms and Gymnasium's table, the turn protocol, the seeds."""

import os
import random
import subprocess
import sys
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

import envs
from envs import ENVS, Episode, make_env, play

MOVES = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}


def cells_of(grid):
    """(row, column) → symbol, from what the model sees."""
    return {(r, c): symbol for r, row in enumerate(grid.split("\n")) for c, symbol in enumerate(row)}


def room(*rows):
    """A Sokoban room as drawn."""
    cells = cells_of("\n".join(rows))
    env = envs.Sokoban(size=len(rows), boxes=sum(s in "X√" for s in cells.values()))
    env.reset(0)
    env.floor = frozenset(cell for cell, s in cells.items() if s != "#")
    env.targets = frozenset(cell for cell, s in cells.items() if s in "O√S")
    boxes = frozenset(cell for cell, s in cells.items() if s in "X√")
    env.state = next(cell for cell, s in cells.items() if s in "PS"), boxes
    return env


def middle(observation):
    """The one row of a corridor room in which things happen."""
    return observation.split("\n")[2]


def corridor(row):
    return room("#" * len(row), "#" * len(row), row, *["#" * len(row)] * (len(row) - 3))


def shortest_pushes(grid):
    """Length of a shortest Sokoban solution by search forwards on the picture, None where there is none. One box."""
    cells = cells_of(grid)
    floor = {cell for cell, s in cells.items() if s != "#"}
    target = next(cell for cell, s in cells.items() if s in "O√S")
    player, box = (next(cell for cell, s in cells.items() if s in kinds) for kinds in ("PS", "X√"))
    queue, seen = deque([(player, box, 0)]), {(player, box)}
    while queue:
        player, box, length = queue.popleft()
        if box == target:
            return length
        for dr, dc in MOVES.values():
            ahead, moved = (player[0] + dr, player[1] + dc), box
            if ahead == box:
                moved = box[0] + dr, box[1] + dc
            if ahead in floor and moved in floor and (ahead, moved) not in seen:
                seen.add((ahead, moved))
                queue.append((ahead, moved, length + 1))
    return None


def test_two_thousand_sokoban_rooms_are_solved_by_their_plan_and_their_mean_optimum_is_the_usual_one():
    env, optima = make_env("sokoban"), []
    for seed in range(2000):
        env.reset(seed)
        plan = env.solve()
        results = [env.step(action) for action in plan]
        assert [terminated for _, _, terminated, *_ in results] == [False] * (len(plan) - 1) + [True], seed
        assert results[-1][4]["success"] and not any(r[4]["success"] for r in results[:-1])
        assert sum(reward for _, reward, *_ in results) == pytest.approx(11 - 0.1 * len(plan))
        optima.append(len(plan))
    assert np.mean(optima) == pytest.approx(4.1, abs=0.15) and np.mean(np.array(optima) <= 10) > 0.98


def test_sokobans_plan_is_as_short_as_a_search_forwards_and_empty_where_the_box_is_stuck():
    env, rng, lengths = make_env("sokoban"), random.Random(0), []
    for seed in range(60):
        observation, _ = env.reset(seed)
        assert len(env.solve()) == len(env.solve(rng.choice)) == shortest_pushes(observation)
        for _ in range(6):
            observation, _, terminated, *_ = env.step(rng.choice(env.actions))
            if terminated:
                break
        lengths.append(shortest_pushes(observation))
        assert len(env.solve()) == (lengths[-1] or 0) and bool(env.best_actions()) == bool(lengths[-1])
    assert {None, 0} < set(lengths)


def test_a_random_player_solves_a_fifth_of_the_sokoban_rooms():
    episodes = play(make_env("sokoban"), envs.random_player, range(1000))
    assert np.mean([e.success for e in episodes]) == pytest.approx(0.19, abs=0.04)  # 3 standard errors


def test_a_move_into_a_box_pushes_it_and_the_last_push_earns_ten_point_nine():
    env = corridor("#PX_O_#")
    observation, reward, terminated, truncated, info = env.step("Right")
    assert middle(observation) == "#_PXO_#" and reward == pytest.approx(-0.1)
    assert not terminated and not truncated and info == {"success": False, "valid": True}
    observation, reward, terminated, truncated, info = env.step("Right")
    assert middle(observation) == "#__P√_#" and reward == pytest.approx(10.9)
    assert terminated and not truncated and info == {"success": True, "valid": True}


def test_a_room_solved_with_the_last_action_is_solved_and_not_cut_off():
    env = corridor("#_PXO_#")
    env.actions_left = 1
    _, _, terminated, truncated, info = env.step("Right")
    assert terminated and not truncated and info["success"]


def test_pushes_work_in_all_four_directions_and_nothing_is_pulled():
    for action, (dr, dc) in MOVES.items():
        env = room("#######", "#P___O#", "#X____#", *["#_____#"] * 3, "#######")
        env.state = (3, 3), frozenset({(3 + dr, 3 + dc)})
        env.step(action)
        assert env.state == ((3 + dr, 3 + dc), frozenset({(3 + 2 * dr, 3 + 2 * dc)}))
        back = next(name for name, step in MOVES.items() if step == (-dr, -dc))
        env.step(back)
        assert env.state == ((3, 3), frozenset({(3 + 2 * dr, 3 + 2 * dc)}))


def test_a_wall_and_a_second_box_stop_a_push_and_the_action_is_spent():
    for row, action in (("#O_PX#", "Right"), ("#PXX_OO#", "Right"), ("#P_X_O#", "Left"), ("#_PX_O#", "Up")):
        env = corridor(row)
        observation, reward, terminated, _, info = env.step(action)
        assert middle(observation) == row and reward == pytest.approx(-0.1)
        assert not terminated and info["valid"] and env.actions_left == 9


def test_a_box_leaving_a_target_costs_one_and_the_player_shows_as_s_there():
    env = corridor("#P√_X_O#")
    observation, reward, *_ = env.step("Right")
    assert middle(observation) == "#_SXX_O#" and reward == pytest.approx(-1.1)
    env = corridor("#PXO_XO#")
    observation, reward, terminated, *_ = env.step("Right")
    assert middle(observation) == "#_P√_XO#" and reward == pytest.approx(0.9) and not terminated
    assert corridor("#P√O_XO_#").step("Right")[1] == pytest.approx(-0.1)  # from one target onto another: -1 + 1


def test_an_unknown_action_moves_nothing_and_spends_nothing():
    for name in ("sokoban", "frozenlake"):
        env = make_env(name)
        before, info = env.reset(3)
        assert info == {"success": False, "valid": True}
        for action in ("upp", "", "Fly", "Up || Up", "U p", None):
            after, reward, terminated, truncated, info = env.step(action)
            assert after == before and reward == 0 and not terminated and not truncated
            assert info == {"success": False, "valid": False} and env.actions_left == 10


def test_the_tenth_action_truncates():
    for name in ("sokoban", "frozenlake"):
        env = make_env(name, frozen=1.0) if name == "frozenlake" else make_env(name)
        for seed in range(20):
            env.reset(seed)
            away = next(a for a in env.actions if env.solve()[0] != a)
            ends = [env.step(away)[2:4] for _ in range(10)]
            if not any(terminated for terminated, _ in ends):
                break
        assert ends == [(False, False)] * 9 + [(False, True)]


def test_the_coordinates_flag_adds_a_line_that_agrees_with_the_grid():
    env, plain = make_env("sokoban", boxes=2, coordinates=True), make_env("sokoban", boxes=2)
    for seed in range(20):
        line, grid = env.reset(seed)[0].split("\n", 1)
        assert grid == plain.reset(seed)[0]
        cells = cells_of(grid)

        def at(symbols, cells=cells):
            return " ".join(str(cell) for cell in sorted(cells) if cells[cell] in symbols)

        assert line == f"Player {at('PS')}. Box {at('X√')}. Target {at('O√S')}."


def test_rooms_have_the_asked_size_a_wall_around_and_as_many_boxes_as_targets():
    for size, boxes in ((6, 1), (5, 1), (8, 2)):
        env = make_env("sokoban", size=size, boxes=boxes)
        for seed in range(10):
            cells = cells_of(env.reset(seed)[0])
            assert len(cells) == size**2 and set(cells.values()) <= set("#_OXPS")  # no box starts on a target
            assert all(s == "#" for (r, c), s in cells.items() if not 0 < r < size - 1 or not 0 < c < size - 1)
            counts = Counter(cells.values())
            assert counts["X"] == boxes == counts["O"] + counts["S"] and counts["P"] + counts["S"] == 1
            assert env.solve()


def lake(observation):
    """The symbols of a FrozenLake observation by cell; its first line lists coordinates."""
    return cells_of(observation.split("\n", 1)[1])


def gymnasiums_table(observation):
    """P of Gymnasium's own FrozenLake, built from what the model sees; a function of the success rate."""
    letters = {"P": "S", "_": "F", "O": "H", "G": "G"}
    rows = ["".join(letters[symbol] for symbol in row) for row in observation.split("\n")[1:]]
    return lambda success_rate: FrozenLakeEnv(desc=rows, is_slippery=True, success_rate=success_rate).P


def test_slips_are_as_frequent_as_gymnasiums_table_says():
    for success_rate in (1 / 3, 0.8):
        env, rng, counts = make_env("frozenlake", success_rate=success_rate), random.Random(0), Counter()
        table = gymnasiums_table(env.reset(4)[0])(success_rate)
        for replica in range(1200):
            env.reset(4, replica)
            over = False
            while not over:
                state, action = 4 * env.player[0] + env.player[1], rng.randrange(4)
                _, _, terminated, truncated, _ = env.step(env.actions[action])
                counts[state, action, 4 * env.player[0] + env.player[1]] += 1
                over = terminated or truncated
        tried = Counter()
        for (state, action, _), count in counts.items():
            tried[state, action] += count
        frequent = [key for key, n in tried.items() if n >= 200]
        assert len(frequent) >= 8
        for state, action in frequent:
            expected = Counter()
            for p, arrival, *_ in table[state][action]:
                expected[arrival] += p
            n = tried[state, action]
            for arrival in range(16):
                p = expected[arrival]
                assert abs(counts[state, action, arrival] / n - p) <= 4 * (p * (1 - p) / n) ** 0.5


def test_the_oracle_looks_a_thousand_actions_ahead_and_no_further():
    env = make_env("frozenlake", success_rate=0.8)
    env.max_actions = 10**9
    for seed in range(3):
        env.reset(seed)
        assert 0 < len(env.solve()) <= 1000 and len(env.values) == 1001


def test_without_slips_a_move_goes_where_it_was_meant_to_or_stays_at_the_edge():
    env = make_env("frozenlake", frozen=1.0)
    for seed in range(20):
        env.reset(seed)
        row, column = env.player
        for action in random.Random(seed).choices(env.actions, k=10):
            row, column = (min(max(i + step, 0), 3) for i, step in zip((row, column), MOVES[action], strict=True))
            _, _, terminated, *_ = env.step(action)
            assert env.player == (row, column) and terminated == (env.player == env.goal)
            if terminated:
                break


def test_a_hole_ends_the_episode_with_nothing_and_the_goal_with_one():
    env, symbols = make_env("frozenlake"), Counter()
    for seed in range(100):
        env.reset(seed)
        for action in random.Random(seed).choices(env.actions, k=10):
            observation, reward, terminated, truncated, info = env.step(action)
            symbol = lake(observation)[env.player]
            assert (reward, info["success"]) == ((1.0, True) if symbol == "√" else (0.0, False))
            assert terminated == (symbol in "X√") and not (terminated and truncated) and symbol in "PX√"
            if terminated:
                symbols[symbol] += 1
                break
    assert symbols["X"] > 10 and symbols["√"] > 10


def test_a_random_player_crosses_a_fifth_of_the_lakes_however_slippery():
    for success_rate in (1 / 3, 0.8, 1.0):
        episodes = play(make_env("frozenlake", success_rate=success_rate), envs.random_player, range(1000))
        assert np.mean([e.success for e in episodes]) == pytest.approx(0.22, abs=0.04)


def test_the_best_closed_loop_player_crosses_half_or_nine_tenths_or_all_of_the_lakes():
    for success_rate, expected in ((1 / 3, 0.51), (0.8, 0.91), (1.0, 1.0)):
        env, crossed = make_env("frozenlake", success_rate=success_rate), []
        for seed in range(600):
            env.reset(seed)
            over = False
            while not over:
                _, _, terminated, truncated, info = env.step((env.best_actions() or env.actions)[0])
                over = terminated or truncated
            crossed.append(info["success"])
        assert np.mean(crossed) == pytest.approx(expected, abs=0.05 if expected < 1 else 0.005)


def test_the_goal_is_always_reachable_and_the_plan_is_a_shortest_way():
    for size, frozen in ((4, 0.8), (4, 0.3), (6, 0.7)):
        env = make_env("frozenlake", size=size, frozen=frozen)
        for seed in range(60):
            cells = lake(env.reset(seed)[0])
            assert len(cells) == size**2 and Counter(cells.values())["G"] == Counter(cells.values())["P"] == 1
            start = next(cell for cell, s in cells.items() if s == "P")
            distance, queue = {start: 0}, deque([start])
            while queue:
                here = queue.popleft()
                for dr, dc in MOVES.values():
                    there = here[0] + dr, here[1] + dc
                    if cells.get(there, "O") != "O" and there not in distance:
                        distance[there] = distance[here] + 1
                        queue.append(there)
            goal = next(cell for cell, s in cells.items() if s == "G")
            assert goal in distance
            if distance[goal] <= 10:
                plan = env.solve()
                assert len(plan) == distance[goal] and [env.step(action)[1] for action in plan][-1] == 1


def test_every_other_cell_is_ice_with_the_asked_probability():
    def holes(frozen):
        env = make_env("frozenlake", frozen=frozen)
        return np.mean([list(lake(env.reset(seed)[0]).values()).count("O") for seed in range(300)])

    assert holes(1.0) == 0
    assert 1.8 < holes(0.8) < 2.8  # 14 · 0.2, less because lakes whose goal is cut off are drawn again
    assert holes(0.0) == 14


def test_the_replica_changes_the_slips_and_not_the_map():
    env, ways = make_env("frozenlake", success_rate=1 / 3, frozen=1.0), {}
    for replica in range(8):
        for _ in range(2):
            assert env.reset(1, replica)[0] == env.reset(1)[0]
            env.reset(1, replica)
            way = [env.step(action)[0] for action in ("Right", "Down") * 4]
            assert ways.setdefault(replica, way) == way
    assert len(set(map(str, ways.values()))) >= 7
    sokoban = make_env("sokoban")
    assert sokoban.reset(1, 0)[0] == sokoban.reset(1, 5)[0]


def test_the_frozen_lake_observation_lists_the_coordinates_of_the_map_below():
    env = make_env("frozenlake")
    for seed in range(30):
        observation, _ = env.reset(seed)
        cells = lake(observation)
        start, goal = (next(cell for cell, s in cells.items() if s == symbol) for symbol in "PG")
        holes = " ".join(str(cell) for cell in sorted(cells) if cells[cell] == "O") or "none"
        first = observation.split("\n")[0]
        assert first == f"Board 4x4. Start {start}. Goal {goal}. Player {start}. Holes {holes}."
        observation, *_ = env.step(env.solve()[0])
        assert observation.startswith(f"Board 4x4. Start {start}. Goal {goal}. Player {env.player}. Holes {holes}.\n")


class Steps:
    """Ten-line stand-in for a game: remembers its actions, Right earns 0.25, and the fourth Right is the goal."""

    moves = "Left, Right"
    task, brief = "Go.", "go"

    def __init__(self, max_turns=5, actions_per_turn=2, max_actions=10):
        self.max_turns, self.actions_per_turn, self.max_actions = max_turns, actions_per_turn, max_actions

    def reset(self, seed, replica=0):
        self.log, self.actions_left = [], self.max_actions
        return "start", {}

    def step(self, action):
        action = action.capitalize()
        if action not in ("Left", "Right"):
            return "same", 0.0, False, False, {"success": False, "valid": False}
        self.log.append(action)
        self.actions_left -= 1
        goal = self.log.count("Right") == 4
        observation = " ".join(self.log)
        return observation, 0.25 * (action == "Right"), goal, not self.actions_left, {"success": goal, "valid": True}


def test_the_answer_is_split_trimmed_and_read_without_regard_to_case():
    for answer, actions in (
        ("Right || Left", ["Right", "Left"]),
        (" right||LEFT\n", ["Right", "Left"]),
        ("|| ||  Right || ||", ["Right"]),
        ("Right || Left || Right", ["Right", "Left"]),
        ("Fly || Right", ["Right"]),
        ("Right || Fly", ["Right"]),
        ("Right | Left", []),
        ("Right Left", []),
    ):
        episode = Episode(Steps(), 0)
        episode.act(answer)
        assert episode.env.log == actions, answer
        assert episode.invalid_turns == (not actions)


def test_an_offending_turn_moves_nothing_and_costs_a_tenth_that_the_model_is_not_shown():
    for answer in (None, "", " ", "||", "Fly", "Fly || Swim", "Right, Left"):
        episode = Episode(Steps(), 0)
        shown = episode.act(answer)
        assert episode.env.log == [] and episode.invalid_turns == 1 and not episode.done
        assert episode.rewards == [-0.1] and episode.return_ == -0.1
        assert shown.startswith("Reward: 0.0\n") and "-0.1" not in shown
    episode.act("Right || Right")
    assert episode.return_ == pytest.approx(0.5 - 0.1) and episode.invalid_turns == 1
    episode = Episode(Steps(), 0, format_penalty=0.75)
    assert episode.act("Fly") and episode.rewards == [-0.75]


def test_the_user_turn_shows_reward_turn_state_actions_left_and_format():
    episode = Episode(Steps(), 0)
    opening = episode.user()
    assert opening.startswith("Turn 1:\nState:\nstart\n") and "10 actions left" in opening and envs.FORMAT in opening
    shown = episode.act("Right || Right")
    assert shown.startswith("Reward: 0.5\nTurn 2:\nState:\nRight Right\n")
    assert "8 actions left" in shown and envs.FORMAT in shown
    for part in ("Go.", "Left, Right", "up to 2", "||", "5 turns", "10 actions", envs.FORMAT):
        assert part in episode.system()
    brief = Episode(Steps(), 0, style="brief")
    assert brief.act("Left") == "Reward: 0.0\nTurn 2: 9 left.\nLeft"
    assert len(brief.system()) < len(episode.system()) and "Left, Right" in brief.system()


def test_the_episode_ends_with_its_turns():
    episode = Episode(Steps(max_turns=3), 0)
    shown = [episode.act(answer) for answer in ("Left", None, "Left")]
    assert shown[0] and shown[1] and shown[2] is None and episode.done and not episode.success
    assert len(episode.rewards) == 3
    with pytest.raises(RuntimeError, match="after the end"):
        episode.act("Left")


def test_the_episode_ends_in_mid_turn_with_its_actions_or_with_the_game():
    episode = Episode(Steps(max_actions=3), 0)
    assert episode.act("Left || Left") and episode.act("Left || Left") is None
    assert episode.env.log == ["Left"] * 3 and episode.done and not episode.success
    episode = Episode(Steps(), 0)
    assert [bool(episode.act(a)) for a in ("Right || Right", "Right", "Right || Left")] == [True, True, False]
    assert episode.env.log == ["Right"] * 4 and episode.done and episode.success
    assert episode.return_ == pytest.approx(1.0)


def test_invalid_actions_spend_the_turn_and_not_the_action_budget():
    episode = Episode(Steps(), 0)
    shown = episode.act("Fly || Left")
    assert "9 actions left" in shown and "Turn 2" in shown and episode.rewards == [0]


def test_the_oracle_solves_sokoban_in_five_turns_of_two_moves():
    episodes = play(make_env("sokoban"), envs.oracle_player, range(50))
    assert np.mean([e.success for e in episodes]) >= 0.97
    for episode in episodes:
        assert not episode.success or episode.return_ > 9.9
        assert len(episode.rewards) <= 5 and episode.invalid_turns == 0


def trace():
    """What short episodes of all games show, slips included, as one string."""
    lines = []
    for env in (make_env("sokoban", boxes=2, coordinates=True), make_env("frozenlake", success_rate=1 / 3)):
        for seed in range(15):
            lines.append(env.reset(seed, seed % 3)[0])
            lines += [str(env.step(action)) for action in ("Left", "Up", "Right", "Down")]
            lines.append(str(env.solve()))
    for level in ("easy", "medium", "hard"):
        for episode in play(make_env("sudoku", level=level), envs.random_player, range(15)):
            lines += [episode.observation, str(episode.rewards), str(episode.env.best_actions())]
    for episode in play(make_env("webshop"), envs.random_player, range(15)):
        lines += [*episode.answers, episode.observation, str(episode.rewards), str(episode.env.best_actions())]
    return "\n".join(lines)


def test_the_same_seed_is_the_same_episode_in_any_process():
    def elsewhere(hash_seed):
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent)])
        return subprocess.run(
            [sys.executable, "-c", "import test_envs; print(test_envs.trace())"], text=True, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
            encoding="utf-8", check=True,
        ).stdout  # fmt: skip

    assert elsewhere("0") == elsewhere("1") == trace() + "\n"


def test_the_same_seed_is_the_same_episode_after_and_beside_other_ones():
    alone = trace()
    np.random.seed(0)
    random.seed(0)
    play(make_env("sokoban"), envs.random_player, range(5))
    assert trace() == alone
    one, two = (make_env("frozenlake", success_rate=1 / 3, frozen=1.0) for _ in range(2))
    one.reset(7)
    expected = [one.step("Right")[0] for _ in range(8)]
    one.reset(7), two.reset(8)
    shown = []
    for _ in range(8):
        shown.append(one.step("Right")[0])
        two.step("Left")
    assert shown == expected


def test_different_seeds_are_different_levels():
    for name in ("sokoban", "frozenlake", "sudoku"):
        env = make_env(name)
        assert len({env.reset(seed)[0] for seed in range(100)}) > 90
    env = make_env("webshop")
    goals = len(env.parts["test"])  # which come round and round
    shown = [env.reset(seed)[0] for seed in range(goals + 20)]
    assert len(set(shown)) == goals > 70 and shown[goals:] == shown[:20]


def test_no_answer_whatever_raises():
    rng = random.Random(0)
    words = ["||", "|", " ", "\n", "\0", "up", "LEFT", "Right", "down", "é", "İ", "\ud800", "</answer>", "<think>", "0"]
    answers = 0
    for name in ("sokoban", "frozenlake"):
        env = make_env(name)
        for seed in range(400):
            episode = Episode(env, seed % 40, style=rng.choice(("paper", "brief")))
            while not episode.done:
                noise = "".join(map(chr, rng.choices(range(0x250), k=rng.randint(0, 12))))
                answer = rng.choice((noise, "".join(rng.choices(words, k=rng.randint(0, 9))), None, "||" * 5000))
                shown = episode.act(answer)
                answers += 1
                assert (shown is None) == episode.done
            assert 1 <= len(episode.rewards) <= 5 and episode.invalid_turns <= len(episode.rewards)
            assert all(-2.3 < r < 11 for r in episode.rewards)
    assert answers > 3000


def broken_responses(n):
    """Well-formed, torn, nested and flooded responses, words of all games and noise among them."""
    rng = random.Random(1)
    words = ["Up", "left", " RIGHT ", "1,2,3", "4 , 4,4", "place 1 at row 2 col 3", "0,0,0", "-1,2,999999999",
             "search[combs for women]", "CLICK[ back to search ]", "9" * 5000 + ",1,1", "search[\ud800 √]",
             "click[buy now]", "click[]", "click[b", "||", "|", "\0", "\n", "é", "İ", "\ud800", "１,２,３", "<think>",
             "</think>", "<answer>", "</answer>"]
    for _ in range(n):
        inside = "".join(rng.choices(words, k=rng.randint(0, 8)))
        word = rng.choice(words)
        inside = rng.choice((inside, word, "||".join(rng.choices(words[:11], k=3)), "||" * 2000, inside[::-1]))
        noise = "".join(map(chr, rng.choices(range(0x300), k=8)))
        yield rng.choice((f"<think>{noise}</think><answer>{inside}</answer>", f"<think></think> <answer>{inside}",
                          f"<think>{inside}</think>\n<answer>1,1,1 || Up</answer>", inside, noise))


def test_twenty_thousand_broken_responses_raise_nothing_and_keep_every_budget():
    from actfocus import answer_span  # here, as the processes of another test import this file and need no torch

    responses = list(broken_responses(20_000))
    spans = map(answer_span, responses)
    answers = [text[slice(*span)] if span else None for text, span in zip(responses, spans, strict=True)]
    assert 5000 < sum(answer is not None for answer in answers) < 18_000
    for name in ENVS:
        env, queue, episodes = make_env(name), iter(answers), []
        while (answer := next(queue, StopIteration)) is not StopIteration:
            if not episodes or episodes[-1].done:
                episodes.append(Episode(env, len(episodes) % 50))
            shown = episodes[-1].act(answer)
            assert (shown is None) == episodes[-1].done and 0 <= env.actions_left <= env.max_actions
        for episode in episodes:
            assert len(episode.rewards) <= env.max_turns and episode.invalid_turns <= len(episode.rewards)
            assert np.isfinite(episode.return_) and -6 < episode.return_ < 20.1
        assert 100 < 20_000 - sum(episode.invalid_turns for episode in episodes) < 10_000  # some answers are in order


def test_what_the_tiny_model_learnt_to_read_has_not_changed():
    assert Episode(make_env("sokoban"), 0, style="brief").system() == (
        "Sokoban: push X onto O. Moves: Up, Down, Left, Right.")
    assert Episode(make_env("frozenlake"), 0, style="brief").system() == (
        "FrozenLake: reach G, not O. Moves: Left, Down, Right, Up.")
    for name in ("sokoban", "frozenlake"):
        env = make_env(name)
        assert f"\nActions: {', '.join(env.actions)}. Put up to 2 into one answer, " in Episode(env, 0).system()
        assert "You have 5 turns and 10 actions in all.\n" in Episode(env, 0).system()


def test_the_random_player_draws_uniformly_from_the_legal_actions():
    for name in ENVS:
        env = make_env(name)
        for seed in range(20):
            env.reset(seed)
            rng, twin, over = np.random.default_rng(seed), np.random.default_rng(seed), False
            while not over:
                legal = env.legal_actions()
                chosen = envs.random_player(env, rng)
                assert chosen == [legal[twin.integers(len(legal))] for _ in range(env.actions_per_turn)]
                _, _, terminated, truncated, _ = env.step(chosen[0])
                over = terminated or truncated
    for name in ("sokoban", "frozenlake"):
        assert make_env(name).legal_actions() == list(make_env(name).actions)


def test_step_reads_names_without_regard_to_case_and_outer_white_space():
    for name in ("sokoban", "frozenlake"):
        one, other = make_env(name), make_env(name)
        for seed in range(10):
            one.reset(seed), other.reset(seed)
            for action in one.actions:
                variant = random.Random(seed).choice((action.upper(), action.lower(), f" {action}\n"))
                assert one.step(action) == other.step(variant)


def test_the_game_is_played_in_the_terminal(monkeypatch, capsys):
    answers = iter(["?", "Fly", "Right", "?"])
    monkeypatch.setattr(sys, "argv", ["envs.py", "--env", "sokoban", "--seed", "0"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers, None) or (_ for _ in ()).throw(EOFError))
    best = Episode(make_env("sokoban"), 0).env.solve()[0]
    envs.main()
    out = capsys.readouterr().out
    assert f"oracle: {best}\n" in out and out.count("oracle: ") == 2
    assert out.count("No action understood: the turn is spent and costs 0.1.") == 1
    assert out.endswith("return -0.2, success False\n")  # a turn that was not understood, and one move


def test_a_level_below_0_is_one_line_and_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["envs.py", "--seed", "-1"])
    with pytest.raises(SystemExit) as end:
        envs.main()
    assert end.value.code == 2 and "--seed -1: levels have numbers from 0 on" in capsys.readouterr().err


def test_make_env_refuses_what_cannot_be_and_shows_it():
    for name, option, value in (
        ("sokoban", "size", 4), ("sokoban", "boxes", 0), ("sokoban", "boxes", 3), ("frozenlake", "size", 1),
        ("frozenlake", "frozen", -0.25), ("frozenlake", "frozen", 1.5), ("frozenlake", "frozen", float("nan")),
        ("frozenlake", "success_rate", 0.0), ("frozenlake", "success_rate", 1.25),
        ("frozenlake", "success_rate", float("nan")), ("sudoku", "level", "impossible"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=str(value)):
            make_env(name, **{option: value})
    with pytest.raises(ValueError, match=r"'chess'.*sokoban, frozenlake, sudoku"):
        make_env("chess")
