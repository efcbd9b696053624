"""Compares sparse videos with dense ones: `bash scripts/evaluate.sh [CONFIG.yaml] [key=value ...]`.

It runs the same prompts and seeds with dense attention and with each setting of `evaluate.compare`, and
reports PSNR, SSIM, LPIPS, recall and output error of the attention, seconds, operations, density. With
--folders it compares finished videos with those of the first folder. Results are kept in --work, and the same
command resumes. Exit codes: 0 done; 2 stopped, one line on stderr says why; 130 interrupted.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from radial_attn.masks.draw import save_figure
from scripts.evaluation import folders
from scripts.evaluation.metrics import no_lpips
from scripts.evaluation.settings import (
    DENSE,
    SCHEMA,
    SCORES,
    EvaluationConfig,
    NamedWords,
    observed_steps,
    plain,
    settings_of,
)
from scripts.evaluation.tables import content, draw, markdown, planned, points, table
from scripts.evaluation.vbench import listed_prompts, place, read_scores, video_name
from scripts.evaluation.videos import Evaluation, Take, make_missing
from scripts.run.config import Config
from scripts.run.errors import OneLineParser, UsageError, exit_code
from scripts.run.files import write_text
from scripts.run.inputs import read_prompts
from scripts.run.plan import RunPlan, make_plan
from scripts.run.processes import processes
from scripts.run.prompt_notes import prompt_notes
from scripts.run.results import OUT, head, results_file, write_json

PRESET = "configs/wan_tiny.yaml"
DRAWN = 3  # settings from which on there is a picture
SCORE_WORD = f"{SCORES}="


def evaluate(options: argparse.Namespace, command: str) -> None:
    """Makes what is missing, measures it and writes evaluation.json and the table."""
    if processes() > 1:
        raise UsageError(f"got {processes()} processes, but the evaluation needs one; run without torchrun")
    config, settings = settings_of(options.config, options.words)
    configs = {name: setting for name, (_, setting) in settings.items()}
    evaluation = examined(config, configs, options.work, dry_run=options.dry_run)
    scores = read_all(config.evaluate.scores, list(settings))
    if options.dry_run:
        rows = [planned(evaluation, name) for name in settings]
        print(*table({"settings": rows, "means": {}})[1:], sep="\n")
        return
    plan, texts = evaluation.plans[DENSE], {f"prompt {take.number}": take.prompt for take in evaluation.takes}
    for note in prompt_notes(plan.path, plan.config.model.family, texts):
        print(f"note: {note}", flush=True)
    if no_lpips():
        print(f"note: {no_lpips()}", flush=True)
    make_missing(evaluation)
    if config.evaluate.vbench != "off":
        name_for_vbench(evaluation)
    device = evaluation.plans[DENSE].device
    results = content(evaluation, {name: words for name, (words, _) in settings.items()})
    data = head("evaluation", command, device, plain(config)) | results | {"scores": scores}
    curves = points(data)
    picture = options.out.with_suffix(".png") if sum(map(len, curves.values())) >= DRAWN else None
    publish(data, options, markdown(data, evaluation, picture and picture.name))
    if picture is not None:
        save_figure(draw(curves), picture)
        print(f"written    {picture}")


def score_folders(options: argparse.Namespace, command: str) -> None:
    """Writes the same files for finished videos, with all that can be measured on them."""
    named = SCHEMA.read(PRESET, options.words).evaluate.scores
    scores = read_all(named, [word.partition("=")[0] for word in options.folders])
    data = head("evaluation", command, "cpu") | folders.scored(options.folders, options.work)
    data["scores"] = scores
    publish(data, options, markdown(data, None))


def examined(
    config: EvaluationConfig, settings: dict[str, Config], work: Path, *, dry_run: bool = False
) -> Evaluation:
    """Plans the evaluation; UsageError for all that can be refused without weights."""
    plans: dict[str, RunPlan] = {}
    for name, setting in settings.items():
        try:
            plans[name] = make_plan(setting, dry_run=dry_run)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    steps = observed_steps(config)
    masks = {
        name: plan.mask
        for name, plan in plans.items()
        if name != DENSE and plan.config.attention.selection == "static"
    }
    if config.evaluate.rows and config.model.compile != "none":
        raise UsageError(
            f"model.compile: got {config.model.compile!r}, but a compiled model shows no attention; set "
            "model.compile=none or evaluate.rows=0"
        )
    return Evaluation(work, plans, takes_of(config), masks, config.evaluate.rows, steps)


def takes_of(config: EvaluationConfig) -> list[Take]:
    """Lists every prompt with every seed; UsageError for prompts that cannot be read or named."""
    wanted = config.evaluate
    if wanted.prompts is None:
        prompts = read_prompts(config.generation)
    else:
        prompts = dict(enumerate(listed_prompts(wanted.prompts, wanted.dimensions), 1))
    seeds = wanted.seeds or config.generation.all_seeds
    numbered = list(enumerate(seeds))
    takes = [Take(text, seed, number, i) for number, text in prompts.items() for i, seed in numbered]
    if wanted.vbench != "off":
        for take in takes:
            video_name(take.prompt, take.index)
    return takes


def read_all(entries: list[NamedWords], names: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Reads the scores by setting; UsageError for a name that is no setting, and for files without scores."""
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for entry in entries:
        if entry.name not in names or not entry.words:
            raise UsageError(
                f"evaluate.scores: got '{entry.name}: {' '.join(entry.words)}', must be a setting and its "
                f"files; settings: {', '.join(names)}"
            )
        for file in entry.words:
            for judge, values in read_scores(file).items():
                scores.setdefault(entry.name, {}).setdefault(judge, {}).update(values)
    return scores


