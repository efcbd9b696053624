"""Writes one page of the measurements of runs: `python -m scripts.report RUN ... [--out FILE.html]`.

A RUN is the output folder, or a JSON file in it, of evaluate, analyse_attention, cost or ablate, or a folder
of generated videos with their JSON. The page contains everything that it shows and needs no network.
Exit codes: 0 done; 2 bad input, one line on stderr says which; 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

from scripts.evaluation.page.clips import MIB, find_clips, packed
from scripts.evaluation.page.render import render
from scripts.evaluation.page.run_files import find_runs
from scripts.run.errors import OneLineParser, UsageError, exit_code, positive, reason_of
from scripts.run.files import write_text


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = OneLineParser(prog="scripts/report.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="an output folder or a JSON file of a run"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/report.html"), help="the page to write")
    parser.add_argument("--videos", type=positive, default=8, help="prompts and seeds whose videos are shown")
    parser.add_argument("--amplify", type=positive, default=4, help="brightness of the difference")
    parser.add_argument("--limit", type=positive, default=200, help="maximum MiB of videos in the page")
    options = parser.parse_args(argv)
    if options.out.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--out: got {options.out}, must be a name ending in .html")
    if options.out.is_dir():
        parser.error(f"--out: got {options.out}, which is a folder; name a file")
    return options


def write(options: argparse.Namespace) -> None:
    """Builds the page and writes it whole or not at all."""
    runs = find_runs(options.runs)
    clips = find_clips(runs)
    page = render(runs, clips, packed(clips[: options.videos], options.limit), options.amplify)
    try:
        write_text(options.out, page)
    except OSError as error:
        raise UsageError(f"--out: cannot write {options.out} ({reason_of(error)})") from error
    print(f"{options.out}: {options.out.stat().st_size / MIB:.1f} MiB, open it in a browser")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    return exit_code(lambda: write(options), "no page was written")


if __name__ == "__main__":
    sys.exit(main())
