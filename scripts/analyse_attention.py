"""Where the attention of a model lies: `python -m scripts.analyse_attention [CONFIG.yaml] [key=value ...]`.

`[--steps N ... | --timestep T] [--rows R] [--layers L ...] [--tail-rows R] [--work DIR] [--out MD]`. Runs the
model dense on its prompts, looks at sampled query rows at some steps, or at one call on noise, and writes the
curves over temporal and spatial distance, their exponential fits, classes of heads, what each band of the
configuration's mask holds and keeps, and a bound on what it drops. Readings are kept prompt by prompt, and a
second run goes on. Exit codes: 0 done; 2 with one line on stderr; 130 interrupted.
"""

import argparse
import math
import re
import shlex
import sys
import time
from pathlib import Path

import torch

from radial_attn.models.runtime.output_check import CheckError
from scripts.evaluation.attention_report import Analysis, write
from scripts.evaluation.attention_run import Looks, gather
from scripts.run.config import ROOT, Config, read_config
from scripts.run.errors import OneLineParser, UsageError, exit_code, positive
from scripts.run.plan import RunPlan, make_plan
from scripts.run.processes import processes
from scripts.run.sampler import Sampler

TINY = "configs/wan_tiny.yaml"
KEY = re.compile(r"[a-z]+\.\w+=")
HIGHEST = 1000.0  # timestep of these models


def run(options: argparse.Namespace) -> None:
    """Looks, and writes JSON, table and picture."""
    if processes() > 1:
        raise UsageError(f"several processes cannot be observed: got {processes()}, allowed: 1")
    config = read_config(options.config, options.overrides)
    plan = planned(config)
    looks = looks_of(options, config, plan.model.attention_layers())
    options.work.mkdir(parents=True, exist_ok=True)
    with Sampler(plan).reporting_memory():
        profiles, tails = gather(plan, looks, options.work)
    command = shlex.join(["bash", "scripts/analyse_attention.sh", *options.given])
    analysis = Analysis(command, plan, looks, profiles, tails)
    for line in write(analysis, options.work, options.out):
        print(line)


def planned(config: Config) -> RunPlan:
    """Plans the run; UsageError for what cannot be run or observed."""
    for name in ("compile", "cache"):
        value = getattr(config.model, name)
        if value != "none":
            raise UsageError(f"model.{name}: got {value!r}, allowed where attention is observed: none")
    return make_plan(config)


def looks_of(options: argparse.Namespace, config: Config, layers: int) -> Looks:
    """What to look at; UsageError for steps or layers that there are not."""
    last = config.generation.steps
    steps = tuple(sorted(set(options.steps or (1, (last + 1) // 2, last))))
    if steps[-1] > last:
        raise UsageError(f"--steps: got {steps[-1]}, allowed: 1 to {last} (generation.steps)")
    chosen = tuple(sorted(set(options.layers)))
    if chosen and chosen[-1] >= layers:
        raise UsageError(f"--layers: got {chosen[-1]}, allowed: 0 to {layers - 1}, the layers of this model")
    return Looks(
        () if options.timestep is not None else steps,
        options.timestep,
        options.rows,
        options.tail_rows,
        chosen,
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: the one word without `=` is the configuration."""
    parser = OneLineParser(prog="scripts/analyse_attention.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--steps", type=positive, nargs="+", help="denoising steps from 1; else first, middle, last"
    )
    where.add_argument("--timestep", type=_timestep, help="one call on noise, 0 to 1000 in the model's units")
    parser.add_argument("--rows", type=positive, default=64, help="query tokens of each call")
    parser.add_argument("--tail-rows", type=positive, default=4, help="of these, how many get a bound")
    parser.add_argument("--layers", type=_layer, nargs="+", default=[], help="from 0; else all")
    parser.add_argument("--work", type=Path, help="folder of readings and analysis.json")
    parser.add_argument(
        "--out", type=Path, help="file of the tables (results/attention_decay_CONFIG_HARDWARE_DATE.md)"
    )
    given = sys.argv[1:] if argv is None else argv
    # keys first, so that an option of several numbers before them does not take them for its own
    options = parser.parse_intermixed_args(sorted(given, key=lambda word: not KEY.match(word)))
    options.given = given
    options.config, options.overrides = parser.divided(options.words, TINY)
    kind = Path(options.config).stem
    options.work = options.work or ROOT / "outputs" / "analysis" / kind
    device, day = "gpu" if torch.cuda.is_available() else "cpu", time.strftime("%Y-%m-%d")
    options.out = options.out or ROOT / "results" / f"attention_decay_{kind}_{device}_{day}.md"
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
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    return exit_code(lambda: run(parse(argv)), "the same command goes on", CheckError)


if __name__ == "__main__":
    sys.exit(main())
