"""Calls exported kernels of FlashAttention-4 without a GPU: they check all arguments, then find no driver.

    python -m tests.support.flash4_files FOLDER [TOKENS ...]

Prints, for each kernel and length, the error with which the call ends. The compiler's packages are hidden.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from radial_attn.kernels.flash4 import exported
from radial_attn.kernels.flash4.lists import Lists

NO_DRIVER = 35  # cudaErrorInsufficientDriver
ADDRESS = 1 << 40  # of what is taken for GPU memory; nothing reads it
CODES = {torch.int8: (0, 8), torch.int32: (0, 32), torch.float32: (2, 32), torch.bfloat16: (4, 16)}


class DLTensor(ctypes.Structure):
    """The C structure of a tensor in the DLPack protocol, with its manager's fields, which stay empty."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class OnGpu:
    """Hands out a CPU tensor's shape and strides as those of a tensor on a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        shape, strides = ((ctypes.c_int64 * tensor.ndim)(*x) for x in (tensor.shape, tensor.stride()))
        device = (ctypes.c_int32 * 2)(2, 0)
        self._made = DLTensor(
            ADDRESS, device, tensor.ndim, *CODES[tensor.dtype], 1, shape, strides, 0, None, None
        )
        self._kept = shape, strides

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, **_: Any) -> object:
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return capsule(ctypes.addressof(self._made), b"dltensor", None)


def load_runtime(folder: Path, spare: Path) -> None:
    """Loads a CUDA runtime without a driver: every function that the kernels name fails."""
    names = {
        x.decode()
        for file in folder.glob("*.so")
        for x in re.findall(rb"\0(cuda[A-Z]\w+)", file.read_bytes())
    }
    lines = [
        f"int {name}(void) {{ return {NO_DRIVER}; }}" for name in sorted(names) if "GetError" not in name
    ]
    lines += [
        f'const char *{name}(int code) {{ return "no driver"; }}' for name in names if "GetError" in name
    ]
    source, library = spare / "runtime.c", spare / "libcudart_stub.so"
    source.write_text("\n".join(lines), encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    ctypes.CDLL(str(library))


def to_gpu(argument: Any, kept: list[OnGpu]) -> Any:
    import tvm_ffi

    if isinstance(argument, tuple | list):
        return tuple(to_gpu(x, kept) for x in argument)
    if not isinstance(argument, Tensor):
        return argument
    kept.append(OnGpu(argument))
    return tvm_ffi.from_dlpack(kept[-1])


def call(kernels: exported.Exported, name: str, tokens: int) -> dict[str, str]:
    """Returns the error of each function of a kernel on tensors of so many tokens."""
    kind, dtype, width, *pattern = name.split("-")
    heads, tile, errors, kept = 3, None, {}, []
    query, key, value, out, grad, *grads = (
        torch.zeros(1, tokens, heads, int(width), dtype=getattr(torch, dtype)) for _ in range(8)
    )
    lse, lists = torch.zeros(1, heads, tokens), None
    if pattern != ["dense"]:
        tile = tuple(map(int, pattern[0].split("x")))
        rows, masks = -(-tokens // tile[0]), heads if pattern[-1] == "heads" else 1
        counts, numbers = (torch.zeros(1, masks, rows, *x, dtype=torch.int32) for x in ((), (rows,)))
        table = torch.zeros(masks, 2 * rows, 2 * rows, dtype=torch.int8) if "mixed" in pattern else None
        lists = Lists(counts, numbers, counts, numbers[..., :1], tile, table, 64)
    find = kernels._function

    def tried(name: str, step: str) -> Any:
        function = find(name, step)

        def attempt(*arguments: Any) -> None:
            try:
                function(*to_gpu(arguments, kept))
            except Exception as error:
                errors[step] = f"{type(error).__name__}: {error}"

        return attempt

    kernels._function = tried
    try:
        if kind == "forward":
            kernels.forward([query, key, value], out, lse, 0.1, lists)
        else:
            kernels.backward([query, key, value, out, grad, lse], lse, grads, 0.1, lists)
    finally:
        del kernels._function
    return errors


def main() -> None:
    folder, *lengths = sys.argv[1:]
    for hidden in ("cutlass", "flash_attn", "quack"):
        sys.modules[hidden] = None
    with TemporaryDirectory() as spare:
        load_runtime(Path(folder), Path(spare))
        kernels = exported.load(Path(folder))
        for name in kernels._kernels:
            for tokens in map(int, lengths or ["1000"]):
                for step, error in call(kernels, name, tokens).items():
                    print(f"{name} {step} {tokens}: {error[-200:]}")


if __name__ == "__main__":
    main()
