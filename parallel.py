"""Several processes as one run: what `torchrun --nproc_per_node N train.py …` needs beyond plain train.py.

Every rank holds the whole model and, after the rollouts, the whole batch. Only playing, scoring and gradients are
shared out, so what is a statistic of the batch (Σ w, μ_E and σ_E, whitening, filters) is global without more ado.
Without a launcher there is one rank, and each function here returns what it was given, or does nothing.
"""

import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> None:
    """Join the other ranks if a launcher has set RANK: gloo for the CPU, nccl for GPUs. Only rank 0 may print."""
    if "RANK" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # a warm start on rank 0 takes an hour and more
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def stop(code: int) -> int:
    """Leave together with an exit code: a launcher that sees one rank fail ends the others, even in mid-sentence."""
    if running():
        dist.barrier()
        dist.destroy_process_group()
    return code


def running() -> bool:
    """Whether there is a launcher, be it of one rank."""
    return dist.is_initialized()


def rank() -> int:
    """This process's number; 0 writes."""
    return dist.get_rank() if running() else 0


def ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if running() else 1


def block(items: range) -> range:
    """This rank's items; those of all ranks, one after the other, are the whole."""
    return items[len(items) * rank() // ranks() : len(items) * (rank() + 1) // ranks()]


def gather(item) -> list:
    """Everybody's item, in order of rank."""
    items = [item] * ranks()
    if running():
        dist.all_gather_object(items, item)
    return items


def agree(work: Callable):
    """What `work` returns here; but a mistake that any rank finds is raised on all."""
    if not running():
        return work()
    try:
        result, mistake = work(), None
    except (ValueError, OSError, FloatingPointError) as error:
        result, mistake = None, error
    if mistakes := [error for error in gather(mistake) if error]:
        raise mistake or mistakes[0]
    return result


def on_first(work: Callable):
    """What only rank 0 does, as it writes; the others get None, and learn of it when that fails."""
    return agree(lambda: work() if rank() == 0 else None)


def total(numbers: dict[str, float]) -> dict[str, float]:
    """Each number's sum over the ranks, its maximum where the name ends in `_max`."""
    parts = gather(numbers)
    return {name: (max if name.endswith("_max") else sum)(part[name] for part in parts) for name in numbers}


def add_up(tensors: Iterable[Tensor]) -> None:
    """Sum every tensor over the ranks, in place."""
    for tensor in tensors if running() else ():
        dist.all_reduce(tensor)
