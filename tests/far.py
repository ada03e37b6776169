"""A second device without hardware: tensors that say they are elsewhere, and refuse to be mixed with the CPU's.

A `Far` tensor claims the device "meta" and keeps its numbers in an ordinary tensor; under `Elsewhere` every operation
is done there, and one that meets CPU tensors as well raises, as it would on a GPU. (Numbers of no dimension and the
indices of an indexing operation may be on the CPU; so it is on a GPU.)
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MOVES = {"_to_copy", "copy_"}


class Far(torch.Tensor):
    """A tensor elsewhere."""

    @staticmethod
    def __new__(cls, near):
        """Shape and strides are those of the numbers."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device=DEVICE)
        self.near = near
        return self

    def tolist(self):
        """From any device."""
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Outside `Elsewhere` (in backward, whose threads have no modes) as inside."""
        return run(function, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Elsewhere(TorchFunctionMode):
    """What is made with device=DEVICE is made there."""

    def __enter__(self):
        """Every operation of torch comes by."""
        self.operations = _Operations()
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        """No more."""
        super().__exit__(*error)
        self.operations.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """`torch.tensor` fills its result before any operation could be seen."""
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") == DEVICE:
            return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


def run(function, args, kwargs):
    """Do it on the numbers; the result is where the arguments are, or where `device` says."""
    name = function.overloadpacket.__name__
    checked = tree_flatten((args[:1] if name in INDEXING else args, kwargs))[0]
    tensors = [x for x in checked if isinstance(x, torch.Tensor)]
    far = [isinstance(x, Far) for x in tensors]
    mixed = any(far) and not all(there for x, there in zip(tensors, far, strict=True) if x.dim())
    if mixed and name not in MOVES:
        raise RuntimeError(f"{name}: tensors on two devices")
    target = kwargs.get("device")
    there = any(far) if target is None else torch.device(target) == DEVICE
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = function(*tree_map(near, args), **tree_map(near, kwargs))
    if name == "copy_" or (name.endswith("_") and not name.startswith("_")):
        return args[0]
    return tree_map(lambda x: Far(x) if there and isinstance(x, torch.Tensor) else x, result)


def near(x):
    """The numbers themselves."""
    return x.near if isinstance(x, Far) else x
