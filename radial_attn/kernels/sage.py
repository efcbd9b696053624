"""Runs SageAttention: scores from int8, sparse masks through SpargeAttn or sparse_sageattn; no gradients.

A kernel block is either computed or skipped, so a library takes a mask only if each of its kernel blocks lies
in mask blocks of one kind. Anything else raises an error that says what to change. Padded text is cut off,
sample by sample. Dense masks, and `dense`, which models may call, go to the library sageattention.
It follows the signatures and block shapes of SpargeAttn bfd980b, sparse_sageattn f8c55eb, and sageattention
1.0.6, 2.0.1 and 2.2.0.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask
from .contract import HALF, Needs

SPARSE = ("spas_sage_attn", "sparse_sageattn")
INSTALL = "pip install sageattention==1.0.6, or SpargeAttn from https://github.com/thu-ml/SpargeAttn"
KEY_BLOCK = 64  # keys a block in sageattention 1 and sparse_sageattn; both count missing keys as zeros
LEAST_TOKENS = 128  # fewest that spas_sage_attn takes
SKIP_NOTHING = 1e6  # spas_sage_attn leaves out weights this many powers of two below the largest so far
NEEDS = Needs(
    devices=("cuda",),
    dtypes=HALF,
    widths=(64, 128),
    backward=(),
    modules=("|".join((*SPARSE, "sageattention")),),
    install=INSTALL,
    capability=(8, 0),
    exact=False,
    also=lambda call: None if call.mask is None else choose(call.mask, call.device)[1] or None,
)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Computes attention over the kept blocks of `mask`; leaves all tensors, `[B, S, H, D]`, unchanged.

    Rows of padded text and rows without any key are zeros.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.

    Raises:
        ImportError: no library for this mask is installed.
        ValueError: a scale that is not positive; a mask or a text length that the installed library cannot
            take exactly.
    """
    if scale <= 0:
        raise ValueError(f"backend 'sage' takes a positive scale, got {scale}")
    run = torch.compiler.disable(_attention)
    return run(query, key, value, mask, text_lengths=text_lengths, scale=scale)


