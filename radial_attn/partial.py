"""Computes attention over a part of the keys, with its log-sum-exp: a ring of devices adds up such parts."""

import math

import torch
from torch import Tensor

from .block_mask import Part
from .dispatch import BACKENDS, kernel, obstacle, order
from .kernels.contract import DTYPES, Call

Partial = tuple[Tensor, Tensor]


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    part: Part,
    *,
    backend: str = "auto",
    text_lengths: Tensor | None = None,
    scale: float | None = None,
) -> Partial:
    """Computes attention of some rows over some keys, and its log-sum-exp.

    Args:
        query: `[B, Q, H, D]`; key, value: `[B, K, H, D]`, with its dtype and device.
        part: the kept blocks, of Q and K tokens.
        backend: "blocks", "triton", "flash4" or "reference"; "auto" takes the first in the device's order
            that can.
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all. The rest of the text is
            neither attended nor computed.
        scale: factor on the scores, `D ** -0.5` by default.

    Returns:
        `[B, Q, H, D]` in the dtype of `query`, and float32 `[B, Q, H]`; zeros and -inf in rows that keep no
        key.

    Raises:
        ValueError: tensors, part and backend that do not fit, or gradients.
        ImportError: something that the backend needs is missing.
    """
    _check(query, key, value, part, text_lengths)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    call = Call(query.device, query.dtype, query.shape[-1], gradients, partial=True)
    name = _choose(call) if backend == "auto" else _require(backend, call)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    lengths = None if text_lengths is None or not part.text else text_lengths
    return kernel(name).partial_attention(query, key, value, part, text_lengths=lengths, scale=scale)


def merge(left: Partial, right: Partial) -> Partial:
    """Merges attention over two sets of keys, in the dtype of the left output, which is best float32.

    A row without keys on one side takes the other side. Without keys on both it stays zeros and -inf.
    """
    (out, lse), (more, added) = left, right
    # exp(added) / (exp(lse) + exp(added)); if neither row has keys, both are -inf
    weight = torch.sigmoid(added - lse).masked_fill(added == -math.inf, 0)
    merged = torch.lerp(out, more.to(out.dtype), weight.to(out.dtype).unsqueeze(-1))
    return merged, torch.logaddexp(lse, added)


def _choose(call: Call) -> str:
    for name in order(call.device):
        if obstacle(name, call) is None:
            return name
    reason = obstacle("blocks", call)
    raise ValueError(f"no backend serves this call: blocks {reason}")


def _require(backend: str, call: Call) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    reason = obstacle(backend, call)
    if reason is None:
        return backend
    error = ImportError if reason.startswith("needs ") else ValueError
    plain = Call(call.device, call.dtype, call.width, False, partial=True)
    served = [name for name in BACKENDS[1:] if obstacle(name, plain) is None]
    raise error(f"backend {backend!r} {reason}; allowed here: auto, {', '.join(served)}")


def _check(query: Tensor, key: Tensor, value: Tensor, part: Part, text_lengths: Tensor | None) -> None:
    if query.ndim != 4 or 0 in query.shape or query.dtype not in DTYPES:
        raise ValueError(
            f"query must be [B, Q, H, D], not empty, of {DTYPES}, got {list(query.shape)} {query.dtype}"
        )
    batch, rows, heads, width = query.shape
    keys = key.shape[1] if key.ndim == 4 else 0
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != (batch, keys, heads, width) or keys == 0:
            raise ValueError(
                f"{name} must be [{batch}, K, {heads}, {width}], K as in key, got {list(tensor.shape)}"
            )
        if (tensor.dtype, tensor.device) != (query.dtype, query.device):
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device}, got {tensor.dtype} on {tensor.device}"
            )
    wanted, shape = [-(-count // part.block_size) for count in (rows, keys)], list(part.blocks.shape)
    if shape not in (wanted, [heads, *wanted]):
        raise ValueError(
            f"blocks must be {wanted} or {[heads, *wanted]} for {rows} rows and {keys} keys in blocks of "
            f"{part.block_size}, got {shape}"
        )
    if part.row_text > rows or part.key_text > keys:
        raise ValueError(
            f"text must be at most the {rows} rows and {keys} keys, got {part.row_text} and {part.key_text}"
        )
    if text_lengths is not None and tuple(text_lengths.shape) != (batch,):
        raise ValueError(f"text_lengths must be int64 [{batch}], got {list(text_lengths.shape)}")
