"""Runs block-sparse attention in C++ on CPUs, in float32: attention.cpp, compiled on first use.

It is one operator for autograd and torch.compile, `radial_attn::cpp_attention`.
"""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...block_mask import BlockMask, csr_of
from ..contract import Call, Needs
from ..operator import register
from .build import load_library

SOURCE = Path(__file__).with_name("attention.cpp")


@torch.compiler.assume_constant_result
def _problem() -> str | None:
    library = load_library(SOURCE)
    return f"needs {library}" if isinstance(library, str) else None


def _objection(call: Call) -> str | None:
    if call.dtype == torch.bfloat16 and _capabilities().get("amx_bf16"):
        return "computes in float32, slower than `blocks` on a processor with bfloat16 tiles (AMX)"
    return _problem()


@torch.compiler.assume_constant_result
def _capabilities() -> Mapping[str, object]:
    return getattr(torch.cpu, "get_capabilities", dict)()


NEEDS = Needs(devices=("cpu",), far_field=True, far_backward=("cpu",), also=_objection)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Computes attention over the kept blocks of `mask`; all tensors `[B, S, H, D]` on the CPU.

    Copies 16-bit tensors to float32.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
    """
    valid = None if text_lengths is None else text_lengths + mask.grid.video_tokens
    wide = (x.float() for x in (query, key, value))
    return cpp_attention(*wide, mask.blocks, mask.block_size, valid, scale)[0].to(query.dtype)


def with_far_field(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    far: Any,
    *,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, S, H, D]` and float32 log-sum-exp `[B, S, H]`; `far`: a `Far` of far_field.py."""
    valid = None if text_lengths is None else text_lengths + mask.grid.video_tokens
    wide = tuple(x.float() for x in (query, key, value))
    first = None
    if far.slope is not None:
        first = scale * torch.einsum("bshd,bhde->bshe", wide[0], far.slope)
    means = [x if x is None else x.contiguous() for x in (far.keys, far.values, far.bias, first)]
    out, lse = _forward(wide, mask.blocks, mask.block_size, valid, scale, means)
    return out.to(query.dtype), lse


def backward(  # noqa: PLR0917
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    *,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Returns gradients through the kept blocks; output and log-sum-exp `[B, S, H]` may cover more keys."""
    valid = None if text_lengths is None else text_lengths + mask.grid.video_tokens
    wide = (x.float() for x in (grad, query, key, value, out))
    grads = cpp_attention_backward(*wide, lse, mask.blocks, mask.block_size, valid, scale)
    return tuple(x.to(query.dtype) for x in grads)


def _forward(  # noqa: PLR0917
    tensors: tuple[Tensor, ...],
    blocks: Tensor,
    block_size: int,
    valid: Tensor | None,
    scale: float,
    means: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor]:
    """Calls the library; `means`: keys, values, bias and first-order term of a far field."""
    query, call = tensors[0], _Call(tensors, blocks, block_size, valid)
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:3])
    work = call.workspace(backward=False)
    far = None, None
    if means:
        sizes = means[0].shape[1], *means[2].shape[:2]
        far = (ctypes.c_void_p * 4)(*(x if x is None else x.data_ptr() for x in means)), _numbers(sizes)
    results = map(_pointer, (work, out, lse))
    call.library.radial_forward(*call.inputs, *call.mask, ctypes.c_float(scale), *results, *far)
    return out, lse


@torch.library.custom_op("radial_attn::cpp_attention", mutates_args=())
def cpp_attention(  # noqa: PLR0917 (an operator's schema is positional)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, S, H, D]` and log-sum-exp, float32 `[B, S, H]`, of attention under a block mask.

    Args:
        blocks: bool `[Q, K]` or `[H, Q, K]` on the CPU; its lists are cached on this tensor.
        valid: tokens of each sample that count, int64 `[B]`, or None for all.
    """
    return _forward((query, key, value), blocks, block_size, valid, scale)


@torch.library.custom_op("radial_attn::cpp_attention_backward", mutates_args=())
def cpp_attention_backward(  # noqa: PLR0917
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor,
    block_size: int,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of query, key and value, `[B, S, H, D]`; arguments are as in `cpp_attention`."""
    call = _Call((grad, query, key, value, out), blocks, block_size, valid)
    grads = tuple(query.new_empty(query.shape) for _ in range(3))
    work, lse = call.workspace(backward=True), lse.contiguous()
    call.library.radial_backward(
        *call.inputs, _pointer(lse), *call.mask, ctypes.c_float(scale), _pointer(work), _pointers(grads)
    )
    return grads


register(cpp_attention, cpp_attention_backward)


class _Call:
    """Holds the arguments of a call as attention.cpp takes them, and keeps alive what they point to."""

    def __init__(
        self, tensors: tuple[Tensor, ...], blocks: Tensor, block_size: int, valid: Tensor | None
    ) -> None:
        self.library = load_library(SOURCE)
        batch, length, heads, width = tensors[0].shape
        lists = len(blocks) if blocks.ndim == 3 else 1
        sizes = batch, length, heads, width, block_size, lists, torch.get_num_threads()
        self._sizes, limits = _numbers(sizes), [length] * batch if valid is None else valid.tolist()
        self._tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
        strides = [step for x in self._tensors for step in x.stride()[:3]]
        self.inputs = _pointers(self._tensors), _numbers(strides)
        if "csr" not in blocks.__dict__:  # made once for each mask
            blocks.__dict__["csr"] = csr_of(blocks)
        self.mask = self._sizes, *map(_pointer, blocks.__dict__["csr"]), _numbers(limits)

    def workspace(self, *, backward: bool) -> Tensor:
        """Allocates the memory in which the call works."""
        count = self.library.radial_workspace
        count.restype = ctypes.c_int64
        return self._tensors[0].new_empty(count(self._sizes, int(backward)))


def _numbers(numbers: Iterable[int]) -> ctypes.Array:
    numbers = tuple(numbers)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _pointers(tensors: Iterable[Tensor]) -> ctypes.Array:
    addresses = [x.data_ptr() for x in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)
