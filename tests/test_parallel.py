"""parallel.py: a run of several ranks is the run of one; resuming with other numbers, deaths, a user's mistakes."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import config, flags, lines, weights
from transformers import AutoModelForCausalLM

import parallel
from checkpoint import find_checkpoint
from methods import make_episodes
from policy import load_model, load_tokenizer
from rollout import play_on, rollout

pytest_plugins = ["tiny"]
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RANK"} | {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

RUNNER = """
import json, os, signal, sys, traceback
import matplotlib.pyplot, torch, train  # once for all ranks, which are forks
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
torch.set_num_threads(1)
play, loss, iteration, append = train.train, train.policy_loss, train.iteration, train.checkpoint.append_line

def keep_weights(config, state, run):
    play(config, state, run)
    torch.save([p.detach() for p in state.policy.parameters()], f"{run}-rank{os.environ['RANK']}.pt")

def nan_at_first(*given):
    train.policy_loss = loss
    return loss(*given) * float("nan")

def no_room():
    raise OSError("No space left on device")

def die(config, state, step):
    if step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return iteration(config, state, step)

def rank_of(name, rank, ranks, port, argv, trouble):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    train.train, train.report = keep_weights, lambda *_: print("report")
    if rank == 1 and trouble == "nan":
        train.policy_loss = nan_at_first
    if rank == 0 and trouble in ("eval.jsonl", "metrics.jsonl"):
        train.checkpoint.append_line = lambda path, row: no_room() if path.name == trouble else append(path, row)
    if rank == 1 and trouble == "death":
        train.iteration = die
    return train.main(argv)

codes = {}
for name, task in json.loads(sys.argv[1]).items():
    children = []
    for rank in range(task[0]):
        children.append(os.fork())
        if not children[-1]:
            code = 1
            try:
                code = rank_of(name, rank, *task)
            except Exception:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(json.dumps(codes))
"""
DIES = """
import os, signal, sys, train

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    train.train = die
sys.exit(train.main())
"""
SHORT = {"max_steps": 2, "num_prompts": 4, "mini_batch_size": 4, "micro_batch_tokens": 300, "save_steps": 1,
         "eval_prompts": 3, "eval_samples": 1,
         "learning_rate": 1e-5}  # Adam makes up to this of a first gradient that is nothing but rounding
FILES = ("eval.jsonl", "metrics.jsonl")
ALGOS = {  # the others share out nothing that these do not; with carl every mini-batch leaves a rank without a row
    "grpo": {"kl_coef": 0.1},
    "ppo": {"algo": "ppo", "value_clip": 0.2},
    "dapo": {"algo": "dapo", "max_steps": 1},
    "carl": {"algo": "carl", "max_steps": 1, "mini_batch_size": 1, "max_kl": 1e-6},
}


def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A folder with a run NAME-RANKS for every method, the troubled ones, and all exit codes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    jobs = {}
    for name, options in ALGOS.items():
        for ranks in (1, 2, 4) if name == "grpo" else (1, 2):
            run = f"{name}-{ranks}"
            jobs[run] = ranks, free_port(), flags(model=tiny, output_dir=run, **SHORT | options), None
    jobs["nan"] = 2, free_port(), flags(model=tiny, output_dir="nan", **SHORT), "nan"
    for file in FILES:
        jobs[file] = 2, free_port(), flags(model=tiny, output_dir=f"without-{file}", **SHORT), file
    jobs["killed"] = 2, free_port(), flags(model=tiny, output_dir="killed", **SHORT | ALGOS["grpo"]), "death"
    jobs["resumed"] = 1, free_port(), ["--resume_from_checkpoint", "killed"], None
    jobs["odd"] = 2, free_port(), flags(model=tiny, output_dir="odd", **SHORT | {"num_prompts": 3}), None
    jobs["taken"] = 2, free_port(), flags(model=tiny, output_dir="full", **SHORT), None
    done = subprocess.run([sys.executable, "-c", RUNNER, json.dumps(jobs)], cwd=folder, capture_output=True, text=True,
                          env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def assert_close_runs(one, other):
    """Every number and every weight equal but for the order in which sums were made."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = lines(one / name), lines(other / name)
        assert len(ours) == len(theirs) > 0
        for row, same in zip(ours, theirs, strict=True):
            gaps = [numbers.pop("logp_gap_max", 0.0) for numbers in (row, same)]  # itself nothing but rounding
            assert row == pytest.approx(same, rel=1e-5, abs=1e-6) and max(gaps) < 1e-4
    ours, theirs = weights(find_checkpoint(one)), weights(find_checkpoint(other))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGOS)
def test_one_and_two_ranks_give_the_same_numbers_and_weights(runs, name, tiny):
    folder, codes = runs
    assert codes[f"{name}-1"] == [0] and codes[f"{name}-2"] == [0, 0], (folder / f"{name}-2.err").read_text()
    assert_close_runs(folder / f"{name}-1", folder / f"{name}-2")
    before, after = weights(tiny), weights(find_checkpoint(folder / f"{name}-2"))
    assert any(not before[key].equal(after[key]) for key in before)


@pytest.mark.slow
def test_four_ranks_do_so_too(runs):
    folder, codes = runs
    assert codes["grpo-4"] == [0] * 4
    assert_close_runs(folder / "grpo-1", folder / "grpo-4")