def dense(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Computes dense attention, `[B, S, H, D]`, through sageattention; leaves the inputs unchanged.

    Args:
        scale: factor on the scores, `D ** -0.5` by default; positive.

    Raises:
        ImportError: sageattention is missing.
        ValueError: a length that the installed version does not mask, or a scale that is not positive.
    """
    if find_spec("sageattention") is None:
        raise ImportError("dense attention with 'sage' needs sageattention: pip install sageattention")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"backend 'sage' takes a positive scale, got {scale}")
    return torch.compiler.disable(_dense)(query, key, value, scale)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, text_lengths: Tensor | None, scale: float
) -> Tensor:
    library, reason = mask.cached(("sage library", query.device), lambda: choose(mask, query.device))
    if library is None:
        raise (ImportError if reason.startswith("needs ") else ValueError)(f"backend 'sage' {reason}")
    run = partial(_dense if library == "sageattention" else partial(_sparse, library, mask), scale=scale)
    if text_lengths is None:
        return run(query, key, value)
    out = query.new_zeros(query.shape)
    for sample, count in enumerate((text_lengths + mask.grid.video_tokens).tolist()):
        part = slice(sample, sample + 1)
        out[part, :count] = run(*(x[part, :count] for x in (query, key, value)))
    return out


def choose(mask: BlockMask, device: torch.device) -> tuple[str | None, str]:
    """Returns the library that takes a mask, or None and why not: "needs ..." if none is installed."""
    names = ("sageattention",) if mask.is_dense else ()
    names = (*names, *SPARSE)
    installed = [name for name in names if find_spec(name) is not None]
    if not installed:
        return None, f"needs {' or '.join(names)}: {INSTALL}"
    reasons = [_objection(name, mask, device) for name in installed]
    for name, reason in zip(installed, reasons, strict=True):
        if reason is None:
            return name, ""
    return None, "; ".join(reasons)


def _objection(library: str, mask: BlockMask, device: torch.device) -> str | None:
    """Says why an installed library cannot take a mask exactly; None if it can."""
    if library == "sageattention":
        return _unmasked(mask.grid.tokens)
    rows, columns = block_shape(library, device)
    if kernel_blocks(mask, rows, columns) is None:
        return (
            f"with {library} computes blocks of {rows} x {columns} tokens, which this mask with "
            f"block_size={mask.block_size} splits: make it with block_size={max(rows, columns)}"
        )
    return _length_objection(library, mask.grid.tokens)


def _length_objection(library: str, tokens: int) -> str | None:
    """Says why a sparse library is not exact at a length of the sequence; None if it is."""
    if library == "spas_sage_attn" and tokens < LEAST_TOKENS:
        return f"with {library} takes {LEAST_TOKENS} tokens or more, got {tokens}"
    if library == "sparse_sageattn" and tokens % KEY_BLOCK:
        return (
            f"with {library} takes multiples of {KEY_BLOCK} tokens, got {tokens} without padded text: "
            "install spas_sage_attn, which takes any"
        )
    return None


def block_shape(library: str, device: torch.device) -> tuple[int, int]:
    """Returns the query and key tokens of a kernel block."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return (64, 128) if hopper and library == "spas_sage_attn" else (128, 64)


def kernel_blocks(mask: BlockMask, rows: int, columns: int) -> Tensor | None:
    """Converts the mask to blocks of `rows` x `columns` tokens, bool `[H or 1, Q, K]` on the CPU.

    Returns None if a kernel block would hold mask blocks of both kinds.
    """

    def build() -> Tensor | None:
        blocks: Tensor | None = mask.blocks.view(-1, *mask.blocks.shape[-2:])
        for dim, wanted in ((1, rows), (2, columns)):
            blocks = None if blocks is None else _resized(blocks, dim, mask.block_size, wanted)
        if blocks is None:
            return None
        return blocks[:, : mask.grid.num_blocks(rows), : mask.grid.num_blocks(columns)]

    return mask.cached(("sage blocks", rows, columns), build)


def _resized(blocks: Tensor, dim: int, size: int, wanted: int) -> Tensor | None:
    """Resizes blocks from `size` to `wanted` tokens along a dimension; None if one would hold both kinds."""
    if size >= wanted:
        return blocks.repeat_interleave(size // wanted, dim)
    ratio = wanted // size
    last = blocks.narrow(dim, blocks.shape[dim] - 1, 1)
    groups = torch.cat([blocks, *[last] * (-blocks.shape[dim] % ratio)], dim).unflatten(dim, (-1, ratio))
    first = groups.narrow(dim + 1, 0, 1)
    return first.squeeze(dim + 1) if bool((groups == first).all()) else None


def _sparse(
    library: str, mask: BlockMask, query: Tensor, key: Tensor, value: Tensor, *, scale: float
) -> Tensor:
    """Runs a sparse library on the first `N` tokens of the sequence; `query` is `[B, N, H, D]`."""
    batch, tokens, heads, _ = query.shape
    reason = _length_objection(library, tokens)
    if reason is not None:
        raise ValueError(f"backend 'sage' {reason}")
    rows, columns = block_shape(library, query.device)
    table, empty = _tables(mask, rows, columns, tokens, query.device)
    table = table.expand(batch, heads, -1, -1).contiguous()
    with torch.cuda.device_of(query):
        call = _spas_sage_attn if library == "spas_sage_attn" else _sparse_sageattn
        out = call(*_rows_contiguous(query, key, value), table, scale)
    return out if empty is None else out.masked_fill(empty, 0)


def _tables(
    mask: BlockMask, rows: int, columns: int, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Returns the first `tokens` of a mask as int8 `[H or 1, Q, K]`, and its rows without keys or None.

    These rows are bool `[tokens, H or 1, 1]`; a kernel may leave them unwritten.
    """
    blocks = kernel_blocks(mask, rows, columns)
    whole = mask.cached(("sage table", rows, columns, device), lambda: blocks.to(device, torch.int8))
    counts = -(-tokens // rows), -(-tokens // columns)

    def find_empty() -> Tensor | None:
        empty = ~blocks[:, : counts[0], : counts[1]].any(dim=-1)
        if not empty.any():
            return None
        return empty.repeat_interleave(rows, dim=1)[:, :tokens].T.unsqueeze(-1).to(device)

    empty = mask.cached(("sage empty rows", rows, columns, tokens, device), find_empty)
    return whole[:, : counts[0], : counts[1]], empty


def _spas_sage_attn(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    return block_sparse_sage2_attn_cuda(
        query, key, value, mask_id=table, scale=scale, pvthreshd=SKIP_NOTHING, tensor_layout="NHD"
    )


def _sparse_sageattn(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> Tensor:
    """Puts a scale other than the built-in `D ** -0.5` into the query, in float32, and runs the library."""
    from sparse_sageattn import sparse_sageattn

    dtype, ratio = query.dtype, scale * math.sqrt(query.shape[-1])
    if not math.isclose(ratio, 1):
        query = query.float() * ratio
    return sparse_sageattn(query, key, value, mask_id=table, tensor_layout="NHD").to(dtype)


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Runs `dense` after its checks; versions differ in how they handle keys that do not fill a block."""
    reason = _unmasked(key.shape[1])
    if reason is not None:
        raise ValueError(f"backend 'sage' {reason}")
    from sageattention import sageattn

    inputs = _rows_contiguous(query, key, value)
    with torch.cuda.device_of(query):
        if _version() == 1:
            return _dense_version_1(sageattn, *inputs, scale)
        return sageattn(*inputs, tensor_layout="NHD", sm_scale=scale)


def _version() -> int:
    """Reads the major version of sageattention from its signature: the first returns no log-sum-exp."""
    from sageattention import sageattn

    return 2 if "return_lse" in inspect.signature(sageattn).parameters else 1


def _unmasked(tokens: int) -> str | None:
    """Says why 2.0 or 2.1 cannot take a length: its Triton kernel has no `attn_mask` for missing keys."""
    if tokens % KEY_BLOCK == 0 or _version() == 1:
        return None
    import sageattention

    kernel = sageattention.sageattn_qk_int8_pv_fp16_triton
    if "attn_mask" in inspect.signature(kernel).parameters:
        return None
    needed = f"takes multiples of {KEY_BLOCK} tokens, got {tokens}"
    return f"with this sageattention {needed}: install 2.2, which takes any"


def _dense_version_1(
    sageattn: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Runs version 1, which has no mask: keys that fill up the last block take part and are divided out.

    They are the mean key: zeros, once the mean is subtracted from all keys, which softmax does not notice.
    With N keys and P added ones, their share of a row is P exp(mean s) / (sum exp(s) + P exp(mean s)), at
    most P / (N + P) since exp is convex. So it is safe to divide by the rest, which a second call returns.
    """
    dtype, added = query.dtype, -key.shape[1] % KEY_BLOCK
    if added:
        query, key, value = query.float(), key.float(), value.float()  # 16 bits are too few for the rest
    key = key - key.mean(dim=1, keepdim=True)  # the library would do it in the caller's memory
    ones = torch.ones_like(value)
    key, value, ones = (F.pad(x, (0, 0, 0, 0, 0, added)) for x in (key, value, ones))
    run = partial(sageattn, query, key, tensor_layout="NHD", sm_scale=scale, smooth_k=False)
    out = run(value)
    return out if added == 0 else (out / run(ones)).to(dtype)


def _rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
