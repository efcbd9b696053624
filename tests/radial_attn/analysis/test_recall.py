"""Attention on sampled rows: equal to the whole softmax, mask kept and output error by the definition."""

import pytest
import torch

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.analysis import recall as analysis
from radial_attn.analysis.recall import attention_rows, kept_by, recall, sample_rows
from radial_attn.kernels import reference
from tests.support.map_cases import CONFIG, GRIDS, LENGTHS, grids, head_masks, masks, tensors, whole_softmax


@pytest.mark.parametrize(("frames", "count"), [(6, 20), (6, 4), (6, 1), (6, 60), (7, 999)])
def test_rows_are_spread_over_the_frames(frames, count):
    grid = TokenGrid(frames, 2, 5, text=3)
    rows = sample_rows(grid, count, seed=3)
    assert len(rows) == min(count, grid.video_tokens)
    assert rows.tolist() == sorted(set(rows.tolist())) and rows.max() < grid.video_tokens
    held = torch.bincount(rows // 10, minlength=frames)
    assert held.max() - held.min() <= 1
    assert torch.equal(rows, sample_rows(grid, count, seed=3))


def test_rows_depend_on_the_seed_and_few_rows_leave_no_end_out():
    grid = TokenGrid(9, 8, 8)
    assert not torch.equal(sample_rows(grid, 18, 0), sample_rows(grid, 18, 1))
    assert (sample_rows(grid, 3) // 64).tolist() == [1, 4, 7]
    with pytest.raises(ValueError, match="count must be an integer >= 1, got 0"):
        sample_rows(grid, 0)


@grids
@pytest.mark.parametrize("chunk", [1, 100, 1 << 23])
def test_rows_equal_the_whole_softmax(grid, chunk, monkeypatch):
    monkeypatch.setattr(analysis, "CHUNK", chunk)
    query, key, _ = tensors(grid)
    rows, lengths = sample_rows(grid, 12), LENGTHS[grid.text]
    actual = attention_rows(query, key, rows, text_lengths=lengths, grid=grid)
    wanted = whole_softmax(query, key, grid, lengths)[:, :, rows]
    torch.testing.assert_close(actual.double(), wanted, atol=1e-6, rtol=0)


@grids
@masks
def test_recall_is_the_share_of_the_kept_keys(grid, make):
    query, key, _ = tensors(grid)
    rows, lengths, mask = sample_rows(grid, 12), LENGTHS[grid.text], make(grid)
    kept = mask.token_mask().view(-1, grid.tokens, grid.tokens)
    wanted = (whole_softmax(query, key, grid, lengths) * kept).sum(-1)[:, :, rows]
    actual = recall(query, key, mask, rows, text_lengths=lengths)
    torch.testing.assert_close(actual.double(), wanted, atol=1e-6, rtol=0)
    assert 0 < actual.min() < actual.max() <= 1


def test_a_mask_of_everything_recalls_all_and_changes_no_output():
    grid = GRIDS[1]
    query, key, value = tensors(grid)
    mask, rows = radial_mask(grid, RadialConfig(block_size=16, pattern="dense")), sample_rows(grid, 12)
    actual = recall(query, key, mask, rows, text_lengths=LENGTHS[9])
    torch.testing.assert_close(actual, torch.ones(2, 3, 12), atol=1e-6, rtol=0)
    (kept,) = kept_by(query, key, value, [mask], rows, text_lengths=LENGTHS[9])
    assert kept.recall.min() > 1 - 1e-6 and kept.mse.max() < 1e-12


@grids
@masks
def test_output_error_is_that_of_the_reference(grid, make):
    query, key, value = tensors(grid)
    rows, lengths, mask = sample_rows(grid, 12), LENGTHS[grid.text], make(grid)
    options = {"text_lengths": lengths, "scale": 8**-0.5}
    everything = radial_mask(grid, RadialConfig(block_size=16, pattern="dense"))
    dense = reference.attention(query, key, value, everything, **options)[:, rows].double()
    masked = reference.attention(query, key, value, mask, **options)[:, rows].double()
    _, actual = kept_by(query, key, value, [everything, mask], rows, text_lengths=lengths)
    shares = recall(query, key, mask, rows, text_lengths=lengths)
    torch.testing.assert_close(actual.recall, shares.double().mean(-1), atol=1e-7, rtol=0)
    torch.testing.assert_close(actual.mse, (masked - dense).square().mean(dim=(1, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(actual.dense, dense.square().mean(dim=(1, 3)), atol=1e-6, rtol=1e-5)
    assert actual.mse.min() > 1e-4


def test_half_precision_is_worked_out_in_float32():
    grid = GRIDS[0]
    query, key, value = tensors(grid, torch.bfloat16)
    mask, rows = radial_mask(grid, CONFIG), sample_rows(grid, 12)
    exact = [x.float() for x in (query, key, value)]
    assert torch.equal(recall(query, key, mask, rows), recall(*exact[:2], mask, rows))
    half, whole = (kept_by(*given, [mask], rows)[0] for given in ((query, key, value), exact))
    assert all(torch.equal(a, b) for a, b in zip(half, whole, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.tensor([150])}, r"rows must be \[R\] video tokens from 0 to 149, got \[150\]"),
        ({"rows": torch.tensor([], dtype=torch.int64)}, r"rows must be \[R\] video tokens"),
        ({"key": torch.zeros(2, 158, 3, 8)}, r"alike, got \[2, 159, 3, 8\] and \[2, 158, 3, 8\]"),
        ({"mask": radial_mask(GRIDS[0], CONFIG)}, "sequence length must be the 140 tokens"),
        ({"query": torch.zeros(2, 159, 2, 8), "key": torch.zeros(2, 159, 2, 8)}, "heads must be the 3"),
    ],
)
def test_what_does_not_fit_is_one_line(change, message):
    query, key, _ = tensors(GRIDS[1])
    given = {"query": query, "key": key, "mask": head_masks(GRIDS[1]), "rows": torch.tensor([0])}
    with pytest.raises(ValueError, match=message):
        recall(**(given | change))


def test_masks_are_judged_on_one_grid():
    query, key, value = tensors(GRIDS[1])
    masks = [radial_mask(grid, CONFIG) for grid in GRIDS[:2]]
    for given, message in ((masks, "of one grid"), ([], "of one grid"), ([head_masks(GRIDS[1])], "heads")):
        with pytest.raises(ValueError, match=message):
            kept_by(query[:, :, :2], key[:, :, :2], value[:, :, :2], given, torch.tensor([0]))


def test_text_lengths_need_the_grid():
    query, key, _ = tensors(GRIDS[1])
    with pytest.raises(ValueError, match="text_lengths needs the grid"):
        attention_rows(query, key, torch.tensor([0]), text_lengths=torch.tensor([9, 4]))
