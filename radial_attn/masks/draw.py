"""Draws a mask: `python -m radial_attn draw --frames 12 --height 12 --width 20 --out mask.png`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import whole_file
from ..grid import TokenGrid
from .density import resolve_density
from .make import radial_mask
from .radial import RadialConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BLOCKS = 8192
FORMATS = (".png", ".svg", ".pdf")
SINK_COLOUR, TEXT_COLOUR, DROPPED_COLOUR = "#e69f00", "#8c8c8c", "#f4f2ee"


@dataclass(frozen=True)
class Layer:
    """Marks the blocks of one colour, kept or not: `member` bool `[Q, Q]`."""

    label: str
    colour: tuple[float, ...] | str
    member: np.ndarray


def frame_distance(grid: TokenGrid, block_size: int) -> np.ndarray:
    """Returns the distance of the nearest frames with tokens in a query and a key block, int `[Q, Q]`."""
    starts = np.arange(grid.num_blocks(block_size)) * block_size
    first, last = (
        np.minimum(tokens, grid.video_tokens - 1) // grid.tokens_per_frame
        for tokens in (starts, starts + block_size - 1)
    )
    gap = first[:, None] - last[None, :]
    return np.maximum(np.maximum(gap, gap.T), 0)


def layers(grid: TokenGrid, config: RadialConfig) -> list[Layer]:
    """Makes one layer for each band of frame distances (0 to 1, 2 to 3, 4 to 7, ...), then sink and text."""
    from matplotlib import colormaps

    config = resolve_density(grid, config)
    text = np.arange(grid.num_blocks(config.block_size)) >= grid.video_tokens // config.block_size
    text &= grid.text > 0
    text = text[:, None] | text[None, :]
    sink = np.zeros_like(text)
    if config.compat == "none":  # another program's sink is drawn as frames at a distance
        sink = ~radial_mask(grid, replace(config, sink=False)).blocks.numpy()
        sink &= radial_mask(grid, config).blocks.numpy()
    distance = frame_distance(grid, config.block_size)
    level = np.frexp(np.maximum(distance, 1))[1] - 1
    bands = max((grid.frames - 1).bit_length(), 1)
    drawn = []
    for band in range(bands):
        colour = colormaps["YlGnBu_r"](0.08 + 0.6 * band / max(bands - 1, 1))
        drawn.append(Layer(_band_label(band, grid.frames), colour, (level == band) & ~text & ~sink))
    drawn += [Layer("frame 0, the sink", SINK_COLOUR, sink), Layer("text", TEXT_COLOUR, text)]
    return [layer for layer in drawn if layer.member.any()]


def _band_label(band: int, frames: int) -> str:
    low, high = 1 << band if band else 0, min((2 << band) - 1, frames - 1)
    if low >= high:
        return f"{high} frames apart"
    return f"{low} {'or' if high == low + 1 else 'to'} {high} frames apart"


def draw_mask(grid: TokenGrid, config: RadialConfig) -> "Figure":
    """Draws the block mask: kept blocks coloured by band, frame borders, density in the title.

    Raises:
        ValueError: more blocks than a picture can show.
        ImportError: matplotlib is not installed.
    """
    count, config = grid.num_blocks(config.block_size), resolve_density(grid, config)
    if count > MOST_BLOCKS:
        raise ValueError(
            f"at most {MOST_BLOCKS} blocks a side can be drawn, got {count}: use a larger block_size"
        )
    try:
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    mask = radial_mask(grid, config)
    kept = mask.blocks.numpy()
    image = np.full((count, count, 3), to_rgb(DROPPED_COLOUR), dtype=np.float32)
    handles = []
    for layer in layers(grid, config):
        image[layer.member & kept] = to_rgb(layer.colour)
        share = 100 * (layer.member & kept).sum() / kept.sum()
        handles.append(Patch(color=layer.colour, label=f"{layer.label}: {share:.0f} %"))
    handles.append(Patch(facecolor=DROPPED_COLOUR, edgecolor="#c8c4bc", label="dropped"))
    figure = Figure(figsize=(9.8, 7.2), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(image, extent=(0, count, count, 0))
    _mark_frames(axes, grid, config.block_size)
    figure.legend(
        handles=handles,
        loc="outside right upper",
        title="Share of the kept blocks",
        alignment="left",
        frameon=False,
    )
    axes.set_title(_title(grid, config, mask.density), loc="left", fontsize=11)
    return figure


def _title(grid: TokenGrid, config: RadialConfig, density: float) -> str:
    text = f" + {grid.text} text" if grid.text else ""
    order = "" if grid.order == "raster" else f" in {grid.order}"
    shape = f"{grid.frames} frames of {grid.height} × {grid.width} tokens{order}{text}"
    head = f"{config.pattern.capitalize()} mask, density {100 * density:.1f} %: {shape}"
    if config.pattern == "dense":
        return f"{head}\nblocks of {config.block_size}"
    sink = "sink" if config.sink else "no sink"
    rest = f"{sink}, neighbour {config.neighbour}, decimation width {config.decimation_width}"
    rest = rest if config.compat == "none" else f"as {config.compat} makes it"
    return f"{head}\nblocks of {config.block_size}, decay factor {config.decay_factor:g}, {rest}"


def _mark_frames(axes: "Axes", grid: TokenGrid, block_size: int) -> None:
    """Draws the frame borders and numbers the frames on both axes."""
    borders = np.arange(grid.frames + 1) * grid.tokens_per_frame / block_size
    width = float(np.clip(12 / grid.frames, 0.15, 0.8))
    for border in borders:
        axes.axhline(border, color="black", linewidth=width, alpha=0.55)
        axes.axvline(border, color="black", linewidth=width, alpha=0.55)
    step = -(-grid.frames // 16)
    frames = np.arange(0, grid.frames, step)
    ticks, names = list((borders[frames] + borders[frames + 1]) / 2), [str(frame) for frame in frames]
    if grid.text:
        ticks.append((borders[-1] + grid.tokens / block_size) / 2)
        names.append("text")
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.tick_params(length=0)
    axes.set_xlabel("key frame")
    axes.set_ylabel("query frame")
    end = grid.tokens / block_size
    axes.set_xlim(0, end)
    axes.set_ylim(end, 0)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a figure, whole or not at all.

    Raises:
        ValueError: the name does not end in .png, .svg or .pdf.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"file name must end in one of {FORMATS}, got {path.name!r}")
    with whole_file(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower(), dpi=150)
        if path.suffix.lower() == ".png":
            _to_palette(part)


def _to_palette(path: Path) -> None:
    """Rewrites a PNG file in 256 colours: a third of the bytes, and a plot looks the same."""
    from PIL import Image

    with Image.open(path) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, format="PNG", optimize=True)
