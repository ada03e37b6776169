"""The README's tables cannot drift from the code, and the checks that say so fail where a table is broken."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

import energy
import train
from config import ALGOS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")}
EQUATION_FILES = ("actfocus", "energy", "baselines", "metrics")
# How the first line of a docstring names the equation that a function computes; `metrics.clipped` mentions one only.
NAMES_EQUATION = re.compile(r"(\(\d+\)|StarPO-S|DAPO|CARL|POAD|POAD paper)\.$|𝓣_act|Figures \d")


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the section's first table."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.M).group().splitlines()[2:]  # without the header and its rule
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def check_equation_map(text: str) -> None:
    """Functions exist and name their equation first, tests call them, and none that names one is left out."""
    mapped = set()
    for equation, _, function, test in rows(text, "Equation map"):
        module, name = function.strip("`").split(".")
        code = getattr(importlib.import_module(module), name, None)
        assert code, f"{function} does not exist"
        first_line = code.__doc__.splitlines()[0]
        for term in re.findall(r"[^\s,]+", equation.replace("Figures 1-2", "Figures 1 and 2").removeprefix("Eq. ")):
            assert re.search(rf"(?<!\w){re.escape(term)}(?!\w)", first_line), f"{function} does not name {equation}"
        path = ROOT / test.strip("`")
        assert path.is_file() and f"{name}(" in path.read_text(encoding="utf-8"), f"{test} does not test {function}"
        mapped.add(f"{module}.{name}")
    named = {f"{module}.{node.name}" for module in EQUATION_FILES for node in MODULES[module].body
             if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
             and NAMES_EQUATION.search((ast.get_docstring(node) or "").split("\n")[0])}
    assert not named - mapped, f"not in the equation map: {named - mapped}"


def check_glossary(text: str, keys: set[str]) -> None:
    """A row for every key of metrics.jsonl and no others."""
    assert {key for row in rows(text, "Metric glossary") for key in re.findall(r"`(\w+)`", row[0])} == keys


def check_names(text: str) -> None:
    """Every name in code occurs there as a name, not only in a comment."""
    known = {getattr(node, kind) for tree in MODULES.values() for node in ast.walk(tree)
             for kind in ("id", "arg", "attr") if hasattr(node, kind)}
    assert rows(text, "Names")
    for _, code, *_ in rows(text, "Names"):
        names = re.findall(r"`(?:--)?(\w+)`", code)
        assert names and not set(names) - known, f"{set(names) - known} of {code}"


def check_reading_guide(text: str) -> None:
    """The lines of every file; and a file imports none that comes after it, but where the text says so."""
    table = rows(text, "Reading guide")
    counted = {row[0].strip("`"): int(row[1]) for row in table}
    assert counted == {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("*.py")}
    assert f"{sum(counted.values()):,} in all" in text
    core = re.search(r"([\d,]+) of them are the method: ((?:`\w+\.py`[\s,]*(?:and )?)+);", text)
    assert core and f"{sum(counted[name] for name in re.findall(r'`(.+?)`', core[2])):,}" == core[1]
    read = {"sudoku", "webshop"}  # the text says so
    for name in (name.removesuffix(".py") for name in counted):
        imported = {alias.name for node in MODULES[name].body if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in MODULES[name].body if isinstance(node, ast.ImportFrom)}
        assert imported & MODULES.keys() <= read, f"{name}.py comes before {imported & MODULES.keys() - read}"
        read.add(name)


def check_rivals(text: str) -> None:
    """A row for every method."""
    assert [row[0].strip("`") for row in rows(text, "The rivals")] == [*ALGOS]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Those of metrics.jsonl."""
    run = tmp_path_factory.mktemp("readme") / "run"
    small = ["--preset", "smoke", "--max_steps", "1", "--max_turns", "1", "--eval_prompts", "1", "--eval_samples", "1"]
    assert train.main([*small, "--output_dir", str(run)]) == 0
    return set(train.checkpoint.read_lines(run / "metrics.jsonl")[0])


