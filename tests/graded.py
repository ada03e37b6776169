"""The six functions of the exercises: the project's own, or those of exercises/NAME.py with ACTFOCUS_MODULE=NAME.

A test that grades says `graded.gae`; what merely helps a test comes from the project itself.
"""

import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable

import pytest

import actfocus
import energy

MODULE = os.environ.get("ACTFOCUS_MODULE")
EQUATIONS = {"classify_tokens": "classes", "token_energy": "eq4", "token_weights": "eq5", "policy_loss": "eq6",
             "gae": "eq12", "group_advantages": "eq3"}  # in the order of the exercises; both names work with -k


def _load():
    try:
        return importlib.import_module(MODULE)
    except Exception as error:
        raise pytest.UsageError(f"ACTFOCUS_MODULE={MODULE}: {type(error).__name__}: {error}") from None


def _find(name: str) -> Callable:
    own = energy.token_energy if name == "token_energy" else getattr(actfocus, name)
    if not MODULE:
        return own
    theirs = getattr(_load(), name, None)

    @functools.wraps(own)
    def call(*args, **options):
        try:
            if theirs is not None:
                return theirs(*args, **options)
        except NotImplementedError:
            pass
        pytest.fail(f"{name} is not written yet", pytrace=False)

    return call


classify_tokens, token_energy, token_weights, policy_loss, gae, group_advantages = map(_find, EQUATIONS)


def functions_of(item: pytest.Item) -> list[str]:
    """Which of the six a test grades."""
    return sorted(set(re.findall(r"\bgraded\.(\w+)", inspect.getsource(item.function))) & EQUATIONS.keys())


def verdict(name: str, items: list[pytest.Item], reports: dict[str, pytest.TestReport]) -> list[str]:
    """Lines on one function: right, not written yet, or what is wrong, what to look at and where the hints are."""
    hint = f"python exercises/hints.py {name} 1"
    seen = [(item, reports[item.nodeid]) for item in items if item.nodeid in reports]
    wrong = [(item, report) for item, report in seen if not report.passed]
    if not wrong:
        return [f"{name:16} right, {len(seen)} tests" if len(seen) == len(items) else
                f"{name:16} right in {len(seen)} of {len(items)} tests, the others did not run"]
    item, report = wrong[0]
    message = report.longrepr.reprcrash.message.splitlines()[0] if hasattr(report.longrepr, "reprcrash") else ""
    if "is not written yet" in str(report.longrepr):
        return [f"{name:16} not written yet; {hint}"]
    sentence = item.function.__name__.removeprefix("test_").replace("_", " ")
    lines = [f"{name:16} wrong in {len(wrong)} of {len(seen)} tests, first in: {sentence}"]
    lines += [f"{'':16} {message}"] if message and not message.startswith("AssertionError") else []
    advice = dict.fromkeys(item.function.__doc__ for item, _ in wrong if item.function.__doc__)
    return [*lines, *(f"{'':16} {line}" for line in [*advice][:3]), f"{'':16} {hint}"]
