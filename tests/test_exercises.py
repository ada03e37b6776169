"""exercises/: the grader tells right from wrong for all six functions, and every bug of the hunt is caught."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forked import copy_of_the_project, run_all

from config import parse

ROOT = Path(__file__).parents[1]
EXERCISES = ROOT / "exercises"
BUGS = dict(re.findall(r"^\| (bug\d) \|.*\| `(tests/\S+)` \|$", (EXERCISES / "bugs" / "answers.md").read_text(), re.M))
SIX = ("classify_tokens", "token_energy", "token_weights", "policy_loss", "gae", "group_advantages")

RIGHT = """
from actfocus import classify_tokens, gae, group_advantages, policy_loss, token_weights
from energy import token_energy
"""
WRONG = {  # a typical mistake each, and what the grader must say about it
    "classify_tokens": ("""
        end, classes = 0, []
        start, stop = actfocus.answer_span("".join(args[0])) or (0, 0)
        for piece in args[0]:
            begin, end = end, end + len(piece)
            classes.append(begin < stop and end > start)  # white space too
        return ~torch.tensor(classes, dtype=torch.bool), torch.tensor(classes, dtype=torch.bool)""",
                        "tags and lone spaces are reasoning"),
    "token_energy": ("return args[0].logsumexp(-1)  # the sign", "Minus the log of the sum of exps"),
    "token_weights": ("""
        weights, signal = options.pop("alpha", 0.1) * args[2].to(args[0].dtype), args[0].detach()[args[1]]
        weights[args[1]] = 1 + options.get("beta", 0.5) * ((signal - signal.mean()) / signal.std()).sigmoid()  # N - 1
        return weights""", "variance / N."),
    "policy_loss": ("""
        loss = actfocus.policy_loss(*args, **options)
        return loss * args[3].sum() / (args[3] > 0).sum()  # a mean over tokens""",
                    "divided by Σw (not by the number of tokens)"),
    "gae": ("""
        rewards, values, is_response = (torch.where(args[2], value, 0) for value in args[:3])
        everywhere = torch.ones_like(args[2])  # through the observations
        advantages, targets = actfocus.gae(rewards, values, everywhere, *args[3:], **options)
        return advantages * is_response, targets * is_response""", "must pass an observation unchanged"),
    "group_advantages": ("return (args[0] - args[0].mean()) / (args[0].std() + options.get('eps', 1e-6))",
                         "Mean and std are those of the group, not of the batch"),
}


def apply(name, folder):
    """Apply a patch with the command that the exercise names."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # whatever repository lies above
    command = ["git", "apply", f"exercises/bugs/{name}.patch"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Exit code and output of pytest in copies of the project: answers graded, bugs applied."""
    parent = tmp_path_factory.mktemp("copies")
    jobs = {"unpatched": (copy_of_the_project(parent / "unpatched", "results"), ["", "pytest", *BUGS.values()])}
    for name, test in BUGS.items():
        jobs[name] = (copy_of_the_project(parent / name, "results"), ["", "pytest", test])
        assert apply(name, parent / name).returncode == 0, f"exercises/bugs/{name}.patch does not apply any more"
    wrong = ["import torch", "import actfocus"]
    wrong += [f"def {name}(*args, **options):\n        {body.strip()}" for name, (body, _) in WRONG.items()]
    answers = {"right": RIGHT, "wrong": "\n".join(wrong), "template": (EXERCISES / "template.py").read_text()}
    graded = {name: ["--tb=no"] for name in answers} | {"one": ["-x", "-k", "eq5"]}
    for name, options in graded.items():
        folder = copy_of_the_project(parent / name, "results")
        jobs[name] = (folder, [f"ACTFOCUS_MODULE={name}_answer", "pytest", *options])
        (folder / "exercises" / f"{name}_answer.py").write_text(answers.get(name, answers["wrong"]))
    return dict(zip(jobs, run_all([*jobs.values()]), strict=True))


