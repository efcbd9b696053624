"""The toy world: rendered scenes are read back, and impossible requests are refused."""

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch.nn.functional import conv3d, pad

from scripts.toyworld import Attributes, Scene, all_attributes, parse_caption, random_scene, read, render
from scripts.toyworld.render import SHAPES, VOCABULARY, coverage, pixel_grid


def blurred(video: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blurs each frame by a Gaussian, `[F, H, W, 3]`."""
    taps = torch.exp(-torch.arange(-3, 4.0).square() / (2 * sigma**2))
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    planes = pad(video.permute(3, 0, 1, 2)[:, None], (3, 3, 3, 3, 0, 0), mode="replicate")
    return conv3d(planes, kernel[None, None, None])[:, 0].permute(1, 2, 3, 0)


def share_read(change: Callable[[torch.Tensor, torch.Generator], torch.Tensor]) -> float:
    """Returns the share of attributes of all captions that are read right."""
    random = torch.Generator().manual_seed(1)
    right = []
    for attributes in all_attributes():
        video = change(render(random_scene(attributes, random)), random)
        right += read(video).matches(attributes).values()
    return sum(right) / len(right)


def test_world_is_large_enough():
    sizes = [len(set(values)) for values in VOCABULARY.values()]
    assert all(size >= least for size, least in zip(sizes, (5, 3, 4, 3), strict=True))
    assert len(set(all_attributes())) == prod(sizes)


@pytest.mark.parametrize(
    "change",
    [
        lambda video, random: video,
        lambda video, random: (video + 0.04 * torch.randn(video.shape, generator=random)).clamp(0, 1),
        lambda video, random: blurred(video, 1.2),
    ],
    ids=["clean", "noise", "blur"],
)
def test_reader_recovers_captions(change):
    assert share_read(change) >= 0.99


def test_reader_on_long_and_wide_videos():
    random = torch.Generator().manual_seed(2)
    for attributes in all_attributes()[::17]:
        video = render(random_scene(attributes, random), frames=65, height=48, width=96)
        assert all(read(video).matches(attributes).values()), attributes


def test_reader_sees_nothing_in_an_empty_video():
    reading = read(torch.full((9, 32, 32, 3), 0.03))
    assert reading.background == "black"
    assert (reading.colour, reading.shape, reading.motion) == (None, None, None)
    assert reading.path.isnan().all() and reading.radius is None and reading.period is None


def test_reader_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"got \(4, 4, 3\)"):
        read(torch.zeros(4, 4, 3))


def test_a_still_shape_has_no_motion():
    scene = Scene(Attributes("red", "circle", "around", "navy"), 0.15, (0, 0), (0, 0), 20, 0, 1)
    assert read(render(scene)).motion is None


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_an_area(shape):
    x, y = pixel_grid(64, 64)
    area = coverage(shape, x, y, 12.0).sum().item()
    expected = torch.pi * 144 * (0.8 if shape == "triangle" else 1.0)
    assert area == pytest.approx(expected, rel=0.03)


def test_path_is_periodic_and_read_back():
    attributes = Attributes("white", "square", "around", "gray")
    scene = Scene(attributes, 0.14, (0.02, -0.03), (0.2, 0.2), 16, 0.3, -1)
    video = render(scene, frames=33)
    assert torch.allclose(video[:17], video[16:33], atol=1e-4)
    x, y = scene.position(torch.arange(33.0))
    assert torch.allclose(read(video).path, 64 * torch.stack([x, y], dim=1), atol=0.25)


@pytest.mark.parametrize("number", range(0, 180, 13))
def test_radius_and_period_are_read_back(number):
    scene = random_scene(all_attributes()[number], torch.Generator().manual_seed(number))
    reading = read(render(scene, 129))
    assert reading.radius == pytest.approx(scene.radius, rel=0.02)
    assert reading.period == pytest.approx(scene.period, rel=0.01)


def test_captions_round_trip():
    for attributes in all_attributes():
        assert parse_caption(attributes.caption) == attributes


@pytest.mark.parametrize("caption", ["a red circle", "a red blue circle moving around on a navy background"])
def test_incomplete_captions_are_refused(caption):
    with pytest.raises(ValueError, match="caption must name one"):
        parse_caption(caption)


def test_unknown_attribute_is_refused():
    with pytest.raises(ValueError, match=r"colour must be one of red.*got 'pink'"):
        Attributes("pink", "circle", "around", "navy")
