"""Computes the cost of attention over length and resolution, dense and radial: `python -m scripts.cost`.

`[--models NAME|PRESET.yaml ...] [--frames N ...] [--size HxW ...] [--rate TFLOPS [TFLOPS]] [key=value ...]`.
FLOPs count self-attention in all layers of one call of the transformer, 4 n^2 d a layer if dense, with the
preset's mask and without warm-up. Exit codes: 0 done; 2 with one line on stderr; 130 interrupted.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from scripts.benchmarks.timing import medians_in_turn
from scripts.evaluation.cost import PRESETS, Rates, curves, read, sparsities
from scripts.evaluation.cost_tables import draw, lines
from scripts.run.attention import radial_config
from scripts.run.errors import OneLineParser, exit_code, positive, positive_number
from scripts.run.results import OUT, head, publish, results_file

REPEATS = 3


def measured_rates(device: str) -> Rates:
    """Measures the rates of a short dense and radial attention call on this machine."""
    large = device == "cuda"
    grid, heads, width = TokenGrid(16, 32, 64) if large else TokenGrid(16, 16, 16), 4, 128 if large else 64
    dtype = torch.bfloat16 if large else torch.float32
    mask = radial_mask(grid, RadialConfig(block_size=128 if large else 64))
    query, key, value = torch.randn(3, 1, grid.tokens, heads, width, device=device, dtype=dtype).unbind(0)
    apart = [x.transpose(1, 2) for x in (query, key, value)]
    calls = {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(*apart),
        "radial": lambda: radial_attention(query, key, value, mask),
    }
    seconds = medians_in_turn(calls, REPEATS, device)
    flops = 4.0 * heads * width * grid.tokens**2
    shape = f"{grid.tokens} tokens, {heads} heads of {width}, density {mask.density:.2f}"
    source = f"measured here on {device} in {str(dtype)[6:]}, {shape}"
    return Rates(flops / seconds["dense"], flops * mask.density / seconds["radial"], source)


def rates_of(options: argparse.Namespace, device: str) -> Rates | None:
    """Returns the rates of the command line, or measures them; None if no times are wanted."""
    if options.no_times:
        return None
    if not options.rate:
        return measured_rates(device)
    return Rates(1e12 * options.rate[0], 1e12 * options.rate[-1], "given by --rate")


def run(options: argparse.Namespace, command: str) -> None:
    """Computes everything and writes it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases, rows, fits = [read(name, options.words) for name in dict.fromkeys(options.models)], [], {}
    rates = rates_of(options, device)
    for case in cases:
        case_rows, fits[case.name] = curves(case._replace(rates=rates), options.frames, options.size)
        rows += case_rows
    data = head("cost", command, device) | {"rows": rows, "paper": sparsities(), "fits": fits}
    data["rates"] = rates and rates._asdict()
    data["masks"] = {case.name: asdict(radial_config(case.plan.config.attention)) for case in cases}
    publish(data, options.work, options.out, lines, draw)


def size(text: str) -> tuple[int, int]:
    """Reads an argument `HxW`, in pixels."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"must be height x width as in 480x832, got {text!r}")
    return int(height), int(width)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = OneLineParser(prog="scripts/cost.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys of generation, for all models")
    names = f"{', '.join(PRESETS)}, or a file ending in .yaml"
    parser.add_argument("--models", nargs="+", default=list(PRESETS), metavar="NAME", help=names)
    parser.add_argument(
        "--frames", type=positive, nargs="+", default=[], help="lengths; resolutions use the first"
    )
    parser.add_argument(
        "--size", type=size, nargs="+", default=[], metavar="HxW", help="resolutions; lengths use the first"
    )
    parser.add_argument(
        "--rate", type=positive_number, nargs="+", default=[], metavar="TFLOPS", help="dense, then radial"
    )
    parser.add_argument("--no-times", action="store_true", help="neither measure nor predict")
    parser.add_argument("--work", type=Path, help="folder of cost.json (outputs/cost, or outputs/cost/NAMES)")
    parser.add_argument("--out", type=Path, help=OUT)
    options = parser.parse_args(argv)
    chosen = [] if options.models == list(PRESETS) else [Path(name).stem for name in options.models]
    options.work = options.work or Path("outputs/cost", "_".join(chosen))
    options.out = results_file(options.out, "cost", *chosen)
    if len(options.rate) > 2:
        parser.error(f"--rate: got {len(options.rate)} numbers, must be 1 or 2 (dense, radial)")
    unknown = [name for name in options.models if name not in PRESETS and not name.endswith(".yaml")]
    if unknown:
        parser.error(f"--models: got {unknown[0]!r}, allowed: {names}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    command = shlex.join(["bash", "scripts/cost.sh", *(sys.argv[1:] if argv is None else argv)])
    return exit_code(lambda: run(options, command), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
