"""Defines attention with the mask expanded to tokens; every other backend is tested against it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask, Part
from .contract import QUANTIZE, Needs
from .quantized_reference import quantized_attention

NEEDS = Needs(quantize=QUANTIZE, partial=True)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    text_lengths: Tensor | None,
    scale: float,
    quantize: str | None = None,
) -> Tensor:
    """Computes SDPA under the token mask; all tensors `[B, S, H, D]`, memory quadratic in `S`.

    Keys of padded text are not attended. Rows of padded text and rows without any key are zeros.

    Args:
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
        quantize: "int8" or "fp8" rounds as the quantised kernels do, to test them on any device.
    """
    keep = mask.token_mask().to(query.device)
    keep = keep.view(1, -1, *keep.shape[-2:])
    if text_lengths is not None:
        valid = text_lengths.to(query.device).view(-1, 1) + mask.grid.video_tokens
        counts = torch.arange(mask.grid.tokens, device=query.device) < valid
        keep = keep & counts[:, None, None, :] & counts[:, None, :, None]
    seen = keep.any(dim=-1, keepdim=True)
    # a row without keys would be NaN: it attends everything and is then set to zero
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    if quantize is None:
        out = F.scaled_dot_product_attention(*heads, attn_mask=keep | ~seen, scale=scale)
    else:
        rounded = [x.float() for x in heads]
        out = quantized_attention(*rounded, keep | ~seen, scale=scale, bits=quantize).to(query.dtype)
    return out.masked_fill(~seen, 0).transpose(1, 2)


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, part: Part, *, text_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns output `[B, Q, H, D]` and log-sum-exp, float32 `[B, Q, H]`, over keys `[B, K, H, D]`.

    Computes in float32. `text_lengths`: valid text tokens of each sample, int64 `[B]`, or None for all.
    """
    rows, keys = query.shape[1], key.shape[1]
    keep = part.blocks.repeat_interleave(part.block_size, -2).repeat_interleave(part.block_size, -1)
    keep = keep[..., :rows, :keys].to(query.device).view(1, -1, rows, keys)
    if text_lengths is not None:
        padding = (part.text - text_lengths).to(query.device).view(-1, 1, 1, 1)
        row, column = (torch.arange(count, device=query.device) for count in (rows, keys))
        keep = keep & (row.view(-1, 1) < rows - padding.clamp(max=part.row_text))
        keep = keep & (column < keys - padding.clamp(max=part.key_text))
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * scale
    lse = scores.masked_fill(~keep, -torch.inf).logsumexp(dim=-1)
    weights = torch.where(keep, (scores - lse.unsqueeze(-1)).exp(), 0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value.float())
    return out.to(query.dtype), lse.transpose(1, 2).contiguous()
