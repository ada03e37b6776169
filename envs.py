"""The games, and the turn protocol that puts them to a language model.

Section 5.1 and the appendix of the paper (arXiv:2605.14558v1): SimpleSokoban, CoordFrozenLake; Sudoku and
WebShop have their own files.
An environment is text in, text out: `reset(seed) -> (observation, info)` and Gymnasium's five-tuple
`step(action) -> (observation, reward, terminated, truncated, info)`, one action a step, whatever its case and outer
white space. `info["success"]`: the task is done; `info["valid"]`: the action was understood. `moves` tells the model
how actions are written, `legal_actions()` lists those of the moment. Every random draw comes from generators seeded
by `reset(seed, replica)`: the seed fixes the level, the replica only the luck in it (slips), so the G rollouts of one
prompt share a level and not their luck. `Episode` adds the turns: several actions an answer, budgets, rewards as
text, the format penalty. No torch here.

    python envs.py --env sokoban --seed 3        # play it yourself; ? asks the oracle

Differs from the paper: the wording of the prompts is ours; so is `brief`, the short style the tiny model reads.
"""

import argparse
import copy
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

from sudoku import Sudoku
from webshop import WebShop

STEPS = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}  # (row, column) of every move
FORMAT = "<think>your reasoning</think><answer>your actions</answer>"

Cell = tuple[int, int]
Room = tuple[Cell, frozenset[Cell]]  # Sokoban's state: player, boxes
Choice = Callable[[list[str]], str]  # picks a move, given the best ones


class Sokoban:
    """Push every box onto a target: size × size room, always solvable.

    Reward per action: -0.1; +1 when a box comes onto a target, -1 when it leaves one, +10 when all are on.
    Solved in n moves without leaving a target, one box: 11 - 0.1 n.
    """

    actions = tuple(STEPS)
    moves = ", ".join(actions)
    max_turns, actions_per_turn, max_actions = 5, 2, 10
    task = (
        "You are solving a Sokoban puzzle: push every box onto a target. You push a box by walking into it; you "
        "cannot pull, and a box stops at a wall or at another box.\n"
        "Symbols: # wall, _ floor, O target, √ box on target, X box, P player, S player on target.\n"
        "Every move costs 0.1; a box on a target earns 1, off it again loses 1; solving the puzzle earns 10."
    )
    brief = "Sokoban: push X onto O."

    def __init__(self, size: int = 6, boxes: int = 1, coordinates: bool = False):
        if size < 5 or not 1 <= boxes <= 2:
            raise ValueError(f"sokoban needs size >= 5 and boxes 1 or 2, got size {size} and boxes {boxes}")
        self.size, self.boxes, self.coordinates = size, boxes, coordinates

    def reset(self, seed: int, replica: int = 0) -> tuple[str, dict]:
        """Draw the seed's room. Nothing in Sokoban is left to luck, so the replica changes nothing."""
        rng = np.random.default_rng(seed)
        self.state = None
        while self.state is None:  # a carved floor may leave no box movable: draw again
            self.floor = _carve_floor(rng, self.size)
            self.targets, self.state = _pull_boxes(rng, self.floor, self.boxes)
        self.actions_left = self.max_actions
        starts = [(cell, self.targets) for cell in self.floor - self.targets]
        self.distance = _search_pulls(self.floor, starts)  # state → moves to the solution
        return self._observe(), {"success": False, "valid": True}

    def reseed(self, replica: int) -> None:
        """Other luck from here on: there is none."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Walk or push one cell; into a wall nothing moves but the action is spent."""
        action = _named(action, self.actions)
        if action is None:
            return self._observe(), 0.0, False, False, {"success": False, "valid": False}
        on_before = len(self.state[1] & self.targets)
        self.state = self._move(self.state, action)
        on_after = len(self.state[1] & self.targets)
        solved = on_after == self.boxes
        self.actions_left -= 1
        reward = -0.1 + (on_after - on_before) + 10.0 * solved
        truncated = not solved and self.actions_left == 0
        return self._observe(), reward, solved, truncated, {"success": solved, "valid": True}

    def legal_actions(self) -> list[str]:
        """All four moves, into a wall too."""
        return list(self.actions)

    def best_actions(self) -> list[str]:
        """All first moves of shortest solutions; empty where the room can no longer be solved."""
        closer = self.distance.get(self.state, 0) - 1
        return [a for a in self.actions if self.distance.get(self._move(self.state, a)) == closer]

    def solve(self, choose: Choice = itemgetter(0)) -> list[str]:
        """A shortest solution from here, empty if there is none; `choose` makes a weaker player of it."""
        start, plan = self.state, []
        while len(plan) < 100 and (best := self.best_actions()):
            plan.append(choose(best))
            self.state = self._move(self.state, plan[-1])
        self.state = start
        return plan

    def _move(self, state: Room, action: str) -> Room:
        (player, boxes), step = state, STEPS[action]
        ahead = _add(player, step)
        if ahead not in self.floor:
            return state
        if ahead in boxes:
            beyond = _add(ahead, step)
            if beyond not in self.floor or beyond in boxes:
                return state
            boxes = boxes - {ahead} | {beyond}
        return ahead, boxes

    def _observe(self) -> str:
        player, boxes = self.state
        grid = _draw(self.size, "#", {cell: "_" for cell in self.floor}, dict.fromkeys(self.targets, "O"),
                     {cell: "√" if cell in self.targets else "X" for cell in boxes},
                     {player: "S" if player in self.targets else "P"})
        if not self.coordinates:
            return grid
        return f"Player {player}. Box {_cells(boxes)}. Target {_cells(self.targets)}.\n{grid}"


