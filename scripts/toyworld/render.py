"""Renders videos such as "a red circle moving around on a navy background", antialiased, on any grid."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.20, 0.45, 1.00),
    "yellow": (0.98, 0.85, 0.15),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS = {"black": (0.03, 0.03, 0.03), "navy": (0.06, 0.08, 0.35), "gray": (0.45, 0.45, 0.45)}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("horizontally", "vertically", "around", "diagonally")
RADII = (0.12, 0.18)  # range in random scenes, shares of the shorter side
PERIODS = (28, 44)  # range in random scenes, frames a cycle
AREAS = {"circle": 1.0, "square": 1.0, "triangle": 0.8}  # relative to the circle of the shape's radius
VOCABULARY = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS, "background": tuple(BACKGROUNDS)}


@dataclass(frozen=True)
class Attributes:
    """Holds what a caption says about a video."""

    colour: str
    shape: str
    motion: str
    background: str

    def __post_init__(self) -> None:
        for name, values in VOCABULARY.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.motion} on a {self.background} background"


@dataclass(frozen=True)
class Scene:
    """Describes one video: lengths are fractions of the shorter side, times are in frames."""

    attributes: Attributes
    radius: float  # of a circle of about the shape's area
    centre: tuple[float, float]  # of the path, (x, y) from the middle of the image
    reach: tuple[float, float]  # amplitude of the path in x and y
    period: float  # frames a cycle
    phase: float  # radians
    direction: int  # +1 or -1: sense of rotation, or which diagonal

    def position(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the shape's centre, (x, y) from the middle of the image, for a tensor of frame numbers."""
        angle = 2 * math.pi * frame / self.period + self.phase
        wave_x, wave_y = {
            "horizontally": (angle.sin(), 0 * angle),
            "vertically": (0 * angle, angle.sin()),
            "around": (angle.cos(), self.direction * angle.sin()),
            "diagonally": (angle.sin(), self.direction * angle.sin()),
        }[self.attributes.motion]
        return self.centre[0] + self.reach[0] * wave_x, self.centre[1] + self.reach[1] * wave_y


def all_attributes() -> list[Attributes]:
    """Returns every combination of colour, shape, motion and background."""
    return [Attributes(*choice) for choice in itertools.product(*VOCABULARY.values())]


def parse_caption(caption: str) -> Attributes:
    """Returns the attributes named in a caption; ValueError if one is missing or named twice."""
    words = caption.lower().replace(",", " ").split()
    named = []
    for name, values in VOCABULARY.items():
        hits = [value for value in values if value in words]
        if len(hits) != 1:
            raise ValueError(f"caption must name one {name} of {', '.join(values)}, got {caption!r}")
        named += hits
    return Attributes(*named)


def random_scene(attributes: Attributes, generator: torch.Generator) -> Scene:
    """Draws size, position, reach, speed and phase; the shape stays inside the image."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    radius = uniform(*RADII)
    room = 0.5 - 1.25 * radius
    reach = uniform(0.7, 1.0) * min(room, 0.28)
    spare = room - reach
    centre = (
        uniform(-1, 1) * (0.6 * room if attributes.motion == "vertically" else spare),
        uniform(-1, 1) * (0.6 * room if attributes.motion == "horizontally" else spare),
    )
    sign = 1 if torch.rand((), generator=generator).item() < 0.5 else -1
    phase = uniform(0, 2 * math.pi)
    return Scene(attributes, radius, centre, (reach, reach), uniform(*PERIODS), phase, sign)


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Returns the distance to the edge of a shape at the origin (negative inside), for each x and y.

    The square and the triangle (upright, equilateral) have 1.0 and 0.8 of the area of the circle.
    """
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius * math.sqrt(math.pi) / 2
    inner = radius * math.sqrt(AREAS["triangle"] * math.pi / (3 * math.sqrt(3)))
    slope = math.sqrt(3) / 2 * x.abs() - 0.5 * y
    return torch.maximum(slope, y) - inner


def coverage(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Returns the antialiased share of a unit pixel at (x, y) that a shape of `radius` pixels covers."""
    return (0.5 - signed_distance(shape, x, y, radius)).clamp(0, 1)


def pixel_grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns pixel centres, (x, y) in pixels from the middle of the image: `[1, W]` and `[H, 1]`."""
    x = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float32) - (height - 1) / 2
    return x[None, :], y[:, None]


def render(scene: Scene, frames: int = 33, height: int = 64, width: int = 64) -> Tensor:
    """Draws a scene as float32 RGB in [0, 1], `[frames, height, width, 3]`."""
    side = min(height, width)
    x, y = pixel_grid(height, width)
    centre_x, centre_y = scene.position(torch.arange(frames, dtype=torch.float32))
    x, y = x - side * centre_x[:, None, None], y - side * centre_y[:, None, None]
    alpha = coverage(scene.attributes.shape, x, y, side * scene.radius)[..., None]
    colour = torch.tensor(COLOURS[scene.attributes.colour])
    return alpha * colour + (1 - alpha) * torch.tensor(BACKGROUNDS[scene.attributes.background])