def name_for_vbench(evaluation: Evaluation) -> None:
    """Fills the folder `vbench` of `--work` with these videos and no others, under VBench's names."""
    for name in evaluation.plans:
        folder = evaluation.work / "vbench" / name
        for video in folder.glob("*.mp4"):
            video.unlink()
        for take in evaluation.takes:
            place(evaluation.path(name, take), folder, video_name(take.prompt, take.index))


def publish(data: dict[str, Any], options: argparse.Namespace, text: str) -> None:
    """Writes the JSON and the table, and prints the table."""
    print(*table(data)[1:], sep="\n")
    print(f"written    {write_json(options.work / 'evaluation.json', data)}")
    print(f"written    {write_text(options.out, text)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line: `config`, `words`, and the options."""
    parser = OneLineParser(
        prog="scripts/evaluate.sh",
        description=__doc__.splitlines()[0],
        epilog="\n".join(line for line in SCHEMA.help_lines() if "evaluate." in line),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("given", nargs="*", metavar="CONFIG.yaml key=value")
    parser.add_argument(
        "--folders", nargs="+", metavar="NAME=DIR", help="finished videos; the first is the reference"
    )
    parser.add_argument("--work", type=Path, help="folder of videos and results (outputs/evaluation/CONFIG)")
    parser.add_argument("--out", type=Path, help=OUT)
    parser.add_argument("--dry-run", action="store_true", help="print only densities and operations")
    options = parser.parse_intermixed_args(argv)
    options.config, options.words = parser.divided(options.given, PRESET)
    if options.folders:
        words = [*options.given, *options.folders]
        options.folders = [word for word in words if not word.startswith(SCORE_WORD)]
        options.words = [word for word in words if word.startswith(SCORE_WORD)]
    kind = "folders" if options.folders else Path(options.config).stem
    options.work = options.work or Path("outputs") / "evaluation" / kind
    options.out = results_file(options.out, "evaluation", kind)
    if options.work.is_file():
        parser.error(f"--work: got {str(options.work)!r}, which is a file; name a folder")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    command = f"bash scripts/evaluate.sh {shlex.join(sys.argv[1:] if argv is None else argv)}".rstrip()
    work = score_folders if options.folders else evaluate
    return exit_code(lambda: work(options, command), "run the same command to resume")


if __name__ == "__main__":
    sys.exit(main())
