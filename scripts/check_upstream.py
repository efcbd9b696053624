"""Runs diffusers' own model tests for Wan as they are and through this fork at density 1.0, and compares.

    python -m scripts.check_upstream --source DIR [--own-package] [--out FILE] [-- PYTEST OPTIONS]

DIR is a source tree of diffusers (the wheel has no tests). Its tests run against the installed diffusers, or
against the package of DIR itself with --own-package. Exit code 1 if any test ends otherwise with the fork.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from scripts.errors import OneLineParser
from scripts.record import installed

ROOT = Path(__file__).parent.parent
TESTS = "tests/models/transformers/test_models_transformer_wan.py"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pytest")
FORK = ("-p", "scripts.upstream_plugin")


def main(arguments: list[str] | None = None) -> int:
    """Runs both, prints and writes the table, returns the exit code."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tests(options.source, folder)
        package = options.source.resolve() / "src" if options.own_package else None
        plain = run_tests(folder, "plain", package, options.pytest)
        counts = folder / "counts.json"
        fork = run_tests(folder, "fork", package, [*FORK, f"--fork-counts={counts}", *options.pytest])
        forked = json.loads(counts.read_text(encoding="utf-8"))
    differing = sorted(test for test in plain.keys() | fork.keys() if plain.get(test) != fork.get(test))
    text = report(options, plain, fork, forked, differing)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(text, f"written to {options.out}", sep="\n")
    return 1 if differing or not plain or not forked["calls"] else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 where the source tree has no such tests."""
    parser = OneLineParser(prog="check_upstream", description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="source tree of diffusers")
    parser.add_argument(
        "--own-package", action="store_true", help="test the package of that tree, not the installed"
    )
    parser.add_argument("--out", type=Path, default=default_out(), help="results file")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args(arguments)
    if not (options.source / TESTS).is_file():
        parser.error(f"--source must be a source tree of diffusers with {TESTS}, got {options.source}")
    return options


def default_out() -> Path:
    """results/upstream_wan_<hardware>_<date>.md"""
    import torch

    hardware = torch.cuda.get_device_name().split()[-1].lower() if torch.cuda.is_available() else "cpu"
    return ROOT / "results" / f"upstream_wan_{hardware}_{datetime.date.today().isoformat()}.md"


def copy_tests(source: Path, folder: Path) -> None:
    """Copies the tests alone: beside them, their conftest would put the tree's own package first."""
    shutil.copytree(source / "tests", folder / "tests")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")


def run_tests(folder: Path, name: str, package: Path | None, options: list[str]) -> dict[str, str]:
    """Outcome of each test of one run: passed, failed, error or skipped."""
    results = folder / f"{name}.xml"
    path = os.pathsep.join(str(entry) for entry in (package, ROOT) if entry)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={results}",
        *options,
        TESTS,
    ]
    print(f"{name}: pytest {' '.join([*options, TESTS])}", flush=True)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=False)
    return outcomes(results)


def outcomes(file: Path) -> dict[str, str]:
    """Reads a JUnit file."""
    cases = ElementTree.parse(file).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
    return next((kinds[child.tag] for child in case if child.tag in kinds), "passed")


def report(
    options: argparse.Namespace,
    plain: dict[str, str],
    fork: dict[str, str],
    forked: dict,
    differing: list[str],
) -> str:
    """The results page: command, versions, counts, differing tests."""
    kinds = ("passed", "failed", "error", "skipped")
    counts = {
        name: Counter(run.values()) for name, run in (("upstream", plain), ("fork at density 1.0", fork))
    }
    rows = [
        f"| {name} | {' | '.join(str(count[kind]) for kind in kinds)} |" for name, count in counts.items()
    ]
    calls = ", ".join(f"{count} {backend}" for backend, count in sorted(forked["calls"].items()))
    versions = ", ".join(f"{name} {found}" for name, found in installed(PACKAGES).items())
    own = " --own-package" if options.own_package else ""
    return "\n".join(
        [
            "# diffusers' model tests for Wan, through the fork at density 1.0",
            "",
            f"`bash scripts/check_upstream.sh --source DIR{own}`; tests of {source_version(options.source)}, "
            f"file `{TESTS}`.",
            f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}.",
            "",
            f"| run | {' | '.join(kinds)} |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"The fork was installed in {forked['models']} models; attention calls: {calls}.",
            f"Tests that end otherwise with the fork: {', '.join(differing) or 'none'}.",
            "Skipped tests want an accelerator, the network or a quantisation package.",
            "",
        ]
    )


def source_version(source: Path) -> str:
    """What the tree says of itself."""
    file = source / "src" / "diffusers" / "__init__.py"
    first = file.read_text(encoding="utf-8").split("\n")[0] if file.is_file() else ""
    return f"diffusers {first.split(chr(34))[1]}" if first.startswith("__version__") else "an unknown version"


if __name__ == "__main__":
    sys.exit(main())
