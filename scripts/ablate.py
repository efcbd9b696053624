"""What each option of the mask does to a bundled model's video: `python -m scripts.ablate`.

`[CONFIG.yaml] [key=value ...] [--only TABLE ...] [--captions N]`. Every value of a table generates the same
captions from the same seeds and is compared with the dense run. All that is made is kept in --work, and a
second call goes on where the first stopped; ablation.json and --out hold the tables of the last call alone.
Exit codes: 0 done; 2 with one line on stderr; 130 interrupted.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from radial_attn.models.runtime.output_check import CheckError
from scripts.evaluation.ablation_attention import looked_at, of_run
from scripts.evaluation.ablation_measure import (
    DENSE,
    Entry,
    Setup,
    compared,
    dense_videos,
    paces,
    program_digest,
    step_seconds,
)
from scripts.evaluation.ablation_report import COLUMNS, NAME, draw, lines
from scripts.evaluation.ablation_runs import TABLES, Run, Table, captions_of, runs_of
from scripts.evaluation.files import head, publish
from scripts.run.checked_job import checked_job
from scripts.run.config import ROOT, read_config
from scripts.run.errors import OneLineParser, UsageError, exit_code, positive
from scripts.run.plan import attention_flops
from scripts.run.schema import shown
from scripts.toyworld import all_attributes
from scripts.toyworld.render import VOCABULARY

NEEDED = {  # what a table varies, hides attention from the observer, or is left out of these videos
    ("attention", "pattern"): "radial",
    ("attention", "density"): None,
    ("model", "compile"): "none",
    ("model", "cache"): "none",
    ("generation", "video"): None,
}


def ablate(setup: Setup, names: Sequence[str]) -> list[dict[str, Any]]:
    """The tables by these names, as the JSON has them."""
    planned = {name: runs_of(TABLES[name], setup.job.config, setup.job.model) for name in names}
    every: dict[Any, Run] = {}
    for runs, _ in planned.values():
        for run in runs:
            every.setdefault(run.identity, run)
    pipeline = setup.job.load()
    dense, entries = dense_videos(setup, pipeline), {}
    for number, (identity, run) in enumerate(every.items(), 1):
        print(f"run        {number} of {len(every)}: density {run.mask.density:.3f}, {run.words}", flush=True)
        entries[identity] = compared(setup, pipeline, run.config)
    file = setup.folder(setup.dense) / f"attention_{setup.rows}.json"
    masks = {run.mask_name: run.config for run in every.values()}
    looked = looked_at(setup, pipeline, masks, file)
    seconds = paces(setup, pipeline, every.values())
    tables = []
    for name, (runs, left_out) in planned.items():
        rows = [
            row(setup, run, entries[run.identity], of_run(run, looked[run.mask_name]), seconds)
            for run in runs
        ]
        same = equal({run.value: entries[run.identity] for run in runs})
        notes = [said(dense, seconds[DENSE]), *same, *left_out]
        tables.append(as_table(TABLES[name], rows, notes))
    return tables


def row(
    setup: Setup, run: Run, entries: list[Entry], attention: dict[str, float], seconds: dict[str, float]
) -> list[Any]:
    """One line of a table, as `COLUMNS`; None where there is no number."""
    dense, kept = attention_flops(run.config, setup.job.model, run.mask.density)
    likeness = [entry["psnr"] for entry in entries if entry["psnr"] is not None]
    return [
        run.value,
        run.mask.density,
        kept / dense,
        mean(likeness) if likeness else None,
        mean(entry["ssim"] for entry in entries),
        attention["recall"],
        attention["mse"],
        attention["relative"],
        accuracy(entries),
        step_seconds(run, seconds),
    ]


def accuracy(entries: list[Entry]) -> float:
    """Percent of the attributes of the captions that the videos show."""
    return 100 * mean(entry[name] for entry in entries for name in VOCABULARY)


def said(dense: list[Entry], seconds: float) -> str:
    """The dense run, in words."""
    return f"dense: {accuracy(dense):.1f} % of the attributes, {seconds:.3f} s a step"


def equal(videos: dict[Any, list[Entry]]) -> list[str]:
    """Which values have how many videos that equal the dense ones, in words; nothing where none has."""
    counts = {value: sum(entry["psnr"] is None for entry in entries) for value, entries in videos.items()}
    found = [f"{value} {count} of {len(videos[value])}" for value, count in counts.items() if count]
    return [f"equal videos, whose PSNR is infinite and not in the mean: {', '.join(found)}"] if found else []


def as_table(table: Table, rows: list[list[Any]], notes: list[str]) -> dict[str, Any]:
    columns = [f"attention.{table.key}", *COLUMNS]
    return {"title": table.title, "note": "; ".join(notes), "columns": columns, "rows": rows}


def prepare(options: argparse.Namespace) -> Setup:
    """The checked configuration; UsageError for one that cannot run."""
    config = read_config(options.config, options.words)
    job = checked_job(config)
    for (group, name), needed in NEEDED.items():
        if (got := getattr(getattr(config, group), name)) != needed:
            raise UsageError(f"{group}.{name}: got {got!r}, allowed here: {shown(needed)}")
    return Setup(
        job=job,
        captions=captions_of(options.captions),
        batch=options.batch,
        rows=options.rows,
        work=options.work,
        program=program_digest(config, job.path),
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: of the words the one without `=` is the config."""
    parser = OneLineParser(prog="scripts/ablate.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value")
    tables = ", ".join(TABLES)
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE", help=tables
    )
    parser.add_argument("--captions", type=positive, default=12, help="generated with each run, up to 180")
    parser.add_argument("--batch", type=positive, default=12, help="videos generated at once")
    parser.add_argument("--rows", type=positive, default=32, help="query rows whose attention is looked at")
    parser.add_argument("--work", type=Path, help="of all that is kept: outputs/ablation/CONFIG")
    parser.add_argument("--out", type=Path, help="of the tables of this call: results/ablation_CONFIG_...md")
    options = parser.parse_args(argv)
    if options.captions > len(all_attributes()):
        parser.error(f"--captions: got {options.captions}, allowed: 1 to {len(all_attributes())}")
    options.config, options.words = parser.divided(options.words, "configs/wan_tiny.yaml")
    stem, kind = Path(options.config).stem, "gpu" if torch.cuda.is_available() else "cpu"
    options.work = options.work or Path("outputs/ablation") / stem
    name = f"ablation_{stem}_{kind}_{time.strftime('%Y-%m-%d')}.md"
    options.out = options.out or ROOT / "results" / name
    return options


def run(options: argparse.Namespace, command: str) -> None:
    """Measures what is missing and writes the tables."""
    setup = prepare(options)
    tables = ablate(setup, [name for name in TABLES if name in options.only])
    data = head("ablation", command, setup.job.device, setup.job.config) | {"tables": tables}
    data |= {"captions": options.captions, "rows": options.rows}
    for file in publish(data, options.work / NAME, options.out, lines, draw):
        print(f"written    {file}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    command = shlex.join(["bash", "scripts/ablate.sh", *(sys.argv[1:] if argv is None else argv)])
    return exit_code(lambda: run(options, command), "the same command goes on", CheckError)


if __name__ == "__main__":
    sys.exit(main())
