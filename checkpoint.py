"""The run folder: what a run leaves on disk, and how a killed run continues as if nothing had happened.

    config.json  metrics.jsonl  eval.jsonl  samples/  plots/  checkpoint-N/

A checkpoint is an ordinary model folder for `from_pretrained`, with optimiser, critic, generator and LoRA's matrices
beside it in `trainer_state.pt` (plain tensors and numbers, read with weights_only=True). It is written to a temporary
folder, flushed and renamed, so a folder called checkpoint-N is always whole. Lines of later steps are cut when a run
resumes.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import parallel
from lora import AdapterOff, merged_weights
from policy import Critic, becoming, load_model

STATE = "trainer_state.pt"
LOCKS = []  # of the run folders that this process trains in


@dataclass
class State:
    """What changes while a run goes on."""

    policy: PreTrainedModel
    reference: PreTrainedModel | AdapterOff
    tokenizer: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    skipped: int = 0  # optimiser steps whose gradient was not finite
    bad_steps: int = 0  # how many of them in a row

    @property
    def learners(self) -> list[tuple[torch.nn.Module, torch.optim.Optimizer]]:
        """The models that learn, each with its optimiser."""
        critic = [(self.critic, self.critic_optimizer)] if self.critic else []
        return [(self.policy, self.optimizer), *critic]


def new_run(config: dict, device: str = "cpu") -> Path:
    """A run folder with its config.json, by default a new one under runs/; nothing that exists is written over."""
    if config["output_dir"]:
        run = Path(config["output_dir"])
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ValueError(f"--output_dir {run}: not empty; choose another, or --resume_from_checkpoint {run}")
    else:
        stem = Path("runs") / "{env}-{algo}-{weights}-seed{seed}".format(**config)
        run = next(p for i in range(1, 10_000) if not (p := stem if i == 1 else Path(f"{stem}-{i}")).exists())
    try:
        for part in ("samples", "plots"):
            (run / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {run}: cannot be written ({error.strerror})") from None
    lock(run)
    about = {"config": config, **provenance(Path(config["model"]), device)}
    (run / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return run


def lock(run: Path) -> None:
    """Keep other processes from training in a run folder until `unlock`, or this process ends.

    Raises:
        ValueError: another one does so.
    """
    LOCKS.append((run / ".lock").open("w"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what POSIX has for a lock of another
        raise ValueError(f"{run}: another process is training there") from None


def unlock() -> None:
    """Let others train in the folders that this process has locked."""
    while LOCKS:
        LOCKS.pop().close()


def provenance(model: Path, device: str = "cpu") -> dict:
    """What a result depends on beside its settings: code, versions, hardware, and the weights that it starts from."""
    return {"commit": _commit(), "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "device": device, "threads": torch.get_num_threads(),
            "machine": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count(),
            "ranks": parallel.ranks() if parallel.running() else None, "model_sha256": weights_digest(model)}


def weights_digest(model: Path) -> str | None:
    """The first 12 digits of the SHA-256 of a model folder's weights; None for a hub name."""
    return files_digest(model, "*.safetensors")


def files_digest(model: Path, *kinds: str) -> str | None:
    """The same of all its files of these kinds."""
    files, digest = [path for kind in kinds for path in sorted(model.glob(kind))], hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12] if files else None


def _commit() -> str:
    """The commit, with -dirty where code differs from it; results and texts may."""
    if not shutil.which("git"):
        return "unknown"

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!*.md")
    commit = git("rev-parse", "--short=12", "HEAD")
    return (commit + "-dirty" * bool(changed)) or "unknown"


def _cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
    return names[0].strip() if names else platform.processor() or "unknown"