def run_check(check, text, keys):
    check(text, *([keys] if check is check_glossary else []))


CHECKS = [check_equation_map, check_glossary, check_names, check_reading_guide, check_rivals]
BREAKS = {  # what to look for (a regular expression) and what to put there
    check_equation_map: [
        (r"^.*`energy.token_energy`.*\n", ""),
        (r"^.*`actfocus.classify_tokens`.*\n", ""),
        (r"^.*`baselines.filter_groups`.*\n", ""),
        ("`energy.token_energy`", "`energy.tokens_energy`"),
        (r"\| Eq. \(4\) \|", "| Eq. (5) |"),
        (r"\| Eq. \(6\) \|", "| Eq. (7) |"),  # its docstring speaks of Eq. (7), too
        (r"\| DAPO \(13\) \|", "| DAPO (12) |"),
        ("`actfocus.policy_loss`", "`actfocus.token_weights`"),
        (r"(`energy.token_energy` \| `tests/test_)energy", r"\1envs"),
        (r"(`energy.token_energy` \| `tests/test_)energy", r"\1nothing"),
    ],
    check_glossary: [(r"^\| `turns` .*\n", ""), ("`kl_ref`", "`kl_reference`"), (r"^\| `step` ", "| `epoch`, `step` "),
                     (r"`tokens_reasoning`, ", "")],
    check_names: [("`old_logp`", "`logp_old`"), (r"`--num_generations`\)", "`--group_size_of_all`)"),
                  ("`advantages`, `ratio`, `energy`, `weights`", "advantages")],
    check_reading_guide: [(r"(^\| `energy.py` \| \d+)", r"\g<1>0"), (r"^\| `metrics.py` .*\n", ""),
                          (r"\d in all", "x in all"), (r"\d of them are", "x of them are"),
                          (r"(^\| `actfocus.py` .*\n)((?:\|.*\n)+)", r"\2\1")],  # the first one last
    check_rivals: [(r"^\| `ntpo` .*\n", ""), (r"^\| `ntpo` ", "| `nptx` ")],
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_table_agrees_with_the_code(check, keys):
    run_check(check, README, keys)


@pytest.mark.parametrize("check, pattern, replacement", [(check, *pair) for check in CHECKS for pair in BREAKS[check]])
def test_a_broken_table_is_noticed(check, pattern, replacement, keys):
    broken = re.sub(pattern, replacement, README, count=1, flags=re.M)
    assert broken != README
    with pytest.raises(AssertionError):
        run_check(check, broken, keys)


def test_a_function_that_does_not_name_its_equation_any_more_is_noticed(monkeypatch):
    monkeypatch.setattr(energy.token_energy, "__doc__", energy.token_energy.__doc__.replace("Eq. (4)", "Energy"))
    with pytest.raises(AssertionError, match="does not name"):
        check_equation_map(README)


def test_a_new_metric_without_a_row_is_noticed(keys):
    with pytest.raises(AssertionError):
        check_glossary(README, keys | {"new_metric"})


def test_the_three_calls_for_a_loop_of_ones_own_run_as_they_are_printed():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    texts = ["<think>", "ice", "</think>", "<answer>", "Down", "</answer>"]
    logp = torch.randn(1, 6, requires_grad=True)
    mine = {"pieces": texts, "reference_logits": torch.randn(1, 6, 9), "logp": logp, "old_logp": logp.detach(),
            "advantages": torch.ones(1)}
    one_response, rest = code.split("energy = ")
    exec(one_response, mine)
    mine |= {name: mine[name][None] for name in ("is_reasoning", "is_action")}  # a batch of one
    exec("energy = " + rest, mine)
    mine["loss"].backward()
    assert mine["weights"].tolist() == [pytest.approx([0.1] * 4 + [1.25, 0.1])]  # one action token: its own mean
    assert logp.grad.tolist() == [pytest.approx([-0.1 / 1.75] * 4 + [-1.25 / 1.75, -0.1 / 1.75])]
