"""Energy decay: profiles equal the whole softmax, fits are exact, the bound holds if eq. 3 does."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from radial_attn import TokenGrid, radial_mask
from radial_attn.analysis import recall as analysis
from radial_attn.analysis.bound import first_dropped, fit_tail, measure_tails, paper_bound, tail_bound
from radial_attn.analysis.decay import bands, column_reach, fit_exponential, measure
from radial_attn.analysis.recall import sample_rows
from tests.support.map_cases import CONFIG, GRIDS, LENGTHS, grids, masks, tensors, whole_softmax
from tests.support.mask_oracle import equation_four, places

ROOT = Path(__file__).parents[3]


def naive_profile(query, key, mask, rows, lengths) -> dict[str, torch.Tensor]:
    """Sums a profile key by key, in loops over the whole softmax."""
    grid, heads = mask.grid, query.shape[2]
    f, s, reach, index = grid.frames, grid.tokens_per_frame, column_reach(grid), places(grid).tolist()
    kept = mask.token_mask().expand(heads, -1, -1)
    sums = {name: torch.zeros(heads, size).double() for name, size in (("temporal", f), ("spatial", s))}
    sums["planar"] = torch.zeros(heads, 1 + round(math.hypot(grid.height - 1, grid.width - 1))).double()
    sums |= {"mass": torch.zeros(heads, f).double(), "kept": torch.zeros(heads, f).double()}
    sums |= {name: torch.zeros(heads).double() for name in ("text", "text_kept", "column")}
    for p in whole_softmax(query, key, grid, lengths):
        for row in rows.tolist():
            i0, k0 = divmod(row, s)
            y0, x0 = divmod(index[k0], grid.width)
            for token in range(grid.tokens):
                (i, k), here = divmod(token, s), p[:, row, token]
                if token >= grid.video_tokens:
                    sums["text"] += here
                    sums["text_kept"] += here * kept[:, row, token]
                    continue
                sums["mass"][:, abs(i - i0)] += here
                sums["kept"][:, abs(i - i0)] += here * kept[:, row, token]
                sums["temporal"][:, abs(i - i0)] += here * (k == k0)
                sums["spatial"][:, abs(k - k0)] += here * (i == i0)
                y, x = divmod(index[k], grid.width)
                sums["planar"][:, round(math.hypot(y - y0, x - x0))] += here * (i == i0)
                sums["column"] += here * (abs(k - k0) <= reach)
    return sums


@grids
@masks
@pytest.mark.parametrize("chunk", [700, 1 << 23])
def test_streamed_sums_equal_the_whole_softmax(grid, make, chunk, monkeypatch):
    monkeypatch.setattr(analysis, "CHUNK", chunk)
    query, key, _ = tensors(grid)
    rows, lengths, mask = sample_rows(grid, 9), LENGTHS[grid.text], make(grid)
    actual = measure(query, key, mask, rows, text_lengths=lengths)
    for name, wanted in naive_profile(query, key, mask, rows, lengths).items():
        torch.testing.assert_close(getattr(actual, name) / 18, wanted / 18, atol=1e-6, rtol=0)
    assert actual.rows == 18
    torch.testing.assert_close(
        actual.mass.sum(1) + actual.text, torch.full((3,), 18.0).double(), rtol=0, atol=1e-5
    )


def test_curves_are_means_over_the_keys_at_a_distance():
    """Equal attention on every key: 1 / 159 at every distance, in time and in space."""
    grid = GRIDS[1]
    query, key = torch.zeros(1, 159, 2, 8), torch.zeros(1, 159, 2, 8)
    actual = measure(query, key, radial_mask(grid, CONFIG), sample_rows(grid, 150))
    for curve, size in ((actual.temporal_curve, 6), (actual.spatial_curve, 25), (actual.planar_curve, 7)):
        torch.testing.assert_close(curve, torch.full((2, size), 1 / 159).double(), atol=1e-9, rtol=0)
    assert actual.spatial_pairs.tolist() == [6 * 25] + [6 * 2 * (25 - x) for x in range(1, 25)]
    assert actual.temporal_pairs.tolist() == [25 * 6] + [25 * 2 * (6 - d) for d in range(1, 6)]


def test_profiles_add_up():
    grid = GRIDS[1]
    query, key, _ = tensors(grid)
    mask, rows = radial_mask(grid, CONFIG), sample_rows(grid, 9)
    parts = [measure(query, key, mask, part) for part in rows.split(4)]
    whole, total = measure(query, key, mask, rows), parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(vars(total), vars(whole), atol=1e-5, rtol=0)


def test_heads_are_classed_by_where_their_mass_is():
    """Head 0 looks at its own frame, head 1 at its own position in all frames."""
    grid = TokenGrid(4, 4, 4)
    frames = torch.nn.functional.one_hot(torch.arange(64) // 16, 16).float()
    places = torch.nn.functional.one_hot(torch.arange(64) % 16, 16).float()
    both = 30 * torch.stack([frames, places], dim=1)[None]
    actual = measure(both, both, radial_mask(grid, CONFIG), sample_rows(grid, 64))
    assert actual.is_temporal.tolist() == [False, True]
    torch.testing.assert_close(actual.mass[:, 0] / 64, torch.tensor([1.0, 0.25]).double(), atol=1e-6, rtol=0)


def test_bands_are_those_of_the_mask():
    assert [list(band) for band in bands(9)] == [[0], [1], [2, 3], [4, 5, 6, 7], [8]]
    assert [list(band) for band in bands(1)] == [[0]]
    for frames in range(1, 40):
        assert [d for band in bands(frames) for d in band] == list(range(frames))


@pytest.mark.parametrize(("a", "b"), [(0.3, -2.0), (5.0, 1.0), (0.001, 0.0), (-0.1, 0.5), (40.0, -30.0)])
def test_an_exponential_gives_its_rate_and_height(a, b):
    x = np.arange(20.0)
    fit = fit_exponential(x, np.exp(-a * x + b))
    np.testing.assert_allclose([fit.a, fit.b, fit.r2], [a, b, 1.0], atol=1e-9)


def test_the_fit_is_of_y_and_not_of_its_logarithm():
    """By hand: y = (1, 0, 0) is best met by an ever steeper curve; a log fit could not take it."""
    fit = fit_exponential(np.arange(3.0), np.array([1.0, 0.0, 0.0]))
    assert fit.r2 > 1 - 1e-9 and fit.a > 10
    x, y = np.array([0.0, 1.0, 2.0, np.nan]), np.array([1.0, 0.4, 0.3, 5.0])
    actual = fit_exponential(x, y)
    rest = np.square(y[:3] - np.exp(actual.b - actual.a * x[:3])).sum()
    for a in np.linspace(0.1, 3, 100):
        for b in np.linspace(-1, 1, 100):
            assert rest <= np.square(y[:3] - np.exp(b - a * x[:3])).sum()
    assert actual.r2 == pytest.approx(1 - rest / np.square(y[:3] - y[:3].mean()).sum())


def test_what_has_no_fit():
    assert fit_exponential(np.arange(2.0), np.array([1.0, 0.5])) is None
    assert fit_exponential(np.arange(4.0), np.zeros(4)) is None
    assert fit_exponential(np.arange(4.0), np.full(4, 0.7)).r2 is None


@pytest.mark.parametrize(("frames", "tokens"), [(9, 16), (20, 5), (40, 3), (6, 1), (33, 100)])
def test_what_the_token_mask_drops_is_equation_four(frames, tokens):
    kept = equation_four(frames, tokens, sink=False).view(frames, tokens, frames, tokens)
    distance = (torch.arange(frames)[:, None] - torch.arange(frames)).abs()
    apart = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    first = first_dropped(distance, tokens)
    assert torch.equal(kept, apart[None, :, None, :] < first[:, None, :, None])


def decaying_row(grid, row, alpha, beta, noise=0.0) -> torch.Tensor:
    """Returns the log of a softmax row that obeys eq. 3 with C_rel 1: an exponential, less random values."""
    frame = grid.tokens_per_frame
    i, k = torch.arange(grid.video_tokens).double() // frame, torch.arange(grid.video_tokens).double() % frame
    falls = -alpha * (i - row // frame).abs() - beta * (k - row % frame).abs()
    loss = noise * torch.rand(len(i), generator=torch.Generator().manual_seed(0)).double()
    loss[row] = 0
    return (falls - loss).log_softmax(-1)


DECAYS = [(0.3, 0.2), (0.05, 0.02), (1.0, 0.01), (0.01, 1.0), (2.0, 3.0)]


@pytest.mark.parametrize(("alpha", "beta"), DECAYS)
@pytest.mark.parametrize("grid", [TokenGrid(41, 5, 6), TokenGrid(12, 3, 5), TokenGrid(30, 1, 4)], ids=str)
@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_the_bound_holds_and_is_exact_for_an_exponential(grid, alpha, beta, noise):
    for row in (0, grid.video_tokens // 2 + 1, grid.video_tokens - 1):
        log_weights = decaying_row(grid, row, alpha, beta, noise)
        weights = log_weights.exp()
        kept = equation_four(grid.frames, grid.tokens_per_frame, sink=False)[row]
        masked = torch.where(kept, weights, 0) / weights[kept].sum()
        error = (masked - weights).abs().sum()
        rates = (torch.tensor([rate], dtype=torch.float64) for rate in (alpha, beta))
        bound = 2 * weights[row] * tail_bound(grid, row, *rates)[0, 0].exp()
        fitted = fit_tail(log_weights, kept, grid, row)
        torch.testing.assert_close(fitted.l1, error, atol=1e-12, rtol=1e-9)
        assert error <= min(bound, fitted.bound) * (1 + 1e-9) + 1e-14
        if not noise:
            torch.testing.assert_close(error, bound, atol=1e-12, rtol=1e-9)
            assert fitted.bound <= 1.1 * bound + 1e-12
        torch.testing.assert_close(fitted.mask_l1, error, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(fitted.mask_bound, fitted.bound, atol=1e-12, rtol=1e-9)


def test_the_papers_bound_fails_where_ours_holds():
    """alpha 0.3, beta 0.2, 100 tokens a frame: the error is 2.9e-2, eq. 7 allows 6.3e-3."""
    grid, rates = TokenGrid(401, 10, 10), [torch.tensor(x, dtype=torch.float64) for x in (0.3, 0.2)]
    row = 200 * 100 + 50
    log_weights = decaying_row(grid, row, 0.3, 0.2)
    fitted = fit_tail(log_weights, torch.ones(grid.video_tokens, dtype=torch.bool), grid, row)
    paper = paper_bound(*rates, torch.tensor(1.0), 100)
    assert paper.item() == pytest.approx(6.3e-3, rel=0.01) and fitted.l1.item() == pytest.approx(
        2.9e-2, rel=0.02
    )
    exact = 2 * log_weights[row].exp() * tail_bound(grid, row, *(rate[None] for rate in rates)).exp().item()
    assert paper < fitted.l1 <= exact * (1 + 1e-9) and exact <= fitted.bound * (1 + 1e-9) <= 1.1 * exact
    assert fitted.mask_l1 == fitted.mask_bound == 0


@grids
def test_the_bound_holds_on_attention(grid):
    query, key, _ = tensors(grid)
    mask, rows, lengths = radial_mask(grid, CONFIG), sample_rows(grid, 9), LENGTHS[grid.text]
    actual = measure_tails(query, key, mask, rows, text_lengths=lengths)
    kept = equation_four(grid.frames, grid.tokens_per_frame, sink=False)
    weights = whole_softmax(query, key, grid, lengths)[:, :, rows]
    video = weights[..., : grid.video_tokens]
    wanted = 2 * torch.where(kept[rows], 0, video).sum(-1)
    torch.testing.assert_close(actual.l1, wanted.flatten(), atol=1e-6, rtol=0)
    unseen = 2 * torch.where(mask.token_mask()[rows], 0, weights).sum(-1)
    torch.testing.assert_close(actual.mask_l1, unseen.flatten(), atol=1e-6, rtol=0)
    assert (actual.l1 <= actual.bound).all() and (actual.mask_l1 <= actual.mask_bound).all()
    assert (actual.c_rel >= 1).all() and actual.l1.max() > 0.1


LONG = """
import psutil, torch
from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.analysis.recall import kept_by, recall, sample_rows
from radial_attn.analysis.decay import measure
from radial_attn.analysis.bound import measure_tails
from scripts.run.system import peak_memory

grid = TokenGrid(18, 48, 80, text=512)
mask, rows = radial_mask(grid, RadialConfig(decay_factor=0.2)), sample_rows(grid, 300)
query = torch.randn(1, grid.tokens, 1, 128)
before = psutil.Process().memory_info().rss
measure(query, query, mask, rows)
recall(query, query, mask, rows)
kept_by(query, query, query, [mask, mask], rows)
measure_tails(query, query, mask, rows[150:151])
print(grid.tokens, peak_memory("cpu")["host_bytes"] - before)
"""


def test_seventy_thousand_tokens_take_little_memory():
    """Of a process of its own: what its peak is above query, key, mask and program."""
    done = subprocess.run([sys.executable, "-c", LONG], cwd=ROOT, capture_output=True, text=True, check=True)
    tokens, grown = map(int, done.stdout.split())
    assert tokens > 69_000 and grown < 500e6
