"""Prompt accuracy of the bundled model: does the video show what the caption says, dense and radial?

`python -m scripts.prompt_accuracy [CONFIG.yaml] [key=value ...] [--every N] [--batch B] [--out FOLDER]`. All
captions of the toy world (or every N-th), one seed each, read back by `toyworld.read`. Readings are kept in
outputs/prompt_accuracy/ as they come, and a second run goes on where the first stopped.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from tqdm import tqdm

from models import apply_radial_attention
from scripts.config import ROOT, Config, read_config
from scripts.errors import OneLineParser, UsageError, positive
from scripts.plan import radial_config
from scripts.record import hardware, versions
from scripts.validate import check_values, resolve_device, resolve_model
from scripts.video import Job, sample
from toyworld import all_attributes, read
from toyworld.render import VOCABULARY, Attributes

PATTERNS = ("dense", "radial")
TIMED_RUNS = 3


@contextmanager
def attention(pipeline: Any, config: Config) -> Iterator[Any]:
    """The pipeline with the attention of `config`; gives the handle."""
    options = config.attention
    counts = {name: getattr(options, name) for name in ("dense_steps", "dense_layers", "dense_last_steps")}
    with apply_radial_attention(pipeline, radial_config(config), backend=options.backend, **counts) as handle:
        yield handle


def with_pattern(config: Config, pattern: str) -> Config:
    """The same run with another attention pattern."""
    return replace(config, attention=replace(config.attention, pattern=pattern))


def readings(pipeline: Any, config: Config, captions: list[Attributes], batch: int, file: Path) -> list[dict]:
    """What the reader sees in the video of each caption; those in `file` already are not made again."""
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    seen = {entry["caption"] for entry in done}
    missing = [(i, a) for i, a in enumerate(captions) if a.caption not in seen]
    name = f"{config.attention.pattern} {config.generation.num_frames} frames"
    with attention(pipeline, config), tqdm(total=len(captions), initial=len(done), desc=name) as bar:
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            seeds = [config.generation.seed + i for i, _ in part]
            videos = sample(pipeline, config, [a.caption for _, a in part], seeds)
            entries = [reading(video, a) for video, (_, a) in zip(videos, part, strict=True)]
            with file.open("a") as stream:
                stream.writelines(json.dumps(entry) + "\n" for entry in entries)
            done += entries
            bar.update(len(part))
    return done


def reading(video: Any, attributes: Attributes) -> dict[str, Any]:
    """One line of the record: the caption and which attributes are right."""
    return {"caption": attributes.caption, **read(torch.from_numpy(video)).matches(attributes)}


def step_seconds(pipeline: Any, config: Config, caption: str) -> dict[str, float]:
    """Median seconds of a denoising step of one video, dense and radial taking turns."""
    seconds: dict[str, list[float]] = {pattern: [] for pattern in PATTERNS}
    short = replace(config, generation=replace(config.generation, steps=4))
    for _ in range(TIMED_RUNS):
        for pattern in PATTERNS:
            marks: list[float] = []
            watch = stopwatch(marks)
            with attention(pipeline, with_pattern(short, pattern)):
                sample(pipeline, short, [caption], [0], output_type="latent", callback_on_step_end=watch)
            seconds[pattern] += [after - before for before, after in pairwise(marks)]
    return {pattern: median(values) for pattern, values in seconds.items()}


def stopwatch(marks: list[float]) -> Any:
    """A pipeline callback that notes the time at the end of every step."""

    def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        marks.append(time.perf_counter())
        return {}

    return step_done


def density(pipeline: Any, config: Config) -> float:
    """Density of the mask that this configuration uses."""
    with attention(pipeline, config) as handle:
        short = replace(config, generation=replace(config.generation, steps=1))
        sample(pipeline, short, [all_attributes()[0].caption], [0], output_type="latent")
        return handle.report()["density"]


def table(
    results: dict[str, list[dict]], seconds: dict[str, float], densities: dict[str, float]
) -> list[str]:
    """A markdown table, a row a pattern, percentages."""
    head = ["attention", "density", *VOCABULARY, "attributes", "whole captions", "captions", "s a step"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for pattern, entries in results.items():
        shares = [mean(entry[name] for entry in entries) for name in VOCABULARY]
        whole = mean(all(entry[name] for name in VOCABULARY) for entry in entries)
        cells = [f"{100 * share:.1f} %" for share in (*shares, mean(shares), whole)]
        values = [pattern, f"{densities[pattern]:.3f}", *cells, str(len(entries)), f"{seconds[pattern]:.3f}"]
        rows.append("| " + " | ".join(values) + " |")
    return rows


def report(command: str, config: Config, lines: list[str]) -> str:
    """The results file: table, command, settings, machine."""
    machine = ", ".join(f"{key} {value}" for key, value in {**versions(), **hardware("cpu")}.items())
    sizes, options = config.generation, config.attention
    text = [
        f"# Prompt accuracy, {config.model.path}, {sizes.num_frames} frames",
        "",
        f"    {command}",
        "",
        *lines,
        "",
        "Attributes is the mean of the four; a whole caption is right when all four are. One seed a caption; "
        "the last column is the median time of a denoising step (both guidance halves) of one video.",
        "",
        f"{sizes.steps} steps, guidance {sizes.guidance_scale}, shift {sizes.flow_shift}, seed {sizes.seed}; "
        + ", ".join(f"{key} {value}" for key, value in asdict(options).items() if key != "pattern"),
        "",
        machine,
        "",
    ]
    return "\n".join(text)


def work_folder(config: Config, path: str) -> Path:
    """Where the readings of this very configuration and these weights are kept."""
    weights = sorted(Path(path).rglob("*.safetensors"))
    digest = hashlib.sha256(json.dumps(asdict(config)).encode())
    for file in weights:
        digest.update(file.read_bytes())
    folder = ROOT / "outputs" / "prompt_accuracy" / digest.hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(options: argparse.Namespace) -> None:
    """Measures and writes the table."""
    config = read_config(options.config, options.overrides)
    check_values(config)
    device, path = resolve_device(config), resolve_model(config)
    pipeline = Job(config, None, path, device).load()
    captions = all_attributes()[:: options.every]
    folder, results, densities = work_folder(config, path), {}, {}
    for pattern in PATTERNS:
        chosen = with_pattern(config, pattern)
        densities[pattern] = density(pipeline, chosen)
        file = folder / f"{pattern}_{options.every}.jsonl"
        results[pattern] = readings(pipeline, chosen, captions, options.batch, file)
    lines = table(results, step_seconds(pipeline, config, captions[0].caption), densities)
    words = " ".join([options.config, *options.overrides])
    command = f"bash scripts/prompt_accuracy.sh {words} --every {options.every} --batch {options.batch}"
    name = f"prompt_accuracy_{Path(options.config).stem}_{device}_{time.strftime('%Y-%m-%d')}.md"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / name).write_text(report(command, config, lines), encoding="utf-8")
    print("\n".join(lines), f"\nwritten {options.out / name}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; the first word without `=` is the config."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value")
    parser.add_argument("--every", type=positive, default=1, help="take every N-th caption")
    parser.add_argument("--batch", type=positive, default=12, help="videos generated at once")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the table")
    options = parser.parse_args(argv)
    files = [word for word in options.words if "=" not in word]
    options.config = files[0] if files else "configs/wan_tiny.yaml"
    options.overrides = [word for word in options.words if "=" in word]
    return options


if __name__ == "__main__":
    try:
        run(parse())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
