"""A GPU to pretend with: backend="cuda" runs on it where there is none, and a line that forgets on which device a tensor is fails as it would there.

Its tensors hold a CPU's numbers and say that they are elsewhere. As on a GPU, NumPy cannot read them, and no operation takes them together with a
CPU's tensors; the exceptions are torch's own: numbers without axes, indices, and copies from one to the other. Kernels do not run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # a dispatch mode imports it at its first operation; here torch is not patched as yet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from opt_fast import nvrtc, ops_cuda, train_cuda

GPU = torch.device("meta")  # the one device for which torch wants no driver, and has no kernels that would see through the pretence
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # which take indices from the CPU as well


class OnGpu(torch.Tensor):
    """A tensor whose numbers nobody reads but through torch's operations."""

    numbers: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "OnGpu":
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype, "device": GPU}
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **layout)

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    def __repr__(self) -> str:
        return f"OnGpu({self.numbers})"

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    numpy = __array__

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def new_tensor(self, data: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=self.dtype, device=GPU)

    # torch would bring indices and values that are not tensors to this device by itself, past __torch_dispatch__.

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, np.ndarray):
            raise TypeError("can't assign a numpy.ndarray to a torch.cuda.FloatTensor")
        super().__setitem__(indices(index), value if isinstance(value, torch.Tensor) else self.new_tensor(value))

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(operation, args, kwargs or {})


def indices(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(indices, index))
    return torch.tensor(index) if isinstance(index, (np.ndarray, list)) else index


class Device(TorchDispatchMode):
    """Sees the operations that have no tensor of the GPU as yet: those that make one."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: tuple, kwargs: dict) -> Any:
    """The operation on the numbers; what it gives is on the GPU if it is asked to be, or what it is given is."""
    given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    there = any(isinstance(a, OnGpu) for a in given)
    refuse_a_mixture(operation._schema.name, args, given)
    if (device := kwargs.get("device")) is not None:
        there = device == GPU
        kwargs = {**kwargs, "device": torch.device("cpu") if there else device}
    args, kwargs = tree_map_only(OnGpu, lambda a: a.numbers, (args, kwargs))
    found = operation(*args, **kwargs)
    return tree_map_only(torch.Tensor, OnGpu, found) if there else found


def refuse_a_mixture(name: str, args: tuple, given: list[torch.Tensor]) -> None:
    """Raises RuntimeError, as torch, for tensors of two devices."""
    free = args[1] if name in INDEXING else args if name == "aten::copy_" else ()
    others = [a for a in given if not isinstance(a, OnGpu) and a.dim() and not any(a is b for b in free)]
    if others and any(isinstance(a, OnGpu) for a in given):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})")


def made_there(make: Any) -> Any:
    """torch.tensor or torch.as_tensor, which put their numbers on a device past every __torch_dispatch__."""

    def tensor(data: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        made = make(data, *args, **options) if device == GPU else make(data, *args, device=device, **options)
        return made.to(GPU) if device == GPU else made

    return tensor


class Random(train_cuda.Random):
    """Its generator has no other device to be on; its numbers are on the GPU."""

    def __init__(self, seed: list[int]) -> None:
        super().__init__(seed, torch.device("cpu"))
        self.device = GPU


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """backend="cuda" computes on the pretended GPU until the end of the block, and then all is as it was."""
    with pytest.MonkeyPatch.context() as patch, Device():
        patch.setattr(torch, "tensor", made_there(torch.tensor))
        patch.setattr(torch, "as_tensor", made_there(torch.as_tensor))
        patch.setattr(nvrtc, "missing", lambda: "")
        patch.setattr(ops_cuda, "device", lambda: GPU)
        patch.setattr(ops_cuda, "description", lambda: "a pretended GPU")
        patch.setattr(ops_cuda, "default_rng", Random)
        yield
