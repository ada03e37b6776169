"""The size that the code may have: files, functions, the heads of files, and what the first files may import."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for folder in (".", "contrib", "exercises") for path in (ROOT / folder).glob("*.py")
         if path.stem != "my_answer"}
BUDGET = {"actfocus.py": 200, "envs.py": 500}  # lines; 400 for all others
CLEAN = {"actfocus.py": {"re", "collections", "torch"}, "energy.py": {"numpy", "torch"}}


def bodies(text):
    """Lines of every function of a file without its head and docstring."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield node.name, body[-1].end_lineno - body[0].lineno + 1 if body else 0


def imports(text):
    """First names of all modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_a_file_keeps_its_budget_and_says_in_25_lines_what_it_is(name):
    head = ast.get_docstring(ast.parse(FILES[name])) or ""
    assert len(FILES[name].splitlines()) <= BUDGET.get(name, 400)
    assert 1 <= len(head.splitlines()) <= 25


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_longer_than_40_lines(name):
    assert {function: lines for function, lines in bodies(FILES[name]) if lines > 40} == {}


def test_half_of_the_functions_are_at_most_15_lines_long():
    assert statistics.median(lines for text in FILES.values() for _, lines in bodies(text)) <= 15


def test_the_idea_imports_torch_and_numpy_only_and_the_games_no_torch():
    for name, allowed in CLEAN.items():
        assert set(imports(FILES[name])) <= allowed
    for name in ("envs.py", "sudoku.py", "catalogue.py", "webshop.py"):
        assert not {"torch", "transformers"} & set(imports(FILES[name]))


def test_the_ruler_measures():
    text = 'def three(a):\n    """Doc,\n\n    more."""\n    a = 1\n\n    return a\n\n\ndef none():\n    """Doc."""\n'
    assert dict(bodies(text)) == {"three": 3, "none": 0}
    assert list(imports("import a.b, c\ndef f():\n    from d.e import g\n")) == ["a", "c", "d"]
