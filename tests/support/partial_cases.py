"""Inputs of partial attention, and what they are compared with."""

import torch
from torch import Tensor

from radial_attn.block_mask import Part
from radial_attn.partial import partial_attention
from tests.support.attention_cases import assert_as_good_as


def token_mask(part: Part, rows: int, keys: int, lengths: list[int] | None) -> Tensor:
    """bool `[B or 1, H or 1, Q, K]`, straight from the definition of a part."""
    size = part.block_size
    keep = part.blocks[..., torch.arange(rows).unsqueeze(1) // size, torch.arange(keys) // size]
    keep = keep.view(1, -1, rows, keys)
    if lengths is None:
        return keep
    samples = []
    for length in lengths:
        sample = keep[0].clone()
        if part.row_text:
            sample[:, rows - part.row_text + length :] = False
        if part.key_text:
            sample[..., keys - part.key_text + length :] = False
        samples.append(sample)
    return torch.stack(samples)


def defined(tensors: list[Tensor], keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64."""
    query, key, value = (x.double() for x in tensors)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    weights = scores.masked_fill(~keep, -1e300).softmax(-1) * keep.any(-1, keepdim=True)
    lse = scores.masked_fill(~keep, -torch.inf).logsumexp(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value), lse.transpose(1, 2)


def make(rows: int, keys: int, heads: int = 3, batch: int = 2, width: int = 16) -> list[Tensor]:
    return [torch.randn(batch, count, heads, width) for count in (rows, keys, keys)]


def some_blocks(rows: int, keys: int, heads: int | None = None, size: int = 16) -> Tensor:
    """A random rectangle whose second row keeps nothing."""
    shape = -(-rows // size), -(-keys // size)
    blocks = torch.rand(*([] if heads is None else [heads]), *shape) < 0.6
    blocks[..., 0, 0] = True
    if shape[0] > 1:
        blocks[..., 1, :] = False
    return blocks


def agree(backend: str, tensors: list[Tensor], part: Part, lengths: list[int] | None = None) -> None:
    """A backend's output as good as SDPA's, its log-sum-exp right, rows without keys zeros and -inf."""
    counts = None if lengths is None else torch.tensor(lengths)
    out, lse = partial_attention(*tensors, part, backend=backend, text_lengths=counts, scale=0.3)
    keep = token_mask(part, tensors[0].shape[1], tensors[1].shape[1], lengths)
    wanted, sums = defined(tensors, keep, 0.3)
    seen = keep.any(-1, keepdim=True)
    heads = [x.transpose(1, 2) for x in tensors]
    plain = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=keep | ~seen, scale=0.3)
    assert_as_good_as([out], [plain.masked_fill(~seen, 0).transpose(1, 2)], [wanted])
    assert out.dtype == tensors[0].dtype and lse.dtype == torch.float32 and lse.shape == out.shape[:3]
    empty = sums == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and not out[empty].any()
    rough = 10 if out.dtype == torch.bfloat16 else 1  # whose kernel has a faster exponential
    torch.testing.assert_close(lse[~empty], sums[~empty].float(), atol=rough * 2e-5, rtol=1e-5)
