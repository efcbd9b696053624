"""Blocks chosen by their attention: mass from sampled rows, budgets, floor."""

import pytest
import torch

from radial_attn import RadialConfig, TokenGrid
from radial_attn.selection import (
    BUDGETS,
    MOST,
    Budget,
    Measured,
    block_rows,
    far_correction,
    floor_blocks,
    measure_blocks,
)

GRID = TokenGrid(3, 5, 6, 10)  # 90 video tokens, 100 in all: 7 blocks of 16, the sixth of video and text

TOKENS = torch.full((6,), 16)


def tensors(batch: int = 2, heads: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, GRID.tokens, heads, 8, generator=generator) for _ in range(3)]


def masses(seed: int = 0, batch: int = 2, heads: int = 3, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, count, count, generator=generator)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [8, 24, 40, 56, 72, 85]), (2, [4, 12, 20, 28, 36, 44, 52, 60, 68, 76, 82, 87])],
)
def test_rows_are_spread_over_the_video_tokens_of_each_block(count, expected):
    assert block_rows(GRID, 16, count).tolist() == expected


def test_more_rows_than_tokens_take_all():
    assert block_rows(GRID, 16, 99).tolist() == list(range(90))


@pytest.mark.parametrize("far_field", [False, True])
@pytest.mark.parametrize("lengths", [None, [10, 3]])
def test_blocks_are_measured_on_the_softmax(lengths, far_field):
    """Compares mass, pooled mass and loss of all rows with the definition in float64."""
    query, key, value = (x.double() for x in tensors())
    lengths = None if lengths is None else torch.tensor(lengths)
    options = {"rows": torch.arange(90), "text_lengths": lengths, "far_field": far_field}
    measured = measure_blocks(tensors(), GRID, 16, **options)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / 8**0.5
    if lengths is not None:
        scores.masked_fill_(torch.arange(100) >= 90 + lengths.view(-1, 1, 1, 1), -torch.inf)
    weights = torch.nn.functional.pad(scores.softmax(-1)[:, :, :90], (0, 12)).unflatten(-1, (7, 16))
    parts = [slice(start, min(start + 16, 90)) for start in range(0, 90, 16)]
    keys, values = (torch.stack([x[:, part].mean(1) for part in parts], 1) for x in (key, value))
    counts = torch.tensor([16] * 5 + [10]).double()
    pooled = torch.einsum("bqhd,bkhd->bhqk", query, keys) / 8**0.5 + counts.log()
    pooled = (pooled - scores.logsumexp(-1, keepdim=True))[:, :, :90].exp()
    by_block = torch.nn.functional.pad(value, (0, 0, 0, 0, 0, 12)).unflatten(1, (7, 16))
    change = torch.einsum("bhqkt,bkthd->bhqkd", weights, by_block)
    if far_field:
        change[..., :6, :] -= torch.einsum("bhqk,bkhd->bhqkd", pooled, values)

    def by_rows(x):
        return torch.nn.functional.pad(x, (0, 0, 0, 6)).unflatten(2, (6, 16)).sum(3) / counts.view(-1, 1)

    torch.testing.assert_close(
        measured.mass[:, :, :6].double(), by_rows(weights.sum(-1)), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(measured.pooled[:, :, :6, :6].double(), by_rows(pooled), rtol=1e-4, atol=1e-6)
    loss = by_rows(change.square().sum(-1)).sqrt()
    torch.testing.assert_close(measured.loss[:, :, :6].double(), loss, rtol=1e-3, atol=1e-5)
    assert not any(x[:, :, 6].any() for x in measured) and not measured.pooled[..., 6].any()


def test_a_sample_of_rows():
    rows = block_rows(GRID, 16)
    given = measure_blocks(tensors(), GRID, 16, far_field=True, rows=rows)
    torch.testing.assert_close(measure_blocks(tensors(), GRID, 16, far_field=True), given)
    torch.testing.assert_close(given.mass.sum(-1)[..., :6], torch.ones(2, 3, 6))


def test_floor_is_diagonal_and_text():
    floor = floor_blocks(GRID, RadialConfig(block_size=16, sink=True))
    wanted = torch.eye(7, dtype=torch.bool)
    wanted[5:], wanted[:, 5:] = True, True
    assert torch.equal(floor, wanted)


@pytest.mark.parametrize("shared_by", BUDGETS)
def test_the_largest_masses_are_kept(shared_by):
    floor, mass = torch.eye(6, dtype=torch.bool), masses()
    budget = Budget(floor, TOKENS, [0.5], shared_by)
    kept = budget.levels(mass, budget.cuts(budget.histogram(mass))) > 0
    assert kept[..., floor].all()
    groups = (kept & ~floor).flatten(2), mass.masked_fill(floor, -1).flatten(2)
    kept, mass = (x.flatten(0, 1) if shared_by == "head" else x.flatten(1) for x in groups)
    heads = 1 if shared_by == "head" else 3
    for chosen, values in zip(kept, mass, strict=True):
        assert chosen.sum() == heads * (18 - 6)
        assert values[chosen].min() > values[~chosen].max()


def test_layers_of_a_model_share_one_budget():
    floor, layers = torch.eye(6, dtype=torch.bool), [masses(0), 0.1 * masses(1), 3 * masses(2).square()]
    budget = Budget(floor, TOKENS, [0.4], "model")
    cuts = budget.cuts(sum(budget.histogram(mass) for mass in layers))
    kept = torch.stack([budget.levels(mass, cuts) > 0 for mass in layers])
    assert kept.flatten(2).sum((0, 2)).tolist() == [int(0.4 * 36 * 9)] * 2
    assert kept[2].sum() > kept[0].sum() > kept[1].sum()


@pytest.mark.parametrize("shared_by", BUDGETS)
def test_a_denser_level_keeps_what_a_sparser_one_keeps(shared_by):
    floor, mass, densities = torch.eye(6, dtype=torch.bool), masses(), [0.3, 0.8, 0.5]
    together = Budget(floor, TOKENS, densities, shared_by)
    assert together.densities == (0.8, 0.5, 0.3)
    levels = together.levels(mass, together.cuts(together.histogram(mass)))
    for number, density in enumerate(together.densities):
        alone = Budget(floor, TOKENS, [density], shared_by)
        wanted = alone.levels(mass, alone.cuts(alone.histogram(mass))) > 0
        assert torch.equal(levels > number, wanted)


@pytest.mark.parametrize("shared_by", ["layer", "model"])
def test_processes_that_share_heads_choose_as_one(shared_by):
    floor, mass = torch.eye(6, dtype=torch.bool), masses()
    alone = Budget(floor, TOKENS, [0.5], shared_by)
    wanted = alone.levels(mass, alone.cuts(alone.histogram(mass)))
    parts = mass[:, :1], mass[:, 1:]
    sums = sum(Budget(floor, TOKENS, [0.5], shared_by).histogram(part) for part in parts)
    shared = [Budget(floor, TOKENS, [0.5], shared_by, lambda counts: sums) for _ in parts]
    kept = [one.levels(x, one.cuts(one.histogram(x))) for one, x in zip(shared, parts, strict=True)]
    assert torch.equal(torch.cat(kept, dim=1), wanted)


def test_everything_is_kept_at_density_1():
    floor, mass = torch.eye(6, dtype=torch.bool), masses()
    mass[0, 0, 0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    budget = Budget(floor, TOKENS, [1.0], "layer")
    assert budget.levels(mass, budget.cuts(budget.histogram(mass))).min() == 1


def test_equal_masses_stay_within_the_budget():
    floor = torch.eye(6, dtype=torch.bool)
    budget = Budget(floor, TOKENS, [0.5], "layer")
    mass = torch.full((1, 2, 6, 6), 1 / 6)
    kept = budget.levels(mass, budget.cuts(budget.histogram(mass))) > 0
    assert torch.equal(kept, floor.expand(1, 2, 6, 6))


def test_density_below_the_floor():
    with pytest.raises(ValueError, match=r"density must be at least 0\.1667, .* got 0\.1$"):
        Budget(torch.eye(6, dtype=torch.bool), TOKENS, [0.5, 0.1], "head")


def test_a_short_block_counts_by_its_tokens():
    floor, tokens = torch.eye(6, dtype=torch.bool), torch.tensor([16, 16, 16, 16, 16, 1])
    budget, mass = Budget(floor, tokens, [0.7], "layer"), masses()
    kept = budget.levels(mass, budget.cuts(budget.histogram(mass))) > 0
    pairs = torch.outer(tokens, tokens) / 81**2
    for share in (kept * pairs).sum((-1, -2)).mean(1).tolist():
        assert 0.7 - 256 / 3 / 81**2 < share <= 0.7


def test_correction_gives_the_far_field_its_exact_mass():
    exact, pooled = masses(0, heads=2), masses(1, heads=2)
    kept = masses(2, heads=2) < 0.3
    kept[0, 0], exact[1, 1], pooled[1, 0] = True, 0, 1e-12
    bias = far_correction(Measured(exact, pooled, exact), kept)
    assert bias.shape == (2, 2, 1, 1)
    wanted = (exact[0, 1][~kept[0, 1]].sum() / pooled[0, 1][~kept[0, 1]].sum()).log()
    torch.testing.assert_close(bias[0, 1, 0, 0], wanted)
    assert bias[0, 0].item() == 0 and bias[1, 1].item() == -MOST and bias[1, 0].item() == MOST