def _carve_floor(rng: np.random.Generator, size: int, steps: int = 20, turn: float = 0.35) -> frozenset[Cell]:
    """Cells of a random walk inside the outer wall; it turns with probability `turn` and clears three cells a step."""
    row, column = (int(i) for i in rng.integers(1, size - 1, 2))
    moves, floor = list(STEPS.values()), set()
    direction = rng.integers(4)
    for _ in range(steps):
        if rng.random() < turn:
            direction = rng.integers(4)
        row, column = (min(max(i, 1), size - 2) for i in _add((row, column), moves[direction]))
        across = moves[rng.integers(4)]
        floor |= {_add((row, column), across, i) for i in (-1, 0, 1)}
    return frozenset(cell for cell in floor if min(cell) > 0 and max(cell) < size - 1)


def _pull_boxes(rng: np.random.Generator, floor: frozenset[Cell], boxes: int) -> tuple[frozenset[Cell], Room | None]:
    """Reverse play: boxes start on their targets, and a reachable state of largest displacement wins.

    Among ties one within two moves of the nearest is drawn: that gives the usual generator's mean optimum of 4.1.
    """
    if len(floor) < boxes + 2:
        return frozenset(), None
    cells = sorted(floor)
    player, *placed = (cells[i] for i in rng.permutation(len(cells))[: boxes + 1])
    targets = frozenset(placed)
    distance = _search_pulls(floor, [(player, targets)])

    def displacement(state: Room) -> int:
        return sum(min(abs(r - tr) + abs(c - tc) for tr, tc in targets) for r, c in state[1])

    farthest = max(map(displacement, distance))
    ties = [state for state in distance if displacement(state) == farthest]
    near = [state for state in ties if distance[state] <= distance[ties[0]] + 2]
    room = near[rng.integers(len(near))]
    return targets, None if room[1] & targets else room


def _search_pulls(floor: frozenset[Cell], starts: Iterable[Room]) -> dict[Room, int]:
    """Breadth-first search backwards in time, from `starts` over walks and pulls: state → number of moves."""
    distance = dict.fromkeys(starts, 0)
    queue = deque(distance)
    while queue:
        player, boxes = state = queue.popleft()
        for step in STEPS.values():
            back, front = _add(player, step, -1), _add(player, step)
            if back not in floor or back in boxes:
                continue
            before = [(back, boxes)] + ([(back, boxes - {front} | {player})] if front in boxes else [])
            for earlier in before:
                if earlier not in distance:
                    distance[earlier] = distance[state] + 1
                    queue.append(earlier)
    return distance


