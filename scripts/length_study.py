"""Length extension on the bundled Wan: `python -m scripts.length_study [--only RUN ...] [key=value ...]`.

Renders videos of four times the trained length and prepares them, trains an adapter for each run that has
one, generates the same captions from the same seeds with each run, and scores the videos. Keys are those of
generation and of LoRA training. Results are kept in --work, and the same command resumes. Exit codes: 0 done;
2 stopped, one line on stderr says why; 130 interrupted.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from radial_attn.models.runtime.output_check import CheckError
from scripts.length.report import write
from scripts.length.runs import PRESET, ROWS, Result, Study, captions_of, title
from scripts.lora.checkpoint import read_log
from scripts.lora.config import SCHEMA as TRAINING
from scripts.lora.plan import plan_training
from scripts.lora.prepare import prepare_latents
from scripts.lora.setup import prepared
from scripts.lora.train import train
from scripts.lora.validation import validate
from scripts.run.config import Config, keys, read_config
from scripts.run.digest import digest
from scripts.run.errors import OneLineParser, UsageError, exit_code, positive
from scripts.run.outputs import encode
from scripts.run.plan import RunPlan, make_plan
from scripts.run.results import OUT, results_file
from scripts.run.sampler import Sampler, to_bytes
from scripts.toyworld import all_attributes
from scripts.toyworld.accuracy import readings, whole_run_seconds
from scripts.toyworld.render import Attributes
from scripts.toyworld.scores import Record, record
from scripts.toyworld.videos import render_videos

READINGS, SHOWN = "readings.json", "shown.mp4"
SET_BY_RUNS = {f"data.{name}" for name in ("folder", "table", "latents", "sizes")}
SET_BY_RUNS |= {f"model.{name}" for name in ("positions", "loras", "lora_mode")}
SET_BY_RUNS |= {"attention.pattern", "output.path", "generation.prompt", "generation.prompt_file"}


def study(options: Study, names: list[str]) -> dict[str, Result]:
    """Makes the runs one after another: data, training, videos; times their steps in turn at the end."""
    for name in names:
        check(options.config(name))
    if data := any(ROWS[name].tuned for name in names):
        make_data(options)
    captions, made, plans, pipelines = captions_of(options.captions), {}, {}, {}
    for name in names:
        print(f"run        {name}: {title(options.config(name), name)}", flush=True)
        if ROWS[name].tuned:
            with prepared(plan_training(options.training_config(name))) as (run, checkpoints):
                train(run, checkpoints)
        plans[name] = plan = make_plan(options.config(name))
        pipelines[name], folder = Sampler(plan).load(), work_folder(options, plan)
        entries = made_and_read(pipelines[name], plan.config, captions, options.batch, folder)
        made[name] = entries, folder / SHOWN, plan.block_mask.density
    losses = {name: held_out_loss(options, name) for name in names} if data else {}
    runs = {name: (pipelines[name], plan.config) for name, plan in plans.items()}
    seconds = whole_run_seconds(runs, captions[0])
    trained = {name: training_seconds(options, name) for name in names if ROWS[name].tuned}
    return {
        name: Result(plan.config, *made[name], losses.get(name), trained.get(name), seconds[name])
        for name, plan in plans.items()
    }


def check(config: Config) -> None:
    """Raises UsageError for a configuration that a run does not take, before its adapter exists."""
    if config.model.positions_frames is None:
        raise UsageError("model.positions_frames: got None, must be the number of frames of the training")
    if config.model.cache != "none":  # the time of a step would leave out what is skipped
        raise UsageError(f"model.cache: got {config.model.cache!r}, allowed here: none")
    make_plan(replace(config, model=replace(config.model, loras=[])))


def make_data(options: Study) -> None:
    """Renders the videos that are missing, and prepares the latents that are missing."""
    sizes = options.config("dense").generation
    if sizes.height != sizes.width:
        raise UsageError(f"generation.width: got {sizes.width}, must be generation.height ({sizes.height})")
    render_videos(options.clips, options.videos, frames=sizes.num_frames, size=sizes.height)
    prepare_latents(options.training_config("dense"))


def made_and_read(
    pipeline: Any, config: Config, captions: list[Attributes], batch: int, folder: Path
) -> list[Record]:
    """Returns a record for each caption, in their order; keeps the video of the first caption."""

    def judge(video: np.ndarray, attributes: Attributes) -> Record:
        if attributes == captions[0]:
            encode(folder / SHOWN, to_bytes(video), config.output.fps)
        return record(torch.from_numpy(video), attributes, config.model.positions_frames)

    records = readings(pipeline, config, captions, batch, folder / READINGS, judge=judge)
    by_caption = {entry["caption"]: entry for entry in records}
    return [by_caption[attributes.caption] for attributes in captions]


def work_folder(options: Study, plan: RunPlan) -> Path:
    """Makes the folder for the readings of this configuration, adapter and weights."""
    folder = options.work / "readings" / digest(plan.config, plan.path)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def held_out_loss(options: Study, name: str) -> float | None:
    """Returns the trainer's loss on videos held out, at the end of the training or without one.

    Returns None for a run of another length than these videos, and if none are held out.
    """
    config = options.training_config(name)
    if not ROWS[name].longer or not config.validation.every:
        return None
    if ROWS[name].tuned:
        return [entry["validation_loss"] for entry in logged(options, name) if "validation_loss" in entry][-1]
    with TemporaryDirectory() as folder:
        config.output.path, config.validation.videos = folder, 0
        with prepared(plan_training(config)) as (run, _):
            return validate(run, Path(folder), 0)["validation_loss"]


def logged(options: Study, name: str) -> list[dict[str, Any]]:
    """Returns the trainer's log of a run: an entry a step."""
    return read_log(options.work / name)


