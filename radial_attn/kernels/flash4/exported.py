"""Runs kernels of FlashAttention-4 for Hopper that were exported to files, without the package.

A folder holds one library for each kernel, and flash4.json, which says what each was compiled for. Kernels
need apache-tvm-ffi, and the CUDA runtime that torch has loaded. Calls follow those of the package's
flash_attn/cute/interface.py; each kernel takes one sample.
"""

import ctypes
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from .library import PACKAGE, VERSION
from .lists import Lists

FOLDER = "RADIAL_ATTN_FLASH4"
INDEX = "flash4.json"
FORMAT = 1
MADE = f"{PACKAGE} {VERSION}"
ALIGNED = 16  # bytes of addresses and strides
Sparse = tuple[Tensor | None, ...]


def folder() -> Path | None:
    """Returns the folder of exported kernels that the user names; None if none is named."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else None


def fingerprint() -> str:
    """Returns what changes if the user's exported kernels do; "none" without any."""
    with suppress(TypeError, OSError):
        return hashlib.sha256((folder() / INDEX).read_bytes()).hexdigest()[:16]
    return "none"


def problem(path: Path, capability: tuple[int, int]) -> str | None:
    """Says why exported kernels cannot be used, in words that follow the backend's name; None if they can."""
    try:
        kernels = load(path)
    except ImportError as error:
        return str(error)
    if kernels.capability == capability:
        return None
    got, wanted = ("{}.{}".format(*numbers) for numbers in (kernels.capability, capability))
    return f"needs kernels for compute capability {wanted}, got {got} in {FOLDER}={path}: export them"


@lru_cache
def load(path: Path) -> "Exported":
    """Loads the kernels of a folder.

    Raises ImportError, which begins with "needs", if the kernels or something that they need is missing.
    """
    if find_spec("tvm_ffi") is None:
        raise ImportError(f"needs apache-tvm-ffi for {FOLDER}={path}: pip install apache-tvm-ffi")
    kernels, capability = _read_index(path)
    runtime = cuda_runtime()
    if runtime is None:
        raise ImportError(f"needs the CUDA runtime that CUDA builds of torch load, for {FOLDER}={path}")
    ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)  # the kernels' libraries look for it among global names
    return Exported(path, kernels, capability)


