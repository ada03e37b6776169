"""Sudoku 4 × 4, text in, text out, of §5.1 of arXiv:2605.14558v1.

The interface is that of `envs.py`, which imports this file. Text counts rows, columns and digits from 1; inside, a
board is 16 digits row by row, 0 a blank, and a cell is its index. There are 288 filled boards in all, so a puzzle has
one solution if exactly one of them agrees with its givens.

    python envs.py --env sudoku --seed 3        # play it yourself; ? asks the oracle

Differs from the paper, which is silent there: what is illegal, and that no cell pays twice (see `Sudoku`).
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import permutations, product
from operator import itemgetter

import numpy as np

GIVENS = {"easy": 10, "medium": 9, "hard": 6}
HOUSES = {  # the row, column and box of every cell
    "row": [cell // 4 for cell in range(16)],
    "column": [cell % 4 for cell in range(16)],
    "box": [cell // 8 * 2 + cell % 4 // 2 for cell in range(16)],
}
PEERS = [[other for other in range(16) if other != cell and any(h[other] == h[cell] for h in HOUSES.values())]
         for cell in range(16)]
NUMBER = r"\s*(-?\d{1,9})\s*"  # Careful: int() refuses strings of more than 4,300 digits
MOVE = re.compile(rf"{NUMBER},{NUMBER},{NUMBER}|place{NUMBER}at\s*row{NUMBER}col{NUMBER}", re.ASCII | re.IGNORECASE)


class Sudoku:
    """Fill the blanks so that every row, column and 2 × 2 box holds 1, 2, 3 and 4.

    A move is illegal outside 1-4, on a given cell, and where its row, column or box has the digit already;
    `info["reason"]` and the next observation name which. It changes nothing, costs 0.1 and is spent, and it is `valid`
    for the turn protocol: it was understood, so the format penalty does not come on top. What cannot be read is not
    `valid`, costs nothing but that penalty, and is not spent. A placed digit may be replaced.

    A cell that comes to match the solution earns 1. Another legal digit earns 0.5, but only where a puzzle may have
    several solutions (unique=False); else it is a mistake and earns 0. No cell pays more than 1 an episode, so
    replacing digits to and fro is no income. The last blank filled solves the puzzle and earns 10: a perfect game
    scores its blanks + 10.
    """

    moves = "row,col,digit or place d at row r col c, all from 1 to 4"
    max_turns, actions_per_turn, max_actions = 8, 2, 16
    task = (
        "You are solving a 4 x 4 Sudoku: fill the blanks so that every row, every column and every 2 x 2 box holds 1, "
        "2, 3 and 4. You may replace a digit that you placed, never a given one.\n"
        "Symbols: . blank, [3] given digit, 3 placed digit, *3* digit that your last move clashed with.\n"
        "A right digit earns 1; an illegal move changes nothing and costs 0.1; solving the puzzle earns 10."
    )
    brief = "Sudoku: 1 2 3 4 in every row, column and 2 x 2 box."

    def __init__(self, level: str = "easy", hints: bool = True, unique: bool = True):
        if level not in GIVENS:
            raise ValueError(f"unknown sudoku level {level!r}: choose from {', '.join(GIVENS)}")
        self.level, self.hints, self.unique = level, hints, unique

    def reset(self, seed: int, replica: int = 0) -> tuple[str, dict]:
        """Draw the seed's puzzle. Nothing in Sudoku is left to luck, so the replica changes nothing."""
        rng, givens = np.random.default_rng(seed), []
        while len(givens) != GIVENS[self.level]:  # some boards cannot lose that many digits: draw again
            board = filled_boards()[rng.integers(288)]
            givens = _dig(rng, board, GIVENS[self.level], self.unique)
        self.givens, self.goals = frozenset(givens), _agreeing(board, givens)  # (solutions, 16)
        self.solution = board.tolist()
        self.board = [digit if cell in self.givens else 0 for cell, digit in enumerate(self.solution)]
        self.paid, self.reason, self.blockers = [0.0] * 16, "", set()
        self.actions_left = self.max_actions
        return self._observe(), {"success": False, "valid": True, "reason": ""}

    def reseed(self, replica: int) -> None:
        """Other luck from here on: there is none."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Place a digit, if that is legal."""
        move = parse(action)
        self.reason, self.blockers = self._judge(*move) if move else ("unreadable", set())
        reward = 0.0
        if move:
            self.actions_left -= 1
            reward = -0.1 if self.reason else self._place(*move)
        solved = all(self.board)  # legal digits only ever fill a board to a solution
        truncated = not solved and self.actions_left == 0
        info = {"success": solved, "valid": move is not None, "reason": self.reason}
        return self._observe(), reward, solved, truncated, info

    def legal_actions(self) -> list[str]:
        """Every digit in every cell that is not given: a random player breaks the rules, too."""
        return [_write(cell, digit) for cell in range(16) for digit in range(1, 5) if cell not in self.givens]

    def best_actions(self) -> list[str]:
        """All legal moves that put a right digit; empty where wrong digits stand in the way of all of them."""
        goal = self.goals[(self.goals != self.board).sum(1).argmin()].tolist()  # the nearest solution
        wanted = [(cell, goal[cell]) for cell in range(16) if self.board[cell] != goal[cell]]
        return [_write(cell, digit) for cell, digit in wanted if digit in self._legal_digits(cell)]

    def solve(self, choose: Callable[[list[str]], str] = itemgetter(0)) -> list[str]:
        """Right digits from here for as long as one fits; `choose` makes a weaker player of it."""
        start, plan = self.board.copy(), []
        while len(plan) < self.actions_left and (best := self.best_actions()):
            plan.append(choose(best))
            row, column, digit = parse(plan[-1])
            if not self._judge(row, column, digit)[0]:
                self.board[_cell(row, column)] = digit
        self.board = start
        return plan

    def _judge(self, row: int, column: int, digit: int) -> tuple[str, set[int]]:
        """Why a move is illegal, "" if it is not, and the cells in its way."""
        if not all(1 <= number <= 4 for number in (row, column, digit)):
            return "out of range", set()
        cell = _cell(row, column)
        if cell in self.givens:
            return "given cell", set()
        blockers = {other for other in PEERS[cell] if self.board[other] == digit}
        houses = [name for name, house in HOUSES.items() if any(house[other] == house[cell] for other in blockers)]
        return f"digit conflicts with {', '.join(houses)}" if houses else "", blockers

    def _place(self, row: int, column: int, digit: int) -> float:
        """Put a legal digit; returns its reward."""
        cell = _cell(row, column)
        self.board[cell] = digit
        worth = 1.0 if digit == self.solution[cell] else 0.0 if self.unique else 0.5
        gained = max(0.0, worth - self.paid[cell])
        self.paid[cell] += gained
        return gained + 10.0 * all(self.board)

    def _legal_digits(self, cell: int) -> list[int]:
        taken = {self.board[other] for other in PEERS[cell]}
        return [digit for digit in range(1, 5) if digit not in taken and cell not in self.givens]

    def _observe(self) -> str:
        shown = [self._symbol(cell) for cell in range(16)]
        lines = [f"Last move: {self.reason}."] if self.reason else []
        lines += [" ".join(shown[i : i + 4]) for i in range(0, 16, 4)]
        blanks = [cell for cell in range(16) if not self.board[cell]]
        if self.hints and blanks:
            lines.append(f"Legal digits: {'; '.join(map(self._hint, blanks))}.")
        steps = self.max_actions - self.actions_left
        return "\n".join([*lines, f"Filled {16 - len(blanks)} of 16. Step {steps} of {self.max_actions}."])

    def _hint(self, cell: int) -> str:
        digits = " ".join(map(str, self._legal_digits(cell))) or "none"
        return f"{cell // 4 + 1},{cell % 4 + 1}: {digits}"

    def _symbol(self, cell: int) -> str:
        digit = self.board[cell]
        return f"*{digit}*" if cell in self.blockers else f"[{digit}]" if cell in self.givens else str(digit or ".")


