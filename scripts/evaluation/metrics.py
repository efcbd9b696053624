"""Measures how near a video is to another: PSNR, SSIM and LPIPS of uint8 frames `[T, H, W, 3]`."""

import math
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch.nn import functional

PEAK = 255
WINDOW, SIGMA = 11, 1.5  # pixels, of the Gaussian window of SSIM: Wang et al. 2004
LEAST_LPIPS = 32  # pixels a side that AlexNet's layers take
NETWORK, WEIGHTS = "alex", "alexnet-owt-7be5be79.pth"
FETCH = "python -c \"from torchvision.models import alexnet; alexnet(weights='DEFAULT')\""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns 10 log10(255^2 / MSE) in dB, MSE over the whole video; infinity for equal ones.

    Raises ValueError if the arrays are not two videos of one shape.
    """
    _check(a, b)
    squares = sum(int(((x.astype(np.int64) - y) ** 2).sum()) for x, y in zip(a, b, strict=True))
    return math.inf if squares == 0 else 10 * math.log10(PEAK**2 * a.size / squares)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the mean structural similarity over frames, channels and pixels; borders are mirrored.

    Raises ValueError as `psnr`, and for frames under 11 pixels a side.
    """
    _check(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs frames of at least {WINDOW} pixels a side, got {list(a.shape[1:3])}")
    pairs = zip(a, b, strict=True)
    return mean(_ssim_of_planes(x[..., c], y[..., c]) for x, y in pairs for c in range(3))


def _ssim_of_planes(a: np.ndarray, b: np.ndarray) -> float:
    """Computes eq. 13 of Wang et al. 2004 for uint8 `[H, W]`.

    The sums are float64: variances are differences of squares, and in float32 SSIM errs by up to 0.0015 if
    frames are bright and even.
    """
    border = [WINDOW // 2] * 4
    planes = (torch.from_numpy(np.ascontiguousarray(plane)).double()[None, None] for plane in (a, b))
    x, y = (functional.pad(plane, border, mode="reflect")[0, 0] for plane in planes)
    mean_x, mean_y, squares, products = map(_smoothed, (x, y, x * x + y * y, x * y))
    shared, both = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    top = (2 * shared + c1) * (2 * (products - shared) + c2)
    return (top / ((both + c1) * (squares - both + c2))).mean().item()


def _smoothed(plane: torch.Tensor) -> torch.Tensor:
    """Applies the Gaussian window to `[H + 10, W + 10]`, an axis at a time: `[H, W]`."""
    weights = [math.exp(-(((i - WINDOW // 2) / SIGMA) ** 2) / 2) for i in range(WINDOW)]
    for axis in (0, 1):
        size = plane.shape[axis] - WINDOW + 1
        total = torch.zeros_like(plane.narrow(axis, 0, size))
        for i, weight in enumerate(weights):
            total.add_(plane.narrow(axis, i, size), alpha=weight / sum(weights))
        plane = total
    return plane


def lpips(a: np.ndarray, b: np.ndarray) -> float | None:
    """Returns the mean learned perceptual distance (AlexNet) over frames; None if `no_lpips` or too small.

    Raises ValueError as `psnr`.
    """
    _check(a, b)
    if no_lpips() is not None or min(a.shape[1:3]) < LEAST_LPIPS:
        return None
    network = _network()
    with torch.inference_mode():
        pairs = zip(a, b, strict=True)
        return float(np.mean([network(_image(x), _image(y)).item() for x, y in pairs]))


def compare(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    """Returns `psnr`, which is None for equal videos, `ssim` and `lpips`; ValueError as they raise."""
    near = psnr(a, b)
    return {"psnr": None if near == math.inf else near, "ssim": ssim(a, b), "lpips": lpips(a, b)}


def no_lpips() -> str | None:
    """Returns why LPIPS cannot be computed here and what to install, in one line; None if it can."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the latter if it was built for another torch
        what = "torchvision is not installed" if isinstance(error, ImportError) else "torchvision is broken"
        return f"no LPIPS: {what}; pip install the torchvision of torch {torch.__version__}, then {FETCH}"
    if not (Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS).is_file():
        return f"no LPIPS: the weights are not here; {FETCH}"
    return None


@lru_cache
def _network() -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type=NETWORK, normalize=True).eval()


def _image(frame: np.ndarray) -> torch.Tensor:
    """Converts uint8 `[H, W, 3]` to float32 `[1, 3, H, W]` in 0 .. 1."""
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / PEAK


def _check(a: np.ndarray, b: np.ndarray) -> None:
    for video in (a, b):
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or video.size == 0:
            raise ValueError(f"videos must be uint8 [T, H, W, 3], got {video.dtype} {list(video.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"videos must have one shape, got {list(a.shape)} and {list(b.shape)}")
