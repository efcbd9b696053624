"""Compiles the kernels of flash-attn-4 on any machine, through the calls of radial_attn/kernels/flash4.

Tensors are fake: the compiler needs their strides and data types, and one kernel serves all lengths.
"""

import os
import re
import struct
import subprocess
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from radial_attn.kernels.flash4.exported import variant
from radial_attn.kernels.flash4.library import ARCHITECTURE, Library
from radial_attn.kernels.flash4.lists import Lists
from radial_attn.kernels.flash4.op import BACKWARD_TILE, BLACKWELL, HOPPER, SIZES, forward_tile

PROCESSORS = {HOPPER: 132, BLACKWELL: 148}  # multiprocessors; on Hopper these kernels do not depend on them
KINDS = ("forward", "backward")
TOKENS, HEADS = 1000, 3
ELF, CUDA = b"\x7fELF", 190  # how a file begins, and the machine that it names for GPU code


@dataclass(frozen=True)
class Wanted:
    """Says what to compile.

    Attributes:
        kind: of `KINDS`.
        block_size: of the mask; None for attention to all keys.
        heads: whether each head has a mask of its own.
    """

    kind: str
    dtype: torch.dtype
    width: int
    block_size: int | None = None
    heads: bool = False


@dataclass(frozen=True)
class Made:
    """Holds a compiled kernel.

    Attributes:
        name: as in `variant`.
        functions: what the compiler returned for each step, by its name.
        rows: query tokens to which the backward pads its scratch memory; 0 for the forward.
    """

    name: str
    functions: dict[str, Any]
    rows: int


def wanted(
    capability: tuple[int, int], dtypes: list[torch.dtype], widths: list[int], kinds: list[str]
) -> list[Wanted]:
    """Lists every kernel that these calls can ask for; masks of 128 and 256 tokens share theirs."""
    sizes = [size for size in SIZES[capability] if size != 128]
    masks = [(None, False), *product(sizes, (False, True))]
    return [Wanted(*call, *mask) for *call, mask in product(kinds, dtypes, widths, masks)]


def prepare_compiler(capability: tuple[int, int]) -> None:
    """Tells the package to compile for a compute capability; call it before the package is imported."""
    target = "sm_{}{}a".format(*capability)
    os.environ |= {ARCHITECTURE: target, "CUTE_DSL_ARCH": target}
    os.environ["FLASH_ATTENTION_NUM_SMS"] = str(PROCESSORS[capability])
    if capability == BLACKWELL:
        import cutlass.utils

        class Hardware:
            def get_device_multiprocessor_count(self) -> int:
                return PROCESSORS[BLACKWELL]

        cutlass.utils.HardwareInfo = Hardware  # the original asks the driver, even without a GPU


def compile_kernel(call: Wanted, capability: tuple[int, int]) -> Made:
    """Compiles one kernel, after `prepare_compiler`; takes seconds."""
    from flash_attn.cute import interface
    from flash_attn.cute.cache_utils import JITCache

    steps = {
        "forward": {"forward": interface._flash_attn_fwd},
        "backward": {
            "prepare": interface._bwd_preprocess,
            "backward": interface._flash_attn_bwd,
            "finish": interface._bwd_postprocess_convert,
        },
    }[call.kind]
    for function in steps.values():
        function.compile_cache = JITCache()  # never the user's
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = _call(call, capability)
    functions = {}
    for step, function in steps.items():
        ((key, functions[step]),) = function.compile_cache.cache.items()
    rows = key[2] if call.kind == "backward" else 0  # the key of the last step names its tile
    return Made(name, functions, rows)


def _call(call: Wanted, capability: tuple[int, int]) -> str:
    """Calls the package with fake tensors; returns the kernel's name."""
    shape = 1, TOKENS, HEADS, call.width
    query, key, value, out, grad, *grads = (
        torch.empty(shape, dtype=call.dtype, device="cuda") for _ in range(8)
    )
    lse = torch.empty(1, HEADS, TOKENS, device="cuda")
    backward = call.kind == "backward"
    lists = None
    if call.block_size is not None:
        tile = BACKWARD_TILE if backward else forward_tile(capability, call.block_size)
        lists = _lists(call, tile)
    library = Library(capability)
    if backward:
        library.backward([query, key, value, out, grad, lse], None, grads, 0.1, lists)
    else:
        library.forward([query, key, value], out, lse, 0.1, lists)
    return variant(call.kind, query, lists)


def _lists(call: Wanted, tile: tuple[int, int]) -> Lists:
    """Returns lists of a fake mask; those of whole and of mixed tiles differ in width."""
    heads = HEADS if call.heads else 1
    rows, columns = (-(-TOKENS // tokens) for tokens in tile)
    if call.kind == "backward":
        rows, columns = columns, rows

    def make(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="cuda")

    mixed = call.kind == "backward" and call.block_size < tile[0]
    blocks = 2 * -(-TOKENS // tile[0])
    table = make(heads, blocks, blocks, dtype=torch.int8) if mixed else None
    return Lists(
        make(1, heads, rows),
        make(1, heads, rows, columns - 1),
        make(1, heads, rows),
        make(1, heads, rows, columns - 2 if mixed else 1),
        tile,
        table,
        call.block_size,
    )


@dataclass(frozen=True)
class Usage:
    """Holds what GPU code uses: registers and stack bytes of a thread, and instructions by name."""

    registers: int
    stack: int
    instructions: Counter[str]


def gpu_code(function: Any) -> bytes:
    """Returns the GPU code of a compiled function."""
    with NamedTemporaryFile(suffix=".o") as file:
        function.export_to_c(file.name, function_name="kernel")
        content = Path(file.name).read_bytes()
    starts = [match.start() for match in re.finditer(re.escape(ELF), content)]
    (start,) = [start for start in starts if struct.unpack_from("<H", content, start + 18) == (CUDA,)]
    return content[start:]


def usage(code: bytes) -> Usage:
    """Measures GPU code with the programs that Triton brings along."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        read = subprocess.check_output([tools / "cuobjdump", "-res-usage", file.name], text=True)
        command = [tools / "nvdisasm", file.name]
        listing = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    names = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", listing)
    return Usage(
        int(re.search(r"REG:(\d+)", read)[1]), int(re.search(r"STACK:(\d+)", read)[1]), Counter(names)
    )
