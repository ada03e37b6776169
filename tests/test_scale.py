"""docs/scale.md: every number of the plan follows from the formula beside it."""

import math
import re

import pytest
from conftest import ROOT

ROW = re.compile(r"^\| `(\w+)` \| (.+) \|$", re.M)
SIZES = ("0.5B", "3B", "7B", "72B")
HUB = {"0.5B": 494_032_768, "3B": 3_085_938_688, "7B": 7_615_616_512, "72B": 72_706_203_648}  # parameters, model cards


def plan():
    """Symbol → number, four numbers, or formula and four numbers; in the document's order."""
    text = (ROOT / "docs" / "scale.md").read_text().split("## A plan on paper")[1]
    return {name: [cell.strip("` ") for cell in cells.split(" | ")] for name, cells in ROW.findall(text)}


@pytest.mark.parametrize("column, size", list(enumerate(SIZES)))
def test_every_number_of_the_plan_is_its_formula(column, size):
    known = {"__builtins__": {}, "max": max, "ceil": math.ceil, "log2": math.log2}
    for name, cells in plan().items():
        if len(cells) == 2:
            known[name] = float(cells[0])
        elif len(cells) == 5:
            known[name] = float(cells[1 + column])
        else:
            known[name] = eval(cells[1], known)
            assert float(cells[2 + column]) == pytest.approx(known[name], rel=5e-3), (name, known[name])
    assert known["S"] == known["B"] * known["T"] and known["R"] == known["B"] * 5 * 400
    assert known["N"] * 1e9 == HUB[size]


def test_the_plan_s_measured_ratios_are_the_readme_s():
    readme = (ROOT / "README.md").read_text().split("### How fast\n")[1]
    for name, row in (("roll", "rollout / its bare forward passes, `brief`"), ("over", "update / bare forward")):
        assert f" {plan()[name][0]} [" in re.search(rf"^\| {row}.*$", readme, re.M)[0]