def verdicts(log):
    """What the grader says of each function; the last section of pytest's output."""
    parts = re.split(rf"^({'|'.join(SIX)}) +", log.split(" answers of ")[1], flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_there_are_eight_bugs_and_a_patch_for_each():
    assert list(BUGS) == [f"bug{i}" for i in range(1, 9)]
    assert {path.stem for path in (EXERCISES / "bugs").glob("*.patch")} == BUGS.keys()


@pytest.mark.slow
def test_without_a_bug_the_tests_that_catch_them_pass(outcomes):
    code, log = outcomes["unpatched"]
    assert code == 0, log


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_one_line_and_its_test_fails(outcomes, name):
    patch = (EXERCISES / "bugs" / f"{name}.patch").read_text(encoding="utf-8")
    assert len(re.findall(r"^\+(?!\+)", patch, re.M)) == 1 and len(re.findall(r"^-(?!-)", patch, re.M)) <= 1
    code, log = outcomes[name]
    assert code == 1, log  # 1: tests ran and failed; anything else is pytest's own trouble
    assert f"FAILED {BUGS[name]}" in log and " error" not in log.splitlines()[-1]


@pytest.mark.slow
def test_right_answers_are_graded_as_right(outcomes):
    code, log = outcomes["right"]
    assert code == 0, log
    assert all(re.match(r"right, \d+ tests$", verdict.splitlines()[0]) for verdict in verdicts(log).values())
    assert verdicts(log).keys() == set(SIX)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_a_typical_mistake_is_graded_as_wrong_with_advice_and_the_way_to_the_hints(outcomes, name):
    code, log = outcomes["wrong"]
    assert code == 1
    verdict = verdicts(log)[name]
    assert verdict.startswith("wrong in ") and WRONG[name][1] in verdict, verdict
    assert f"python exercises/hints.py {name} 1" in verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_what_is_not_written_yet_is_called_so(outcomes, name):
    code, log = outcomes["template"]
    assert code == 1 and verdicts(log)[name].startswith("not written yet")


@pytest.mark.slow
def test_k_selects_the_tests_of_one_function(outcomes):
    code, log = outcomes["one"]
    assert code == 1 and verdicts(log).keys() == {"token_weights"}
    assert "not 6 / 2: population" in log  # the arithmetic by hand is on the screen


def test_whatever_test_fails_first_says_what_to_look_at():
    """With -x only one test has failed, so every test that grades has advice in its docstring."""
    for name in ("test_actfocus.py", "test_energy.py"):
        text = (ROOT / "tests" / name).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and "graded." in ast.get_source_segment(text, node):
                assert ast.get_docstring(node), f"{name}: {node.name}"


@pytest.mark.parametrize("name", SIX)
def test_the_template_has_signature_and_equation_and_no_solution(name):
    text = (EXERCISES / "template.py").read_text(encoding="utf-8")
    body = text.split(f"def {name}(")[1].split("\ndef ")[0]
    assert body.rstrip().endswith('"""\n    raise NotImplementedError')


def test_there_are_three_hints_for_each_function_and_a_clear_line_otherwise(capsys):
    sys.path.append(str(EXERCISES))
    import hints

    assert hints.HINTS.keys() == set(SIX)
    for name in SIX:
        shown = []
        for level in ("1", "2", "3"):
            assert hints.main([name, level]) == 0
            shown.append(capsys.readouterr().out)
        assert len(set(shown)) == 3 and all(len(text) > 40 for text in shown)
    for arguments in ([], ["gae"], ["gae", "4"], ["gea", "1"]):
        assert hints.main(arguments) == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["exercises/README.md", "exercises/bugs/README.md", "docs/lab.md"])
def test_the_flags_and_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"python train\.py (.+?)(?:`|;|$)", text, re.M) + re.findall(r"`(--\w+ [^`]+)`", text)
    assert commands
    for command in commands:
        if not re.search("FLAGS|resume_from_checkpoint", command):
            parse(command.replace("$alpha", "0.1").split())
    for path in re.findall(r"(?:exercises|docs|tests)/[\w./-]*\w\.(?:py|md|patch)", text):
        assert (ROOT / path).exists() or path == "exercises/my_answer.py", path


def test_show_prints_a_line_a_step_and_one_clear_line_for_what_does_not_exist(capsys, tmp_path):
    sys.path.append(str(EXERCISES))
    import show

    run = str(ROOT / "results" / "runs" / "frozenlake-grpo-actfocus-seed0")
    assert show.main(["success,kl_ref", run, run]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [f"1 = {run}", f"2 = {run}"] and len(printed) == 33 and printed[32].split()[0] == "30"
    assert printed[2].split() == ["step", "success", "1", "kl_ref", "1", "success", "2", "kl_ref", "2"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "lo')  # not finite; a kill came
    assert show.main(["loss", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["1", "-"]
    for arguments in (["success"], ["nothing", run], ["success", "nowhere"]):
        assert show.main(arguments) == 2 and len(capsys.readouterr().err.splitlines()) == 1
