"""Runs the package's commands: `python -m radial_attn backends | draw | density`.

    python -m radial_attn backends
    python -m radial_attn draw --frames 12 --height 12 --width 20 --out mask.png
    python -m radial_attn density --frames 18 --height 48 --width 80 [--target 0.1 0.2]

Bad input ends with one line and exit code 2.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from .block_mask import BLOCK_SIZES
from .dispatch import ORDER, order_key, table
from .grid import TokenGrid
from .kernels.contract import DTYPES, Call
from .masks.density_curve import curve_lines, target_table
from .masks.draw import FORMATS, draw_mask, save_figure
from .masks.make import radial_mask
from .masks.radial import COMPAT, NEIGHBOURS, PATTERNS, RadialConfig


class OneLineParser(argparse.ArgumentParser):
    """Ends with one line and exit code 2, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = OneLineParser("python -m radial_attn", description="Inspect backends, masks and densities.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)

    command = commands.add_parser("backends", help="print which backends are installed and usable here")
    command.add_argument("--device", help="default: cuda if there is one, else cpu")
    command.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
    command.add_argument("--width", type=int, default=128, help="head width (default: 128)")
    command.set_defaults(run=print_backends)

    command = commands.add_parser("draw", help="draw the block mask of a token grid")
    add_mask_options(command)
    command.add_argument("--density", type=float, help="solve for the options of a mask of this density")
    command.add_argument(
        "--out", type=Path, required=True, help=f"the picture to write: {', '.join(FORMATS)}"
    )
    command.set_defaults(run=draw)

    command = commands.add_parser("density", help="print which densities the masks of a grid have")
    add_mask_options(command)
    command.add_argument("--target", type=float, nargs="+", default=[], help="densities to solve for")
    command.set_defaults(run=print_density)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{parser.prog} {args.command}: error: {error}\n")
    return 0


def print_backends(args: argparse.Namespace) -> None:
    """Prints the table of backends for this machine; ValueError for a device that cannot be used."""
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: got {args.device!r}, but torch sees no CUDA device; use --device cpu")
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    call = Call(device, getattr(torch, dtype), args.width, gradients=False)
    rows = [("backend", "installed", "usable", "why not"), *table(call)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"device {device}, {dtype}, head width {args.width}, no gradients")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"auto tries: {', '.join(ORDER[order_key(device)])}")


def draw(args: argparse.Namespace) -> None:
    """Draws one mask into a file; ValueError for bad options or a file that cannot be written."""
    grid, config = mask_options(args)
    config = replace(config, density=args.density)
    try:
        save_figure(draw_mask(grid, config), args.out)
    except OSError as error:
        raise ValueError(f"cannot write --out {args.out}: {error.strerror or error}") from error
    print(f"{args.out}: density {radial_mask(grid, config).density:.4f}")


def print_density(args: argparse.Namespace) -> None:
    """Prints the curve of one grid, or the options of the wanted densities."""
    grid, config = mask_options(args)
    if config.pattern == "dense":
        raise ValueError("--pattern must be radial, got 'dense'")
    if config.compat != "none":
        raise ValueError(f"--compat must be none, got {config.compat!r}; draw prints the density of its mask")
    print(target_table(grid, config, args.target) if args.target else "\n".join(curve_lines(grid, config)))


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `mask_options` reads: a grid, and the options of its mask."""
    for name in ("frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, required=True, help=f"{name} in tokens, after patching")
    parser.add_argument("--text", type=int, default=0, help="text tokens after the video")
    parser.add_argument("--block-size", type=int, default=128, help=f"one of {BLOCK_SIZES}")
    parser.add_argument("--decay-factor", type=float, help="scales the width of the bands")
    parser.add_argument("--no-sink", action="store_true", help="do not keep frame 0 for every query")
    help_text = f"half-width at frame distance 1: one of {NEIGHBOURS}, or a share of a frame"
    parser.add_argument("--neighbour", type=_neighbour, help=help_text)
    parser.add_argument("--decimation-width", type=_width, help="tokens, or 'block'")
    parser.add_argument("--pattern", default="radial", help=f"one of {PATTERNS}")
    parser.add_argument("--compat", default="none", help=f"whose mask to make: one of {tuple(COMPAT)}")


def mask_options(args: argparse.Namespace) -> tuple[TokenGrid, RadialConfig]:
    """Returns grid and options of the parsed arguments; ValueError if they are not valid."""
    config = RadialConfig(
        decay_factor=args.decay_factor,
        block_size=args.block_size,
        sink=False if args.no_sink else None,
        neighbour=args.neighbour,
        decimation_width=args.decimation_width,
        pattern=args.pattern,
        compat=args.compat,
    )
    return TokenGrid(args.frames, args.height, args.width, args.text), config


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


if __name__ == "__main__":
    sys.exit(main())
