"""The README's equation map and glossary cannot drift from the code."""

import importlib
import re
from pathlib import Path

import experiments
import tables
import train

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def _rows(heading: str) -> list[list[str]]:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]  # without the header and its rule
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_row_of_the_equation_map_names_a_function_its_equation_and_an_existing_test():
    rows = _rows("Equation map")
    assert len(rows) >= 10
    for equation, _, function, test in rows:
        module, name = function.strip("`").split(".")
        docstring = getattr(importlib.import_module(module), name).__doc__ or importlib.import_module(module).__doc__
        if equation.startswith(("Eq.", "Figures")):
            number = equation.split()[1]
            whole = docstring + (importlib.import_module(module).__doc__ or "")
            assert number in whole, f"{function} does not name {equation}"
        text = (Path(__file__).parent.parent / test.strip("`")).read_text(encoding="utf-8")
        assert name in text, f"{test} does not test {function}"


def test_the_glossary_has_exactly_the_keys_of_metrics_jsonl(tmp_path):
    keys = {key for row in _rows("Metric glossary") for key in re.findall(r"`(\w+)`", row[0])}
    run = tmp_path / "run"
    arguments = ["--preset", "smoke", "--max_steps", "1", "--eval_prompts", "1", "--eval_samples", "1"]
    assert train.main([*arguments, "--output_dir", str(run)]) == 0
    line = train.checkpoint.read_lines(run / "metrics.jsonl")[0]
    assert keys == set(line)


def test_the_reading_guide_counts_the_lines_of_every_file():
    counted = {row[0].strip("`"): int(row[1]) for row in _rows("Reading guide")}
    files = Path(__file__).parent.parent.glob("*.py")
    assert counted == {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}


def test_the_results_are_those_of_the_committed_runs():
    results = Path(__file__).parent.parent / "results"
    runs = [tables.read_run(folder) for folder in sorted((results / "runs").iterdir())]
    names = {experiments.name_of(run) for run in experiments.grids()["main"].runs}
    runs = [run for run in runs if run.name in names]
    table = README.split("## Results\n")[1].split("\n\n")[1]
    assert table.strip().splitlines()[2:] == tables.result_rows(runs)
    assert (results / "evaluations.csv").read_text().count("\n") > 3 * len(runs)
