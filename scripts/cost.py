"""What attention costs over length and resolution, dense and radial: `python -m scripts.cost`.

`[--models NAME|PRESET.yaml ...] [--frames N ...] [--size HxW ...] [--rate TFLOPS [TFLOPS]] [key=value ...]`.
FLOPs are those of self-attention in all layers of one call of the transformer, 4 n^2 d a layer if dense, with
the preset's mask and without warm-up. Exit codes: 0 done; 2 with one line on stderr; 130 interrupted.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from scripts.benchmarks.timing import medians_in_turn
from scripts.evaluation.cost_tables import NAME, draw, lines
from scripts.evaluation.files import head, publish
from scripts.run.config import ROOT, VideoSize, read_config
from scripts.run.errors import OneLineParser, exit_code, positive, positive_number
from scripts.run.option_checks import check_size
from scripts.run.plan import RunPlan, make_plan, radial_config, solve_mask

PRESETS = {
    "wan_tiny": "configs/wan_tiny.yaml",
    "wan": "configs/wan2.1_t2v_14b.yaml",
    "hunyuan": "configs/hunyuan_t2v.yaml",
    "mochi": "configs/mochi_t2v.yaml",
}
LENGTHS = (0.5, 1, 1.5, 2, 3, 4, 6, 8)  # of the preset's
SIDES = (0.5, 0.75, 1, 1.25, 1.5)
REPEATS = 3


class Published(NamedTuple):
    """A sparsity of the paper (percent), and the preset and words that have its rule and size."""

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
    """Operations a second of dense and of radial attention, and where they are from."""

    dense: float
    radial: float
    source: str


class Case(NamedTuple):
    """A model under its name, its preset, and the rates that times are predicted with."""

    name: str
    plan: RunPlan
    rates: Rates | None = None

    def row(self, frames: int, size: tuple[int, int]) -> dict[str, Any]:
        """One line of the table; `n_log_n`, which other lines decide, is None.

        Raises UsageError for a size that the model does not take.
        """
        video, model = VideoSize(frames, *size), self.plan.model
        check_size(video, model)
        grid = model.grid(video)
        mask = radial_mask.__wrapped__(grid, solve_mask(self.plan.config.attention, grid))  # not cached
        dense = 4.0 * grid.tokens**2 * model.width * model.attention_layers()
        radial = dense * mask.density
        return {
            "model": self.name,
            "frames": video.frames,
            "height": video.height,
            "width": video.width,
            "tokens": grid.tokens,
            "density": mask.density,
            "dense_flops": dense,
            "radial_flops": radial,
            "kept_blocks": int(mask.blocks.sum()),
            "n_log_n": None,
            "seconds_dense": self.rates and dense / self.rates.dense,
            "seconds_radial": self.rates and radial / self.rates.radial,
            "of_bound": mask.kept_pairs / bound(grid) if grid.frames > 1 else None,
        }


def bound(grid: TokenGrid) -> float:
    """The paper's bound on kept pairs, 4 s^2 f log2 f."""
    return 4.0 * grid.tokens_per_frame**2 * grid.frames * math.log2(grid.frames)


def n_log_n(tokens: float) -> float:
    return tokens * math.log2(tokens)


def fit(rows: Sequence[dict[str, Any]]) -> tuple[float, float | None]:
    """`c` of `c n log2 n` by least squares on the radial FLOPs, and its R^2, None for a single length."""
    x = np.array([n_log_n(row["tokens"]) for row in rows])
    y = np.array([row["radial_flops"] for row in rows])
    factor = float(x @ y / (x @ x))
    spread = float(((y - y.mean()) ** 2).sum())
    return factor, 1 - float(((y - factor * x) ** 2).sum()) / spread if spread else None


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """`p` of `y ~ x^p` by least squares of the logarithms; None where x does not vary."""
    across, up = np.log(np.array(x, dtype=float)), np.log(np.array(y, dtype=float))
    across -= across.mean()
    return float(across @ up / (across @ across)) if len(set(x)) > 1 else None


