"""Measures what each option of the mask does to a bundled model's video: `python -m scripts.ablate`.

`[CONFIG.yaml] [key=value ...] [--only TABLE ...] [--captions N]`. The tables are lists of values in
configs/ablation. Each value generates the same captions from the same seeds and is compared with the dense
run. Results are kept in --work, and the same command resumes; ablation.json and --out hold the tables of the
last call alone. Exit codes: 0 done; 2 with one line on stderr; 130 interrupted.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from radial_attn.models.runtime.output_check import CheckError
from scripts.evaluation.ablation import (
    DENSE,
    TABLES,
    Ablation,
    Entry,
    Run,
    attention_of,
    captions_of,
    read_table,
    runs_of,
)
from scripts.evaluation.ablation_report import COLUMNS, draw, lines
from scripts.run.config import read_one_seed
from scripts.run.errors import OneLineParser, UsageError, exit_code, positive
from scripts.run.plan import make_plan
from scripts.run.results import OUT, head, publish, results_file
from scripts.run.schema import shown
from scripts.toyworld import all_attributes
from scripts.toyworld.accuracy import mean_step
from scripts.toyworld.render import VOCABULARY

NEEDED = {  # keys that a table varies, that hide attention from the observer, or that these videos lack
    ("attention", "pattern"): "radial",
    ("attention", "density"): None,
    ("attention", "compat"): "none",
    ("model", "compile"): "none",
    ("model", "cache"): "none",
    ("generation", "video"): None,
}


def ablate(ablation: Ablation, names: Sequence[str]) -> list[dict[str, Any]]:
    """Measures the tables by these names; returns them as the JSON has them."""
    tables = {name: read_table(name) for name in names}
    planned = {name: runs_of(table, ablation.plan) for name, table in tables.items()}
    every: dict[Any, tuple[str, Run]] = {}
    for name, (runs, _) in planned.items():
        for run in runs:
            every.setdefault(run.identity, (f"{tables[name]['key']}={shown(run.value)}", run))
    dense, entries = ablation.videos(ablation.dense), {}
    for number, (identity, (option, run)) in enumerate(every.items(), 1):
        density = run.plan.block_mask.density
        print(f"run        {number} of {len(every)}: {option}, density {density:.3f}", flush=True)
        entries[identity] = ablation.videos(run.plan.config)
    measured = [run for _, run in every.values()]
    attention, seconds = ablation.attention(measured), ablation.seconds(measured)
    before = f"dense: {accuracy(dense):.1f} % of the attributes, {seconds[DENSE]:.3f} s a step"
    return [
        {
            "title": tables[name]["title"],
            "note": "; ".join([before, *equal(runs, entries), *left_out]),
            "columns": [tables[name]["key"], *COLUMNS],
            "rows": [row(run, entries[run.identity], attention[run.mask_name], seconds) for run in runs],
        }
        for name, (runs, left_out) in planned.items()
    ]


def row(run: Run, entries: list[Entry], attention: dict[str, Any], seconds: dict[str, float]) -> list[Any]:
    """Returns one line of a table, in the order of `COLUMNS`; None if there is no number."""
    flops, config = run.plan.flops, run.plan.config
    near = [entry["psnr"] for entry in entries if entry["psnr"] is not None]
    return [
        run.value,
        run.plan.block_mask.density,
        flops.sparse / flops.dense,
        mean(near) if near else None,
        mean(entry["ssim"] for entry in entries),
        *attention_of(run, attention).values(),
        accuracy(entries),
        mean_step(config, seconds[DENSE], seconds[run.pace]),
    ]


def accuracy(entries: list[Entry]) -> float:
    """Returns the percentage of the captions' attributes that the videos show."""
    return 100 * mean(entry[name] for entry in entries for name in VOCABULARY)


def equal(runs: Sequence[Run], entries: dict[Any, list[Entry]]) -> list[str]:
    """Says how many videos of which values equal the dense ones; empty if none does."""
    psnr = {run.value: [entry["psnr"] for entry in entries[run.identity]] for run in runs}
    counts = [f"{value} {of.count(None)} of {len(of)}" for value, of in psnr.items() if None in of]
    start = "equal videos, whose PSNR is infinite and not in the mean: "
    return [start + ", ".join(counts)] if counts else []


def prepare(options: argparse.Namespace) -> Ablation:
    """Plans the configuration; UsageError for one that cannot run."""
    plan = make_plan(read_one_seed(options.config, options.words))
    for (group, name), needed in NEEDED.items():
        if (got := getattr(getattr(plan.config, group), name)) != needed:
            raise UsageError(f"{group}.{name}: got {got!r}, must be {shown(needed)} here")
    return Ablation(plan, captions_of(options.captions), options.batch, options.rows, options.work)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line: the one word without `=` is the configuration."""
    parser = OneLineParser(prog="scripts/ablate.sh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value")
    parser.add_argument(
        "--only", nargs="+", choices=TABLES, default=TABLES, metavar="TABLE", help=", ".join(TABLES)
    )
    parser.add_argument("--captions", type=positive, default=12, help="captions of each run, up to 180")
    parser.add_argument("--batch", type=positive, default=12, help="videos generated at once")
    parser.add_argument("--rows", type=positive, default=32, help="query rows whose attention is observed")
    parser.add_argument("--work", type=Path, help="folder of results (outputs/ablation/CONFIG)")
    parser.add_argument("--out", type=Path, help=OUT)
    options = parser.parse_args(argv)
    if options.captions > len(all_attributes()):
        parser.error(f"--captions: got {options.captions}, must be 1 to {len(all_attributes())}")
    options.config, options.words = parser.divided(options.words, "configs/wan_tiny.yaml")
    stem = Path(options.config).stem
    options.work = options.work or Path("outputs/ablation") / stem
    options.out = results_file(options.out, "ablation", stem)
    return options


def run(options: argparse.Namespace, command: str) -> None:
    """Measures what is missing and writes the tables."""
    ablation = prepare(options)
    tables = ablate(ablation, [name for name in TABLES if name in options.only])
    data = head("ablation", command, ablation.plan.device, ablation.plan.config) | {"tables": tables}
    data |= {"captions": options.captions, "rows": options.rows}
    publish(data, options.work, options.out, lines, draw)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    command = shlex.join(["bash", "scripts/ablate.sh", *(sys.argv[1:] if argv is None else argv)])
    return exit_code(lambda: run(options, command), "run the same command to resume", CheckError)


if __name__ == "__main__":
    sys.exit(main())
