"""Measures the radial mask: seconds to build it, and kept blocks as the video grows.

`bash scripts/benchmark.sh --mask`. One thread; every number is the median of `REPEATS` builds.
"""

import argparse
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask
from scripts.benchmarks.timing import median_seconds
from scripts.evaluation.files import table
from scripts.run.system import hardware

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "mask_cost_cpu"
REPEATS = 7
GROWTH = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
HEIGHT, WIDTH = 48, 80  # 768 x 1280 pixels
SHAPES = (  # name, grid, options, wanted milliseconds
    ("Wan2.1 768x1280, 69 frames", TokenGrid(18, 48, 80), RadialConfig(decay_factor=0.2), None),
    ("HunyuanVideo 768x1280, 117 frames", TokenGrid(30, 48, 80), RadialConfig(0.95, sink=False), 10),
    ("128 latent frames, 768x1280", TokenGrid(128, 48, 80), RadialConfig(), 100),
    ("HunyuanVideo 720x1280, 253 frames", TokenGrid(64, 45, 80), RadialConfig(), None),
    ("Wan2.1 480x832, 81 frames", TokenGrid(21, 30, 52), RadialConfig(), None),
    ("Mochi 480x848, 163 frames", TokenGrid(28, 30, 53), RadialConfig(), None),
)


@dataclass(frozen=True)
class Point:
    """One mask: seconds to build it, kept and all blocks, density by tokens."""

    frames: int
    seconds: float
    kept: int
    total: int
    density: float


def build(grid: TokenGrid, config: RadialConfig) -> BlockMask:
    """`radial_mask` without its cache."""
    return radial_mask.__wrapped__(grid, config)


def growth(frame_counts: tuple[int, ...], repeats: int = REPEATS) -> list[Point]:
    """The default rule at a fixed frame size and growing length."""
    points = []
    for frames in frame_counts:
        grid, config = TokenGrid(frames, HEIGHT, WIDTH), RadialConfig()
        seconds = median_seconds(partial(build, grid, config), repeats)
        mask = build(grid, config)
        points.append(Point(frames, seconds, int(mask.blocks.sum()), mask.blocks.numel(), mask.density))
    return points


def shape_table(repeats: int = REPEATS) -> list[str]:
    """Returns the Markdown lines: milliseconds of the mask and of its CSR for real settings."""
    rows = []
    for name, grid, config, wanted in SHAPES:
        mask = build(grid, config)
        milliseconds = 1000 * median_seconds(partial(build, grid, config), repeats)
        csr = 1000 * median_seconds(lambda mask=mask: replace(mask).indices, repeats)
        size, blocks = f"{grid.frames} x {grid.tokens_per_frame}", f"{len(mask.blocks)}²"
        limit = "" if wanted is None else f"<= {wanted}"
        rows.append((name, size, blocks, f"{mask.density:.4f}", f"{milliseconds:.2f}", limit, f"{csr:.2f}"))
    return table("setting|frames x tokens|blocks|density|mask, ms|wanted, ms|CSR, ms", rows)


def growth_table(points: list[Point]) -> list[str]:
    """Returns the Markdown lines: kept blocks, and how they compare with `f log2 f` and `f^2`."""
    rows = []
    for point in points:
        f, log, square = point.frames, point.frames * math.log2(point.frames), point.frames**2
        ratios = f"{point.kept / log:.1f}", f"{point.kept / square:.1f}"
        rows.append((f, f"{point.kept:,}", f"{point.density:.4f}", *ratios, f"{1000 * point.seconds:.2f}"))
    return table("frames|kept blocks|density|kept / (f log2 f)|kept / f²|mask, ms", rows)


def growth_figure(points: list[Point]) -> "Figure":
    """Kept blocks against `f log f` and `f^2`, both through the first point; and the time to build."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    cost, clock = figure.subplots(1, 2)
    frames = [point.frames for point in points]
    first = points[0]
    log = [first.kept * f * math.log(f) / (first.frames * math.log(first.frames)) for f in frames]
    square = [first.kept * (f / first.frames) ** 2 for f in frames]
    cost.loglog(frames, square, "--", color="#d55e00", label="n², through the first point")
    cost.loglog(frames, log, "--", color="#009e73", label="n log n, through the first point")
    cost.loglog(frames, [point.kept for point in points], "o-", color="#0072b2", label="kept blocks")
    cost.set_ylabel("blocks of 128 x 128")
    cost.set_title(f"Cost of attention, {HEIGHT} x {WIDTH} tokens a frame", loc="left", fontsize=11)
    clock.loglog(
        frames, [1000 * point.seconds for point in points], "o-", color="#0072b2", label="build the mask"
    )
    clock.set_ylabel("milliseconds, one core")
    clock.set_title("Time to build the mask", loc="left", fontsize=11)
    for axes in (cost, clock):
        axes.set_xlabel("latent frames")
        axes.set_xticks(frames[::2], [str(f) for f in frames[::2]])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure


def report(command: str, points: list[Point], shapes: list[str], picture: str) -> list[str]:
    """Returns the lines of the Markdown file."""
    first, last = points[0], points[-1]
    longer = last.frames / first.frames
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
        f"{last.kept / first.kept:.0f} times; n log n would be "
        f"{longer * math.log(last.frames) / math.log(first.frames):.0f} times, n² {longer**2:.0f} times.",
        *growth_table(points),
        "",
        f"![kept blocks against n log n and n²]({picture})",
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--frames", type=frame_count, nargs="+", default=GROWTH, help="lengths, in latent frames"
    )


def frame_count(text: str) -> int:
    """Reads a length of at least 2 frames."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number from 2 on, got {text!r}")
    return int(text)


def measured(options: argparse.Namespace, command: str, picture: str) -> tuple[list[str], "Figure"]:
    """Measures; returns the lines of the table and the picture."""
    torch.set_num_threads(1)
    shapes, points = shape_table(), growth(tuple(sorted(options.frames)))
    return report(command, points, shapes, picture), growth_figure(points)
