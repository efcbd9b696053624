"""Measures energy decay: where attention lies in time and space, and how well an exponential fits.

Covers the paper's figures 4 and 8 and its eq. 3, on sampled rows, with sums that never hold more than a few
rows of the attention.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..grid import TokenGrid
from .recall import Chunk, masked_chunks

STEEPNESS = (1e-3, 1e5)  # range of the first guesses: decay over all distances
STEEPEST_RISE = 20
FLAT = 1e-12  # variation of a curve, relative to its height, that counts as rounding
LEAST_POINTS = 3  # two always lie on an exponential


@dataclass(frozen=True)
class Profile:
    """Holds sums of dense attention over `rows` rows of one layer, by head; profiles of a layer add up.

    `d = |i - i0|` is the distance of a key's frame from the query's, `x = |l - k0|` the distance of their
    places in the sequence of a frame, in raster order as in eq. 3 of the paper or in the grid's. All are
    float64 on the CPU.

    Attributes:
        rows: number of rows, of all samples.
        temporal: attention on keys at the query's own position, by d, `[H, F]`.
        temporal_pairs: number of these keys, `[F]`.
        spatial: attention on keys of the query's own frame, by x, `[H, s]`; spatial_pairs likewise `[s]`.
        planar: the same keys by their distance in the plane of the frame, rounded, `[H, P]`; planar_pairs.
        mass: attention on all keys of the frames at distance d, `[H, F]`.
        kept: the part of `mass` on keys that the mask keeps.
        text, text_kept: attention on text, and on text that the mask keeps, `[H]`.
        column: attention on keys with `x <= column_reach(grid)` of all frames, `[H]`.
    """

    rows: Tensor
    temporal: Tensor
    temporal_pairs: Tensor
    spatial: Tensor
    spatial_pairs: Tensor
    planar: Tensor
    planar_pairs: Tensor
    mass: Tensor
    kept: Tensor
    text: Tensor
    text_kept: Tensor
    column: Tensor

    def __add__(self, other: Self) -> Self:
        return Profile(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    @property
    def temporal_curve(self) -> Tensor:
        """Returns the mean attention on one key at the query's position in a frame at distance d, `[H, F]`.

        It is NaN at distances that no sampled row has.
        """
        return self.temporal / self.temporal_pairs

    @property
    def spatial_curve(self) -> Tensor:
        """Returns the mean attention on one key of the query's frame at distance x in sequence, `[H, s]`."""
        return self.spatial / self.spatial_pairs

    @property
    def planar_curve(self) -> Tensor:
        """Returns the mean attention on one key of the query's frame at a distance in its plane, `[H, P]`."""
        return self.planar / self.planar_pairs

    @property
    def is_temporal(self) -> Tensor:
        """Marks heads, bool `[H]`, with more attention on the query's position in all frames than its frame.

        Both have about equally many keys: a frame `s`, the column `2 column_reach + 1` of each frame.
        """
        return self.column > self.mass[:, 0]


class Fit(NamedTuple):
    """Holds `y = exp(-a x + b)` and the R^2 of y (not of log y), None if y does not vary."""

    a: float
    b: float
    r2: float | None


def column_reach(grid: TokenGrid) -> int:
    """Returns the distance in a frame up to which a column through all frames has about a frame's keys."""
    return max(0, round((grid.tokens_per_frame / grid.frames - 1) / 2))


def measure(
    query: Tensor, key: Tensor, mask: BlockMask, rows: Tensor, *, text_lengths: Tensor | None = None
) -> Profile:
    """Measures the profile of some rows of a layer, of all samples together.

    Args:
        query, key: `[B, S, H, D]`.
        mask: its kept part is summed up; the attention itself is dense.
        rows: video tokens, int64 `[R]`, as from `radial_attn.analysis.recall.sample_rows`.
        text_lengths: valid text tokens of each sample, integers `[B]`, or None for all.

    Raises ValueError if tensors, rows and mask do not fit together.
    """
    grid, heads = mask.grid, query.shape[2]
    frames, frame, most = grid.frames, grid.tokens_per_frame, _farthest(grid)
    sizes = {"temporal": frames, "spatial": frame, "planar": most, "mass": frames, "kept": frames}
    sums = {name: torch.zeros(heads, size, dtype=torch.float64) for name, size in sizes.items()}
    sums |= {name: torch.zeros(heads, dtype=torch.float64) for name in ("text", "text_kept", "column")}
    reach = column_reach(grid)
    for chunk, kept in masked_chunks(query, key, rows, mask, text_lengths):
        for name, value in _of_chunk(chunk, kept, grid, reach).items():
            sums[name][chunk.head] += value.cpu()
    rows, samples = torch.as_tensor(rows).cpu(), query.shape[0]
    temporal, spatial = distances(rows, grid)
    planar = planar_distance(rows, grid)
    return Profile(
        rows=torch.tensor(samples * len(rows), dtype=torch.float64),
        temporal_pairs=samples * torch.bincount(temporal.flatten(), minlength=frames).double(),
        spatial_pairs=samples * torch.bincount(spatial.flatten(), minlength=frame).double(),
        planar_pairs=samples * torch.bincount(planar.flatten(), minlength=most).double(),
        **sums,
    )


