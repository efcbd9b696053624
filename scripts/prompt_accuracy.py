"""Measures how often videos of the bundled models show what the caption says, dense and radial.

`python -m scripts.prompt_accuracy [CONFIG.yaml ...] [key=value ...] [--every N ...] [--batch B] [--out MD]`.
It makes all captions of the toy world (or every N-th), one seed each, and reads them back by `toyworld.read`.
Readings are kept in outputs/prompt_accuracy/ as they come, and the same command resumes. Image to video
starts from the first frame of a scene of the caption, so only the motion is left to the model. With
`--prompt CAPTION ... --seeds N` it makes only these prompts with N seeds each, for one configuration.
"""

import argparse
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from radial_attn.models.runtime.output_check import CheckError
from scripts.evaluation.files import write_text
from scripts.length.seeds import seed_records, seed_table
from scripts.run.config import ROOT, Config, read_config
from scripts.run.describe import describe_settings
from scripts.run.digest import digest
from scripts.run.errors import OneLineParser, exit_code, positive
from scripts.run.plan import RunPlan, make_plan
from scripts.run.sampler import Sampler, sample
from scripts.run.system import hardware, pairs, versions
from scripts.toyworld import all_attributes
from scripts.toyworld.accuracy import attention, first_frame, readings, whole_run_seconds, with_pattern
from scripts.toyworld.render import VOCABULARY, Attributes, parse_caption

PATTERNS = ("dense", "radial")
LEAST_STEPS = 2  # Mochi's noise levels need two


def step_seconds(pipeline: Any, config: Config, attributes: Attributes) -> dict[str, float]:
    """Measures the mean seconds of a denoising step of one video, dense and radial in turn."""
    runs = {pattern: (pipeline, with_pattern(config, pattern)) for pattern in PATTERNS}
    return whole_run_seconds(runs, attributes)


def density(pipeline: Any, config: Config) -> float:
    """Returns the density of the mask that this configuration uses."""
    with attention(pipeline, config) as handle:
        short = replace(config, generation=replace(config.generation, steps=LEAST_STEPS))
        first = all_attributes()[0]
        sample(pipeline, short, [first.caption], [0], output_type="latent", **first_frame(config, first, 0))
        return handle.report()["density"]


def row(config: Config, entries: list[dict], density: float, seconds: float) -> str:
    """Returns one line of the table, in percent."""
    shares = [mean(entry[name] for entry in entries) for name in VOCABULARY]
    whole = mean(all(entry[name] for name in VOCABULARY) for entry in entries)
    percent = [f"{100 * share:.1f}" for share in (*shares, mean(shares), whole)]
    model, frames = Path(config.model.path).name, str(config.generation.num_frames)
    first = [model, frames, config.attention.pattern, f"{density:.3f}"]
    return "| " + " | ".join([*first, *percent, str(len(entries)), f"{seconds:.3f}"]) + " |"


def report(command: str, configs: list[Config], rows: list[str], device: str) -> str:
    """Returns the text of the results file: command, table, settings, machine."""
    head = ["model", "frames", "attention", "density", *VOCABULARY, "attributes", "whole captions"]
    head += ["captions", "s a step"]
    machine = pairs(versions(), hardware(device))
    settings = [
        describe_settings(config) + "".join(f", LoRA {x.path}" for x in config.model.loras)
        for config in configs
    ]
    text = [
        "# Prompt accuracy of the bundled models",
        "",
        f"    {command}",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *rows,
        "",
        "Percent of videos in which `toyworld.read` finds what the caption asks for, one seed a caption. "
        "Attributes is the mean of the four; a whole caption is right when all four are. The last column is "
        "the median time of a step (both halves of guidance, if any) of one video, dense and radial in turn; "
        "if a run has dense steps, the mean of both by their number. Image to video starts from the first "
        "frame of a scene of the caption, one video at a time.",
        "",
        *settings,
        "",
        machine,
        "",
    ]
    return "\n".join(text)