def parse(action: str) -> tuple[int, int, int] | None:
    """Row, column and digit of "row,col,digit" or "place d at row r col c"; None for anything else."""
    match = MOVE.fullmatch(str(action).strip())
    if match is None:
        return None
    numbers = [int(number) for number in match.groups() if number]
    return tuple(numbers if match[1] else [*numbers[1:], numbers[0]])


@cache
def filled_boards() -> np.ndarray:
    """(288, 16): all that fill the board and break no rule."""
    rows = list(permutations(range(1, 5)))
    bands = [upper + lower for upper, lower in product(rows, rows) if len({*upper[:2], *lower[:2]}) == 4]
    boards = [top + bottom for top, bottom in product(bands, bands)
              if all(len({*top[i::4], *bottom[i::4]}) == 4 for i in range(4))]
    return np.array(boards)


def _dig(rng: np.random.Generator, board: np.ndarray, givens: int, unique: bool) -> list[int]:
    """The cells that keep their digit: blanks are dug in random order as long as the solution stays the only one."""
    kept = list(range(16))
    for cell in rng.permutation(16).tolist():
        fewer = [other for other in kept if other != cell]
        if len(kept) > givens and (not unique or len(_agreeing(board, fewer)) == 1):
            kept = fewer
    return kept


def _agreeing(board: np.ndarray, cells: Sequence[int]) -> np.ndarray:
    """(solutions, 16): the filled boards that are like `board` in `cells`."""
    return filled_boards()[(filled_boards()[:, cells] == board[cells]).all(1)]


def _cell(row: int, column: int) -> int:
    return 4 * (row - 1) + column - 1


def _write(cell: int, digit: int) -> str:
    return f"{cell // 4 + 1},{cell % 4 + 1},{digit}"