def _read_index(path: Path) -> tuple[dict[str, dict[str, Any]], tuple[int, int]]:
    """Returns the kernels' entries and the compute capability; checks every file by its digest."""
    again = f"of {FOLDER}={path}: export the kernels again"
    try:
        content = json.loads((path / INDEX).read_text(encoding="utf-8"))
        made = content["package"], content["format"]
        kernels, (major, minor) = dict(content["kernels"]), content["capability"]
        digests = {str(kernel["file"]): kernel["sha256"] for kernel in kernels.values()}
        if not all(isinstance(x["functions"], list) and isinstance(x["rows"], int) for x in kernels.values()):
            raise TypeError("functions or rows")
    except OSError as error:
        raise ImportError(f"needs the file {INDEX} {again} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImportError(f"needs the complete file {INDEX} {again}") from error
    if made != (MADE, FORMAT):
        raise ImportError(f"needs kernels of {MADE} in format {FORMAT}, got {made[0]} in {made[1]} {again}")
    for name, digest in digests.items():
        with suppress(OSError, ValueError):
            if hashlib.sha256((path / name).read_bytes()).hexdigest() == digest:
                continue
        raise ImportError(f"needs the complete file {name} {again}")
    return kernels, (major, minor)


def cuda_runtime() -> str | None:
    """Returns the file of the CUDA runtime that this process has loaded; None if it has loaded none."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    files = (line.split(maxsplit=5)[-1] for line in lines)
    return next((file for file in files if re.search(r"/libcudart[^/]*\.so", file)), None)


def variant(kind: str, query: Tensor, lists: Lists | None) -> str:
    """Names the kernel that serves a call; `kind`: "forward" or "backward"."""
    parts = [kind, str(query.dtype).removeprefix("torch."), str(query.shape[-1])]
    if lists is None:
        return "-".join([*parts, "dense"])
    shared = lists.counts.shape[1] != query.shape[2]
    rows, columns = lists.tile
    mixed = [] if lists.table is None else ["mixed"]
    return "-".join([*parts, f"{rows}x{columns}", *mixed, "shared" if shared else "heads"])


class Exported:
    """Runs the kernels of one folder; `forward` and `backward` are as in library.py."""

    def __init__(self, path: Path, kernels: dict[str, dict[str, Any]], capability: tuple[int, int]) -> None:
        self.capability = capability
        self._path, self._kernels = path, kernels
        self._functions: dict[str, Callable[..., None]] = {}

    def forward(
        self, tensors: Sequence[Tensor], out: Tensor, lse: Tensor, scale: float, lists: Lists | None
    ) -> None:
        heads, name = out.shape[2], variant("forward", out, lists)
        attend = self._function(name, "forward")
        for sample in range(len(out)):
            attend(
                *(_aligned(x.narrow(0, sample, 1)) for x in tensors),
                out.narrow(0, sample, 1),
                lse.narrow(0, sample, 1),
                scale,
                *[None] * 8,  # lengths, pages, window and sink
                _sparse(lists, heads),
                _tables(lists, heads),
                None,
                None,
            )

    def backward(
        self,
        tensors: Sequence[Tensor],
        lse_grad: Tensor | None,
        grads: Sequence[Tensor],
        scale: float,
        lists: Lists | None,
    ) -> None:
        query = tensors[0]
        _, tokens, heads, width = query.shape
        name = variant("backward", query, lists)
        prepare, attend, finish = (self._function(name, step) for step in ("prepare", "backward", "finish"))
        rows = self._kernels[name]["rows"]
        padded = -(-tokens // rows) * rows
        for sample in range(len(query)):
            query, key, value, out, grad, lse = (_aligned(x.narrow(0, sample, 1)) for x in tensors)
            query_grad, key_grad, value_grad = (x.narrow(0, sample, 1) for x in grads)
            products, logs = (lse.new_empty(1, heads, padded) for _ in range(2))
            sums = lse.new_empty(1, heads, padded * width)
            prepare(out, grad, products, lse, logs, sums, *[None] * 5, 1.0, None, None)
            if lse_grad is not None:
                products[..., :tokens] -= lse_grad[sample]
            attend(
                *(query, key, value, grad, logs, products, sums, key_grad, value_grad, scale),
                *[None] * 9,  # lengths, window and semaphores
                _tables(lists, heads),
                _sparse(lists, heads),
                None,
            )
            finish(sums, query_grad, scale, *[None] * 4)

    def _function(self, name: str, step: str) -> Callable[..., None]:
        """Returns a function of a kernel's library; ValueError if the kernel was not exported."""
        if (name, step) not in self._functions:
            import tvm_ffi

            if name not in self._kernels:
                raise ValueError(f"backend 'flash4' has no kernel {name} in {FOLDER}={self._path}: export it")
            module = tvm_ffi.load_module(str(self._path / self._kernels[name]["file"]))
            self._functions |= {(name, each): module[each] for each in self._kernels[name]["functions"]}
        return self._functions[name, step]


def _sparse(lists: Lists | None, heads: int) -> Sparse | None:
    """Returns the lists of one sample for each head, in the package's order: mixed tiles, then whole ones."""
    if lists is None:
        return None
    tensors = lists.mixed_counts, lists.mixed_indices, lists.counts, lists.indices
    return *(x.expand(1, heads, *x.shape[2:]) for x in tensors), *[None] * 4


def _tables(lists: Lists | None, heads: int) -> tuple[list[Tensor] | None, None]:
    if lists is None or lists.table is None:
        return None, None
    return [lists.table.expand(heads, -1, -1)], None


def _aligned(x: Tensor) -> Tensor:
    """Returns a tensor whose address and strides are as the kernels assume."""
    x = x.detach()
    step = ALIGNED // x.element_size()
    if x.is_contiguous():
        return x if x.data_ptr() % ALIGNED == 0 else x.clone()
    fits = x.stride(-1) == 1 and all(stride and stride % step == 0 for stride in x.stride()[:-1])
    return x if fits and x.data_ptr() % ALIGNED == 0 else x.contiguous()
