"""sudoku.py: unique puzzles, legal and illegal moves, both notations, what is shown and what is paid."""

import re

import numpy as np
import pytest

import envs
import sudoku
from envs import Episode, make_env, play

PUZZLE = "[1] . . [4]\n. . [1] [2]\n[2] . [4] .\n. [3] . [1]"
SOLUTION = [1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]


def digits(observation):
    return [[int(symbol.strip("[]*").replace(".", "0")) for symbol in row] for row in grid(observation)]


def grid(observation):
    """The four lines of the board; a line above them names an illegal move."""
    lines = observation.split("\n")
    return [line.split() for line in lines[lines[0].startswith("Last move") :][:4]]


def flat(board):
    return [digit for row in board for digit in row]


def solutions(board):
    """All ways to fill a board, by trying digits cell after cell."""
    for r in range(4):
        for c in range(4):
            if not board[r][c]:
                found = []
                for digit in range(1, 5):
                    box = [board[i][j] for i in range(4) for j in range(4) if (i // 2, j // 2) == (r // 2, c // 2)]
                    if digit not in board[r] and digit not in [row[c] for row in board] and digit not in box:
                        found += solutions([[digit if (i, j) == (r, c) else board[i][j] for j in range(4)]
                                            for i in range(4)])
                return found
    return [board]


def fixed(**options):
    """The puzzle above; its one cell with a legal but wrong digit is 2,1, where 4 fits and 3 is right."""
    env = make_env("sudoku", **options)
    env.reset(0)
    symbols = PUZZLE.split()
    env.givens = frozenset(i for i in range(16) if symbols[i] != ".")
    env.board = [SOLUTION[i] if i in env.givens else 0 for i in range(16)]
    env.solution, env.goals = SOLUTION, np.array([SOLUTION])
    return env


def test_two_thousand_puzzles_have_one_solution_and_the_levels_givens():
    solved = set()
    for level, givens, seeds in (("easy", 10, 1000), ("medium", 9, 500), ("hard", 6, 500)):
        env = make_env("sudoku", level=level)
        for seed in range(seeds):
            observation, info = env.reset(seed)
            symbols = [symbol for row in grid(observation) for symbol in row]
            assert sum(bool(re.fullmatch(r"\[[1-4]\]", symbol)) for symbol in symbols) == givens
            assert symbols.count(".") == 16 - givens and info == {"success": False, "valid": True, "reason": ""}
            (solution,) = solutions(digits(observation))
            assert flat(solution) == env.solution
            solved.add(tuple(env.solution))
    assert len(solved) > 270  # of the 288 there are


def test_there_are_288_filled_boards():
    boards = sudoku.filled_boards()
    assert boards.shape == (288, 16) and len({tuple(board) for board in boards.tolist()}) == 288
    assert sorted(flat(board) for board in solutions([[0] * 4 for _ in range(4)])) == sorted(boards.tolist())


def test_both_notations_are_read_whatever_the_case_and_the_spaces():
    for action in ("2,1,3", " 2 , 1 ,3\n", "place 3 at row 2 col 1", "PLACE 3  at Row 2\tCol 1",
                   "place 3 at row2 col1"):
        assert sudoku.parse(action) == (2, 1, 3), action
        env = fixed()
        observation, reward, *_, info = env.step(action)
        assert (reward, info) == (1.0, {"success": False, "valid": True, "reason": ""})
        assert grid(observation)[1] == ["3", ".", "[1]", "[2]"]


def test_what_cannot_be_read_is_named_and_spends_nothing():
    env = fixed()
    before = env.board.copy()
    for action in ("", "2,1", "2,1,3,4", "2;1;3", "2 1 3", "1 2,3,4", "two,1,3", "2.0,1,3", "place 3 at row 2",
                   "2,1,3 x", "place 3 at col 1 row 2", "２,１,３", "2,1,\0", "9" * 5000 + ",1,1", "[2,1,3]",
                   "2,1,3 | 2,2,4", None):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation.startswith("Last move: unreadable.\n") and not terminated and not truncated
        assert reward == 0 and info == {"success": False, "valid": False, "reason": "unreadable"}
        assert env.actions_left == 16 and env.board == before


@pytest.mark.parametrize("action, reason, marked", [
    ("1,1,1", "given cell", []),
    ("1,1,3", "given cell", []),
    ("0,1,1", "out of range", []),
    ("1,5,1", "out of range", []),
    ("1,2,5", "out of range", []),
    ("1,2,0", "out of range", []),
    ("-1,2,3", "out of range", []),
    ("1,2,999999999", "out of range", []),
    ("1,2,4", "digit conflicts with row", [(0, 3)]),
    ("1,2,3", "digit conflicts with column", [(3, 1)]),
    ("2,2,1", "digit conflicts with row, box", [(0, 0), (1, 2)]),
    ("4,1,2", "digit conflicts with column, box", [(2, 0)]),
    ("place 1 at row 4 col 3", "digit conflicts with row, column, box", [(1, 2), (3, 3)]),
])
def test_every_illegal_move_is_named_changes_nothing_costs_a_tenth_and_is_spent(action, reason, marked):
    env = fixed()
    before = env.board.copy()
    observation, reward, terminated, truncated, info = env.step(action)
    assert info == {"success": False, "valid": True, "reason": reason} and not terminated and not truncated
    assert observation.startswith(f"Last move: {reason}.\n[" if (0, 0) not in marked else f"Last move: {reason}.\n*1*")
    assert reward == -0.1 and env.actions_left == 15 and env.board == before
    stars = [(r, c) for r in range(4) for c in range(4) if grid(observation)[r][c].startswith("*")]
    assert stars == marked
    assert "*" not in env.step("2,1,3")[0]  # the marks are of the last move alone


def test_a_placed_digit_in_the_way_is_marked_and_a_conflict_with_the_box_alone_is_named():
    env = fixed()
    env.step("2,1,4")  # legal, though wrong
    observation, *_, info = env.step("1,2,4")
    assert info["reason"] == "digit conflicts with row, box"
    assert grid(observation)[:2] == [["[1]", ".", ".", "*4*"], ["*4*", ".", "[1]", "[2]"]]
    env.board[3], env.givens = 0, env.givens - {3}
    assert env.step("1,2,4")[4]["reason"] == "digit conflicts with box"


def test_the_observation_shows_board_hints_progress_and_steps():
    env = fixed()
    env.step("2,1,4")
    observation, *_ = env.step("3,2,1")
    assert observation == (
        "[1] . . [4]\n4 . [1] [2]\n[2] 1 [4] .\n. [3] . [1]\n"
        "Legal digits: 1,2: 2; 1,3: 3; 2,2: none; 3,4: 3; 4,1: none; 4,3: 2.\nFilled 10 of 16. Step 2 of 16."
    )
    assert "Legal" not in make_env("sudoku", hints=False).reset(0)[0]


def test_the_hints_are_the_digits_that_break_no_rule():
    for level in ("easy", "hard"):
        for episode in play(make_env("sudoku", level=level), envs.random_player, range(100)):
            observation = episode.env.reset(episode.seed)[0]
            board = digits(observation)
            hints = dict(re.findall(r"(\d,\d): ([\d ]+)", observation))
            for r, c in ((r, c) for r in range(4) for c in range(4) if not board[r][c]):
                taken = {*board[r], *(row[c] for row in board)} | {
                    board[i][j] for i in range(4) for j in range(4) if (i // 2, j // 2) == (r // 2, c // 2)}
                assert set(hints.pop(f"{r + 1},{c + 1}").split()) == {str(d) for d in {1, 2, 3, 4} - taken}
            assert not hints


def test_a_perfect_game_scores_its_blanks_and_ten():
    for level, blanks in (("easy", 6), ("medium", 7), ("hard", 10)):
        env = make_env("sudoku", level=level)
        for seed in range(50):
            env.reset(seed)
            plan = env.solve()
            results = [env.step(action) for action in plan]
            assert [reward for _, reward, *_ in results] == [1.0] * (blanks - 1) + [11.0]
            assert [terminated for _, _, terminated, *_ in results] == [False] * (blanks - 1) + [True]
            assert results[-1][4]["success"] and not any(truncated for *_, truncated, _ in results)


def test_no_cell_pays_twice_and_a_wrong_digit_pays_nothing_where_the_solution_is_the_only_one():
    env = fixed()
    rewards = [env.step(f"2,1,{digit}")[1] for digit in (3, 3, 4, 3, 4, 4, 3)]
    assert rewards == [1.0, 0, 0, 0, 0, 0, 0] and env.actions_left == 9
    assert fixed().step("2,1,4")[1] == 0


def test_another_legal_digit_earns_a_half_only_where_a_puzzle_may_have_several_solutions():
    env = fixed(unique=False)
    assert [env.step(f"2,1,{digit}")[1] for digit in (4, 4, 3, 4)] == [0.5, 0, 0.5, 0]
    several = 0
    for seed in range(100):
        env = make_env("sudoku", level="hard", unique=False)
        several += len(solutions(digits(env.reset(seed)[0]))) > 1
        *_, last = [env.step(action) for action in env.solve()]
        assert last[2] and last[4]["success"]
    assert several > 20


def test_a_puzzle_of_several_solutions_is_solved_by_any_of_them():
    env = make_env("sudoku", level="hard", unique=False)
    seed = next(seed for seed in range(100) if len(solutions(digits(env.reset(seed)[0]))) > 1)
    found = [flat(board) for board in solutions(digits(env.reset(seed)[0]))]
    other = next(board for board in found if board != env.solution)
    moves = [f"{i // 4 + 1},{i % 4 + 1},{other[i]}" for i in range(16) if i not in env.givens]
    results = [env.step(move) for move in moves]
    assert results[-1][4]["success"] and {reward for _, reward, *_ in results} <= {0.5, 1.0, 10.5, 11.0}


def test_sixteen_moves_truncate_and_a_solution_with_the_last_one_counts():
    env = fixed()
    ends = [env.step("1,1,1")[2:4] for _ in range(16)]
    assert ends == [(False, False)] * 15 + [(False, True)]
    env = fixed()
    plan = env.solve()
    for action in ["1,1,1"] * (16 - len(plan)) + plan[:-1]:
        assert env.step(action)[2:4] == (False, False)
    assert env.step(plan[-1])[2:4] == (True, False) and env.actions_left == 0


def test_an_illegal_turn_is_no_format_error_and_an_unreadable_one_is():
    episode = Episode(make_env("sudoku"), 0)
    shown = episode.act("0,0,0 || 5,5,5")
    assert episode.rewards == [-0.2] and episode.invalid_turns == 0 and shown.startswith("Reward: -0.2\nTurn 2:")
    shown = episode.act("put 3 somewhere")
    assert episode.rewards[1:] == [-0.1] and episode.invalid_turns == 1 and shown.startswith("Reward: 0.0\nTurn 3:")
    assert "Last move: unreadable." in shown and "You have 14 actions left" in shown


def test_an_episode_has_eight_turns_of_two_moves():
    episode = Episode(make_env("sudoku"), 0)
    for part in ("8 turns", "16 actions", "up to 2", "row,col,digit or place d at row r col c", "[3]", "*3*"):
        assert part in episode.system()
    for turn in range(8):
        assert not episode.done and len(episode.rewards) == turn
        episode.act("0,0,0 || 0,0,0 || 0,0,0")
    assert episode.done and episode.env.actions_left == 0 and not episode.success
    assert Episode(make_env("sudoku"), 0, style="brief").system().endswith(f"Moves: {sudoku.Sudoku.moves}.")


def test_the_hints_are_exactly_the_moves_on_blanks_that_step_does_not_call_illegal():
    env, rng = make_env("sudoku", level="hard"), np.random.default_rng(0)
    for seed in range(15):
        env.reset(seed)
        for action in rng.choice(env.legal_actions(), 3):
            shown, before = env.step(str(action))[0], env.board.copy()
            line = next(line for line in shown.splitlines() if line.startswith("Legal digits: "))
            hints = dict(part.split(": ") for part in line.removeprefix("Legal digits: ").rstrip(".").split("; "))
            for r, c, d in ((r, c, d) for r in range(1, 5) for c in range(1, 5) for d in range(1, 5)):
                env.board = before.copy()
                if not before[4 * r + c - 5]:
                    assert (env.step(f"{r},{c},{d}")[4]["reason"] == "") == (str(d) in hints[f"{r},{c}"])
            env.board = before


def test_legal_actions_are_every_digit_in_every_cell_that_is_not_given():
    env = make_env("sudoku", level="medium")
    env.reset(0)
    expected = {f"{r},{c},{d}" for r in range(1, 5) for c in range(1, 5) for d in range(1, 5)
                if 4 * r + c - 5 not in env.givens}
    assert set(env.legal_actions()) == expected and len(env.legal_actions()) == 7 * 4


def test_the_oracle_finishes_what_others_began_with_legal_and_right_moves_only():
    rng, ends = np.random.default_rng(0), []
    for seed in range(100):
        env = make_env("sudoku", level="hard")
        env.reset(seed)
        for action in rng.choice(env.legal_actions(), 2):
            env.step(str(action))
        plan, again, before = env.solve(), env.solve(lambda best: str(rng.choice(best))), env.board.copy()
        assert len(plan) == len(again) and env.board == before
        assert len(plan) <= 10
        results = [env.step(action) for action in plan]
        assert all(not info["reason"] and reward >= 0 for _, reward, _, _, info in results)
        ends.append(env.board == env.solution)
        assert ends[-1] or not env.best_actions()
    assert np.mean(ends) > 0.8


def test_the_oracle_solves_every_puzzle_and_a_random_player_one_in_a_hundred_of_the_easy():
    for level in ("easy", "hard"):
        episodes = play(make_env("sudoku", level=level), envs.oracle_player, range(100))
        assert all(episode.success for episode in episodes)
    success = np.mean([episode.success for episode in play(make_env("sudoku"), envs.random_player, range(1000))])
    assert 0.003 < success < 0.03  # 1.2 % of 2,000
