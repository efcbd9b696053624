"""Compares an output with the definition on a sample of query blocks: affordable at any length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..far_field import Far

SAMPLED_BLOCKS = 4  # query blocks that are compared


@dataclass(frozen=True)
class OutputError:
    """Measures the difference from exact attention over all values: relative L2 norm, cosine of the angle."""

    relative_l2: float
    cosine: float

    def __str__(self) -> str:
        return f"relative L2 {self.relative_l2:.2e}, cosine {self.cosine:.6f}"


def sample_blocks(mask: BlockMask, count: int) -> list[int]:
    """Returns at most `count` query blocks, spread evenly over the sequence, first and last included."""
    last = mask.blocks.shape[-1] - 1
    return sorted({round(last * i / max(1, count - 1)) for i in range(count)})


def sampled_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    blocks: Sequence[int],
    *,
    text_lengths: Tensor | None = None,
    far: Far | None = None,
) -> Tensor:
    """Computes attention of the query tokens of some blocks, exact up to float32.

    Args:
        query, key, value: `[B, S, H, D]`.
        blocks: query block numbers; their tokens come one after the other, see `sampled_rows`.
        text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
        far: the far field of the call, None without one.

    Returns:
        float32 `[B, rows, H, D]`; rows of padded text are zeros.
    """
    tensors = query, key, value
    return torch.cat([_block_rows(tensors, mask, block, text_lengths, far) for block in blocks], dim=1)


def sampled_rows(tensor: Tensor, mask: BlockMask, blocks: Sequence[int]) -> Tensor:
    """Selects query tokens of some blocks, `[B, rows, H, D]` of `[B, S, H, D]`, in the order of `blocks`."""
    return torch.cat([tensor[:, _tokens(mask, block)] for block in blocks], dim=1)


def output_error(output: Tensor, exact: Tensor) -> OutputError:
    """Measures the error of `output`; NaN if it has values that are not finite."""
    got, want = output.flatten().double(), exact.flatten().double()
    norms = got.norm().item(), want.norm().item()
    if min(norms) == 0.0:
        return OutputError(0.0 if norms[0] == norms[1] else math.inf, 1.0 if norms[0] == norms[1] else 0.0)
    return OutputError((got - want).norm().item() / norms[1], (got @ want).item() / norms[0] / norms[1])


def _tokens(mask: BlockMask, block: int) -> slice:
    start = block * mask.block_size
    return slice(start, min(start + mask.block_size, mask.grid.tokens))


def _block_rows(
    tensors: Sequence[Tensor], mask: BlockMask, block: int, text_lengths: Tensor | None, far: Far | None
) -> Tensor:
    """Computes one query block, `[B, rows, H, D]`: heads with one pattern together, samples one by one."""
    (query, key, value), tokens = tensors, _tokens(mask, block)
    out = torch.zeros(query[:, tokens].shape, dtype=torch.float32, device=query.device)
    patterns = mask.blocks[..., block, :].view(-1, mask.blocks.shape[-1])
    for pattern, keep in enumerate(patterns):
        heads = slice(None) if mask.heads is None else slice(pattern, pattern + 1)
        kept = keep.repeat_interleave(mask.block_tokens).nonzero().flatten()
        for sample in range(query.shape[0]):
            limit = mask.grid.tokens
            if text_lengths is not None:
                limit = mask.grid.video_tokens + int(text_lengths[sample])
            columns = kept[kept < limit].to(query.device)
            rows = slice(tokens.start, min(tokens.stop, limit))
            if rows.start >= rows.stop or not (len(columns) or far):
                continue
            q, k, v = (
                x[sample, at, heads].float().transpose(0, 1)
                for x, at in ((query, rows), (key, columns), (value, columns))
            )
            scale = q.shape[-1] ** -0.5
            scores = q @ k.mT * scale
            if far is not None:
                bias = far.bias.expand(len(query), query.shape[2], -1, -1)[sample, heads, block, None]
                keys, means = (x[sample, :, heads].transpose(0, 1) for x in (far.keys, far.values))
                scores, v = torch.cat([scores, q @ keys.mT * scale + bias], -1), torch.cat([v, means], 1)
            weights = scores.softmax(-1)
            part = weights @ v
            if far is not None and far.slope is not None:
                share = weights[..., len(columns) :].sum(-1, keepdim=True)
                part += scale * share * (q @ far.slope[sample, heads])
            out[sample, : rows.stop - rows.start, heads] = part.transpose(0, 1)
    return out
