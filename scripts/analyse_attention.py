"""Measures where attention lies: `python -m scripts.analyse_attention [CONFIG.yaml] [key=value ...]`.

`[--steps N ... | --timestep T] [--rows R] [--layers L ...] [--tail-rows R] [--work DIR] [--out MD]`. It runs
the model dense on its prompts and observes sampled query rows at some steps, or at one call on noise. It
writes the curves over temporal and spatial distance, their exponential fits, classes of heads, the attention
that each band of the configuration's mask holds and keeps, and a bound on the attention that the mask drops.
Readings are kept prompt by prompt, and the same command resumes. Exit codes: 0 done; 2 with one line on
stderr; 130 interrupted.
"""

import argparse
import math
import re
import shlex
import sys
from pathlib import Path

from radial_attn.masks.draw import save_figure
from radial_attn.models.runtime.output_check import CheckError
from scripts.evaluation.attention_report import content
from scripts.evaluation.attention_run import Looks, gather
from scripts.evaluation.attention_tables import draw, fit_lines, lines
from scripts.evaluation.head_maps import draw as draw_heads
from scripts.evaluation.head_maps import maps
from scripts.run.config import Config, read_one_seed
from scripts.run.errors import OneLineParser, UsageError, exit_code, positive
from scripts.run.plan import RunPlan, make_plan
from scripts.run.processes import processes
from scripts.run.results import OUT, publish, results_file
from scripts.run.sampler import Sampler

TINY = "configs/wan_tiny.yaml"
KEY = re.compile(r"[a-z]+\.\w+=")
HIGHEST = 1000.0  # the highest timestep of these models


def run(options: argparse.Namespace) -> None:
    """Observes the attention, and writes JSON, table and picture."""
    if processes() > 1:
        raise UsageError(f"got {processes()} processes, but only one can be observed; run without torchrun")
    config = read_one_seed(options.config, options.overrides)
    plan = planned(config)
    looks = looks_of(options, config, plan.model.attention_layers())
    options.work.mkdir(parents=True, exist_ok=True)
    with Sampler(plan).reporting_memory():
        profiles, tails, reading = gather(plan, looks, options.work)
    command = shlex.join(["bash", "scripts/analyse_attention.sh", *options.given])
    data = content(command, plan, looks, profiles, tails) | {"maps": maps(reading, plan)}
    print("\n".join(fit_lines(data)))
    publish(data, options.work, options.out, lines, draw)
    picture = options.out.with_name(f"{options.out.stem}_heads.png")
    save_figure(draw_heads(data["maps"]), picture)
    print(f"written    {picture}")


def planned(config: Config) -> RunPlan:
    """Plans the run; UsageError for what cannot be run or observed."""
    for name in ("compile", "cache"):
        if (value := getattr(config.model, name)) != "none":
            raise UsageError(f"model.{name}: got {value!r}, which hides attention; set model.{name}=none")
    return make_plan(config)


def looks_of(options: argparse.Namespace, config: Config, layers: int) -> Looks:
    """Returns which calls to observe; UsageError for steps or layers that do not exist."""
    last = config.generation.steps
    steps = tuple(sorted(set(options.steps or (1, (last + 1) // 2, last))))
    if steps[-1] > last:
        raise UsageError(f"--steps: got {steps[-1]}, must be 1 to {last} (generation.steps)")
    chosen = tuple(sorted(set(options.layers)))
    if chosen and chosen[-1] >= layers:
        raise UsageError(f"--layers: got {chosen[-1]}, must be 0 to {layers - 1}, the layers of this model")
    steps = () if options.timestep is not None else steps
    return Looks(steps, options.timestep, options.rows, options.tail_rows, chosen)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line: the one word without `=` is the configuration."""
    parser = OneLineParser(prog="scripts/analyse_attention.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value")
    calls = parser.add_mutually_exclusive_group()
    calls.add_argument(
        "--steps", type=positive, nargs="+", help="denoising steps, from 1 (first, middle, last)"
    )
    calls.add_argument("--timestep", type=_timestep, help="one call on noise, 0 to 1000 in the model's units")
    parser.add_argument("--rows", type=positive, default=64, help="query tokens of each call")
    parser.add_argument("--tail-rows", type=positive, default=4, help="number of these rows that get a bound")
    parser.add_argument("--layers", type=_layer, nargs="+", default=[], help="layers, from 0 (all)")
    parser.add_argument("--work", type=Path, help="folder of readings and analysis.json")
    parser.add_argument("--out", type=Path, help=OUT)
    given = sys.argv[1:] if argv is None else argv
    # keys go first, or an option of several numbers before them would take them as its own
    options = parser.parse_intermixed_args(sorted(given, key=lambda word: not KEY.match(word)))
    options.given = given
    options.config, options.overrides = parser.divided(options.words, TINY)
    kind = Path(options.config).stem
    options.work = options.work or Path("outputs", "analysis", kind)
    options.out = results_file(options.out, "attention_decay", kind)
    return options


def _timestep(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= HIGHEST:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {HIGHEST:g}, got {text!r}")
    return value


def _layer(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    return exit_code(lambda: run(parse(argv)), "run the same command to resume", CheckError)


if __name__ == "__main__":
    sys.exit(main())
