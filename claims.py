"""The paper's claims about training, the rows of runs that test each of them, and the rule of the verdict.

    python experiments.py report     # writes results/claims.csv, and the table in results/README.md

A claim is about the paired differences of a first row of runs to a second one; of several games it is about the mean
of their mean differences, and its test has two rows a game. The rule is older than the runs at tuned learning rates.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import product
from typing import NamedTuple

import numpy as np

from tables import Run, compared, paired_difference, pooled_difference, real_pairs

ENOUGH = {"webshop": 3}  # pairs of seeds; 5 in all other games
AT_2E4, AT_4E4 = "-learning_rate0.0002", "-learning_rate0.0004"
LONG, LONG_AT_2E4 = "-max_steps100-eval_steps10", f"-max_steps100{AT_2E4}-eval_steps10"


class Claim(NamedTuple):
    """The sign that the difference of a measure should have, and its size in points where the paper gives one."""

    text: str
    paper: str
    measure: str
    sign: int
    points: float | None
    tests: dict[str, tuple[str, ...]]  # of each setting the names of two rows, or of two rows a game


def rows(start: str, focus: str = "", uniform: str = "") -> tuple[str, str]:
    """Names of runs with ActFocus and with uniform weights; the ends say what else they set."""
    return f"{start}-actfocus-seed?{focus}", f"{start}-uniform-seed?{uniform}"


def changed(game: str, what: str) -> tuple[str, str]:
    """Names of a game's runs with one thing of ActFocus changed, and without, both at its learning rate."""
    end = AT_2E4 if game == "frozenlake" else ""
    return f"{game}-grpo-actfocus-seed?-{what}{end}", f"{game}-grpo-actfocus-seed?{end}"


LAKE, BOX, SHOP = rows("frozenlake-grpo", AT_2E4), rows("sokoban-grpo", "", AT_2E4), rows("webshop-grpo")
LAKE_BETTER, BOX_BETTER = rows("frozenlake-grpo", AT_2E4, AT_2E4), rows("sokoban-grpo")
PPO_LAKE, PPO_BOX, PPO_SHOP = (
    rows("frozenlake-ppo", "", AT_4E4), rows("sokoban-ppo", "", AT_2E4), rows("webshop-ppo"))
PPO_LAKE_BETTER, PPO_BOX_BETTER = rows("frozenlake-ppo"), rows("sokoban-ppo")
LONG_RUNS = {"FrozenLake, 100 steps": rows("frozenlake-grpo", LONG_AT_2E4, LONG),
             "FrozenLake, 100 steps, both at 1e-4": rows("frozenlake-grpo", LONG, LONG),
             "FrozenLake, 100 steps, both at 2e-4": rows("frozenlake-grpo", LONG_AT_2E4, LONG_AT_2E4)}
