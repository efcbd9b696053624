"""The far field by its definition, in float64, and masks that drop blocks."""

import torch
from torch import Tensor

from radial_attn import BlockMask, TokenGrid


def some_mask(grid: TokenGrid, size: int, heads: int | None = None, share: float = 0.3) -> BlockMask:
    """Keeps a random share of the blocks, the diagonal and all text; a pattern for each of `heads`."""
    count, generator = grid.num_blocks(size), torch.Generator().manual_seed(0)
    shape = (count, count) if heads is None else (heads, count, count)
    blocks = torch.rand(shape, generator=generator) < share
    blocks |= torch.eye(count, dtype=torch.bool)
    if grid.text:
        blocks[..., grid.video_tokens // size :] = True
        blocks[..., grid.video_tokens // size :, :] = True
    return BlockMask.from_blocks(grid, blocks, size)


def bias_for(mask: BlockMask, batch: int = 2, heads: int = 2) -> Tensor:
    """Returns a random bias of the far field, `[B, H, Q, K]`."""
    keys = -(-mask.grid.video_tokens // mask.block_size)
    return torch.randn(batch, heads, mask.blocks.shape[-1], keys)


def defined(
    tensors: list[Tensor],
    mask: BlockMask,
    far_field: str,
    *,
    bias: Tensor | None = None,
    lengths: list[int] | None = None,
    scale: float,
) -> Tensor:
    """Computes one softmax over the kept tokens and one mean key for each dropped block, float64."""
    query, key, value = (x.double() for x in tensors)
    grid, size, (batch, tokens) = mask.grid, mask.block_size, query.shape[:2]
    ends = torch.full((batch,), tokens) if lengths is None else torch.tensor(lengths) + grid.video_tokens
    valid = torch.arange(tokens) < ends[:, None]
    kept = mask.token_mask().view(1, -1, tokens, tokens) & valid[:, None, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    blocks = range(0, grid.video_tokens, size)
    parts = [slice(start, min(start + size, grid.video_tokens)) for start in blocks]
    keys, values = (torch.stack([x[:, part].mean(1) for part in parts], 1) for x in (key, value))
    counts = torch.tensor([part.stop - part.start for part in parts]).double()
    far = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale + counts.log()
    if bias is not None:
        far = far + bias.double().repeat_interleave(size, 2)[:, :, :tokens]
    dropped = ~mask.blocks.view(-1, *mask.blocks.shape[-2:])[..., : len(parts)]
    dropped = dropped.repeat_interleave(size, -2)[:, :tokens]
    every = torch.cat([scores.masked_fill(~kept, -1e300), far.masked_fill(~dropped, -1e300)], -1)
    weights = every.softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, torch.cat([value, values], 1))
    if far_field == "linear":
        apart = [
            torch.cat([x[:, part] - mean[:, [j]] for j, part in enumerate(parts)], 1)
            for x, mean in ((key, keys), (value, values))
        ]
        slope = torch.einsum("bshd,bshe->bhde", *apart) / grid.video_tokens
        share = weights[..., tokens:].sum(-1).transpose(1, 2)
        out = out + scale * share[..., None] * torch.einsum("bshd,bhde->bshe", query, slope)
    return out * valid[..., None, None]
