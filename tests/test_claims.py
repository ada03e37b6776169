"""claims.py: the rule of the verdict, and that the claims rest on the rows that they name."""

import statistics
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import experiments
from claims import CLAIMS, Claim, result, verdict
from config import Config
from tables import Run, read_table

RESULTS = Path(__file__).parents[1] / "results"
GAIN, DECAY = (Claim("", "", "final", +1, 17.0, {}), Claim("", "", "decay", -1, None, {}))


def make_runs(weights, finals, env="frozenlake", first=0):
    """A row of runs that ended there."""
    return [Run(f"{env}-{weights}-{seed}", Config(env=env, weights=weights, seed=seed), {"model_sha256": "a"},
                [{"step": step, "success": success} for step, success in ((0, 0.25), (10, final))],
                [{"success": 0.5}], "") for seed, final in enumerate(finals, first)]


@pytest.mark.parametrize("claim, bootstrap, student, expected", [
    (GAIN, (0.01, 0.2), (0.001, 0.3), "holds"), (GAIN, (0.01, 0.2), (-0.01, 0.3), "inconclusive"),
    (GAIN, (-0.2, -0.1), (-0.3, -0.01), "fails"), (GAIN, (-0.2, -0.1), (-0.3, 0.01), "inconclusive"),
    (GAIN, (-0.1, 0.1), (-0.12, 0.16), "not at this scale"), (GAIN, (-0.1, 0.1), (-0.12, 0.18), "inconclusive"),
    (GAIN, (0.0, 0.1), (0.0, 0.1), "not at this scale"),  # 0 itself is on no side
    (DECAY, (-0.2, -0.1), (-0.3, -0.01), "holds"), (DECAY, (0.1, 0.2), (0.01, 0.3), "fails"),
    (DECAY, (-0.05, 0.05), (-0.09, 0.09), "not at this scale"), (DECAY, (-0.05, 0.05), (-0.09, 0.11), "inconclusive"),
    (DECAY, (-0.05, 0.05), (-0.11, 0.09), "inconclusive"),
])
def test_the_rule_of_the_verdict(claim, bootstrap, student, expected):
    assert verdict(claim, [bootstrap, student]) == expected


def test_a_claim_is_tested_with_five_pairs_of_webshop_three_and_games_only_together():
    finals, lower = [0.7, 0.8, 0.75, 0.7, 0.8], [0.5, 0.6, 0.5, 0.5, 0.55]
    five = [make_runs("actfocus", finals), make_runs("uniform", lower)]
    shop = [make_runs("actfocus", finals[:3], "webshop"), make_runs("uniform", lower[:3], "webshop")]
    for found in (five, shop):
        assert result(GAIN, found)["verdict"] == "holds"
    same = result(GAIN, [five[0], make_runs("uniform", finals)])
    assert same["verdict"] == "not tested" and same["mean"] == 0 and same["of"] == 5
    four = result(GAIN, [five[0][:4], five[1]])
    assert four["verdict"] == "not tested" and four["seeds"] == "0 1 2 3" and four["mean"] == pytest.approx(0.2125)
    both = result(GAIN, [*five, *shop])
    means = (0.2 + 0.2 + 0.25 + 0.2 + 0.25) / 5, (0.2 + 0.2 + 0.25) / 3
    assert both["mean"] == pytest.approx(statistics.mean(means)) and both["of"] == 2 and both["verdict"] == "holds"
    for found in ([*five, *(side[:2] for side in shop)], [*five, [], []], [[], []]):
        none = result(GAIN, found)
        assert none["verdict"] == "not tested" and none["mean"] is None
    assert none["seeds"] == "none"
    other = make_runs("uniform", lower, first=9)  # other seeds
    assert result(GAIN, [five[0], other])["seeds"] == "none"


def test_every_row_that_a_claim_names_is_in_a_grid():
    known = {experiments.name_of(run) for grid in experiments.grids().values() for run in grid.runs}
    for name in {name for claim in CLAIMS for names in claim.tests.values() for name in names}:
        assert any(fnmatchcase(run, name) for run in known), name


def test_a_game_alone_means_both_sides_at_their_tuned_rates():
    main = {experiments.name_of(run) for run in experiments.grids()["main"].runs}
    for claim, algo in zip(CLAIMS[:2], ("grpo", "ppo"), strict=True):
        for game in ("FrozenLake", "Sokoban", "Sudoku", "WebShop"):
            names = claim.tests[game]
            assert len(names) == 2 and {name for name in main if name.startswith(f"{game.lower()}-{algo}-")} == {
                name for name in main if fnmatchcase(name, names[0]) or fnmatchcase(name, names[1])}


def test_the_better_rate_is_better():
    final = {row["run"]: float(row["final"]) for row in read_table(RESULTS / "runs.csv")}

    def mean(name):
        return statistics.mean(value for run, value in final.items() if fnmatchcase(run, name))

    for claim in CLAIMS[:2]:
        tuned, better = (claim.tests[f"the three games{end}"][1::2]
                         for end in ("", ", uniform at the better rate tried"))
        for one, other in zip(tuned, better, strict=True):
            assert mean(other) >= mean(one)


def test_the_committed_verdicts_are_those_of_the_rule():
    rows = read_table(RESULTS / "claims.csv")
    assert len(rows) == sum(len(claim.tests) for claim in CLAIMS)
    by_text = {claim.text: claim for claim in CLAIMS}
    for row in rows:
        if row["verdict"] != "not tested":
            intervals = [tuple(float(row[f"{who}{end}"]) for end in ("low", "high")) for who in ("", "student_")]
            assert verdict(by_text[row["claim"]], intervals) == row["verdict"]
    assert {row["verdict"] for row in rows} <= {"holds", "fails", "not at this scale", "inconclusive", "not tested"}
