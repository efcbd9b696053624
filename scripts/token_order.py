"""Measures what the order of the tokens in a frame does to a sparse video: `python -m scripts.token_order`.

`[CONFIG.yaml] [key=value ...] [--captions N] [--batch B] [--work DIR] [--out MD]`. The blocks of the bundled
model get their video tokens in each order of radial_attn/grid.py. Dense attention does not notice it; blocks
of a mask hold other tokens. Videos are compared with the dense ones of the same captions and seeds. Readings
are kept in --work, and the same command resumes. Exit codes: 0 done; 2 with one line on stderr; 130
interrupted.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from math import inf
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from radial_attn.grid import ORDERS
from radial_attn.models.apply import family_of
from radial_attn.models.runtime.output_check import CheckError
from scripts.evaluation.ablation import Ablation, Entry, captions_of
from scripts.run.config import read_one_seed
from scripts.run.errors import OneLineParser, UsageError, exit_code, positive
from scripts.run.files import write_text
from scripts.run.plan import make_plan
from scripts.run.results import OUT, document, head, results_file, table
from scripts.run.system import pairs
from scripts.toyworld.render import VOCABULARY

TITLES = "order|PSNR, dB|to raster, dB|SSIM|attributes, %"
MEANING = """PSNR and SSIM compare with the dense videos of the same captions and seeds, in raster order. "To
raster" is the mean difference in PSNR of the same videos, and the standard error of that mean. Attributes are
what the toy world's reader finds right."""


@contextmanager
def in_order(transformer: torch.nn.Module, order: str) -> Iterator[None]:
    """Gives the blocks of a transformer their video tokens and rotary tables in another order than raster.

    Before the first block tokens are moved, after the last one they are moved back. The model keeps its
    masks, which are rules on places in the sequence: none but "sliding_tile" and those of profiles asks what
    lies there. Apply radial attention inside, as its hook adds to the rotary tables.
    """
    family, index = family_of(transformer), torch.empty(0, dtype=torch.int64)
    (stack,) = family.stacks(transformer)

    def begin(transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal index
        grid = replace(family.token_grid(transformer, kwargs), text=0, order=order)
        index = grid.raster_index.to(kwargs["hidden_states"].device)

    def rotate(rope: torch.nn.Module, args: tuple, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(table.index_select(family.ROTARY_TOKENS, index) for table in tables)

    def enter(block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        bound = signature(type(block).forward).bind(block, *args, **kwargs)
        bound.arguments["hidden_states"] = bound.arguments["hidden_states"].index_select(1, index)
        return bound.args[1:], bound.kwargs

    def leave(block: torch.nn.Module, args: tuple, output: Any) -> Any:
        video, *text = (output,) if isinstance(output, Tensor) else output
        video = video.index_select(1, index.argsort())
        return video if isinstance(output, Tensor) else (video, *text)

    hooks = [
        transformer.register_forward_pre_hook(begin, with_kwargs=True),
        transformer.rope.register_forward_hook(rotate),
        stack[0].register_forward_pre_hook(enter, with_kwargs=True),
        stack[-1].register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(ablation: Ablation) -> list[list[Any]]:
    """Measures the configuration in every order and returns the rows of the table."""
    ablation.videos(ablation.dense)
    config, transformer, rows, raster = ablation.plan.config, ablation.pipeline.transformer, [], None
    for order in ORDERS:
        with in_order(transformer, order):
            entries = ablation.videos(config, order)
        raster = raster or entries
        rows.append(row(order, entries, raster))
        print(" | ".join(map(str, rows[-1])), flush=True)
    return rows


def row(order: str, entries: Sequence[Entry], raster: Sequence[Entry]) -> list[Any]:
    """Returns the cells of an order, compared with the same videos in raster order; equal videos are inf."""
    psnr, before = ([inf if x["psnr"] is None else x["psnr"] for x in of] for of in (entries, raster))
    gains = [a - b for a, b in zip(psnr, before, strict=True)]
    error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    gain = None if order == ORDERS[0] else f"{mean(gains):+.2f}" + (f" ± {error:.2f}" if error else "")
    right = 100 * mean(entry[name] for entry in entries for name in VOCABULARY)
    return [order, f"{mean(psnr):.2f}", gain, f"{mean(x['ssim'] for x in entries):.4f}", f"{right:.1f}"]


def run(options: argparse.Namespace) -> None:
    """Measures what is missing and writes the table."""
    plan = make_plan(read_one_seed(options.config, options.words))
    if plan.config.generation.video is not None:
        raise UsageError("generation.video: got a video, must be null here")
    ablation = Ablation(plan, captions_of(options.captions), options.batch, 1, options.work)
    rows = measure(ablation)
    command = shlex.join(["python", "-m", "scripts.token_order", *options.given])
    grid, density = plan.grid, plan.config.attention.density or plan.block_mask.density
    about = f"{grid.frames} x {grid.height} x {grid.width} tokens, density {density:.3f}"
    data = head("token_order", command, plan.device, plan.config)
    note = f"{plan.config.model.path}, {about}, {options.captions} captions. {MEANING}"
    settings = f"- the attention: {pairs(data['config']['attention'])}"
    lines = document(data, "Order of the tokens in a frame", note, table(TITLES, rows), settings)
    print(f"written {write_text(options.out, chr(10).join(lines) + chr(10))}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line: the one word without `=` is the configuration."""
    parser = OneLineParser(prog="token_order", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value")
    parser.add_argument("--captions", type=positive, default=12, help="captions of each run, up to 180")
    parser.add_argument("--batch", type=positive, default=4, help="videos generated at once")
    parser.add_argument("--work", type=Path, default=Path("outputs/token_order"), help="folder of readings")
    parser.add_argument("--out", type=Path, help=OUT)
    options = parser.parse_intermixed_args(argv)
    options.given = sys.argv[1:] if argv is None else argv
    options.config, options.words = parser.divided(options.words, "configs/wan_tiny.yaml")
    options.out = results_file(options.out, "token_order", Path(options.config).stem)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    return exit_code(lambda: run(options), "run the same command to resume", CheckError)


if __name__ == "__main__":
    sys.exit(main())
