"""Draws a radial mask: `python -m radial_attn.mask --frames 12 --height 12 --width 20 --out mask.png`."""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from .block_mask import BLOCK_SIZES
from .density import resolve_density
from .grid import TokenGrid
from .mask import NEIGHBOURS, PATTERNS, RadialConfig, radial_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BLOCKS = 8192
FORMATS = (".png", ".svg", ".pdf")
SINK_COLOUR, TEXT_COLOUR, DROPPED_COLOUR = "#e69f00", "#8c8c8c", "#f4f2ee"


@dataclass(frozen=True)
class Layer:
    """Blocks of one colour: `member` bool `[Q, Q]` are the ones that belong to it, kept or not."""

    label: str
    colour: tuple[float, ...] | str
    member: np.ndarray


def frame_distance(grid: TokenGrid, block_size: int) -> np.ndarray:
    """Distance of the two nearest frames of which a query and a key block hold tokens, int `[Q, Q]`."""
    starts = np.arange(grid.num_blocks(block_size)) * block_size
    first, last = (
        np.minimum(tokens, grid.video_tokens - 1) // grid.tokens_per_frame
        for tokens in (starts, starts + block_size - 1)
    )
    gap = first[:, None] - last[None, :]
    return np.maximum(np.maximum(gap, gap.T), 0)


def layers(grid: TokenGrid, config: RadialConfig) -> list[Layer]:
    """One layer for each band of frame distances (0 to 1, 2 to 3, 4 to 7, ...), then sink and text."""
    from matplotlib import colormaps

    config = resolve_density(grid, config)
    text = np.arange(grid.num_blocks(config.block_size)) >= grid.video_tokens // config.block_size
    text &= grid.text > 0
    text = text[:, None] | text[None, :]
    sink = ~radial_mask(grid, replace(config, sink=False)).blocks.numpy()
    sink &= radial_mask(grid, config).blocks.numpy()
    distance = frame_distance(grid, config.block_size)
    level = np.frexp(np.maximum(distance, 1))[1] - 1
    bands = max((grid.frames - 1).bit_length(), 1)
    found = []
    for band in range(bands):
        colour = colormaps["YlGnBu_r"](0.08 + 0.6 * band / max(bands - 1, 1))
        found.append(Layer(_band_label(band, grid.frames), colour, (level == band) & ~text & ~sink))
    found += [Layer("frame 0, the sink", SINK_COLOUR, sink), Layer("text", TEXT_COLOUR, text)]
    return [layer for layer in found if layer.member.any()]


def _band_label(band: int, frames: int) -> str:
    low, high = 1 << band if band else 0, min((2 << band) - 1, frames - 1)
    if low >= high:
        return f"{high} frames apart"
    return f"{low} {'or' if high == low + 1 else 'to'} {high} frames apart"


def draw_mask(grid: TokenGrid, config: RadialConfig) -> "Figure":
    """A picture of the block mask: kept blocks coloured by band, frame borders, density in the title.

    Raises:
        ValueError: more blocks than a picture can show.
        ImportError: matplotlib is not installed.
    """
    count, config = grid.num_blocks(config.block_size), resolve_density(grid, config)
    if count > MOST_BLOCKS:
        raise ValueError(f"at most {MOST_BLOCKS} blocks a side can be drawn, got {count}: take larger blocks")
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
    shape = f"{grid.frames} frames of {grid.height} × {grid.width} tokens{text}"
    head = f"{config.pattern.capitalize()} mask, density {100 * density:.1f} %: {shape}"
    if config.pattern == "dense":
        return f"{head}\nblocks of {config.block_size}"
    sink = "sink" if config.sink else "no sink"
    return (
        f"{head}\nblocks of {config.block_size}, decay factor {config.decay_factor:g}, {sink}, "
        f"neighbour {config.neighbour}, decimation width {config.decimation_width}"
    )


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
    """Writes a figure under a temporary name and renames it, so that `path` is never half a file.

    Raises:
        ValueError: the name does not end in .png, .svg or .pdf.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the picture's name must end in one of {FORMATS}, got {path.name!r}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=150)
        if path.suffix.lower() == ".png":
            _to_palette(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _to_palette(path: Path) -> None:
    """Rewrites a PNG file in 256 colours: a third of the bytes, and a plot looks the same."""
    from PIL import Image

    with Image.open(path) as image:
        few = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, format="PNG", optimize=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends with one line and exit code 2, without the usage text."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _width(text: str) -> int | str:
    try:
        return text if text == "block" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1 or 'block', got {text!r}") from None


def _neighbour(text: str) -> float | str:
    try:
        return text if text in NEIGHBOURS else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be one of {NEIGHBOURS} or a number in (0, 1], got {text!r}"
        ) from None


def one_line_parser(program: str, description: str) -> argparse.ArgumentParser:
    """An argument parser whose error is one line, with exit code 2."""
    return _Parser(prog=program, description=description)


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """The arguments that `mask_options` reads: a grid, and the options of its mask."""
    for name in ("frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, required=True, help=f"{name} in tokens, after patching")
    parser.add_argument("--text", type=int, default=0, help="text tokens after the video")
    parser.add_argument("--block-size", type=int, default=128, help=f"one of {BLOCK_SIZES}")
    parser.add_argument("--decay-factor", type=float, default=1.0, help="scales the width of the bands")
    parser.add_argument("--no-sink", action="store_true", help="do not keep frame 0 for every query")
    help_text = f"half-width at frame distance 1: one of {NEIGHBOURS}, or a share of a frame"
    parser.add_argument("--neighbour", type=_neighbour, default="full", help=help_text)
    parser.add_argument("--decimation-width", type=_width, default=128, help="tokens, or 'block'")
    parser.add_argument("--pattern", default="radial", help=f"one of {PATTERNS}")


def mask_options(args: argparse.Namespace) -> tuple[TokenGrid, RadialConfig]:
    """Grid and options from the command line; ValueError where they cannot be."""
    config = RadialConfig(
        decay_factor=args.decay_factor,
        block_size=args.block_size,
        sink=not args.no_sink,
        neighbour=args.neighbour,
        decimation_width=args.decimation_width,
        pattern=args.pattern,
    )
    return TokenGrid(args.frames, args.height, args.width, args.text), config


def main(argv: list[str] | None = None) -> None:
    """The command line: draws one mask; bad input ends with one line and exit code 2."""
    parser = one_line_parser("python -m radial_attn.mask", "Draw the block mask of a token grid.")
    add_mask_options(parser)
    parser.add_argument("--density", type=float, help="solve for the options of a mask of this density")
    parser.add_argument("--out", type=Path, required=True, help=f"the picture to write: {', '.join(FORMATS)}")
    args = parser.parse_args(argv)
    try:
        grid, config = mask_options(args)
        config = replace(config, density=args.density)
        save_figure(draw_mask(grid, config), args.out)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write --out {args.out}: {error.strerror or error}")
    print(f"{args.out}: density {radial_mask(grid, config).density:.4f}")
