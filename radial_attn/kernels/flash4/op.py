"""Runs FlashAttention-4 over the tiles that a mask keeps, forward and backward, on Hopper and Blackwell.

A block of 128 or 256 tokens is whole tiles of the kernels. On Hopper the forward also has tiles of 64; the
backward has only tiles of 128, in which it looks up blocks of 64. Padded text is cut off, sample by sample.
The tile lists (lists.py) are made inside the operators, so a compiled graph holds only the operators.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ...block_mask import BlockMask, Part
from ..contract import HALF, Call, Needs
from ..operator import register
from . import exported, library
from .exported import Exported
from .library import Library
from .lists import Cut, forward_parts, is_dense, make_lists

HOPPER, BLACKWELL = (9, 0), (10, 0)
SIZES = {HOPPER: (64, 128, 256), BLACKWELL: (256,)}  # of a mask's blocks
BACKWARD_TILE = (128, 128)
End = tuple[int, int]  # how many queries and how many keys of a sample count


def objection(call: Call) -> str | None:
    """Says why the kernels do not serve a call on a GPU, in words that follow the backend's name; or None.

    The operators ask again, so inside torch.compile it says nothing.
    """
    if torch.compiler.is_compiling():
        return None
    if call.gradients and torch.are_deterministic_algorithms_enabled():
        return "has no deterministic gradients"
    blocks = () if call.mask is None else (call.mask.blocks, call.mask.block_size)
    return _objection(_capability(call.device), *blocks)


def _objection(capability: tuple[int, int], blocks: Tensor | None = None, block_size: int = 0) -> str | None:
    if capability not in SIZES:
        return "has kernels for compute capability 9.0 and 10.0, got {}.{}".format(*capability)
    folder = exported.folder()
    reason = library.problem() if folder is None else exported.problem(folder, capability)
    if reason is not None:
        return reason
    sizes = SIZES[capability]
    if blocks is None or block_size in sizes or is_dense(blocks):
        return None
    served, on = " or ".join(map(str, sizes)), "{}.{}".format(*capability)
    return f"takes masks with block_size {served} on compute capability {on}, got {block_size}"


NEEDS = Needs(
    devices=("cuda",),
    dtypes=HALF,
    widths=(64, 128),
    modules=("flash_attn|tvm_ffi",),
    install=library.INSTALL,
    partial=True,
    far_backward=("cuda",),
    also=objection,
)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Computes attention over the kept blocks of `mask`; all tensors `[B, S, H, D]` on one GPU.

    Rows of padded text and rows without any key are zeros. A mask that keeps everything runs densely.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.

    Raises:
        ValueError: a scale that is not positive, or a mask or GPU that the kernels do not serve.
        ImportError: neither the package nor exported kernels can be used.
    """
    inputs = _checked((query, key, value), scale)
    shape = mask.blocks, mask.block_size, mask.grid.video_tokens
    return flash4_attention(*inputs, *shape, text_lengths, scale)[0]


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, part: Part, *, text_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, Q, H, D]` and float32 log-sum-exp `[B, Q, H]`, over keys `[B, K, H, D]` on one GPU.

    Arguments and errors are as in `attention`.
    """
    inputs = _checked((query, key, value), scale)
    rows, keys = query.shape[1], key.shape[1]
    ends = [(rows, keys)] * len(query)
    if text_lengths is not None:
        padding = [part.text - length for length in text_lengths.tolist()]
        ends = [(rows - min(x, part.row_text), keys - min(x, part.key_text)) for x in padding]
    out, lse = _run_forward(inputs, part.blocks, part.block_size, ends, scale)
    return out, lse.transpose(1, 2)


def backward(
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
    inputs = *_checked((query, key, value), scale), out, lse.transpose(1, 2).contiguous()
    shape = mask.blocks, mask.block_size, mask.grid.video_tokens
    return flash4_attention_backward(grad, None, *inputs, *shape, text_lengths, scale)


def _checked(tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    if scale <= 0:
        raise ValueError(f"backend 'flash4' takes a positive scale, got {scale}")
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@torch.library.custom_op("radial_attn::flash4_attention", mutates_args=())
def flash4_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    block_size: int,
    video_tokens: int,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, S, H, D]` and log-sum-exp, float32 `[B, H, S]`.

    Args:
        blocks: bool `[Q, K]` or `[H, Q, K]` on the CPU; its tile lists are cached on this tensor.
        video_tokens: position at which the text begins.
        text_lengths: valid text tokens of each sample, int64 `[B]` on the CPU, or None for all.
    """
    ends = _ends(query, video_tokens, text_lengths)
    return _run_forward((query, key, value), blocks, block_size, ends, scale)


@torch.library.custom_op("radial_attn::flash4_attention_backward", mutates_args=())
def flash4_attention_backward(
    grad: Tensor,
    lse_grad: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor,
    block_size: int,
    video_tokens: int,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients of query, key and value, `[B, S, H, D]`, from gradients of output and log-sum-exp.

    `lse_grad` may be None. Further arguments are as in `flash4_attention`.
    """
    kernels = _kernels(query.device, blocks, block_size)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grads = [query.new_empty(query.shape) for _ in range(3)]
    cut = Cut(block_size, (query.shape[1], key.shape[1]), BACKWARD_TILE, transposed=True)
    with torch.cuda.device_of(query):
        for samples, (count, _) in _runs(_ends(query, video_tokens, text_lengths)):
            lists = None if is_dense(blocks) else make_lists(blocks, cut, query.device, (count, count))
            tokens = samples, slice(count)
            rows = samples, slice(None), slice(count)
            kernels.backward(
                [*(x[tokens] for x in (query, key, value, out, grad)), lse[rows]],
                None if lse_grad is None else lse_grad[rows],
                [x[tokens] for x in grads],
                scale,
                lists,
            )
            for x in grads:
                x[samples, count:] = 0
    return tuple(grads)