@pytest.mark.slow
@pytest.mark.parametrize("run, ranks", [("grpo-4", 4), ("ppo-2", 2), ("nan", 2)])
def test_all_ranks_end_with_the_very_same_weights(runs, run, ranks):
    first, *others = (torch.load(runs[0] / f"{run}-rank{rank}.pt") for rank in range(ranks))
    saved = dict(AutoModelForCausalLM.from_pretrained(find_checkpoint(runs[0] / run)).named_parameters())
    assert all(tensor.equal(written) for tensor, written in zip(first, saved.values(), strict=True))
    for other in others:
        assert all(one.equal(two) for one, two in zip(first, other, strict=True))


@pytest.mark.slow
def test_a_nan_on_one_rank_skips_the_step_on_all(runs):
    assert runs[1]["nan"] == [0, 0]
    assert [row["skipped_steps"] for row in lines(runs[0] / "nan" / "metrics.jsonl")] == [1, 0]


@pytest.mark.slow
def test_only_the_first_rank_speaks_and_writes(runs):
    folder, _ = runs
    for ranks in (1, 2, 4):
        out = (folder / f"grpo-{ranks}.out").read_text()
        assert len(re.findall(r"^step +\d", out, re.M)) == 2 and out.count("report") == 1
        assert len(lines(folder / f"grpo-{ranks}" / "eval.jsonl")) == 2
        assert json.loads((folder / f"grpo-{ranks}" / "config.json").read_text())["ranks"] == ranks


@pytest.mark.slow
@pytest.mark.parametrize("name, part", [
    ("odd", "error: --num_prompts 3: not divisible by the 2 ranks"),
    ("taken", "error: --output_dir full: not empty"),  # only the first rank looks
])
def test_a_mistake_is_one_line_and_code_2_on_every_rank_and_leaves_no_folder(runs, name, part):
    folder, codes = runs
    error = (folder / f"{name}.err").read_text().splitlines()
    assert codes[name] == [2, 2] and len(error) == 1 and part in error[0]
    assert not (folder / name).exists() and [path.name for path in (folder / "full").iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_of_the_rank_that_writes_ends_all_with_one_line_and_code_2(runs, file):
    *_, line = (runs[0] / f"{file}.err").read_text().strip().splitlines()
    assert runs[1][file] == [2, 2] and line.startswith("error: No space left on device; --resume_from")


def test_ranks_wait_for_a_warm_start_of_hours(monkeypatch):
    given = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend, timeout: given.append(timeout))
    parallel.start()
    assert given[0].total_seconds() > 5 * 3600


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_other_and_one_rank_goes_on_from_there(runs):
    folder, codes = runs
    assert codes["killed"] == [1, -9] and "closed by peer" in (folder / "killed.err").read_text()
    assert codes["resumed"] == [0]
    assert_close_runs(folder / "killed", folder / "grpo-2")


@pytest.mark.slow
def test_torchrun_ends_a_run_within_a_minute_of_a_death_and_says_why(tiny, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "dies.py"]
    done = subprocess.run([*command, *flags(model=tiny, output_dir="run", **SHORT)], cwd=tmp_path, capture_output=True,
                          text=True, env=ENVIRONMENT, timeout=120)
    seconds = time.time() - (tmp_path / "run" / "checkpoint-0").stat().st_mtime
    assert done.returncode == 1 and seconds < 60, f"{seconds} s\n{done.stderr}"
    assert re.search(r"rank +: 1 .*Signal 9 \(SIGKILL\) received", done.stderr, re.S), done.stderr


def test_a_trajectory_without_a_generator_does_not_depend_on_its_company(tiny):
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    settings = config(tiny)

    def tokens(levels):
        return [row.tokens for row in rollout(model, tokenizer, make_episodes(settings, levels, 3), None, 1.0, 24, 512)]

    together = tokens(range(4))
    assert together == [row for level in range(4) for row in tokens([level])]
    assert len({tuple(row) for row in together}) == 12  # yet every one has noise of its own


def test_forks_without_a_generator_do_not_repeat_what_they_were_forked_from(tiny):
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    first = rollout(model, tokenizer, make_episodes(config(tiny), [7], 1), None, 1.0, 24, 512)
    forks = play_on(model, tokenizer, [first[0].fork(0, replica) for replica in (1, 2)], None, 1.0, 24, 512)
    again = play_on(model, tokenizer, [forks[0].fork(0, 3)], None, 1.0, 24, 512)
    assert len({tuple(row.tokens) for row in [*first, *forks, *again]}) == 4


def test_without_a_launcher_the_helpers_do_nothing():
    tensor, items = torch.ones(2), range(5)
    parallel.start()
    parallel.add_up([tensor])
    assert not parallel.running() and (parallel.rank(), parallel.ranks(), parallel.stop(3)) == (0, 1, 3)
    assert tensor.tolist() == [1, 1] and parallel.block(items) == items and parallel.gather("a") == ["a"]
    assert parallel.agree(lambda: 5) == 5 and parallel.total({"a": 2.0, "b_max": 3.0}) == {"a": 2.0, "b_max": 3.0}


@pytest.mark.parametrize("count, ranks", [(8, 1), (8, 2), (3, 4), (7, 3)])
def test_the_blocks_of_all_ranks_are_the_whole_in_order(monkeypatch, count, ranks):
    monkeypatch.setattr(parallel, "ranks", lambda: ranks)
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts += parallel.block(range(10, 10 + count))
    assert parts == list(range(10, 10 + count))
