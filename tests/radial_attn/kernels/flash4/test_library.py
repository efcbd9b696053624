"""The package flash-attn-4 as it is installed: its signatures, its validators, and what it hands its kernels.

    python -m venv flash4 && flash4/bin/pip install -r requirements.txt '.[flash4]'
    flash4/bin/python -m pytest tests/radial_attn/kernels/flash4

Its Python code runs on fake tensors of a GPU, so these tests need none. Without the package they are skipped.
"""

import inspect
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from radial_attn import TokenGrid
from radial_attn.kernels.flash4 import exported, library, lists, op
from tests.support import flash4_emulation
from tests.support.attention_cases import make_mask

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"flash4 {library.problem()}")
GRID = TokenGrid(5, 10, 10, text=101)
MASKS = [(None, False), (64, False), (64, True), (128, False), (128, True), (256, True)]


class Recorder(dict):
    """Stands for the package's store of compiled kernels: notes keys and arguments, and runs nothing."""

    def __init__(self, calls: list, step: str) -> None:
        super().__init__()
        self.calls, self.step = calls, step

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: tuple):
        return lambda *arguments: self.calls.append((self.step, key, arguments))


@pytest.fixture
def calls(monkeypatch):
    """Yields what the package hands to its kernels, while tensors are fake and on a GPU that is a Hopper."""
    from flash_attn.cute import interface

    monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_90a")
    monkeypatch.setenv("FLASH_ATTENTION_NUM_SMS", "132")
    interface._get_device_arch.cache_clear()
    library.table_lookup.cache_clear()
    steps = {"forward": "_flash_attn_fwd", "prepare": "_bwd_preprocess", "backward": "_flash_attn_bwd"}
    noted = []
    for step, name in (steps | {"finish": "_bwd_postprocess_convert"}).items():
        monkeypatch.setattr(getattr(interface, name), "compile_cache", Recorder(noted, step))
    monkeypatch.setattr(interface, "is_fake_mode", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield noted
    interface._get_device_arch.cache_clear()
    library.table_lookup.cache_clear()


class Given(NamedTuple):
    """Fake arguments of a call: tensors `[B, S, H, D]` with the log-sum-exp, gradients, and lists."""

    tensors: list[Tensor]
    grads: list[Tensor]
    lists: lists.Lists | None


def given(kind: str, block_size: int | None, heads: bool, *, batch: int = 1, width: int = 64) -> Given:
    tensors = [
        torch.empty(batch, GRID.tokens, 3, width, dtype=torch.bfloat16, device="cuda") for _ in range(8)
    ]
    lse = torch.empty(batch, 3, GRID.tokens, device="cuda")
    if block_size is None:
        return Given([*tensors[:5], lse], tensors[5:], None)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        mask = make_mask(GRID, block_size, 3 if heads else None)
        tile = op.BACKWARD_TILE if kind == "backward" else op.forward_tile(op.HOPPER, block_size)
        cut = lists.Cut(block_size, (GRID.tokens,) * 2, tile, transposed=kind == "backward")
        made = lists.make_lists(mask.blocks, cut, torch.device("cpu"))
    fake = {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        for name, x in vars(made).items()
        if isinstance(x, Tensor)
    }
    return Given([*tensors[:5], lse], tensors[5:], lists.Lists(**(vars(made) | fake)))


def call(kernels, kind: str, arguments: Given) -> None:
    query, key, value, out, _, lse = arguments.tensors
    if kind == "forward":
        kernels.forward([query, key, value], out, lse, 0.1, arguments.lists)
    else:
        kernels.backward(arguments.tensors, None, arguments.grads, 0.1, arguments.lists)


def test_signatures_are_those_of_the_emulation():
    from flash_attn.cute import block_sparsity, interface

    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        kept, promised = (inspect.signature(getattr(x, name)) for x in (interface, flash4_emulation))
        assert set(promised.parameters) <= set(kept.parameters)
    real, emulated = (x.BlockSparseTensorsTorch for x in (block_sparsity, flash4_emulation))
    assert real._fields == emulated._fields


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("block_size", "heads"), MASKS)
def test_the_validators_take_the_lists_and_the_kernel_gets_them(calls, kind, batch, block_size, heads):
    arguments = given(kind, block_size, heads, batch=batch, width=128)
    call(library.Library(op.HOPPER), kind, arguments)
    (handed,) = [handed for step, _, handed in calls if step == kind]
    sparse = handed[14 if kind == "forward" else 20]
    if block_size is None:
        assert sparse is None
        return
    tile = (64, 64) if (kind, block_size) == ("forward", 64) else (128, 128)
    assert arguments.lists.tile == tile
    wanted = [x for x in vars(arguments.lists).values() if isinstance(x, Tensor)][:4]
    got = [sparse[2], sparse[3], sparse[0], sparse[1]]
    assert all(
        x.shape[2:] == y.shape[2:] and x.shape[:2] == (batch, 3) for x, y in zip(got, wanted, strict=True)
    )
    tables = handed[15 if kind == "forward" else 19].tensors
    assert (tables is not None) == (arguments.lists.table is not None)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("block_size", "heads"), MASKS)
def test_exported_kernels_get_what_the_package_hands_to_its_own(calls, kind, width, block_size, heads):
    arguments = given(kind, block_size, heads, width=width)
    call(library.Library(op.HOPPER), kind, arguments)
    own = {step: shape_of(handed) for step, _, handed in calls}
    rows = next((key[2] for step, key, _ in calls if step == "finish"), 0)
    name = exported.variant(kind, arguments.tensors[0], arguments.lists)
    kernels = exported.Exported(Path(), {name: {"rows": rows}}, op.HOPPER)
    taken = {}
    for step in own:
        kernels._functions[name, step] = lambda *handed, step=step: taken.update({step: shape_of(handed)})
    call(kernels, kind, arguments)
    assert taken == own


def shape_of(argument):
    """Describes an argument: tensors by shape, strides and data type, lists and tuples by their contents."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    if isinstance(argument, tuple | list):
        return tuple(shape_of(x) for x in argument)
    return argument


def test_an_architecture_that_drops_lists_takes_none_of_our_tiles(calls):
    """For 8.x the package hands lists to no kernel; tiles that it did not shape for 8.x end in an error."""
    for block_size in (64, 128):
        with pytest.raises(ValueError, match=r"tile_n|a multiple of 128"):
            call(library.Library((8, 0)), "forward", given("forward", block_size, False))
