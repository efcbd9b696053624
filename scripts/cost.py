"""Computes the cost of attention over length and resolution, dense and radial: `python -m scripts.cost`.

`[--models NAME|PRESET.yaml ...] [--frames N ...] [--size HxW ...] [--rate TFLOPS [TFLOPS]] [key=value ...]`.
FLOPs count self-attention in all layers of one call of the transformer, 4 n^2 d a layer if dense, with the
preset's mask and without warm-up. Exit codes: 0 done; 2 with one line on stderr; 130 interrupted.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from scripts.benchmarks.timing import medians_in_turn
from scripts.evaluation.cost_tables import draw, lines
from scripts.run.config import VideoSize, read_config
from scripts.run.errors import OneLineParser, exit_code, positive, positive_number
from scripts.run.option_checks import check_size
from scripts.run.plan import RunPlan, make_plan, radial_config, solve_mask
from scripts.run.results import head, publish, results_file

PRESETS = {
    "wan_tiny": "configs/wan_tiny.yaml",
    "wan": "configs/wan2.1_t2v_14b.yaml",
    "hunyuan": "configs/hunyuan_t2v.yaml",
    "mochi": "configs/mochi_t2v.yaml",
}
LENGTHS = (0.5, 1, 1.5, 2, 3, 4, 6, 8)  # times the preset's length
SIDES = (0.5, 0.75, 1, 1.25, 1.5)
REPEATS = 3


class Published(NamedTuple):
    """Holds a sparsity of the paper (percent), and the preset and overrides with its rule and size."""

    model: str
    preset: str
    percent: float
    words: tuple[str, ...] = ()


PAPER = (
    Published("HunyuanVideo", "configs/hunyuan_t2v_2x.yaml", 80.8),
    Published("HunyuanVideo", "configs/hunyuan_t2v_4x.yaml", 88.3),
    Published("Mochi 1", "configs/mochi_t2v_2x.yaml", 76.4),
    Published("Mochi 1", "configs/mochi_t2v_4x.yaml", 85.5),
    Published("Wan2.1-14B", "configs/wan2.1_t2v_14b_2x.yaml", 73.6, ("generation.height=768",)),
)


class Rates(NamedTuple):
    """Holds the operations a second of dense and of radial attention, and their source."""

    dense: float
    radial: float
    source: str


class Case(NamedTuple):
    """Holds a model's name, its planned preset, and the rates that predict times."""

    name: str
    plan: RunPlan
    rates: Rates | None = None

    def row(self, frames: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns one line of the table; `n_log_n`, which depends on other lines, is None.

        Raises UsageError for a size that the model does not take.
        """
        video, model = VideoSize(frames, *size), self.plan.model
        check_size(video, model)
        grid = model.grid(video)
        mask = radial_mask.__wrapped__(grid, solve_mask(self.plan.config.attention, grid))  # not cached
        dense = 4.0 * grid.tokens**2 * model.width * model.attention_layers()
        radial = dense * mask.density
        bound = 4.0 * grid.tokens_per_frame**2 * grid.frames * math.log2(grid.frames)  # the paper's, of pairs
        return {
            "model": self.name,
            **video._asdict(),
            "tokens": grid.tokens,
            "density": mask.density,
            "dense_flops": dense,
            "radial_flops": radial,
            "kept_blocks": int(mask.blocks.sum()),
            "n_log_n": None,
            "seconds_dense": self.rates and dense / self.rates.dense,
            "seconds_radial": self.rates and radial / self.rates.radial,
            "of_bound": mask.kept_pairs / bound if bound else None,
        }


def n_log_n(tokens: float) -> float:
    return tokens * math.log2(tokens)


def fit(rows: Sequence[dict[str, Any]]) -> tuple[float, float | None]:
    """Fits `c` of `c n log2 n` to the radial FLOPs by least squares; also R^2, None for a single length."""
    x = np.array([n_log_n(row["tokens"]) for row in rows])
    y = np.array([row["radial_flops"] for row in rows])
    factor = float(x @ y / (x @ x))
    spread = float(((y - y.mean()) ** 2).sum())
    return factor, 1 - float(((y - factor * x) ** 2).sum()) / spread if spread else None


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Fits `p` of `y ~ x^p` by least squares of the logarithms; None if x does not vary."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(set(x)) > 1 else None


def curves(
    case: Case, frames: Sequence[int] = (), sizes: Sequence[tuple[int, int]] = ()
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the rows of one model, over length and then over resolution, and the fits to them.

    Without `frames` or `sizes` the lengths or sizes are parts and multiples of the preset's. The curve over
    length is at the first of `sizes`, and the curve over resolution at the first of `frames`; else both are
    at the preset's.
    """
    usual, model = case.plan.size, case.plan.model
    step, chunks = model.vae_frames, (usual.frames - 1) // model.vae_frames
    lengths = sorted(set(frames or (round(chunks * part) * step + 1 for part in LENGTHS)))
    factors = [(side, model.size_factor(axis)) for axis, side in enumerate(usual[1:], 1)]
    scaled = [tuple(max(1, round(side * part / by)) * by for side, by in factors) for part in SIDES]
    sides = list(dict.fromkeys(sizes or scaled))
    middle, size = [*frames, usual.frames][0], [*sizes, usual[1:]][0]
    along = [case.row(length, size) for length in lengths]
    across = [case.row(middle, side) for side in sides]
    factor, r2 = fit(along)
    rows = list({(row["frames"], row["height"], row["width"]): row for row in [*along, *across]}.values())
    for row in rows:
        row["n_log_n"] = factor * n_log_n(row["tokens"])
    fits: dict[str, Any] = {"c": factor, "r2": r2, "frames": middle, "size": list(size)}
    pixels = [height * width for height, width in sides]
    for kind in ("dense", "radial"):
        fits[f"{kind}_exponent_length"] = exponent(lengths, [row[f"{kind}_flops"] for row in along])
        fits[f"{kind}_exponent_pixels"] = exponent(pixels, [row[f"{kind}_flops"] for row in across])
    return rows, fits


def sparsities() -> list[dict[str, Any]]:
    """Returns the paper's sparsities and ours, percent of the pairs of video tokens; `preset`: unchanged."""
    rows = []
    for name, preset, percent, words in PAPER:
        plan, usual = read(preset, words).plan, read(preset, ()).plan
        video = radial_mask(replace(plan.grid, text=0), radial_config(plan.config.attention))
        ours, unchanged = (100 * (1 - mask.density) for mask in (video, usual.block_mask))
        start = {"model": name, "frames": plan.size.frames}
        rows.append(start | {"paper": percent, "ours": ours, "preset": unchanged})
    return rows


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


def read(name: str, words: Sequence[str]) -> Case:
    """Plans a name of `PRESETS` or a preset's file; UsageError if there is none or it cannot run."""
    return Case(name, make_plan(read_config(PRESETS.get(name, name), list(words)), dry_run=True))


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
    parser.add_argument("--out", type=Path, help="file of the tables (results/cost_NAMES_...md)")
    options = parser.parse_args(argv)
    chosen = [] if options.models == list(PRESETS) else [Path(name).stem for name in options.models]
    options.work = options.work or Path("outputs/cost", "_".join(chosen))
    options.out = options.out or results_file("cost", *chosen)
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
