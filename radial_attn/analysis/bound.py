"""Measures and bounds what the token mask of eq. 4 drops: the paper's error bound (eq. 7), corrected.

Let a softmax row `p` of query `(i0, k0)` obey eq. 3, `p[j, l] <= C p[i0, k0] exp(-alpha d - beta x)` with
`d = |j - i0|` and `x = |l - k0|`. The masked row is `p` on the kept keys over their sum `1 - D`, and `D` is
the dropped mass. So its L1 error is `(1 - D) (1 / (1 - D) - 1) + D = 2 D`, and

    L1 = 2 D <= 2 C p[i0, k0] sum over dropped (j, l) of exp(-alpha d - beta x).

Eq. 4 keeps `x + 1 <= s / 2^g`, `g = floor(log2 max(d, 1))`, so it drops `x >= w(d) = floor(s / 2^g)`,
and nothing if `d <= 1`. If `2^g > s` it keeps only `x = 0`, `w = 1`, and nothing in the frames that
decimation leaves out, `w = 0`. Over a frame this is a geometric sum on each side, and
`exp(-beta w) / (1 - exp(-beta))` if the frame has no end: the tail is the sum over d of
`exp(-alpha d - beta s / 2^g)`. Eq. 7 has `exp(-beta s / 2)` for all d up to s, as if `w` were at least
`s / 2` there, which fails from d = 4 on.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..grid import TokenGrid
from .decay import distances
from .recall import masked_chunks

GUESSES, ROUNDS = 12, 4  # for alpha and for beta, each round between the neighbours of the best
MOST = 8.0


class Tail(NamedTuple):
    """Holds L1 errors and bounds of some rows, float64 `[N]` each.

    Attributes:
        l1: error of the masked and renormalised row under eq. 4 without a sink.
        bound: the least bound on it, of the form above, over the alpha and beta that were tried.
        alpha, beta, c_rel: their values at that bound; with them eq. 3 holds for every key of the row.
        paper_bound: eq. 7 with these values.
        mask_l1, mask_bound: the same two for the mask in use, with the same alpha, beta and c_rel.
    """

    l1: Tensor
    bound: Tensor
    alpha: Tensor
    beta: Tensor
    c_rel: Tensor
    paper_bound: Tensor
    mask_l1: Tensor
    mask_bound: Tensor


def first_dropped(distance: Tensor, tokens_per_frame: int) -> Tensor:
    """Returns `w(d)` of frame distances, int64: raster distances from it on are dropped, all if it is 0."""
    power = 2 ** (torch.frexp(distance.clamp(min=1).double()).exponent.long() - 1)
    decimation = -(-power // tokens_per_frame)
    widths = (tokens_per_frame // power).clamp(min=1)
    widths = torch.where(distance <= 1, tokens_per_frame, widths)
    return torch.where(distance % decimation == 0, widths, 0)


def paper_bound(alpha: Tensor, beta: Tensor, c_rel: Tensor, tokens_per_frame: int) -> Tensor:
    """Computes eq. 7 of the paper unchanged."""
    s, of_alpha, of_beta = tokens_per_frame, -torch.expm1(-alpha), -torch.expm1(-beta)
    near = 8 * torch.exp(-beta * (s / 2 + 1)) / (of_alpha * of_beta)
    far = 4 * (1 + torch.exp(-beta)) / of_beta * torch.exp(-alpha * (s + 1)) / of_alpha
    return c_rel * (near + far)


def tail_bound(grid: TokenGrid, row: int, alpha: Tensor, beta: Tensor) -> Tensor:
    """Returns the log of the sum of `exp(-alpha d - beta x)` over the keys that eq. 4 drops, `[a, b]`.

    Args:
        row: a video token.
        alpha, beta: float64 `[a]` and `[b]`, beta above 0.
    """
    frame, position = grid.tokens_per_frame, row % grid.tokens_per_frame
    distance = distances(torch.tensor([row], device=alpha.device), grid)[0][0]
    first = first_dropped(distance, frame)
    sides = [_geometric(first, position, beta), _geometric(first.clamp(min=1), frame - 1 - position, beta)]
    of_frames = torch.logaddexp(*sides)
    return torch.logsumexp(of_frames - alpha[:, None, None] * distance, dim=-1)


def _geometric(first: Tensor, last: int, beta: Tensor) -> Tensor:
    """Sums `exp(-beta x)` for x from `first` `[f]` to `last`, returns the log `[b, f]`; -inf for no x."""
    count, rate = (last + 1 - first).clamp(min=0), beta[:, None]
    return -rate * first + torch.log(-torch.expm1(-rate * count)) - torch.log(-torch.expm1(-rate))


def fit_tail(log_weights: Tensor, kept: Tensor, grid: TokenGrid, row: int) -> Tail:
    """Computes L1 error and bounds of one row, with alpha from 0.001 to 8 and beta from 0.01 / s to 8.

    Args:
        log_weights: log of the dense softmax over the video's keys, float64 `[f s]`; text may hold the rest.
        kept: the keys that the mask in use keeps, bool `[f s]`.
        row: the token of the row.
    """
    frame = grid.tokens_per_frame
    temporal, spatial = (x[0] for x in distances(torch.tensor([row], device=log_weights.device), grid))
    alpha, beta, log_c, log_bound = _envelope(log_weights - log_weights[row], grid, row)
    weights = log_weights.exp().view(grid.frames, frame)
    self_weight = log_weights[row].exp()
    dropped = spatial >= first_dropped(temporal, frame)[:, None]
    envelope = self_weight * (log_c - alpha * temporal[:, None] - beta * spatial).exp()
    unseen = ~kept.view(grid.frames, frame)
    return Tail(
        l1=2 * weights[dropped].sum(),
        bound=2 * self_weight * log_bound.exp(),
        alpha=alpha,
        beta=beta,
        c_rel=log_c.exp(),
        paper_bound=paper_bound(alpha, beta, log_c.exp(), frame),
        mask_l1=2 * weights[unseen].sum(),
        mask_bound=2 * envelope[unseen].sum(),
    )


def _envelope(log_ratio: Tensor, grid: TokenGrid, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Finds the least `C_rel` times the sum over dropped keys: alpha, beta, log `C_rel`, log of the product.

    For any alpha and beta the least `C_rel` with which eq. 3 holds is a maximum over the keys, so the log of
    the product is convex in both. `log_ratio`: log of each weight over the row's own, `[f s]`.
    """
    temporal, spatial = (x[0] for x in distances(torch.tensor([row], device=log_ratio.device), grid))
    ratio, options = log_ratio.view(grid.frames, -1), {"dtype": torch.float64, "device": log_ratio.device}
    limits = [(1e-3, MOST), (0.01 / grid.tokens_per_frame, MOST)]
    for _ in range(ROUNDS):
        exponents = [[math.log10(limit) for limit in pair] for pair in limits]
        alpha, beta = (torch.logspace(*pair, GUESSES, **options) for pair in exponents)
        highest = torch.stack([(ratio + rate * spatial).amax(-1) for rate in beta])
        log_c = (highest + alpha[:, None, None] * temporal).amax(-1)
        product = log_c + tail_bound(grid, row, alpha, beta)
        a, b = divmod(int(product.argmin()), GUESSES)
        limits = [
            (values[max(at - 1, 0)].item(), values[min(at + 1, GUESSES - 1)].item())
            for values, at in ((alpha, a), (beta, b))
        ]
    return alpha[a], beta[b], log_c[a, b], product[a, b]


def measure_tails(
    query: Tensor, key: Tensor, mask: BlockMask, rows: Tensor, *, text_lengths: Tensor | None = None
) -> Tail:
    """Measures the tails of some rows of a layer, for all samples and heads in turn, on the CPU.

    Arguments and errors are as in `decay.measure`; a row takes about 50 passes over its keys.
    """
    tails, video = [], mask.grid.video_tokens
    for chunk, kept in masked_chunks(query, key, rows, mask, text_lengths):
        for row, scores, row_kept in zip(chunk.rows.tolist(), chunk.scores, kept, strict=True):
            weights = scores.double().log_softmax(-1)[:video]
            tails.append(torch.stack(fit_tail(weights, row_kept[:video], mask.grid, row)).cpu())
    return Tail(*torch.stack(tails, dim=1))
