"""The run folder: what a run leaves on disk, and how a killed run continues as if nothing had happened.

    config.json  metrics.jsonl  eval.jsonl  samples/  plots/  checkpoint-N/

A checkpoint is an ordinary model folder for `from_pretrained`, with optimiser, critic and generator beside it in
`trainer_state.pt` (plain tensors and numbers, read with weights_only=True). It is written to a temporary folder, flushed and
renamed, so a folder called checkpoint-N is always whole. Lines of steps after it are cut when a run resumes.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATE = "trainer_state.pt"


def save_checkpoint(run: Path, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: dict) -> Path:
    """Write `checkpoint-{step}` so that a crash at any moment leaves the previous one loadable."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise FloatingPointError(f"refusing to save a policy with NaN or infinite weights at step {step}")
    final, temporary = run / f"checkpoint-{step}", run / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save(state, temporary / STATE)
    for path in [*temporary.iterdir(), temporary]:
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)  # only there when an older checkpoint was resumed
    os.replace(temporary, final)
    _flush(run)
    return final


def load_state(checkpoint: Path) -> dict:
    """Optimiser, critic, generator and counters of a checkpoint."""
    return torch.load(checkpoint / STATE, weights_only=True)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the last whole one of a run folder."""
    if (path / STATE).is_file():
        return path
    found = [p for p in path.glob("checkpoint-*") if (p / STATE).is_file()]
    if not found:
        raise ValueError(f"no complete checkpoint in {str(path)!r}: expected a run folder or a checkpoint-N inside one")
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]))


def append_line(path: Path, row: dict) -> None:
    """Add one JSON line, full precision."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[dict]:
    """All whole lines; one that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a whole line ends in a newline
    return [json.loads(line) for line in lines]


def cut_lines(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`."""
    kept = [row for row in read_lines(path) if row["step"] <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