def curves(
    case: Case, frames: Sequence[int] = (), sizes: Sequence[tuple[int, int]] = ()
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one model, over length and then over resolution, and what was fitted to them.

    Without `frames` or `sizes` they are parts and multiples of the preset's. The other curve is at the first
    of those given, else at the preset's.
    """
    usual = case.plan.size
    lengths, sides = _lengths(case, frames), _sides(case, sizes)
    middle, size = [*frames, usual.frames][0], [*sizes, (usual.height, usual.width)][0]
    along = [case.row(length, size) for length in lengths]
    across = [case.row(middle, side) for side in sides]
    factor, r2 = fit(along)
    rows = list({(row["frames"], row["height"], row["width"]): row for row in [*along, *across]}.values())
    for row in rows:
        row["n_log_n"] = factor * n_log_n(row["tokens"])
    found: dict[str, Any] = {"c": factor, "r2": r2, "frames": middle, "size": list(size)}
    pixels = [height * width for height, width in sides]
    for kind in ("dense", "radial"):
        found[f"{kind}_exponent_length"] = exponent(lengths, [row[f"{kind}_flops"] for row in along])
        found[f"{kind}_exponent_pixels"] = exponent(pixels, [row[f"{kind}_flops"] for row in across])
    return rows, found


def _lengths(case: Case, given: Sequence[int]) -> list[int]:
    step = case.plan.model.vae_frames
    chunks = (case.plan.size.frames - 1) // step
    return sorted(set(given)) or sorted({round(chunks * part) * step + 1 for part in LENGTHS})


def _sides(case: Case, given: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    factors = [case.plan.model.size_factor(axis) for axis in (1, 2)]
    pairs = list(zip(case.plan.size[1:], factors, strict=True))
    usual = [tuple(max(1, round(side * part / by)) * by for side, by in pairs) for part in SIDES]
    return list(dict.fromkeys(given or usual))


def sparsities() -> list[dict[str, Any]]:
    """The paper's sparsities and ours, percent of the pairs of video tokens; `preset`: as it stands."""
    return [_sparsity(*published) for published in PAPER]


def _sparsity(name: str, preset: str, percent: float, words: Sequence[str]) -> dict[str, Any]:
    plan, usual = (make_plan(read_config(preset, own), dry_run=True) for own in (list(words), []))
    video = radial_mask(replace(plan.grid, text=0), radial_config(plan.config.attention))
    ours, as_it_is = (100 * (1 - mask.density) for mask in (video, usual.block_mask))
    return {"model": name, "frames": plan.size.frames, "paper": percent, "ours": ours, "preset": as_it_is}


def measured_rates(device: str) -> Rates:
    """A short dense and radial attention call on this machine."""
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
    """Those of the command line, or measured; None where no times are wanted."""
    if options.no_times:
        return None
    if not options.rate:
        return measured_rates(device)
    dense, radial = 1e12 * options.rate[0], 1e12 * options.rate[-1]
    return Rates(dense, radial, "given by --rate")


def run(options: argparse.Namespace, command: str) -> None:
    """Works everything out and writes it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases, rows, fits = [read(name, options.words) for name in dict.fromkeys(options.models)], [], {}
    rates = rates_of(options, device)
    for case in cases:
        found, fits[case.name] = curves(case._replace(rates=rates), options.frames, options.size)
        rows += found
    data = head("cost", command, device) | {"rows": rows, "paper": sparsities(), "fits": fits}
    data["rates"] = rates and rates._asdict()
    data["masks"] = {case.name: asdict(radial_config(case.plan.config.attention)) for case in cases}
    for file in publish(data, options.work / NAME, options.out, lines, draw):
        print(f"written    {file}")


def read(name: str, words: Sequence[str]) -> Case:
    """A name of `PRESETS` or a preset's file, checked; UsageError for what there is not."""
    return Case(name, make_plan(read_config(PRESETS.get(name, name), list(words)), dry_run=True))


def size(text: str) -> tuple[int, int]:
    """`HxW` of an argument, pixels."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"must be height x width as in 480x832, got {text!r}")
    return int(height), int(width)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="scripts/cost.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys of generation, for every model")
    names = f"{', '.join(PRESETS)}, or a file ending in .yaml"
    parser.add_argument("--models", nargs="+", default=list(PRESETS), metavar="NAME", help=names)
    parser.add_argument(
        "--frames", type=positive, nargs="+", default=[], help="the first also for the resolutions"
    )
    parser.add_argument(
        "--size", type=size, nargs="+", default=[], metavar="HxW", help="the first also for the lengths"
    )
    parser.add_argument(
        "--rate", type=positive_number, nargs="+", default=[], metavar="TFLOPS", help="dense, then radial"
    )
    parser.add_argument("--no-times", action="store_true", help="neither measure nor predict")
    parser.add_argument("--work", type=Path, help="of cost.json: outputs/cost, with --models NAMES below it")
    parser.add_argument("--out", type=Path, help="of the tables: results/cost_NAMES_...md")
    options = parser.parse_args(argv)
    chosen = [] if options.models == list(PRESETS) else [Path(name).stem for name in options.models]
    options.work = options.work or Path("outputs/cost", "_".join(chosen))
    words = ["cost", *chosen, "gpu" if torch.cuda.is_available() else "cpu", time.strftime("%Y-%m-%d")]
    options.out = options.out or ROOT / "results" / f"{'_'.join(words)}.md"
    if len(options.rate) > 2:
        parser.error(f"--rate: got {len(options.rate)} numbers, allowed: 1 or 2 (dense, radial)")
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