register(flash4_attention, flash4_attention_backward, heads_first=True)


def _run_forward(
    inputs: Sequence[Tensor], blocks: Tensor, block_size: int, ends: Sequence[End], scale: float
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, Q, H, D]` and log-sum-exp, float32 `[B, H, Q]`, of the tokens that count."""
    query, key, value = inputs
    kernels = _kernels(query.device, blocks, block_size)
    tile = forward_tile(_capability(query.device), block_size)
    cut = Cut(block_size, (query.shape[1], key.shape[1]), tile)
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.transpose(1, 2).shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(query):
        for samples, (count, keys) in _runs(ends):
            rows = count if keys else 0
            for part, lists in forward_parts(blocks, cut, (rows, keys), query.device):
                tensors = query[samples, part], key[samples, :keys], value[samples, :keys]
                kernels.forward(tensors, out[samples, part], lse[samples, :, part], scale, lists)
            out[samples, rows:] = 0
            lse[samples, :, rows:] = -torch.inf
    return out, lse


def forward_tile(capability: tuple[int, int], block_size: int) -> tuple[int, int]:
    """Returns the queries and keys of a tile of the forward kernel for a mask's block size."""
    if capability == BLACKWELL:
        return 256, 128
    return (64, 64) if block_size == 64 else (128, 128)


def _kernels(device: torch.device, blocks: Tensor, block_size: int) -> Library | Exported:
    """Returns what runs the kernels; raises if nothing can, or if the kernels do not serve the mask."""
    capability = _capability(device)
    reason = _objection(capability, blocks, block_size)
    if reason is not None:
        error = ImportError if reason.startswith("needs ") else ValueError
        raise error(f"backend 'flash4' {reason}")
    folder = exported.folder()
    return Library(capability) if folder is None else exported.load(folder)


def _capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability of a GPU; Hopper's for plans on a machine without one."""
    known = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if known else HOPPER


def _ends(query: Tensor, video_tokens: int, text_lengths: Tensor | None) -> list[End]:
    """Returns how many queries and keys of each sample count."""
    if text_lengths is None:
        return [(query.shape[1],) * 2] * len(query)
    return [(video_tokens + length,) * 2 for length in text_lengths.tolist()]


def _runs(ends: Sequence[End]) -> Iterator[tuple[slice, End]]:
    """Yields samples that follow each other and have the same end, and that end."""
    start = 0
    for end, samples in groupby(ends):
        stop = start + len(list(samples))
        yield slice(start, stop), end
        start = stop