CLAIMS = (
    Claim("ActFocus ends above uniform weights, GRPO", "mean gain +34.6", "final", +1, 34.6, {
        "FrozenLake": LAKE, "FrozenLake, uniform at 2e-4": LAKE_BETTER,
        "FrozenLake, slippery (0.8)": rows("frozenlake-grpo", f"{AT_2E4}-success_rate0.8", "-success_rate0.8"),
        **LONG_RUNS, "Sokoban": BOX, "Sokoban, uniform at 1e-4": BOX_BETTER, "Sudoku": rows("sudoku-grpo"),
        "WebShop": SHOP, "the three games": LAKE + BOX + SHOP,
        "the three games, uniform at the better rate tried": LAKE_BETTER + BOX_BETTER + SHOP}),
    Claim("ActFocus ends above uniform weights, PPO", "mean gain +17.0", "final", +1, 17.0, {
        "FrozenLake": PPO_LAKE, "FrozenLake, uniform at 1e-4": PPO_LAKE_BETTER, "Sokoban": PPO_BOX,
        "Sokoban, uniform at 1e-4": PPO_BOX_BETTER, "Sudoku": rows("sudoku-ppo"), "WebShop": PPO_SHOP,
        "the three games": PPO_LAKE + PPO_BOX + PPO_SHOP,
        "the three games, uniform at the better rate tried": PPO_LAKE_BETTER + PPO_BOX_BETTER + PPO_SHOP}),
    Claim("much less decay from peak to end, GRPO", "no number", "decay", -1, None, {
        "FrozenLake": LAKE, **LONG_RUNS, "Sokoban": BOX, "Sokoban, uniform at 1e-4": BOX_BETTER, "WebShop": SHOP}),
    Claim("α = 0 can collapse (against 0.1)", "no number", "final", -1, None, {
        "FrozenLake": changed("frozenlake", "alpha0.0"), "Sokoban": changed("sokoban", "alpha0.0")}),
    Claim("β = 0 ends below 0.5", "-7.0 (WebShop, 3 B, PPO)", "final", -1, -7.0, {
        "FrozenLake": changed("frozenlake", "beta0.0"), "Sokoban": changed("sokoban", "beta0.0"),
        "FrozenLake, the classes' ratio kept by α = 0.08": changed("frozenlake", "alpha0.08-beta0.0"),
        "Sokoban, the classes' ratio kept by α = 0.08": changed("sokoban", "alpha0.08-beta0.0")}),
    Claim("β = 1 ends above 0.5", "+3.1 (WebShop, 3 B, PPO)", "final", +1, 3.1, {
        "FrozenLake": changed("frozenlake", "beta1.0"), "Sokoban": changed("sokoban", "beta1.0")}),
    Claim("β = 2 ends below 0.5", "-11.3 (WebShop, 3 B, PPO)", "final", -1, -11.3, {
        "FrozenLake": changed("frozenlake", "beta2.0"), "Sokoban": changed("sokoban", "beta2.0")}),
    Claim("other signals end below energy", "no number", "final", -1, None, {
        f"{game}, {signal}": changed(game.lower(), f"signal{signal}")
        for game in ("FrozenLake", "Sokoban") for signal in ("entropy", "policy_nll", "logprob_shift")}),
)


def verdict(claim: Claim, intervals: Sequence[tuple[float, float]]) -> str:
    """The rule: both intervals on the claim's side of 0, on the other one, or both around 0 and without its number.

    Where the paper gives no number, intervals that lie within ±10 points say that there is nothing of this size.
    """
    sides = {np.sign(low) if low * high > 0 else 0 for low, high in intervals}
    if sides == {claim.sign}:
        return "holds"
    if sides == {-claim.sign}:
        return "fails"
    numbers = [claim.points / 100] if claim.points else [-0.1, 0.1]
    excluded = all(not low <= number <= high for low, high in intervals for number in numbers)
    return "not at this scale" if sides == {0} and excluded else "inconclusive"


def tested(runs: Sequence[Run]) -> list[dict]:
    """Every test of every claim, as a row of claims.csv."""
    return [{"claim": claim.text, "paper": claim.paper, "setting": setting, "measure": claim.measure,
             **result(claim, [[run for run in runs if fnmatchcase(run.name, name)] for name in names]),
             "command": "python experiments.py --compare " + " ".join(f'"{name}"' for name in names)}
            for claim in CLAIMS for setting, names in claim.tests.items()]


def result(claim: Claim, found: Sequence[Sequence[Run]]) -> dict:
    """Seeds, difference, intervals and verdict of one test."""
    by_game = [real_pairs(product(first, second)) for first, second in zip(found[::2], found[1::2], strict=True)]
    enough = all(pairs and len(pairs) >= ENOUGH.get(pairs[0][0].config.env, 5) for pairs in by_game)
    difference = dict.fromkeys(("mean", "low", "high", "student_low", "student_high", "above", "of"))
    if len(by_game) == 1 and by_game[0]:
        difference = paired_difference(*compared(by_game[0])[claim.measure])
    elif enough:
        difference = pooled_difference([np.subtract(*compared(pairs)[claim.measure]) for pairs in by_game])
    both = [(difference["low"], difference["high"]), (difference["student_low"], difference["student_high"])]
    tested = enough and (difference["low"], difference["high"]) != (0, 0)  # no seed differs: nothing to compare
    return {"seeds": ", ".join(" ".join(str(run.config.seed) for run, _ in pairs) or "none" for pairs in by_game),
            **difference, "verdict": verdict(claim, both) if tested else "not tested"}
