"""Recovers the four attributes from a video by classical computer vision."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.toyworld.render import (
    AREAS,
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    VOCABULARY,
    Attributes,
    coverage,
    pixel_grid,
)

EDGE = 2  # pixels of border from which the background is read
LINE = 0.3  # a path is a line if its width is under this share of its length
PADDED = 4096  # least number of points of the spectrum that a period is read from
STRAIGHT = 0.35  # a line is horizontal or vertical if its slope is under this
MASS = 4  # pixels of shape that a frame must have
POINTS = 3  # frames that a motion is read from, at least


@dataclass(frozen=True)
class Reading:
    """Holds what a video shows; an attribute is None if it cannot be recognised.

    Attributes:
        path: centre of the shape in pixels from the middle (x, y), `[frames, 2]`; NaN in frames without it.
        radius: radius of a circle of the shape's area, as a share of the shorter side; median of the frames.
        period: frames a cycle; rough, and at most the video's length, for videos under two cycles.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    background: str | None
    path: Tensor
    radius: float | None = None
    period: float | None = None

    def matches(self, attributes: Attributes) -> dict[str, bool]:
        """Returns which attributes are as asked."""
        return {name: getattr(self, name) == getattr(attributes, name) for name in VOCABULARY}


def read(video: Tensor) -> Reading:
    """Reads a float RGB video in [0, 1], `[frames, height, width, 3]`. Raises ValueError for other shapes."""
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video must be [frames, height, width, 3], got {tuple(video.shape)}")
    video = video.float()
    ground = _border(video).median(dim=0).values
    background = _nearest(ground, BACKGROUNDS)
    contrast = (video - ground).norm(dim=-1)
    core = contrast > 0.6 * torch.quantile(contrast.flatten(1), 0.99, dim=1).median()
    if contrast.max() < 0.15 or not core.any():
        return Reading(None, None, None, background, torch.full((len(video), 2), torch.nan))
    colour = video[core].median(dim=0).values
    alpha = _alpha(video, ground, colour)
    path = _path(alpha)
    shape, motion = _shape(alpha, path), _motion(path)
    radius, period = _radius(alpha, shape), _period(path) if motion else None
    return Reading(_nearest(colour, COLOURS), shape, motion, background, path, radius, period)


def _border(video: Tensor) -> Tensor:
    """Returns the pixels along the four edges of all frames, `[N, 3]`."""
    rows = torch.cat([video[:, :EDGE], video[:, -EDGE:]], dim=1).reshape(-1, 3)
    columns = torch.cat([video[:, :, :EDGE], video[:, :, -EDGE:]], dim=2).reshape(-1, 3)
    return torch.cat([rows, columns])


def _nearest(rgb: Tensor, palette: dict[str, tuple[float, float, float]]) -> str:
    """Returns the name of the nearest colour."""
    return min(palette, key=lambda name: (rgb - torch.tensor(palette[name])).norm().item())


def _alpha(video: Tensor, ground: Tensor, colour: Tensor) -> Tensor:
    """Returns the share of shape in each pixel, `[F, H, W]`: its position from background to colour."""
    axis = colour - ground
    alpha = ((video - ground) @ axis / axis.square().sum()).clamp(0, 1)
    return torch.where(alpha > 0.25, alpha, 0.0)


def _path(alpha: Tensor) -> Tensor:
    """Returns the centre of mass of each frame, pixels from the middle, `[F, 2]`; NaN in empty frames."""
    x, y = pixel_grid(*alpha.shape[1:])
    mass = alpha.sum(dim=(1, 2))
    centre = torch.stack([(alpha * x).sum(dim=(1, 2)), (alpha * y).sum(dim=(1, 2))], dim=1) / mass[:, None]
    return torch.where((mass > MASS)[:, None], centre, torch.nan)


def _shape(alpha: Tensor, path: Tensor) -> str | None:
    """Returns the shape whose template fits the mean of the centred frames best."""
    seen = ~path.isnan().any(dim=1)
    if not seen.any():
        return None
    mean = _centred(alpha[seen], path[seen]).mean(dim=0)
    return min(SHAPES, key=lambda shape: _misfit(shape, mean))


def _centred(alpha: Tensor, path: Tensor) -> Tensor:
    """Shifts each frame (bilinear) so that its centre of mass is in the middle, `[F, H, W]`."""
    frames, height, width = alpha.shape
    theta = torch.eye(2, 3).repeat(frames, 1, 1)
    theta[:, 0, 2] = 2 * path[:, 0] / width
    theta[:, 1, 2] = 2 * path[:, 1] / height
    grid = torch.nn.functional.affine_grid(theta, (frames, 1, height, width), align_corners=False)
    return torch.nn.functional.grid_sample(alpha[:, None], grid, align_corners=False)[:, 0]


def _misfit(shape: str, mean: Tensor) -> float:
    """Returns the smallest squared difference between a centred shape and templates of about its area."""
    x, y = pixel_grid(*mean.shape)
    radius = (mean.sum() / (AREAS[shape] * torch.pi)).sqrt().item()
    best = float("inf")
    for factor in (0.9, 0.95, 1.0, 1.05):
        template = coverage(shape, x, y, factor * radius)
        offset = (template * y).sum() / template.sum()
        template = coverage(shape, x, y + offset, factor * radius)
        best = min(best, (template - mean).square().sum().item())
    return best


def _radius(alpha: Tensor, shape: str | None) -> float | None:
    """Returns the radius from the median area of the frames that show the shape."""
    areas = alpha.sum(dim=(1, 2))
    if shape is None:
        return None
    radius = (areas[areas > MASS].median() / (AREAS[shape] * torch.pi)).sqrt().item()
    return radius / min(alpha.shape[1:])


def _period(path: Tensor) -> float:
    """Returns the period of the strongest frequency along the path's longer axis."""
    seen = ~path.isnan().any(dim=1)
    centred = path[seen] - path[seen].mean(dim=0)
    along = torch.zeros(len(path))
    along[seen] = centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, 1]
    points = max(PADDED, len(along))
    power = torch.fft.rfft(along * torch.hann_window(len(along)), points).abs()
    least = points // len(along)  # the frequency of a single cycle
    peak = least + int(power[least:].argmax())
    return points / peak


def _motion(path: Tensor) -> str | None:
    """Classifies a path by the principal axes of its points."""
    points = path[~path.isnan().any(dim=1)]
    if len(points) < POINTS:
        return None
    spread, axes = torch.linalg.eigh(torch.cov(points.T))
    if spread[1] < 1:
        return None
    if (spread[0].clamp(min=0) / spread[1]).sqrt() > LINE:
        return "around"
    along = axes[:, 1].abs()
    if along[1] < STRAIGHT * along[0]:
        return "horizontally"
    return "vertically" if along[0] < STRAIGHT * along[1] else "diagonally"
