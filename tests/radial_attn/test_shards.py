"""Shares of a ring: every token once, equal shares, parts that make up the mask, and balance; heads dealt."""

from itertools import combinations

import pytest
import torch

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask
from radial_attn.shards import Shards, deal, deal_heads, imbalance
from tests.support import head_cases

GRIDS = [
    TokenGrid(6, 6, 8),
    TokenGrid(5, 3, 7, text=11),
    TokenGrid(4, 8, 8, text=16),
    TokenGrid(1, 2, 3, text=40),
]


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_token_once_in_equal_shares(grid, degree):
    shards = deal(grid, 16, degree)
    assert torch.equal(torch.cat(shards.tokens).sort().values, torch.arange(grid.video_tokens))
    assert all(torch.equal(tokens, tokens.sort().values) for tokens in shards.tokens)
    counts = [len(blocks) for blocks in shards.blocks]
    assert max(counts) - min(counts) <= 1 and sum(counts) == grid.video_tokens // 16
    assert shards.most_tokens <= -(-grid.video_tokens // 16 // degree) * 16 + 15
    assert deal(grid, 16, degree) is shards


def keys(shards: Shards, rank: int) -> torch.Tensor:
    """Returns the indices of a rank's keys: its video tokens, and the text on the last rank."""
    text = torch.arange(shards.grid.video_tokens, shards.grid.tokens)
    last = rank == shards.degree - 1
    return torch.cat([shards.tokens[rank], text]) if last else shards.tokens[rank]


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_parts_are_the_mask_of_their_tokens(grid, degree, heads):
    """Expanded to tokens, every part is what the mask says of its rows and keys."""
    torch.manual_seed(0)
    count = grid.num_blocks(16)
    shape = (count, count) if heads is None else (heads, count, count)
    mask = BlockMask.from_blocks(grid, (torch.rand(shape) < 0.5) | torch.eye(count, dtype=torch.bool), 16)
    shards, whole = deal(grid, 16, degree), mask.token_mask()
    text = torch.arange(grid.video_tokens, grid.tokens)
    for rank in range(degree):
        for source in range(degree):
            columns = keys(shards, source)
            cases = [(shards.part(mask, rank, source), 0, shards.tokens[rank])]
            if grid.text:
                cases.append((shards.text_part(mask, source), shards.front, text))
            for part, skipped, lines in cases:
                actual = part.blocks.repeat_interleave(16, -2).repeat_interleave(16, -1)
                actual = actual[..., skipped : skipped + len(lines), : len(columns)]
                assert torch.equal(actual, whole[..., lines, :][..., columns])
                assert part.row_text == (grid.text if lines is text else 0)
                assert part.key_text == (grid.text if source == degree - 1 else 0)
            assert shards.part(mask, rank, source) is shards.part(mask, rank, source)


def test_kept_blocks_and_what_waiting_costs():
    grid = TokenGrid(4, 8, 8)
    shards = deal(grid, 16, 2)
    blocks = torch.eye(16, dtype=torch.bool)
    kept = shards.kept(BlockMask.from_blocks(grid, blocks, 16))
    assert kept.tolist() == [[8, 0], [0, 8]] and imbalance(kept) == (1, 1)
    assert imbalance(torch.tensor([[3.0, 1.0], [1.0, 1.0]])) == pytest.approx((4 / 3, 4 / 3))
    assert imbalance(torch.tensor([[3.0, 0.0], [2.0, 1.0]])) == pytest.approx((1, 5 / 3))
    per_head = BlockMask.from_blocks(grid, torch.stack([blocks, torch.ones_like(blocks)]), 16)
    assert shards.kept(per_head).tolist() == [[36, 32], [32, 36]]


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("text", [0, 256])
def test_a_radial_mask_is_shared_evenly(text, degree):
    """Takes HunyuanVideo's 117 frames of 720 x 1280 at half the height."""
    grid = TokenGrid(30, 24, 80, text)
    mask = radial_mask(grid, RadialConfig(decay_factor=0.95))
    busiest, waiting = imbalance(deal(grid, 128, degree).kept(mask))
    assert 1 <= busiest < 1.05 and busiest <= waiting < 1.15


@pytest.mark.parametrize(
    ("work", "processes", "heads"),
    [
        ([5, 5, 5, 5], 2, [[0, 1], [2, 3]]),
        ([4, 3, 2, 1], 2, [[1, 2], [0, 3]]),
        ([9, 9, 1, 1, 9, 1], 3, [[1, 2], [0, 3], [4, 5]]),
        ([7, 1, 1, 1, 1, 1], 2, [[0, 1, 2], [3, 4, 5]]),  # nothing helps
        ([100, 100, 100, 99], 2, [[0, 1], [2, 3]]),
        ([1000, 1001, 1000, 990], 2, [[0, 1], [2, 3]]),  # under 1 %
        ([8, 8, 0, 0], 4, [[0], [1], [2], [3]]),
    ],
)
def test_heads_are_dealt_by_their_work(work, processes, heads):
    dealt = deal_heads(torch.tensor(work), processes)
    assert dealt.heads.tolist() == heads
    assert dealt.loads.tolist() == [sum(work[head] for head in row) for row in heads]
    assert dealt.in_order == (heads == torch.arange(len(work)).view(processes, -1).tolist())


@pytest.mark.parametrize(("heads", "processes"), [(8, 2), (10, 2), (16, 8)])
def test_no_exchange_of_two_heads_is_left_that_helps(heads, processes):
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        work = torch.randint(1, 1000, (heads,), generator=generator)
        dealt = deal_heads(work, processes)
        assert torch.equal(dealt.heads.flatten().sort().values, torch.arange(heads))
        assert torch.equal(dealt.heads, dealt.heads.sort(1).values)
        for one, other in combinations(range(processes), 2):
            gap = dealt.loads[one] - dealt.loads[other]
            step = work[dealt.heads[one]][:, None] - work[dealt.heads[other]]
            assert dealt.in_order or (gap - 2 * step).abs().min() >= gap.abs()


@pytest.mark.parametrize("model", head_cases.HEADS)
@pytest.mark.parametrize("spread", head_cases.SPREADS)
@pytest.mark.parametrize("processes", head_cases.PROCESSES)
def test_heads_of_large_models_are_dealt_evenly(model, spread, processes):
    before, after = (head_cases.imbalance(x) for x in head_cases.loads(model, spread, processes, 60))
    assert 1 <= after < 1.04 < before
