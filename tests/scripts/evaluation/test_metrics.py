"""Tests PSNR and SSIM against hand-computed and library values, LPIPS if it is there, and bad videos."""

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchmetrics.functional.image import structural_similarity_index_measure as ssim_of_images
from torchmetrics.image import PeakSignalNoiseRatio

from scripts.evaluation import metrics
from scripts.evaluation.metrics import compare, lpips, no_lpips, psnr, ssim
from scripts.toyworld import all_attributes, random_scene, render

SHAPE = (3, 24, 32, 3)
C1 = (0.01 * 255) ** 2  # of Wang et al. 2004


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plain(value: int) -> np.ndarray:
    return np.full(SHAPE, value, np.uint8)


def images(video: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(video).permute(0, 3, 1, 2).double() / 255


def test_psnr_of_a_shift_and_of_one_pixel():
    assert psnr(plain(100), plain(110)) == pytest.approx(20 * math.log10(25.5))
    other = plain(100)
    other[1, 2, 3, 0] = 150
    assert psnr(plain(100), other) == pytest.approx(10 * math.log10(255**2 * other.size / 2500))


def test_psnr_is_of_the_whole_video_not_the_mean_of_frames():
    other = plain(100)
    other[0] += 30
    assert psnr(plain(100), other) == pytest.approx(10 * math.log10(255**2 / 300))
    assert psnr(noise(0), noise(1)) == pytest.approx(
        PeakSignalNoiseRatio(data_range=1.0)(images(noise(0)), images(noise(1))).item(), rel=1e-6
    )


@pytest.mark.parametrize(("dark", "light"), [(100, 110), (0, 255), (30, 200)])
def test_ssim_of_constant_frames_is_its_luminance_term(dark, light):
    expected = (2 * dark * light + C1) / (dark**2 + light**2 + C1)
    assert ssim(plain(dark), plain(light)) == pytest.approx(expected, abs=1e-9)


def scene() -> np.ndarray:
    attributes = all_attributes()[50]
    video = render(random_scene(attributes, torch.Generator().manual_seed(0)), 2, 48, 40)
    return (video * 255).round().byte().numpy()


@pytest.mark.parametrize("video", [noise(0), scene(), plain(250)])
@pytest.mark.parametrize("strength", [1, 32])
def test_ssim_is_that_of_the_library_over_all_frames(video, strength):
    """Compares noise, a drawn scene, and bright even frames, for which float32 is off by 0.0015."""
    other = noise(2, video.shape) % (2 * strength + 1) + video.astype(int) - strength
    other = np.clip(other, 0, 255).astype(np.uint8)
    expected = ssim_of_images(images(other), images(video), data_range=1.0).item()
    assert 0.05 < expected < 1
    assert ssim(other, video) == pytest.approx(expected, abs=1e-9)


def test_ssim_by_the_formula_over_every_window_of_a_mirrored_frame():
    a, b = noise(3, (1, 11, 14, 3)), noise(4, (1, 11, 14, 3))
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    mirrored = [np.pad(x[0].astype(float), ((5, 5), (5, 5), (0, 0)), mode="reflect") for x in (a, b)]
    x, y = (sliding_window_view(image, (11, 11), axis=(0, 1)) for image in mirrored)  # [11, 14, 3, 11, 11]
    mean_x, mean_y = ((weights * z).sum((-2, -1), keepdims=True) for z in (x, y))
    spread = (weights * ((x - mean_x) ** 2 + (y - mean_y) ** 2)).sum((-2, -1))
    shared = (weights * (x - mean_x) * (y - mean_y)).sum((-2, -1))
    mean_x, mean_y, c2 = mean_x[..., 0, 0], mean_y[..., 0, 0], (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + C1) * (2 * shared + c2)
    expected = top / ((mean_x**2 + mean_y**2 + C1) * (spread + c2))
    assert ssim(a, b) == pytest.approx(expected.mean(), abs=1e-9)


def test_equal_videos():
    result = compare(noise(5), noise(5))
    assert (
        psnr(noise(5), noise(5)) == math.inf and result["psnr"] is None and result["ssim"] == pytest.approx(1)
    )
    assert set(result) == {"psnr", "ssim", "lpips"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (noise(0, (2, 24, 32, 3)), r"one shape, got \[3, 24, 32, 3\] and \[2, 24, 32, 3\]"),
        (noise(0, (3, 24, 32, 1)), r"uint8 \[T, H, W, 3\], got uint8 \[3, 24, 32, 1\]"),
        (noise(0).astype(np.float32), r"got float32 \[3, 24, 32, 3\]"),
        (noise(0)[:0], r"got uint8 \[0, 24, 32, 3\]"),
        (noise(0)[0], r"got uint8 \[24, 32, 3\]"),
    ],
)
@pytest.mark.parametrize("metric", [psnr, ssim, lpips])
def test_other_arrays_are_refused(metric, other, message):
    with pytest.raises(ValueError, match=message):
        metric(noise(0), other)


def test_frames_smaller_than_the_window_are_refused():
    small = noise(0, (1, 10, 40, 3))
    with pytest.raises(ValueError, match=r"at least 11 pixels a side, got \[10, 40\]"):
        ssim(small, small)


def test_without_weights_there_is_no_lpips_and_a_line_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert lpips(noise(0, (1, 64, 64, 3)), noise(1, (1, 64, 64, 3))) is None
    reason = no_lpips()
    assert reason.startswith("no LPIPS: ") and "alexnet(weights='DEFAULT')" in reason and "\n" not in reason


def test_lpips_is_that_of_the_library(monkeypatch, tmp_path):
    models = pytest.importorskip("torchvision.models", reason="LPIPS needs torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(models.alexnet().state_dict(), tmp_path / "hub" / "checkpoints" / metrics.WEIGHTS)
    metrics._network.cache_clear()
    a, b = noise(6, (2, 64, 64, 3)), noise(7, (2, 64, 64, 3))
    assert no_lpips() is None
    assert lpips(a, a) == 0
    expected = learned_perceptual_image_patch_similarity(
        images(a).float(), images(b).float(), net_type="alex", normalize=True
    )
    assert lpips(a, b) == pytest.approx(expected.item(), rel=1e-4) and expected > 0
    assert lpips(a[:, :24], b[:, :24]) is None
    metrics._network.cache_clear()
