"""Prompt accuracy of the bundled models: does the video show what the caption says, dense and radial?

`python -m scripts.prompt_accuracy [CONFIG.yaml ...] [key=value ...] [--every N ...] [--batch B] [--out MD]`.
All captions of the toy world (or every N-th), one seed each, read back by `toyworld.read`. Readings are kept
in outputs/prompt_accuracy/ as they come, and a second run goes on where the first stopped. Image to video
starts from the first frame of a scene of the caption, so that only its motion is left to the model.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from models import apply_radial_attention
from models.guard import CheckError
from scripts.architecture import read_architecture
from scripts.config import ROOT, Config, read_config
from scripts.errors import OneLineParser, exit_code, positive
from scripts.files import write_text
from scripts.inputs import NEED_IMAGE
from scripts.loras import find_file
from scripts.plan import attention_options, dense_steps
from scripts.record import hardware, pairs, synchronizer, versions
from scripts.validate import check_sizes, check_values, resolve_device, resolve_model
from scripts.video import Job, sample
from toyworld import all_attributes, random_scene, read, render
from toyworld.render import VOCABULARY, Attributes

PATTERNS = ("dense", "radial")
SOURCES = ("architecture", "combinations", "inputs", "loras", "plan", "positions", "sampling", "video")
TIMED_RUNS, TIMED_STEPS = 3, 4
LARGE = 2**26  # bytes of a file
LEAST_STEPS = 2  # of Mochi, whose noise levels need two


@contextmanager
def attention(pipeline: Any, config: Config) -> Iterator[Any]:
    """The pipeline with the attention of `config`; gives the handle."""
    with apply_radial_attention(pipeline, **attention_options(config)) as handle:
        yield handle


def with_pattern(config: Config, pattern: str) -> Config:
    """The same run with another attention pattern."""
    return replace(config, attention=replace(config.attention, pattern=pattern))


def readings(
    pipeline: Any,
    config: Config,
    captions: list[Attributes],
    batch: int,
    file: Path,
    *,
    judge: Callable[[np.ndarray, Attributes], dict[str, Any]] | None = None,
) -> list[dict]:
    """What is seen in the video of each caption; those in `file` already are not made again.

    `judge` makes the line of the record from frames `[T, H, W, 3]` of 0 .. 1 and the caption's attributes;
    without one it is `reading`.
    """
    judge = judge or reading
    done = json.loads(file.read_text()) if file.exists() else []
    seen = {entry["caption"] for entry in done}
    missing = [(i, a) for i, a in enumerate(captions) if a.caption not in seen]
    name = f"{config.attention.pattern} {config.generation.num_frames} frames"
    batch = 1 if config.model.family in NEED_IMAGE else batch
    with attention(pipeline, config), tqdm(total=len(captions), initial=len(done), desc=name) as bar:
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            seeds = [config.generation.seed + i for i, _ in part]
            given = first_frame(config, part[0][1], seeds[0])
            videos = sample(pipeline, config, [a.caption for _, a in part], seeds, **given)
            done += [judge(video, a) for video, (_, a) in zip(videos, part, strict=True)]
            write_text(file, json.dumps(done))
            bar.update(len(part))
    return done


def first_frame(config: Config, attributes: Attributes, seed: int) -> dict[str, Any]:
    """The image that image to video starts from: that of a random scene; nothing for other families."""
    if config.model.family not in NEED_IMAGE:
        return {}
    sizes, scene = config.generation, random_scene(attributes, torch.Generator().manual_seed(seed))
    frame = render(scene, 1, sizes.height, sizes.width)[0]
    return {"image": Image.fromarray((frame * 255).round().byte().numpy())}


def reading(video: Any, attributes: Attributes) -> dict[str, Any]:
    """One line of the record: the caption and which attributes are right."""
    return {"caption": attributes.caption, **read(torch.from_numpy(video)).matches(attributes)}


def step_seconds(pipeline: Any, config: Config, attributes: Attributes) -> dict[str, float]:
    """Mean seconds of a denoising step of one video, dense and radial taking turns."""
    runs = {pattern: (pipeline, with_pattern(config, pattern)) for pattern in PATTERNS}
    return whole_run_seconds(runs, attributes)


def whole_run_seconds(runs: Mapping[str, tuple[Any, Config]], attributes: Attributes) -> dict[str, float]:
    """Mean seconds of a step of each whole run, by name: its dense steps and the others are timed apart."""
    timed: dict[tuple[str, bool], tuple[Any, Config]] = {}
    for name, (pipeline, config) in runs.items():
        timed[name, False] = pipeline, without_warm_up(config)
        if dense_steps(config) and config.attention.pattern != "dense":
            timed[name, True] = pipeline, with_pattern(config, "dense")
    found = seconds_in_turn(timed, attributes)
    return {
        name: mean_step(config, found.get((name, True), found[name, False]), found[name, False])
        for name, (_, config) in runs.items()
    }


def without_warm_up(config: Config) -> Config:
    """The same run without steps whose attention is dense in every layer."""
    return replace(config, attention=replace(config.attention, dense_steps=0, dense_last_steps=0))


def mean_step(config: Config, dense: float, sparse: float) -> float:
    """Mean seconds of a step of a whole run, from those of a dense step and of one that is not."""
    steps, count = config.generation.steps, len(dense_steps(config))
    return (count * dense + (steps - count) * sparse) / steps


def seconds_in_turn(runs: Mapping[Any, tuple[Any, Config]], attributes: Attributes) -> dict[Any, float]:
    """Median seconds of a denoising step of one video of each run, by name, the runs taking turns.

    Of the first steps: a run with dense steps among them is to be timed as two (`whole_run_seconds`).
    """
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(TIMED_RUNS):
        for name, (pipeline, config) in runs.items():
            marks: list[float] = []
            short = replace(config, generation=replace(config.generation, steps=TIMED_STEPS))
            with attention(pipeline, short):
                given = first_frame(config, attributes, 0) | {"callback_on_step_end": stopwatch(marks)}
                sample(pipeline, short, [attributes.caption], [0], output_type="latent", **given)
            seconds[name] += [after - before for before, after in pairwise(marks)]
    return {name: median(values) for name, values in seconds.items()}


def stopwatch(marks: list[float]) -> Any:
    """A pipeline callback that notes the time at the end of every step."""

    def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        synchronizer(pipeline.device.type)()
        marks.append(time.perf_counter())
        return {}

    return step_done


def density(pipeline: Any, config: Config) -> float:
    """Density of the mask that this configuration uses."""
    with attention(pipeline, config) as handle:
        short = replace(config, generation=replace(config.generation, steps=LEAST_STEPS))
        first = all_attributes()[0]
        sample(pipeline, short, [first.caption], [0], output_type="latent", **first_frame(config, first, 0))
        return handle.report()["density"]


def row(config: Config, entries: list[dict], density: float, seconds: float) -> str:
    """One line of the table, percentages."""
    shares = [mean(entry[name] for entry in entries) for name in VOCABULARY]
    whole = mean(all(entry[name] for name in VOCABULARY) for entry in entries)
    percent = [f"{100 * share:.1f}" for share in (*shares, mean(shares), whole)]
    model, frames = Path(config.model.path).name, str(config.generation.num_frames)
    first = [model, frames, config.attention.pattern, f"{density:.3f}"]
    return "| " + " | ".join([*first, *percent, str(len(entries)), f"{seconds:.3f}"]) + " |"


def describe(config: Config) -> str:
    """The settings of one configuration, as a list item."""
    sizes = config.generation
    numbers = f"guidance {sizes.guidance_scale}, shift {sizes.flow_shift}, seeds from {sizes.seed}"
    options = ", ".join(f"{k} {v}" for k, v in asdict(config.attention).items() if k != "pattern")
    return f"- {config.model.path}, {sizes.num_frames} frames: {sizes.steps} steps, {numbers}; {options}"


def report(command: str, configs: list[Config], rows: list[str], device: str) -> str:
    """The results file: command, table, settings, machine."""
    head = ["model", "frames", "attention", "density", *VOCABULARY, "attributes", "whole captions"]
    head += ["captions", "s a step"]
    machine = pairs(versions(), hardware(device))
    settings = [
        describe(config) + "".join(f", LoRA {x.path}" for x in config.model.loras) for config in configs
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
        "where a run has dense steps, the mean of both by their number. Image to video starts from the first "
        "frame of a scene of the caption, one video at a time.",
        "",
        *settings,
        "",
        machine,
        "",
    ]
    return "\n".join(text)


def work_folder(config: Config, path: str) -> Path:
    """Where the readings of this very configuration, program and weights are kept."""
    folder = ROOT / "outputs" / "prompt_accuracy" / digest(config, path)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(config: Config, path: str) -> str:
    """Of a configuration, the program, the model at `path` and the LoRAs: what a reading follows from."""
    sources = [file for name in ("radial_attn", "models", "toyworld") for file in (ROOT / name).rglob("*.py")]
    sources += [Path(__file__), *(ROOT / "scripts" / f"{name}.py" for name in SOURCES)]
    loras = [find_file("model.loras", entry) for entry in config.model.loras]
    model = [file for file in Path(path).rglob("*") if file.suffix in (".safetensors", ".json")]
    total = hashlib.sha256(json.dumps(asdict(config)).encode())
    for file in [*sorted(sources), *sorted(model), *loras]:
        about = file.stat()
        large = about.st_size > LARGE  # tens of gigabytes are known by size and time of change
        total.update(f"{about.st_size} {about.st_mtime_ns}".encode() if large else file.read_bytes())
    return total.hexdigest()


def measure(config: Config, device: str, path: str, every: int, batch: int) -> list[str]:
    """The rows of one configuration."""
    pipeline = Job(config, read_architecture(path), path, device).load()
    captions, folder = all_attributes()[::every], work_folder(config, path)
    seconds, rows = step_seconds(pipeline, config, captions[0]), []
    for pattern in PATTERNS:
        chosen = with_pattern(config, pattern)
        entries = readings(pipeline, chosen, captions, batch, folder / f"{pattern}_{every}.json")
        rows.append(row(chosen, entries, density(pipeline, chosen), seconds[pattern]))
        print(rows[-1], flush=True)
    return rows


def run(options: argparse.Namespace) -> None:
    """Measures all configurations and writes the table."""
    configs = [read_config(name, options.overrides) for name in options.configs]
    places = []
    for config in configs:
        check_values(config)
        places.append((resolve_device(config), resolve_model(config)))
        check_sizes(config, read_architecture(places[-1][1]))
    plan = zip(configs, places, options.every, strict=True)
    rows = [line for config, place, every in plan for line in measure(config, *place, every, options.batch)]
    words = [*options.configs, *options.overrides, "--every", *map(str, options.every)]
    command = " ".join(["bash scripts/prompt_accuracy.sh", *words, "--batch", str(options.batch)])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report(command, configs, rows, places[0][0]), encoding="utf-8")
    print(f"written {options.out}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: words without `=` are configs."""
    parser = OneLineParser(prog="scripts/prompt_accuracy.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value")
    parser.add_argument(
        "--every", type=positive, nargs="+", default=[1], help="every N-th caption, by config"
    )
    parser.add_argument("--batch", type=positive, default=12, help="videos generated at once")
    name = f"prompt_accuracy_{'gpu' if torch.cuda.is_available() else 'cpu'}_{time.strftime('%Y-%m-%d')}.md"
    parser.add_argument("--out", type=Path, default=ROOT / "results" / name, help="file of the table")
    options = parser.parse_args(argv)
    options.configs = [word for word in options.words if "=" not in word] or ["configs/wan_tiny.yaml"]
    options.overrides = [word for word in options.words if "=" in word]
    if len(options.every) == 1:
        options.every *= len(options.configs)
    if len(options.every) != len(options.configs):
        parser.error(f"--every: got {len(options.every)} numbers, allowed: 1 or {len(options.configs)}")
    return options


if __name__ == "__main__":
    options = parse()
    sys.exit(exit_code(lambda: run(options), "the same command goes on", CheckError))