def distances(rows: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """Returns the distance of each row from each frame, int64 `[R, F]`, and place in it, `[R, s]`."""
    frame = grid.tokens_per_frame
    frames, positions = (torch.arange(size, device=rows.device) for size in (grid.frames, frame))
    return (frames - (rows // frame)[:, None]).abs(), (positions - (rows % frame)[:, None]).abs()


def planar_distance(rows: Tensor, grid: TokenGrid) -> Tensor:
    """Returns the Euclidean distance of each row and position in tokens, rounded, int64 `[R, s]`."""
    keys = grid.raster_index[: grid.tokens_per_frame].to(rows.device)
    queries = keys[rows % grid.tokens_per_frame][:, None]
    down, across = keys // grid.width - queries // grid.width, keys % grid.width - queries % grid.width
    return torch.hypot(down.double(), across.double()).round().long()


def _farthest(grid: TokenGrid) -> int:
    """Counts the rounded distances in the plane of a frame."""
    return 1 + int(planar_distance(torch.tensor([0]), grid).max())


def _of_chunk(chunk: Chunk, kept: Tensor, grid: TokenGrid, reach: int) -> dict[str, Tensor]:
    """Returns what the rows of a chunk add to the sums of their head."""
    weights, frame = chunk.scores.softmax(-1), grid.tokens_per_frame
    rows = chunk.rows.to(weights.device)
    temporal, spatial = distances(rows, grid)
    shape = -1, grid.frames, frame
    video, text = weights[:, : grid.video_tokens].view(shape), weights[:, grid.video_tokens :]
    kept_mass = (video * kept[:, : grid.video_tokens].view(shape)).sum(-1)
    position = (rows % frame)[:, None, None].expand(-1, grid.frames, 1)
    own_frame = video[torch.arange(len(rows), device=rows.device), rows // frame]
    return {
        "temporal": _by_distance(temporal, video.gather(2, position)[..., 0], grid.frames),
        "spatial": _by_distance(spatial, own_frame, frame),
        "planar": _by_distance(planar_distance(rows, grid), own_frame, _farthest(grid)),
        "mass": _by_distance(temporal, video.sum(-1), grid.frames),
        "kept": _by_distance(temporal, kept_mass, grid.frames),
        "text": text.double().sum(),
        "text_kept": (text * kept[:, grid.video_tokens :]).double().sum(),
        "column": (video.sum(1) * (spatial <= reach)).double().sum(),
    }


def _by_distance(distance: Tensor, values: Tensor, count: int) -> Tensor:
    """Sums the values at each of `count` distances, float64."""
    sums = torch.zeros(count, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, distance.flatten(), values.double().flatten())


def bands(frames: int) -> list[range]:
    """Returns the frame distances of each band of the mask: 0, 1, 2 to 3, 4 to 7, ..., below `frames`."""
    edges = [0, 1, *(1 << level for level in range(1, max(frames - 1, 1).bit_length())), frames]
    return [range(first, min(last, frames)) for first, last in pairwise(edges)][:frames]


def fit_exponential(distance: np.ndarray, mean: np.ndarray) -> Fit | None:
    """Fits `y = exp(-a x + b)` to a curve by least squares of y; every distance counts alike.

    Args:
        distance, mean: float `[N]`; points that are not finite are left out.

    Returns:
        None for fewer than three points, or if y is nowhere above 0.
    """
    x, y = np.asarray(distance, float), np.asarray(mean, float)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < LEAST_POINTS or y.max() <= 0 or np.ptp(x) == 0:
        return None
    start, span, scale = x.min(), np.ptp(x), y.max()
    rate, height = _least_squares((x - start) / span, y / scale)
    a, b = rate / span, np.log(height * scale) + rate / span * start
    rest, total = (np.square(y - by).sum() for by in (np.exp(b - a * x), y.mean()))
    return Fit(float(a), float(b), float(1 - rest / total) if np.ptp(y) > FLAT * scale else None)


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Fits `height exp(-rate x)`, returns rate and height; the best height follows from the rate.

    Takes the best of a few hundred rates on a few hundred points, dense at first, then bisects on all points.
    """

    def height_and_slope(rate: float) -> tuple[float, float]:  # slope of the error by the rate
        shape = np.exp(-rate * x)
        height = shape @ y / (shape @ shape)
        return height, height * ((y - height * shape) @ (x * shape))

    chosen = np.unique(np.geomspace(1, len(x), 256).astype(int)) - 1
    falling = np.geomspace(*STEEPNESS, 300)
    rates = np.concatenate([-falling[falling < STEEPEST_RISE][::-1], [0.0], falling])
    shapes = np.exp(-np.outer(rates, x[chosen]))
    heights = shapes @ y[chosen] / np.square(shapes).sum(1)
    errors = np.square(y[chosen] - heights[:, None] * shapes).sum(1)
    low = high = int(np.where(heights > 0, errors, np.inf).argmin())
    while low > 0 and height_and_slope(rates[low])[1] > 0:
        low -= 1
    while high < len(rates) - 1 and height_and_slope(rates[high])[1] < 0:
        high += 1
    below, above = rates[low], rates[high]
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (below, middle) if height_and_slope(middle)[1] > 0 else (middle, above)
    return below, height_and_slope(below)[0]
