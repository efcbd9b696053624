"""Defines `radial_attention`, one operator over all backends: it validates, chooses and dispatches.

`python -m radial_attn backends` prints which backends are installed and usable here.
"""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .block_mask import BlockMask
from .dispatch import BACKENDS, kernel, obstacle, order
from .far_field import far_attention
from .kernels.contract import DTYPES, FAR_FIELDS, QUANTIZE, Call


def radial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    backend: str = "auto",
    text_lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    quantize: str | None = None,
    far_field: str = "none",
    far_bias: Tensor | None = None,
) -> Tensor:
    """Computes attention of every token over the key blocks that `mask` keeps for its block.

    Args:
        query, key, value: `[B, S, H, D]`, video tokens first, text after; float32, bfloat16 or float16.
        mask: block mask with `mask.grid.tokens == S`, shared by all heads or with one pattern per head.
        backend: one of `BACKENDS`; "auto" reports its choice once per shape to the logger "radial_attn".
        text_lengths: valid text tokens of each sample, integers `[B]` (the valid ones come first), or None
            for all. Keys of padded text are not attended; output rows of padded text are zeros. Inside
            torch.compile the range is not checked.
        scale: factor on the scores, `D ** -0.5` by default.
        quantize: "int8" or "fp8" for products of 8-bit operands, on backends that offer it; no gradients.
        far_field: how a dropped block takes part: "none"; "mean" as one key, the mean of its video tokens,
            with their weight; "linear" also with the first-order term of far_field.py. Text is never pooled.
        far_bias: added to the logarithm of a dropped block's weight, `[B, H, Q, K]` of the K blocks with
            video, each of them or 1; None for no correction. It gets no gradients.

    Returns:
        `[B, S, H, D]` in the dtype of `query`. Under autocast for their device the inputs are first cast to
        its dtype, as in SDPA, and the result has that dtype.

    Raises:
        ValueError: an unknown backend, or tensors, mask, text_lengths and backend that do not fit together.
            A named backend runs or raises; only "auto" looks for another.
        ImportError: something that the backend needs is missing; the message says how to install it.
    """
    query, key, value = _autocast(query, key, value)
    _check_tensors(query, key, value, mask)
    _check_choice("backend", backend, BACKENDS)
    _check_choice("quantize", quantize, QUANTIZE)
    _check_choice("far_field", far_field, FAR_FIELDS)
    _check_far_bias(far_bias, far_field, query, mask)
    lengths = _check_text_lengths(text_lengths, query.shape[0], mask)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if far_field != "none" and not torch.compiler.is_compiling() and mask.is_dense:
        far_field = "none"
    call = Call(query.device, query.dtype, query.shape[-1], gradients, mask, quantize, far_field=far_field)
    if backend == "auto":
        backend = choose_backend(call)
        report_choice(backend, query, mask)
    else:
        require(backend, call)
    if far_field != "none":
        far = far_field, far_bias
        return far_attention(
            kernel(backend), (query, key, value), mask, far, text_lengths=lengths, scale=scale
        )
    options = {} if quantize is None else {"quantize": quantize}
    return kernel(backend).attention(query, key, value, mask, text_lengths=lengths, scale=scale, **options)


def choose_backend(call: Call) -> str:
    """Chooses the backend for "auto": torch's own dense attention ("blocks") if the mask is dense, else the
    first of the device's order that serves the call.

    Raises:
        ValueError: no backend serves it.
    """
    if torch.compiler.is_compiling():
        return _choose(call)
    return call.mask.cached(("chosen", replace(call, mask=None)), lambda: _choose(call))


def _choose(call: Call) -> str:
    if call.quantize is None and not torch.compiler.is_compiling() and call.mask.is_dense:
        return "blocks"
    reasons = []
    for name in order(call.device):
        reason = obstacle(name, call)
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    raise ValueError(f"no backend serves this call: {'; '.join(reasons)}")


