"""Puts the repository root on the path, so that `pytest` finds what `python -m pytest` finds; grades the exercises."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]
torch.set_num_threads(1)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers that tests expect are those of a CPU, also where there is a GPU
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is refused at once, network or not,
os.environ["HF_HUB_CACHE"] = os.devnull  # and also where the machine has that model

selected: dict[str, list[pytest.Item]] = {}  # function of the exercises → the tests that grade it
reports: dict[str, pytest.TestReport] = {}
if os.environ.get("ACTFOCUS_MODULE"):  # somebody's own answers: only what grades them is of interest
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}
    collect_ignore = [name for name, text in texts.items() if "import graded" not in text]


def pytest_configure():
    """Load the answers first, so that a mistake in their file is one line; a cluster's own ranks reach no test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # Careful: the ranks that a test starts import this file too
        os.environ.pop(name, None)
    import graded  # noqa: F401


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """`-k gae` and `-k eq12` find the tests that grade gae; with ACTFOCUS_MODULE no others run."""
    import graded

    grades = {item: graded.functions_of(item) for item in items if hasattr(item.module, "graded")}
    for item, names in grades.items():
        item.extra_keyword_matches.update(names, [graded.EQUATIONS[name] for name in names])
    if graded.MODULE:
        config.hook.pytest_deselected(items=[item for item in items if not grades.get(item)])
        items[:] = [item for item in items if grades.get(item)]


def pytest_collection_finish(session):
    """What is left after -k."""
    import graded

    if graded.MODULE:
        for name in graded.EQUATIONS:
            if chosen := [item for item in session.items if name in item.extra_keyword_matches]:
                selected[name] = chosen


def pytest_runtest_logreport(report):
    """Keep the outcome of every test itself."""
    if selected and report.when == "call":
        reports[report.nodeid] = report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """A verdict on each function of the exercises, below everything else."""
    import graded

    result = yield
    if selected:
        terminalreporter.section(f"answers of {graded.MODULE}")
        for name, items in selected.items():
            terminalreporter.write_line("\n".join(graded.verdict(name, items, reports)))
    return result