class FrozenLake:
    """Walk from a random start to a random goal over ice; a hole ends the episode. Gymnasium is the engine.

    The intended move succeeds with `success_rate`, else one of the two perpendicular ones happens.
    Reward: 1 at the goal, 0 elsewhere. Every other cell is ice with probability `frozen`.
    """

    actions = ("Left", "Down", "Right", "Up")  # Gymnasium's order
    moves = ", ".join(actions)
    max_turns, actions_per_turn, max_actions = 5, 2, 10
    task = (
        "You are crossing a frozen lake: reach the goal and do not step into a hole. On slippery ice a move may "
        "carry you sideways instead.\n"
        "Symbols: P player, _ ice, O hole, G goal, X player in a hole, √ player on the goal.\n"
        "Reaching the goal earns 1, everything else 0."
    )
    brief = "FrozenLake: reach G, not O."

    def __init__(self, size: int = 4, frozen: float = 0.8, success_rate: float = 1.0):
        if size < 2 or not 0 <= frozen <= 1 or not 0 < success_rate <= 1:
            raise ValueError(
                f"frozenlake needs size >= 2, frozen in [0, 1] and success_rate in (0, 1], got {size}, {frozen}, "
                f"{success_rate}"
            )
        self.size, self.frozen, self.success_rate = size, frozen, success_rate

    def reset(self, seed: int, replica: int = 0) -> tuple[str, dict]:
        """The seed draws the map, seed and replica together the slips."""
        rng = np.random.default_rng(seed)
        cells = [(row, column) for row in range(self.size) for column in range(self.size)]
        while True:
            self.start, self.goal = (cells[i] for i in rng.permutation(len(cells))[:2])
            holes = {cell for cell in cells if rng.random() > self.frozen}
            self.holes = frozenset(holes - {self.start, self.goal})
            if self._goal_is_reachable():
                break
        letters = _draw(self.size, "F", dict.fromkeys(self.holes, "H"), {self.start: "S", self.goal: "G"})
        self.lake = FrozenLakeEnv(desc=letters.split("\n"), is_slippery=self.success_rate < 1,
                                  success_rate=self.success_rate)
        self.lake.reset(seed=int(np.random.SeedSequence([seed, replica]).generate_state(1)[0]))
        self.seed, self.player, self.actions_left, self.values = seed, self.start, self.max_actions, None
        return self._observe(), {"success": False, "valid": True}

    def reseed(self, replica: int) -> None:
        """Other luck from here on."""
        self.lake.np_random = np.random.default_rng([self.seed, replica, self.actions_left])

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        """Slide one cell, perhaps not the intended one."""
        action = _named(action, self.actions)
        if action is None:
            return self._observe(), 0.0, False, False, {"success": False, "valid": False}
        index, reward, terminated, *_ = self.lake.step(self.actions.index(action))
        self.player = divmod(int(index), self.size)
        self.actions_left -= 1
        truncated = not terminated and self.actions_left == 0
        return self._observe(), float(reward), terminated, truncated, {"success": reward > 0, "valid": True}

    def legal_actions(self) -> list[str]:
        """All four moves, off the edge too."""
        return list(self.actions)

    def best_actions(self) -> list[str]:
        """All actions that are best with the actions left: finite-horizon value iteration, 0.99 a step."""
        if self.values is None:
            self.values = self._action_values()
        q = self.values[min(self.actions_left, len(self.values) - 1), self.player[0] * self.size + self.player[1]]
        return [a for a, value in zip(self.actions, q, strict=True) if q.max() > 0 and value > q.max() - 1e-9]

    def solve(self, choose: Choice = itemgetter(0)) -> list[str]:
        """Best actions from here as long as every move goes where it was meant to; `choose` as in Sokoban."""
        start, left, plan = self.player, self.actions_left, []
        self.actions_left = min(left, self._horizon())
        while self.player not in self.holes | {self.goal} and self.actions_left and (best := self.best_actions()):
            plan.append(choose(best))
            row, column = _add(self.player, STEPS[plan[-1]])
            self.player = min(max(row, 0), self.size - 1), min(max(column, 0), self.size - 1)
            self.actions_left -= 1
        self.player, self.actions_left = start, left
        return plan

    def _action_values(self) -> np.ndarray:
        """q[actions left, state, action] from Gymnasium's transition table."""
        q = np.zeros((self._horizon() + 1, self.size**2, 4))
        for left in range(1, len(q)):
            future = 0.99 * q[left - 1].max(1)
            for state, by_action in self.lake.P.items():
                for action, outcomes in by_action.items():
                    q[left, state, action] = sum(p * (r + future[s] * (not end)) for p, s, r, end in outcomes)
        return q

    def _horizon(self) -> int:
        """How many actions the oracle looks ahead; with more than 1,000 the first ones would be the same."""
        return min(self.max_actions, 1000)

    def _goal_is_reachable(self) -> bool:
        seen, queue = {self.start}, [self.start]
        while queue:
            here = queue.pop()
            for cell in (_add(here, step) for step in STEPS.values()):
                if min(cell) >= 0 and max(cell) < self.size and cell not in self.holes | seen:
                    seen.add(cell)
                    queue.append(cell)
        return self.goal in seen

    def _observe(self) -> str:
        player = "X" if self.player in self.holes else "√" if self.player == self.goal else "P"
        grid = _draw(self.size, "_", dict.fromkeys(self.holes, "O"), {self.goal: "G"}, {self.player: player})
        return (f"Board {self.size}x{self.size}. Start {self.start}. Goal {self.goal}. Player {self.player}. "
                f"Holes {_cells(self.holes)}.\n{grid}")


