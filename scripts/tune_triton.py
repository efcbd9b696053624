"""Times launch configurations of the Triton kernels on this GPU; prints the best rows for the launch table.

    python -m scripts.tune_triton [--minutes 5] [--kinds forward ...] [--width 128] [--out outputs/tune.json]
    python -m scripts.tune_triton --dry-run [--arch sm90]      lists the candidates, on any machine

The current entry comes first, then what differs least from the best so far. Each candidate runs in a child
process on a fresh mask (Wan2.1, 69 frames) and must be right. One that does not compile, needs too much
shared memory or hangs is skipped with a line. Backward kernels are timed as the whole backward.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from radial_attn.kernels.triton.configs import KINDS, LAUNCHES
from scripts.benchmarks.cases import CASES, shrink
from scripts.benchmarks.machine import short_name
from scripts.benchmarks.tuner import Setting, TuneSession, plans, row, tune
from scripts.benchmarks.worker import Worker
from scripts.run.errors import OneLineParser, positive, positive_number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 for a wrong option or no GPU."""
    parser = OneLineParser(prog="python -m scripts.tune_triton", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=positive_number, default=5.0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--width", type=int, choices=(64, 128), default=128, help="of a head")
    parser.add_argument("--heads", type=positive, default=8)
    parser.add_argument("--out", type=Path, help="JSON (default: outputs/tune_<gpu>.json)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted, tiny")
    parser.add_argument("--dry-run", action="store_true", help="only lists the candidates")
    parser.add_argument("--arch", choices=LAUNCHES, default="sm90", help="of --dry-run")
    options = parser.parse_args(argv)
    if options.dry_run:
        for kind, listed in plans(options.kinds, options.arch, options.width).items():
            print(*(row(kind, options.width, each) for each in listed), sep="\n")
        return 0
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no CUDA device here; --dry-run lists the candidates", file=sys.stderr)
        return 2
    case = replace(CASES["wan-69"], heads=options.heads)
    case = case if device == "cuda" else shrink(case)
    name = short_name(torch.cuda.get_device_name()) if device == "cuda" else "interpreted"
    out = options.out or Path("outputs") / f"tune_{name}.json"
    setting = Setting(device, case, options.width)
    worker = Worker(TuneSession, setting)
    try:
        tune(worker, options.kinds, setting, 60 * options.minutes, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
