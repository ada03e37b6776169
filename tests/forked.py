"""Runs commands of the project in copies of it, each a fork of one process that has the slow imports behind it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNNER = """
import json, os, runpy, sys
import gymnasium, matplotlib.pyplot, pytest, torch  # once for all jobs, which are forks
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, GPT2LMHeadModel, LlamaForCausalLM
jobs, running, codes = json.loads(sys.argv[1]), {}, {}  # a process's number, a number's exit code
def wait():
    process, status = os.wait()
    codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
for number, (folder, (variable, program, *arguments)) in enumerate(jobs):
    if len(running) == os.cpu_count():
        wait()
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ.update([variable.split("=", 1)] if variable else [])
        log = os.open(f"log{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            if program == "pytest":
                code = pytest.main(["-p", "no:cacheprovider", *arguments])
            else:
                sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
                torch.set_num_threads(1)
                runpy.run_path(arguments[0], run_name="__main__")
                code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    running[child] = number
while running:
    wait()
print(json.dumps([codes[number] for number in range(len(jobs))]))
"""


def copy_of_the_project(folder: Path, *without: str) -> Path:
    """What is in the repository, but for its hidden files, runs, environments and whatever else is named."""
    unwanted = shutil.ignore_patterns(".*", "runs", "__pycache__", "venv", *without)
    shutil.copytree(ROOT, folder, ignore=unwanted)
    return folder


def run_all(jobs: list[tuple[Path, list[str]]]) -> list[tuple[int, str]]:
    """Exit code and output of each job: its folder, and NAME=VALUE (or ""), then `pytest` or `python`, then words.

    As many run at a time as there are cores.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("ACTFOCUS_MODULE", "PYTEST_ADDOPTS")}
    done = subprocess.run([sys.executable, "-c", RUNNER, json.dumps(jobs, default=str)], env=environment, check=True,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    codes = json.loads(done.stdout.splitlines()[-1])
    return [(code, (folder / f"log{number}").read_text(encoding="utf-8"))
            for number, (code, (folder, _)) in enumerate(zip(codes, jobs, strict=True))]
