"""Compiles the Triton kernels for calls of real sizes without a GPU, by a driver that only names one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from radial_attn import BlockMask
from radial_attn.far_field import Far
from scripts.benchmarks.kernel_sources import BITS, Variant
from scripts.kernel_report import Compiled, examined


class NamedGpu:
    """Replaces the driver by one that names an architecture, such as "sm90", and can launch nothing."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(self.arch[2:]), 32)

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, _device: str) -> int:
        return 0


@contextmanager
def compiling_for(arch: str) -> Iterator[list[tuple[Any, Any]]]:
    """Makes launches compile for an architecture instead; yields the functions and their compiled kernels."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from radial_attn.kernels.triton import configs

    made, run = [], JITFunction.run

    def warm_up(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made.append((function, run(function, *args, grid=grid, warmup=True, **options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", NamedGpu(arch))
        patch.setattr(JITFunction, "run", warm_up)
        patch.setattr(configs, "architecture", lambda _device: arch)
        configs.launch.cache_clear()
        yield made
    configs.launch.cache_clear()


def compiled(arch: str, kind: str, mask: BlockMask, heads: int, width: int) -> list[Compiled]:
    """Compiles what a call of a kind of kernel launches, in bfloat16 with one sample and padded text."""
    from radial_attn.kernels.triton import configs, op, quantized

    shape = 1, mask.grid.tokens, heads, width
    query, key, value = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(3))
    lse = torch.empty(1, heads, shape[1], device="meta")
    counts = torch.empty(1, dtype=torch.int32, device="meta") if mask.grid.text else None
    call = mask.blocks, mask.block_size, mask.grid.video_tokens, counts, width**-0.5
    with compiling_for(arch) as made:
        launch = configs.launch(kind, query.device, width)
        if kind in configs.BACKWARD:
            op.triton_attention_backward._init_fn(query, None, query, key, value, query, lse, *call)
        elif kind in BITS:
            quantized.quantized_attention._init_fn(query, key, value, *call, kind)
        elif kind == "far field":
            lists = op.tables(kind, query, *call[:4])
            op.run_forward((query, key, value), lists, (counts, counts), call[-1], far_of(query, mask))
        else:
            op.triton_attention._init_fn(query, key, value, *call)
    results = []
    for function, kernel in made:
        name = function.fn.__name__.removesuffix("_kernel").replace("_", " ")
        name = kind if name.endswith("forward") else name
        of_tiles = launch if name not in configs.BACKWARD else replace(configs.LAUNCHES[arch][name, width])
        results.append(examined(arch, Variant(name, width, of_tiles), kernel))
    return results


def far_of(query: Tensor, mask: BlockMask) -> Far:
    """Returns a linear far field of the sizes that a call has."""
    batch, _, heads, width = query.shape
    rows, blocks = mask.blocks.shape[-1], -(-mask.grid.video_tokens // mask.block_size)
    means = [query.new_empty(batch, blocks, heads, width) for _ in range(2)]
    bias = query.new_empty(batch, heads, rows, blocks, dtype=torch.float32)
    return Far(*means, bias, query.new_empty(batch, heads, width, width, dtype=torch.float32))
