"""Measures the radial mask: seconds to build it, and kept blocks as the video grows.

`bash scripts/benchmark.sh --mask`. One thread; every number is the median of `REPEATS` builds.
"""

import argparse
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from radial_attn import RadialConfig, TokenGrid, radial_mask
from scripts.benchmarks.timing import median_seconds
from scripts.run.errors import UsageError, positive
from scripts.run.results import subplots, table
from scripts.run.system import hardware

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "mask_cost_cpu"
REPEATS = 7
GROWTH = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
HEIGHT, WIDTH = 48, 80  # 768 x 1280 pixels
SHAPES = (  # name, grid, options, wanted milliseconds
    ("Wan2.1 768x1280, 69 frames", TokenGrid(18, 48, 80), RadialConfig(decay_factor=0.2), ""),
    ("HunyuanVideo 768x1280, 117 frames", TokenGrid(30, 48, 80), RadialConfig(0.95, sink=False), "<= 10"),
    ("128 latent frames, 768x1280", TokenGrid(128, 48, 80), RadialConfig(), "<= 100"),
    ("HunyuanVideo 720x1280, 253 frames", TokenGrid(64, 45, 80), RadialConfig(), ""),
    ("Wan2.1 480x832, 81 frames", TokenGrid(21, 30, 52), RadialConfig(), ""),
    ("Mochi 480x848, 163 frames", TokenGrid(28, 30, 53), RadialConfig(), ""),
)
build = radial_mask.__wrapped__  # without its cache


class Point(NamedTuple):
    """Holds a mask's frames, seconds to build it, kept blocks, and density by tokens."""

    frames: int
    seconds: float
    kept: int
    density: float


def growth(frame_counts: tuple[int, ...], repeats: int = REPEATS) -> list[Point]:
    """Measures the default rule at a fixed frame size and growing length."""
    points = []
    for frames in frame_counts:
        make = partial(build, TokenGrid(frames, HEIGHT, WIDTH), RadialConfig())
        mask = make()
        points.append(Point(frames, median_seconds(make, repeats), int(mask.blocks.sum()), mask.density))
    return points


def shape_table() -> list[str]:
    """Returns the Markdown lines: milliseconds of the mask and of its CSR for real settings."""
    rows = []
    for name, grid, config, wanted in SHAPES:
        mask = build(grid, config)
        milliseconds = 1000 * median_seconds(partial(build, grid, config), REPEATS)
        csr = 1000 * median_seconds(lambda mask=mask: replace(mask).indices, REPEATS)
        size, blocks = f"{grid.frames} x {grid.tokens_per_frame}", f"{len(mask.blocks)}²"
        rows.append((name, size, blocks, f"{mask.density:.4f}", f"{milliseconds:.2f}", wanted, f"{csr:.2f}"))
    return table("setting|frames x tokens|blocks|density|mask, ms|wanted, ms|CSR, ms", rows)


def report(command: str, points: list[Point], shapes: list[str], picture: str) -> list[str]:
    """Returns the lines of the Markdown file; kept blocks are compared with `f log2 f` and `f^2`."""
    first, last = points[0], points[-1]
    longer = last.frames / first.frames
    log = longer * math.log(last.frames) / math.log(first.frames)
    rows = []
    for f, seconds, kept, density in points:
        ratios = (f"{kept / growing:.1f}" for growing in (f * math.log2(f), f**2))
        rows.append((f, f"{kept:,}", f"{density:.4f}", *ratios, f"{1000 * seconds:.2f}"))
    return [
        "# Cost of the radial mask on the CPU",
        "",
        f"`{command}` on {hardware('cpu')['cpu']}, one thread, torch {torch.__version__}; medians of "
        f"{REPEATS} builds.",
        "",
        "## Time to build it",
        *shapes,
        "",
        "## Kept blocks as the video grows",
        "",
        f"{HEIGHT} x {WIDTH} tokens a frame, blocks of 128, decay factor 1, with sink. From {first.frames} "
        f"to {last.frames} frames ({longer:.0f} times longer) the kept blocks grow "
        f"{last.kept / first.kept:.0f} times; n log n would be {log:.0f} times, n² {longer**2:.0f} times.",
        *table("frames|kept blocks|density|kept / (f log2 f)|kept / f²|mask, ms", rows),
        "",
        f"![kept blocks against n log n and n²]({picture})",
    ]


def growth_figure(points: list[Point]) -> "Figure":
    """Draws kept blocks against `f log f` and `f^2`, both through the first point; and the time to build."""
    figure, (cost, clock) = subplots((10, 4.6), 1, 2)
    frames, seconds, kept, _ = zip(*points, strict=True)
    curves = (("n²", "#d55e00", lambda f: f**2), ("n log n", "#009e73", lambda f: f * math.log(f)))
    for name, colour, cost_of in curves:
        line = [kept[0] * cost_of(f) / cost_of(frames[0]) for f in frames]
        cost.loglog(frames, line, "--", color=colour, label=f"{name}, through the first point")
    cost.loglog(frames, kept, "o-", color="#0072b2", label="kept blocks")
    cost.set(ylabel="blocks of 128 x 128", title=f"Cost of attention, {HEIGHT} x {WIDTH} tokens a frame")
    clock.loglog(frames, [1000 * s for s in seconds], "o-", color="#0072b2", label="build the mask")
    clock.set(ylabel="milliseconds, one core", title="Time to build the mask")
    for axes in (cost, clock):
        axes.set_xlabel("latent frames")
        axes.set_xticks(frames[::2], [str(f) for f in frames[::2]])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--frames", type=positive, nargs="+", default=GROWTH, help="lengths, in latent frames"
    )


def measured(options: argparse.Namespace, command: str, picture: str) -> tuple[list[str], "Figure"]:
    """Measures, and returns the lines of the table and the picture."""
    if min(options.frames) < 2:
        raise UsageError(f"--frames: got {min(options.frames)}, must be at least 2")
    torch.set_num_threads(1)
    shapes, points = shape_table(), growth(tuple(sorted(options.frames)))
    return report(command, points, shapes, picture), growth_figure(points)