def work_folder(plan: RunPlan) -> Path:
    """Makes the folder of the readings of this configuration, program and weights."""
    folder = ROOT / "outputs" / "prompt_accuracy" / digest(plan.config, plan.path)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measure(plan: RunPlan, every: int, batch: int) -> list[str]:
    """Measures one configuration and returns its rows."""
    config, pipeline = plan.config, Sampler(plan).load()
    captions, folder = all_attributes()[::every], work_folder(plan)
    seconds, rows = step_seconds(pipeline, config, captions[0]), []
    for pattern in PATTERNS:
        chosen = with_pattern(config, pattern)
        entries = readings(pipeline, chosen, captions, batch, folder / f"{pattern}_{every}.json")
        rows.append(row(chosen, entries, density(pipeline, chosen), seconds[pattern]))
        print(rows[-1], flush=True)
    return rows


def run_seeds(options: argparse.Namespace) -> None:
    """Measures the prompts of `--prompt` and writes their table."""
    plan = make_plan(read_config(options.configs[0], options.overrides))
    config, first = plan.config, plan.config.generation.seed
    seeds = range(first, first + options.seeds)
    records = seed_records(plan, options.prompt, seeds, work_folder(plan) / "seeds.json")
    given = [*options.configs, *options.overrides, "--prompt", *map(shlex.quote, options.prompt)]
    loras = "".join(f", LoRA {entry.path}" for entry in config.model.loras)
    text = [
        "# Prompts over several seeds",
        "",
        f"    bash scripts/prompt_accuracy.sh {' '.join(given)} --seeds {options.seeds}",
        "",
        *seed_table(records, options.prompt, seeds),
        "",
        describe_settings(config) + loras,
        "",
        pairs(versions(), hardware(plan.device)),
    ]
    print("\n".join(text[4 : 6 + 2 * len(options.prompt)]))
    print(f"written {write_text(options.out, chr(10).join(text) + chr(10))}")


def run(options: argparse.Namespace) -> None:
    """Measures all configurations and writes the table."""
    if options.prompt:
        return run_seeds(options)
    configs = [read_config(name, options.overrides) for name in options.configs]
    plans = [make_plan(config) for config in configs]
    pairs_of = zip(plans, options.every, strict=True)
    rows = [line for plan, every in pairs_of for line in measure(plan, every, options.batch)]
    arguments = [*options.configs, *options.overrides, "--every", *map(str, options.every)]
    command = " ".join(["bash scripts/prompt_accuracy.sh", *arguments, "--batch", str(options.batch)])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report(command, configs, rows, plans[0].device), encoding="utf-8")
    print(f"written {options.out}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line: words without `=` are configs."""
    parser = OneLineParser(prog="scripts/prompt_accuracy.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value")
    parser.add_argument(
        "--every", type=positive, nargs="+", default=[1], help="take every N-th caption, of each config"
    )
    parser.add_argument("--batch", type=positive, default=12, help="videos generated at once")
    parser.add_argument(
        "--prompt", nargs="+", default=[], metavar="CAPTION", help="measure only these captions"
    )
    parser.add_argument("--seeds", type=positive, default=10, help="number of seeds of each --prompt")
    name = f"prompt_accuracy_{'gpu' if torch.cuda.is_available() else 'cpu'}_{time.strftime('%Y-%m-%d')}.md"
    parser.add_argument("--out", type=Path, default=ROOT / "results" / name, help="file of the table")
    options = parser.parse_args(argv)
    options.configs = [word for word in options.words if "=" not in word] or ["configs/wan_tiny.yaml"]
    options.overrides = [word for word in options.words if "=" in word]
    if len(options.every) == 1:
        options.every *= len(options.configs)
    if len(options.every) != len(options.configs):
        parser.error(f"--every: got {len(options.every)} numbers, must be 1 or {len(options.configs)}")
    if options.prompt and len(options.configs) > 1:
        parser.error(f"--prompt: got {len(options.configs)} configurations; name one")
    for prompt in options.prompt:
        try:
            parse_caption(prompt)
        except ValueError as error:
            parser.error(f"--prompt: {error}")
    return options


if __name__ == "__main__":
    options = parse()
    sys.exit(exit_code(lambda: run(options), "run the same command to resume", CheckError))