def _named(action: str, names: Iterable[str]) -> str | None:
    """The name that is meant, without regard to case and outer white space."""
    return next((name for name in names if name.lower() == str(action).strip().lower()), None)


def _add(cell: Cell, step: Cell, times: int = 1) -> Cell:
    return cell[0] + times * step[0], cell[1] + times * step[1]


def _draw(size: int, background: str, *layers: dict[Cell, str]) -> str:
    """Square grid of characters, later layers over earlier ones, rows joined by newlines."""
    painted = {cell: symbol for layer in layers for cell, symbol in layer.items()}
    return "\n".join("".join(painted.get((r, c), background) for c in range(size)) for r in range(size))


def _cells(cells: Iterable[Cell]) -> str:
    return " ".join(str(cell) for cell in sorted(cells)) or "none"


BUDGETS = ("max_turns", "actions_per_turn", "max_actions")  # of an environment; a run may set its own
ENVS = {"sokoban": Sokoban, "frozenlake": FrozenLake, "sudoku": Sudoku, "webshop": WebShop}
Env = Sokoban | FrozenLake | Sudoku | WebShop


def make_env(name: str, **options) -> Env:
    """An environment by name with its own options, e.g. make_env("frozenlake", success_rate=0.8)."""
    if name not in ENVS:
        raise ValueError(f"unknown env {name!r}: choose from {', '.join(ENVS)}")
    return ENVS[name](**options)


