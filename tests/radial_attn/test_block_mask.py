import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radial_attn import BlockMask, TokenGrid

GRID = TokenGrid(frames=5, height=6, width=7, text=3)
COUNT = GRID.num_blocks(16)


def random_blocks(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < 0.4) | torch.eye(shape[-1], dtype=torch.bool)


@st.composite
def masks(draw) -> BlockMask:
    grid = TokenGrid(draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    count = grid.num_blocks(16)
    heads = draw(st.sampled_from([(), (1,), (3,)]))
    return BlockMask.from_blocks(grid, random_blocks(draw(st.integers(0, 99)), *heads, count, count), 16)


@settings(max_examples=60)
@given(masks())
def test_csr_names_every_kept_block_once(mask):
    assert mask.indptr.dtype == mask.indices.dtype == torch.int32
    assert mask.indptr.shape == (*mask.blocks.shape[:-2], mask.blocks.shape[-1] + 1)
    rebuilt = torch.zeros_like(mask.blocks).view(-1, mask.blocks.shape[-1])
    starts, ends = mask.indptr[..., :-1].flatten(), mask.indptr[..., 1:].flatten()
    assert starts[0] == 0
    assert ends[-1] == len(mask.indices)
    for row, start, end in zip(rebuilt, starts, ends, strict=True):
        keys = mask.indices[start:end]
        assert (keys.diff() > 0).all()
        row[keys.long()] = True
    assert torch.equal(rebuilt.view(mask.blocks.shape), mask.blocks)


@settings(max_examples=60)
@given(masks())
def test_density_counts_valid_tokens(mask):
    tokens = mask.token_mask()
    assert tokens.shape == (*mask.blocks.shape[:-2], mask.grid.tokens, mask.grid.tokens)
    assert mask.kept_pairs == round(int(tokens.sum()) / (mask.heads or 1))
    assert mask.density == pytest.approx(tokens.double().mean().item(), rel=1e-12)
    assert mask.is_dense == bool(tokens.all())


@settings(max_examples=30)
@given(masks())
def test_token_mask_looks_up_the_block(mask):
    block = torch.arange(mask.grid.tokens) // mask.block_size
    assert torch.equal(mask.token_mask(), mask.blocks[..., block[:, None], block[None, :]])


def test_heads_are_shared_or_counted():
    assert BlockMask.from_blocks(GRID, random_blocks(0, COUNT, COUNT)).heads is None
    assert BlockMask.from_blocks(GRID, random_blocks(0, 4, COUNT, COUNT)).heads == 4


def test_block_size_is_inferred_or_asked_for():
    assert BlockMask.from_blocks(GRID, random_blocks(0, COUNT, COUNT)).block_size == 16
    one = torch.ones(1, 1, dtype=torch.bool)
    assert BlockMask.from_blocks(TokenGrid(1, 4, 30), one, 256).block_size == 256
    with pytest.raises(ValueError, match=r"block_size must be given: 2 of .* cut 120 tokens into 1 blocks"):
        BlockMask.from_blocks(TokenGrid(1, 4, 30), one)
    with pytest.raises(ValueError, match=r"block_size must be given: 0 of .* into 3 blocks"):
        BlockMask.from_blocks(GRID, torch.ones(3, 3, dtype=torch.bool))


def test_from_blocks_copies():
    blocks = torch.ones(COUNT, COUNT, dtype=torch.bool)
    mask = BlockMask.from_blocks(GRID, blocks)
    blocks[0, 0] = False
    assert mask.is_dense


def test_takes_numpy_and_strided_blocks():
    blocks = random_blocks(1, COUNT, COUNT)
    assert torch.equal(BlockMask.from_blocks(GRID, blocks.numpy()).blocks, blocks)
    mask = BlockMask.from_blocks(GRID, blocks.T)
    assert mask.indices[: mask.indptr[1]].tolist() == blocks[:, 0].nonzero().flatten().tolist()


def test_cached_builds_once_per_mask():
    built = []
    mask, other = (BlockMask.from_blocks(GRID, random_blocks(0, COUNT, COUNT)) for _ in range(2))
    for owner in (mask, mask, other):
        owner.cached(("plan", 16), lambda: built.append(1))
    assert len(built) == 2
    assert mask.indices is mask.indices
    assert mask.csr("cpu")[0] is mask.indptr


def test_masks_are_values_by_identity():
    mask, other = (BlockMask.from_blocks(GRID, random_blocks(0, COUNT, COUNT)) for _ in range(2))
    assert mask != other
    assert len({mask, other}) == 2
    with pytest.raises(AttributeError):
        mask.block_size = 32


@pytest.mark.parametrize(
    ("blocks", "block_size", "message"),
    [
        (torch.ones(COUNT, COUNT), 16, "blocks must be bool on the CPU, got torch.float32"),
        (torch.ones(COUNT, COUNT, dtype=torch.bool), 24, "block_size must be one of .* got 24"),
        (
            torch.ones(COUNT, 4, dtype=torch.bool),
            16,
            r"blocks must be \[14, 14\] .* for 213 tokens .* \[14, 4\]",
        ),
        (torch.ones(0, COUNT, COUNT, dtype=torch.bool), 16, r"got \[0, 14, 14\]"),
        (torch.ones(COUNT, dtype=torch.bool), 16, r"got \[14\]"),
        (
            torch.eye(COUNT, dtype=torch.bool).roll(1, 0).tril(),
            16,
            r"must keep a key block, got none at \[0\]",
        ),
    ],
)
def test_bad_blocks_are_named(blocks, block_size, message):
    with pytest.raises(ValueError, match=message):
        BlockMask.from_blocks(GRID, blocks, block_size)


def test_text_lengths_are_copied_once_without_gradients():
    mask, device = BlockMask.from_blocks(GRID, random_blocks(0, COUNT, COUNT)), torch.device("cpu")
    assert mask.token_counts(None, device) is None
    with torch.no_grad():
        first, same, other = (mask.token_counts(torch.tensor(x), device) for x in ([2, 3], [2, 3], [1, 3]))
    assert first is same and first.tolist() == [212, 213] and other.tolist() == [211, 213]
    assert mask.token_counts(torch.tensor([2, 3]), device) is not first