def require(backend: str, call: Call) -> None:
    """Raises if a backend cannot take a call: ImportError for a missing library, else ValueError."""
    if torch.compiler.is_compiling():
        _require(backend, call)
    else:
        call.mask.cached(("serves", backend, replace(call, mask=None)), lambda: _require(backend, call))


def _require(backend: str, call: Call) -> None:
    reason = obstacle(backend, call)
    if reason is None:
        return
    error = ImportError if reason.startswith("needs ") else ValueError
    raise error(f"backend {backend!r} {reason}; backend='auto' chooses one that serves the call")


def report_choice(backend: str, tensor: Tensor, mask: BlockMask, density: str = "") -> None:
    """Logs the choice, once for each shape, dtype and device that the mask meets.

    Args:
        tensor: the query `[B, S, H, D]`, or the latents if one choice serves all layers of a model.
        density: describes the density; by default the mask's.
    """
    if torch.compiler.is_compiling():
        return
    call = tuple(tensor.shape), tensor.dtype, tensor.device

    def log() -> None:
        logging.getLogger("radial_attn").info(
            "backend %s for %s %s on %s, density %s",
            *(backend, list(call[0]), *call[1:], density or f"{mask.density:.3f}"),
        )

    mask.cached(("reported", backend, density, *call), log)


@torch.compiler.assume_constant_result  # torch 2.8 cannot trace the question
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """Casts the tensors to autocast's dtype, if it is on for the device of the first."""
    device = tensors[0].device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def _check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), [str(choice) for choice in allowed], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {allowed}, got {value!r}{hint}")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> None:
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask must be a BlockMask (see BlockMask.from_blocks), got {type(mask).__name__}")
    if query.ndim != 4 or 0 in query.shape:
        raise ValueError(f"query must be [B, S, H, D] without empty dimensions, got {list(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name} must have query's shape {list(query.shape)}, got {list(tensor.shape)}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}: cast one")
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on query's device {query.device}, got {tensor.device}: move one"
            )
    if query.dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {query.dtype}")
    if query.shape[1] != mask.grid.tokens:
        raise ValueError(
            f"sequence length must be the {mask.grid.tokens} tokens of {mask.grid}, got {query.shape[1]}: "
            "make the mask from the grid of this video"
        )
    if mask.heads is not None and mask.heads != query.shape[2]:
        raise ValueError(f"heads must be the {mask.heads} of the per-head mask, got {query.shape[2]}")


def _check_far_bias(bias: Tensor | None, far_field: str, query: Tensor, mask: BlockMask) -> None:
    if bias is None:
        return
    if far_field == "none":
        raise ValueError("far_bias needs a far field: set far_field to 'mean' or 'linear', or leave it out")
    rows, keys = mask.blocks.shape[-1], -(-mask.grid.video_tokens // mask.block_size)
    shape = query.shape[0], query.shape[2], rows, keys
    if bias.ndim != 4 or any(x not in {y, 1} for x, y in zip(bias.shape, shape, strict=True)):
        raise ValueError(f"far_bias must be {list(shape)}, each of them or 1, got {list(bias.shape)}")
    if bias.device != query.device:
        raise ValueError(f"far_bias must be on query's device {query.device}, got {bias.device}: move one")


def _check_text_lengths(
    text_lengths: Tensor | Sequence[int] | None, batch: int, mask: BlockMask
) -> Tensor | None:
    """Returns the lengths as int64 `[B]` on the CPU; None if no text is padded."""
    if text_lengths is None:
        return None
    lengths, text = torch.as_tensor(text_lengths, device="cpu"), mask.grid.text
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"text_lengths must be integers, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(
            f"text_lengths must be one number for each of {batch} samples, got {list(lengths.shape)}"
        )
    lengths = lengths.to(torch.int64)
    if torch.compiler.is_compiling():
        return lengths
    if lengths.min() < 0 or lengths.max() > text:
        raise ValueError(
            f"text_lengths must be from 0 to {text}, the grid's text tokens, got {lengths.tolist()}"
        )
    return None if bool((lengths == text).all()) else lengths