@dataclass
class Episode:
    """One trajectory seen from the environment's side: K turns, one answer each.

    The answer is split at `||`; at most `actions_per_turn` parts are kept; each runs until the episode ends. A turn
    without the response structure (answer None) or without any valid action moves nothing and costs `format_penalty`,
    which the return counts and the model is not shown.
    """

    env: Env
    seed: int
    replica: int = 0
    style: str = "paper"
    format_penalty: float = 0.1
    reseeds: dict[int, int] = field(default_factory=dict)  # turn → replica whose luck holds from there on
    answers: list[str | None] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)  # r_k of every turn, penalty included
    invalid_turns: int = 0
    done: bool = False
    success: bool = False
    purchased: bool | None = None  # WebShop: whether anything was bought

    def __post_init__(self):
        if self.style not in ("brief", "paper"):
            raise ValueError(f"unknown prompt style {self.style!r}: choose from brief, paper")
        self.observation, info = self.env.reset(self.seed, self.replica)
        self.purchased = info.get("purchased")

    @property
    def return_(self) -> float:
        """R(τ), the sum of the turns' rewards."""
        return sum(self.rewards)

    def system(self) -> str:
        """What the model is told once, before the first turn."""
        env = self.env
        if self.style == "brief":
            return f"{env.brief} Moves: {env.moves}."
        n = env.actions_per_turn
        put = "one into an answer" if n == 1 else f"up to {n} into one answer, separated by ||"
        return (f"{env.task}\nActions: {env.moves}. Put {put}. You have {env.max_turns} turns and {env.max_actions} "
                f"actions in all.\nAnswer as {FORMAT}")

    def user(self, reward: float | None = None) -> str:
        """The turn's user message: last turn's reward, observation, actions left, required format."""
        turn, left = len(self.rewards) + 1, self.env.actions_left
        shown = "" if reward is None else f"Reward: {reward:.1f}\n"
        if self.style == "brief":
            return f"{shown}Turn {turn}: {left} left.\n{self.observation}"
        return (f"{shown}Turn {turn}:\nState:\n{self.observation}\nYou have {left} actions left. "
                f"Answer with nothing but {FORMAT}")

    def act(self, answer: str | None) -> str | None:
        """Run one turn's answer; returns the next user message, or None when the episode is over."""
        if self.done:
            raise RuntimeError("act() after the end of the episode")
        if len(self.rewards) in self.reseeds:
            self.env.reseed(self.reseeds[len(self.rewards)])
        self.answers.append(answer)
        parts = [part.strip() for part in (answer or "").split("||") if part.strip()]
        reward, valid = 0.0, False
        for part in parts[: self.env.actions_per_turn]:
            self.observation, gained, terminated, truncated, info = self.env.step(part)
            reward, valid = reward + gained, valid or info["valid"]
            self.success, self.purchased = info["success"], info.get("purchased")
            self.done = terminated or truncated
            if self.done:
                break
        self.invalid_turns += not valid
        self.rewards.append(reward - self.format_penalty * (not valid))
        self.done = self.done or len(self.rewards) == self.env.max_turns
        return None if self.done else self.user(reward)

    def fork(self, turn: int, replica: int) -> "Episode":
        """A copy that stands before `turn` (0 is the first) and has its own luck from there on; this one stays."""
        reseeds = {k: luck for k, luck in self.reseeds.items() if k < turn} | {turn: replica}
        fork = Episode(copy.copy(self.env), self.seed, self.replica, self.style, self.format_penalty, reseeds)
        for answer in self.answers[:turn]:  # the level and its luck are functions of the seeds, so history repeats
            fork.act(answer)
        return fork


Player = Callable[[Env, np.random.Generator], list[str]]  # the actions of one turn


def random_player(env: Env, rng: np.random.Generator) -> list[str]:
    """The floor: uniformly random legal actions, each drawn from those of the turn's beginning."""
    return [str(rng.choice(env.legal_actions())) for _ in range(env.actions_per_turn)]


def oracle_player(env: Env, rng: np.random.Generator) -> list[str]:
    """The ceiling: the solver's plan, looked up anew every turn."""
    return env.solve()[: env.actions_per_turn] or env.legal_actions()[:1]


def play(env: Env, player: Player, seeds: Iterable[int], replica: int = 0) -> list[Episode]:
    """Scripted episodes on the levels of `seeds`, one each."""
    episodes = []
    for seed in seeds:
        episode, rng = Episode(env, seed, replica), np.random.default_rng([seed, replica, 1])
        while not episode.done:
            episode.act(" || ".join(player(env, rng)))
        episodes.append(episode)
    return episodes


def main() -> None:
    """Play an environment in the terminal."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Play an environment; ? asks the oracle.")
    parser.add_argument("--env", choices=list(ENVS), default="frozenlake")
    parser.add_argument("--seed", type=int, default=0, help="level")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: levels have numbers from 0 on")
    episode = Episode(make_env(args.env), args.seed)
    print(episode.system(), episode.user(), sep="\n\n")
    while not episode.done:
        try:
            answer = input("your actions> ")
        except EOFError:
            break
        if answer.strip() == "?":
            print("oracle:", next(iter(episode.env.solve()), "no way left"))
        else:
            invalid, message = episode.invalid_turns, episode.act(answer)
            if episode.invalid_turns > invalid:
                print(f"No action understood: the turn is spent and costs {episode.format_penalty}.")
            print(message or "")
    print(episode.observation, f"return {episode.return_:.1f}, success {episode.success}", sep="\n")


if __name__ == "__main__":
    main()
