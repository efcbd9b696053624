"""Makes a profile of a model: `python -m scripts.calibrate CONFIG.yaml [key=value ...]`.

`[--parts P] [--work DIR] [--out FILE]`. It runs the model dense on its prompts, each with noise of its own,
and measures what every head would lose with every block, in each part of the schedule. The profile serves
attention.selection=profile, also at other sizes and lengths. Readings are kept prompt by prompt, and the same
command resumes. Exit codes: 0 done; 2 with one line on stderr; 130 interrupted.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from radial_attn import TokenGrid
from radial_attn.models.calibration import PARTS
from radial_attn.models.pipeline.rope_scaling import temporal_frequencies
from radial_attn.models.profile import ModelProfile, Reading
from radial_attn.models.runtime.observe import Seen
from radial_attn.models.runtime.output_check import CheckError
from scripts.evaluation.attention_run import observed, summed
from scripts.run.config import read_one_seed
from scripts.run.errors import OneLineParser, UsageError, exit_code, positive
from scripts.run.files import replacing
from scripts.run.hub_models import planned_boundary
from scripts.run.plan import RunPlan, make_plan
from scripts.run.processes import processes
from scripts.run.sampler import Sampler

TINY = "configs/wan_tiny.yaml"


class Calibration:
    """Measures every call of a run, as a callback of `observe`."""

    def __init__(self, grid: TokenGrid, block_size: int, parts: list[int], bar: tqdm) -> None:
        self._reading, self._parts, self._bar = Reading(grid, block_size), parts, bar
        self._sigmas: dict[int, float] = {}

    def __call__(self, seen: Seen) -> None:
        if seen.step not in self._sigmas:
            if seen.sigma is None:
                raise UsageError("model.path: its scheduler has no noise levels, which a profile needs")
            self._sigmas[seen.step] = seen.sigma
            self._bar.update(seen.step > 0)
        self._bar.set_postfix_str(f"layer {seen.layer}", refresh=False)
        tensors = seen.query, seen.key, seen.value
        self._reading.add(self._parts[seen.step], seen.layer, tensors, seen.text_lengths)

    def content(self) -> dict[str, Any]:
        """Returns tensors and numbers for a file of readings."""
        return {"sums": self._reading.sums, "counts": self._reading.counts, "sigmas": self._sigmas}


def run(options: argparse.Namespace) -> None:
    """Measures what is missing, and writes the profile."""
    if processes() > 1:
        raise UsageError(f"got {processes()} processes, but only one can be observed; run without torchrun")
    plan = planned(options)
    steps, size = plan.config.generation.steps, plan.config.attention.block_size
    if options.parts > steps:
        raise UsageError(f"--parts: got {options.parts}, must be at most {steps} (generation.steps)")
    parts = divided(steps, options.parts, second_expert(plan))
    for folder in (options.work, options.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with Sampler(plan).reporting_memory():
        contents = observed(
            plan,
            options.work,
            lambda number, bar: Calibration(plan.grid, size, parts, bar),
            facts={"calibration": options.parts},
            steps=steps,
            own_noise=True,
        )
    reading = summed(contents, plan)
    sigmas = contents[0]["sigmas"]
    edges = [min(sigmas[s] for s in range(steps) if parts[s] == part) for part in range(options.parts)]
    video = plan.size
    about = {
        "command": shlex.join(["bash", "scripts/calibrate.sh", *options.given]),
        "video": f"{video.width}x{video.height}, {video.frames} frames, {steps} steps, blocks of {size}",
        "prompts": len(plan.prompts),
    }
    turns = temporal_frequencies(*plan.model.rope_time).tolist() if plan.model.rope_time else []
    profile = ModelProfile.of(reading, plan.measured_model, edges, frequencies=turns, about=about)
    content = profile.to_bytes()
    with replacing(options.out) as part:
        part.write_bytes(content)
    kinds = f"{profile.cells.frames} frames by {profile.cells.positions} positions, {len(profile.basis)} maps"
    levels = ", ".join(f"{edge:.3g}" for edge in edges)
    print(f"profile    {kinds}, parts down to sigma {levels}, {len(content) / 1000:.0f} kB")
    print(f"written    {options.out}")
    print(f"use it     attention.selection=profile attention.profile={options.out}")


def divided(steps: int, count: int, boundary: int | None = None) -> list[int]:
    """Returns the part of each step: equal ones, the nearest edge moved to the step `boundary`."""
    starts = [-(-part * steps // count) for part in range(count)]
    if boundary is not None and count > 1:
        nearest = min(range(1, count), key=lambda part: abs(starts[part] - boundary))
        starts[nearest] = boundary
    return [sum(step >= start for start in starts) - 1 for step in range(steps)]


def second_expert(plan: RunPlan) -> int | None:
    """Returns the first step of Wan2.2's second expert; None if there is none, or it is not known."""
    boundary = planned_boundary(plan.path) if "transformer_2" in plan.model.parameters else None
    if boundary is None or plan.sigmas is None:
        return None
    return next((step for step, sigma in enumerate(plan.sigmas) if step > 0 and sigma < boundary), None)


def planned(options: argparse.Namespace) -> RunPlan:
    """Plans the dense runs; UsageError for what cannot be run or observed."""
    config = read_one_seed(options.config, options.overrides)
    for name in ("compile", "cache"):
        if (value := getattr(config.model, name)) != "none":
            raise UsageError(f"model.{name}: got {value!r}, which hides attention; set model.{name}=none")
    plain = {"selection": "static", "profile": None, "residual": "none", "far_field": "none", "density": None}
    return make_plan(replace(config, attention=replace(config.attention, dense_layers=0, **plain)))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line: the one word without `=` is the configuration."""
    parser = OneLineParser(prog="scripts/calibrate.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value")
    parser.add_argument("--parts", type=positive, default=PARTS, help=f"parts of the schedule ({PARTS})")
    parser.add_argument("--work", type=Path, help="folder of readings (outputs/calibration/CONFIG)")
    parser.add_argument("--out", type=Path, help="file of the profile (outputs/profiles/CONFIG.safetensors)")
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_intermixed_args(given)
    options.given = given
    options.config, options.overrides = parser.divided(options.words, TINY)
    kind = Path(options.config).stem
    options.work = options.work or Path("outputs", "calibration", kind)
    options.out = options.out or Path("outputs", "profiles", f"{kind}.safetensors")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    return exit_code(lambda: run(parse(argv)), "run the same command to resume", CheckError)


if __name__ == "__main__":
    sys.exit(main())