def training_seconds(options: Study, name: str) -> float:
    """Returns the median seconds of a training step, without the first, which sets up."""
    steps = [entry["seconds"] for entry in logged(options, name)]
    return median(steps[1:] or steps)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line into `study`, the runs `only` and the file `out`."""
    parser = OneLineParser(prog="scripts/length_study.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="key=value", help="of generation, LoRA training, or both")
    parser.add_argument(
        "--videos", type=positive, default=180, help="to train on (180 is every caption once)"
    )
    parser.add_argument("--steps", type=positive, help="of each training; the default is the preset's")
    parser.add_argument("--captions", type=positive, default=60, help="generated with each run, up to 180")
    parser.add_argument("--batch", type=positive, default=4, help="videos generated at once")
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="RUN", help=f"{', '.join(ROWS)}"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/length_study"), help="folder of all that is made"
    )
    parser.add_argument("--out", type=Path, help=OUT)
    options = parser.parse_args(argv)
    options.out = results_file(options.out, "length_extension")
    if options.captions > len(all_attributes()):
        parser.error(f"--captions: got {options.captions}, must be 1 to {len(all_attributes())}")
    try:
        generation, training = divided(options.words)
    except UsageError as error:
        parser.error(str(error))
    training += [] if options.steps is None else [f"train.steps={options.steps}"]
    counts = options.videos, options.captions, options.batch
    options.study = Study(options.work, *counts, training_words=training, generation_words=generation)
    return options


def divided(words: list[str]) -> tuple[list[str], ...]:
    """Divides overrides into those of generation and of training; keys that both have go to both.

    Raises UsageError for a word without `=`, an unknown key, and a key that each run sets for itself.
    """
    kinds = keys(), TRAINING.keys()
    for word in words:
        name, equals, _ = word.partition("=")
        if not equals:
            raise UsageError(f"got {word!r}, must be key=value; options begin with --, see --help")
        if name in SET_BY_RUNS:
            raise UsageError(f"got {word!r}, which each run sets for itself; use other keys")
        if not any(name in kind for kind in kinds):
            read_config(PRESET, [word])  # names the nearest key
    return tuple([word for word in words if word.partition("=")[0] in kind] for kind in kinds)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    command = " ".join(["bash scripts/length_study.sh", *(sys.argv[1:] if argv is None else argv)])

    def work() -> None:
        results = study(options.study, [name for name in ROWS if name in options.only])
        for file in write(options.out, command, options.study, results):
            print(f"written    {file}")

    return exit_code(work, "run the same command to resume", CheckError)


if __name__ == "__main__":
    sys.exit(main())
