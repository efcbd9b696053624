"""Runs models of real size on fake CUDA tensors: shapes, devices and dtypes are real, there is no memory.

torch for the CPU makes CUDA tensors under FakeTensorMode once a device guard is registered, by a line of C++.
Only the values of small tensors are known, those that a host would copy: lengths, masks, timesteps.
"""

import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.cpp_extension import include_paths, library_paths

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
SHAPED = ("nonzero", "masked_select", "_unique2", "bincount")  # the values give the shape of the result
SYNCS = ("_local_scalar_dense", "is_nonzero", "equal", *SHAPED)
FILLED = ("full", "ones", "zeros")
SMALL = 1 << 20  # values of tensors up to this size are known
Key = tuple[str, str]


@lru_cache
def register_guard() -> None:
    """Compiles and loads the guard, once in a process; CalledProcessError without a C++ compiler."""
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        paths = [f"-I{path}" for path in include_paths("cpu")] + [
            f"-L{path}" for path in library_paths("cpu")
        ]
        command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), *paths, "-lc10", "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True)
        torch.ops.load_library(str(library))


class FakeCuda(TorchDispatchMode):
    """Sends everything on CUDA to FakeTensorMode, and notes what a real GPU would have to wait for.

    Attributes:
        watching: name of what runs now, "" if nothing is noted.
        copies: `(what, direction)` of each copy between host and device.
        syncs: `(what, operator)` for which the host waits.
        largest: bytes of the largest tensor made, and its operator.
    """

    def __init__(self) -> None:
        super().__init__()
        register_guard()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.watching = ""
        self.copies: Counter[Key] = Counter()
        self.syncs: Counter[Key] = Counter()
        self.largest: tuple[int, str] = (0, "")
        self._values: dict[int, tuple[ref, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if target != "cuda" and not any(isinstance(x, FakeTensor) for x in given):
            return func(*args, **kwargs)
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        values = self._compute(func, given, args, kwargs)
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if self.watching:
            self._note(name, given, target, waits=name in SYNCS or by_mask)
        if values is not None and (
            target == "cpu" or not any(isinstance(x, Tensor) for x in tree_leaves(values))
        ):
            return values  # on the host, or a number
        shape = None
        if values is None and by_mask:
            chosen = self._value(args[1][0])  # AttributeError if its values are not known
            shape = int(chosen.sum()), *args[0].shape[chosen.ndim :]
        with self.fake:
            if shape is not None:
                out = args[0].new_empty(shape)
            elif values is not None and (name in SHAPED or by_mask):
                out = tree_map(lambda x: torch.empty_like(x, device="cuda"), values)
            else:
                out = func(*args, **kwargs)
        for made, value in zip(tree_leaves(out), tree_leaves(values), strict=False):
            if isinstance(made, FakeTensor) and isinstance(value, Tensor):
                self._values[id(made)] = ref(made), value
        if self.watching:
            sizes = [
                (x.nbytes, f"{self.watching}: {name}") for x in tree_leaves(out) if isinstance(x, FakeTensor)
            ]
            self.largest = max(self.largest, *sizes, (0, ""))
        return out

    def _value(self, x: Any) -> Any:
        """Returns the values of a tensor on the host; None if they are not known."""
        if not isinstance(x, FakeTensor):
            return x
        kept = self._values.get(id(x))
        return kept[1] if kept is not None and kept[0]() is x else None

    def _compute(self, func: Any, given: list[Tensor], args: tuple, kwargs: dict) -> Any:
        """Computes on the host what an operator gives, if all it reads is small and known; else None."""
        known = [self._value(x) for x in given]
        if func.namespace == "prim" or any(x is None or x.numel() > SMALL for x in known):
            return None
        name = func.overloadpacket.__name__
        shape = args[1] if name.startswith("new_") else args[0] if name in FILLED else ()
        if not (given or name in FILLED or name == "arange") or prod(shape) > SMALL:
            return None
        args, kwargs = tree_map(self._value, args), tree_map(self._value, kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)

    def _note(self, name: str, given: list[Tensor], target: str | None, *, waits: bool) -> None:
        """Notes a copy between the devices, or what waits for the values of a tensor."""
        if waits:
            self.syncs[self.watching, name] += 1
        if name in {"_to_copy", "copy_"} and len({x.device.type for x in given} | {target} - {None}) > 1:
            self.copies[self.watching, name] += 1


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Makes CUDA tensors fake in the block; dense attention of them is one kernel, as it is on a GPU.

    torch for the CPU has no such kernel, and would store the scores.
    """
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        if query.device.type != "cuda":
            return original(query, key, value, *rest, **options)
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    lifted = torch._C._only_lift_cpu_tensors()
    with (
        FakeCuda() as mode,
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(torch.cuda, "_lazy_init", lambda: None),
    ):
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)
