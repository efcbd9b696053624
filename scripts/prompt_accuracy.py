"""Measures how often videos of the bundled models show what the caption says, dense and radial.

`python -m scripts.prompt_accuracy [CONFIG.yaml ...] [key=value ...] [--every N ...] [--batch B] [--out MD]`.
It makes all captions of the toy world (or every N-th), one seed each, and reads them back.
Readings are kept in outputs/prompt_accuracy/ as they come, and the same command resumes. Image to video
starts from the first frame of a scene of the caption, so only the motion is left to the model. With
`--prompt CAPTION ... --seeds N` it makes only these prompts with N seeds each, for one configuration.
"""

import argparse
import shlex
import sys
from pathlib import Path
from statistics import mean

from radial_attn.models.runtime.output_check import CheckError
from scripts.length.seeds import PATTERNS, seed_records, seed_table
from scripts.run.config import Config, read_one_seed
from scripts.run.describe import describe_settings
from scripts.run.digest import digest
from scripts.run.errors import OneLineParser, exit_code, positive
from scripts.run.files import write_text
from scripts.run.plan import RunPlan, make_plan
from scripts.run.results import OUT, results_file, table
from scripts.run.sampler import Sampler
from scripts.run.system import hardware, pairs, versions
from scripts.toyworld import all_attributes
from scripts.toyworld.accuracy import readings, whole_run_seconds, with_pattern
from scripts.toyworld.render import VOCABULARY, parse_caption

TITLES = f"model|frames|attention|density|{'|'.join(VOCABULARY)}|attributes|whole captions|captions|s a step"
MEANING = (
    "Percent of videos in which the toy world's reader finds what the caption asks for, one seed a caption. "
    "Attributes is the mean of the four; a whole caption is right when all four are. The last column is "
    "the median time of a step (both halves of guidance, if any) of one video, dense and radial in turn; "
    "if a run has dense steps, the mean of both by their number. Image to video starts from the first "
    "frame of a scene of the caption, one video at a time."
)


def row(config: Config, entries: list[dict], density: float, seconds: float) -> list[str]:
    """Returns the cells of one line of the table, in percent."""
    shares = [mean(entry[name] for entry in entries) for name in VOCABULARY]
    whole = mean(all(entry[name] for name in VOCABULARY) for entry in entries)
    percent = [f"{100 * share:.1f}" for share in (*shares, mean(shares), whole)]
    model, frames = Path(config.model.path).name, str(config.generation.num_frames)
    first = [model, frames, config.attention.pattern, f"{density:.3f}"]
    return [*first, *percent, str(len(entries)), f"{seconds:.3f}"]


def report(title: str, command: str, lines: list[str], plans: list[RunPlan]) -> str:
    """Returns the text of the results file: command, table, settings, machine."""
    configs = [plan.config for plan in plans]
    settings = [
        describe_settings(config) + "".join(f", LoRA {lora.path}" for lora in config.model.loras)
        for config in configs
    ]
    machine = pairs(versions(), hardware(plans[0].device))
    return "\n".join([f"# {title}", "", f"    {command}", *lines, "", *settings, "", machine, ""])


def work_folder(plan: RunPlan) -> Path:
    """Makes the folder of the readings of this configuration, program and weights."""
    folder = Path("outputs", "prompt_accuracy") / digest(plan.config, plan.path)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measure(plan: RunPlan, every: int, batch: int) -> list[list[str]]:
    """Measures one configuration, dense and radial, and returns its rows."""
    pipeline, captions, folder = Sampler(plan).load(), all_attributes()[::every], work_folder(plan)
    plans = {pattern: make_plan(with_pattern(plan.config, pattern)) for pattern in PATTERNS}
    runs = {pattern: (pipeline, turn.config) for pattern, turn in plans.items()}
    seconds, rows = whole_run_seconds(runs, captions[0]), []
    for pattern, turn in plans.items():
        file = folder / f"{pattern}_{every}.json"
        entries = readings(pipeline, turn.config, captions, batch, file)
        rows.append(row(turn.config, entries, turn.block_mask.density, seconds[pattern]))
        print(" | ".join(rows[-1]), flush=True)
    return rows


def run(options: argparse.Namespace) -> None:
    """Measures all configurations, or the prompts of `--prompt`, and writes the table."""
    plans = [make_plan(read_one_seed(name, options.overrides)) for name in options.configs]
    command = ["bash scripts/prompt_accuracy.sh", *options.configs, *options.overrides]
    if options.prompt:
        (plan,), title = plans, "Prompts over several seeds"
        first = plan.config.generation.seed
        seeds = range(first, first + options.seeds)
        records = seed_records(plan, options.prompt, seeds, work_folder(plan) / "seeds.json")
        lines = seed_table(records, options.prompt, seeds)
        print("\n".join(line for line in lines if line.startswith("|")))
        command += ["--prompt", *map(shlex.quote, options.prompt), "--seeds", str(options.seeds)]
    else:
        title, rows = "Prompt accuracy of the bundled models", []
        print(TITLES.replace("|", " | "), flush=True)
        for plan, every in zip(plans, options.every, strict=True):
            rows += measure(plan, every, options.batch)
        lines = [*table(TITLES, rows), "", MEANING]
        command += ["--every", *map(str, options.every), "--batch", str(options.batch)]
    print(f"written {write_text(options.out, report(title, ' '.join(command), lines, plans))}")


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
    parser.add_argument("--out", type=Path, help=OUT)
    options = parser.parse_args(argv)
    options.out = results_file(options.out, "prompt_accuracy")
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