def save(state: State, run: Path) -> None:
    """Write `checkpoint-{step}` so that a crash at any moment leaves the previous one loadable.

    It holds everything that changes; levels need no generator, they follow from the step.

    Raises:
        FloatingPointError: a weight is not finite.   OSError: it cannot be written; nothing of it is left.
    """
    parts = {"optimizer": state.optimizer.state_dict(), "generator": state.generator.get_state(), "step": state.step,
             "skipped": state.skipped, "bad_steps": state.bad_steps}
    if isinstance(state.reference, AdapterOff):
        parts["adapter"] = _adapter(state.policy)
    if state.critic:
        parts |= {"critic": state.critic.state_dict(), "critic_optimizer": state.critic_optimizer.state_dict()}
    weights = [*state.policy.parameters(), *parts.get("critic", {}).values()]
    if not all(weight.isfinite().all() for weight in weights):
        raise FloatingPointError(f"refusing to save NaN or infinite weights at step {state.step}")
    final, temporary = run / f"checkpoint-{state.step}", run / f".checkpoint-{state.step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with becoming(final, temporary):
        state.policy.save_pretrained(temporary, state_dict=merged_weights(state.policy) if "adapter" in parts else None)
        state.tokenizer.save_pretrained(temporary)
        torch.save(parts, temporary / STATE)
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)  # only there when an older checkpoint was resumed
    _flush(run)


def restore(state: State, path: Path) -> None:
    """Bring `state` to what it was when the checkpoint was written."""
    saved = torch.load(path / STATE, weights_only=True, map_location="cpu")
    if "adapter" in saved:
        for name, weight in _adapter(state.policy).items():
            weight.copy_(saved["adapter"][name])
    else:
        state.policy.load_state_dict(load_model(str(path)).state_dict())
    state.optimizer.load_state_dict(saved["optimizer"])
    state.generator.set_state(saved["generator"])
    state.step, state.skipped, state.bad_steps = saved["step"], saved["skipped"], saved["bad_steps"]
    if state.critic:
        state.critic.load_state_dict(saved["critic"])
        state.critic_optimizer.load_state_dict(saved["critic_optimizer"])


def check_start(run: Path, model: Path) -> None:
    """Refuse to go on where the model that a run began with, its π_ref, has other weights by now.

    Raises:
        ValueError: it names both digests.
    """
    was = read_about(run).get("model_sha256")
    if was and was != (now := weights_digest(model)):
        raise ValueError(f"{run} began with {model} of weights {was}, and these are {now} now: its reference is lost")


def _adapter(policy: PreTrainedModel) -> dict[str, Tensor]:
    """LoRA's A and B, which are all that learns."""
    return {name: weight.detach() for name, weight in policy.named_parameters() if weight.requires_grad}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the last whole one of a run folder."""
    if (path / STATE).is_file():
        return path
    found = {step: folder for step, folder in checkpoints(path).items() if (folder / STATE).is_file()}
    if not found:
        raise ValueError(f"no complete checkpoint in {str(path)!r}: expected a run folder or a checkpoint-N inside one")
    return found[max(found)]


def checkpoints(run: Path) -> dict[int, Path]:
    """Folders of checkpoints by their step."""
    return {step: path for path in run.glob("checkpoint-*") if (step := step_of(path)) is not None}


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's folder; a user's copy of another name, as checkpoint-30-old, is none."""
    found = re.fullmatch(r"checkpoint-([0-9]+)", path.name)
    return int(found[1]) if found else None


def update_config(run: Path, settings: dict) -> None:
    """Keep what a resumed run was given, or the next resume would not know of it."""
    _replace(run / "config.json", json.dumps({**read_about(run), "config": settings}, indent=2) + "\n")


def read_config(run: Path) -> dict:
    """The settings a run was started or last resumed with."""
    if "config" not in (about := read_about(run)):
        raise ValueError(f"{str(run)!r} is not a run folder: it has no config.json of a run")
    return about["config"]


def read_about(folder: Path) -> dict:
    """What config.json says: of a run its settings as "config", and how it was made; a model's is another."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def append_line(path: Path, row: dict) -> None:
    """Add one JSON line, full precision; a number that is not finite is null, as JSON has none."""
    row = {name: value if math.isfinite(value) else None for name, value in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[dict]:
    """All whole lines; one that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a whole line ends in a newline
    return [json.loads(line) for line in lines]


def forget_later(run: Path, step: int) -> None:
    """Drop the checkpoints and the lines after `step`: a run that resumes there will write them again."""
    for later, path in checkpoints(run).items():
        if later > step:
            shutil.rmtree(path)
    for path in (run / "metrics.jsonl", run / "eval.jsonl"):
        if path.exists():
            kept = [row for row in read_lines(path) if row["step"] <= step]
            _replace(path, "".join(json.dumps(row) + "\n" for row in kept))


def _replace(path: Path, text: str) -> None:
    """A new text of a file, whole at any moment."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
