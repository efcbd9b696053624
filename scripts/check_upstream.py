"""Runs diffusers' own model tests as they are and through one of our forks at density 1.0, and compares.

    python -m scripts.check_upstream --source DIR [--family NAME] [--own-package] [--out FILE] [-- OPTIONS]

DIR is a source tree of diffusers (the wheel has no tests). Its tests run against the installed diffusers, or
against the package of DIR itself with --own-package. OPTIONS go to pytest. Exit code 1 if any test ends
otherwise with the fork.
"""

import argparse
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from scripts.run.errors import OneLineParser
from scripts.run.files import write_text
from scripts.run.results import OUT, results_file, table
from scripts.run.system import installed, pairs

ROOT = Path(__file__).parent.parent
TESTS = "tests/models/transformers/test_models_transformer_{}.py"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "pytest")
FORK = ("-p", "scripts.check_upstream")  # this file is a pytest plugin too
# no band narrower than the frame, no frame pair left out: every block is kept
DENSITY_ONE = {"decay_factor": 1e6, "block_size": 16, "decimation_width": 1}


class Family(NamedTuple):
    """Holds tests of diffusers, `TESTS` of `tests`, and the class whose models get the fork.

    `forked`: the models under test are of that class; if they are not, the fork must change no test.
    """

    title: str
    tests: str
    model: str
    forked: bool = True

    @property
    def file(self) -> str:
        return TESTS.format(self.tests)


FAMILIES = {
    "wan": Family("Wan", "wan", "WanTransformer3DModel"),
    "wan_vace": Family("Wan-VACE", "wan_vace", "WanVACETransformer3DModel"),
    "skyreels": Family("SkyReels-V2", "skyreels_v2", "SkyReelsV2Transformer3DModel"),
    "chronoedit": Family("ChronoEdit", "chronoedit", "ChronoEditTransformer3DModel"),
    "anyflow": Family("AnyFlow", "anyflow", "AnyFlowTransformer3DModel"),
    "wan_animate": Family("Wan-Animate", "wan_animate", "WanAnimateTransformer3DModel"),
    "mochi": Family("Mochi", "mochi", "MochiTransformer3DModel"),
    "ltx": Family("LTX-Video", "ltx", "LTXVideoTransformer3DModel"),
    "hunyuan_video": Family("HunyuanVideo", "hunyuan_video", "HunyuanVideoTransformer3DModel"),
    "hunyuan_video15": Family("HunyuanVideo 1.5", "hunyuan_1_5", "HunyuanVideo15Transformer3DModel"),
    "kandinsky5": Family("Kandinsky 5.0", "kandinsky5", "Kandinsky5Transformer3DModel"),
    "framepack": Family(
        "FramePack", "hunyuan_video_framepack", "HunyuanVideoTransformer3DModel", forked=False
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs both, prints and writes the table, and returns the exit code."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # the tests alone: next to them, their conftest would put the tree's own package first
        shutil.copytree(options.source / "tests", folder / "tests")
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        package = options.source.resolve() / "src" if options.own_package else None
        family, counts = FAMILIES[options.family], folder / "counts.json"
        fork_options = [*FORK, f"--fork-class={family.model}", f"--fork-counts={counts}"]
        plain = run_tests(folder, "plain", package, [*options.pytest, family.file])
        fork = run_tests(folder, "fork", package, [*fork_options, *options.pytest, family.file])
        forked = json.loads(counts.read_text(encoding="utf-8"))
    differing = sorted(test for test in plain.keys() | fork.keys() if plain.get(test) != fork.get(test))
    text = report(options, plain, fork, forked, differing)
    print(text, f"written to {write_text(options.out, text)}", sep="\n")
    return 1 if differing or not plain or bool(forked["calls"]) != family.forked else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line; exits with code 2 if the source tree has no such tests."""
    parser = OneLineParser(prog="check_upstream", description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="source tree of diffusers")
    parser.add_argument("--family", choices=FAMILIES, default="wan", help="whose tests")
    parser.add_argument(
        "--own-package", action="store_true", help="test the package of that tree, not the installed"
    )
    parser.add_argument("--out", type=Path, help=OUT)
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args(arguments)
    tests = FAMILIES[options.family].file
    if not (options.source / tests).is_file():
        parser.error(f"--source must be a source tree of diffusers with {tests}, got {options.source}")
    options.out = results_file(options.out, "upstream", options.family)
    return options


def run_tests(folder: Path, name: str, package: Path | None, options: list[str]) -> dict[str, str]:
    """Runs the tests once; returns the outcome of each: passed, failed, error or skipped."""
    results = folder / f"{name}.xml"
    path = os.pathsep.join(str(entry) for entry in (package, ROOT) if entry)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
    print(f"{name}: pytest {' '.join(options)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, *options], cwd=folder, env=environment, check=False)
    cases = ElementTree.parse(results).iter("testcase")
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
    """Returns the results page: command, versions, counts, differing tests."""
    kinds, family = ("passed", "failed", "error", "skipped"), FAMILIES[options.family]
    how = "through the fork at density 1.0" if family.forked else "next to the fork of HunyuanVideo"
    second = "fork at density 1.0" if family.forked else "fork of HunyuanVideo at hand"
    counts = {name: Counter(run.values()) for name, run in (("upstream", plain), (second, fork))}
    rows = ([name, *(count[kind] for kind in kinds)] for name, count in counts.items())
    calls = ", ".join(f"{count} {backend}" for backend, count in sorted(forked["calls"].items()))
    file = options.source / "src" / "diffusers" / "__init__.py"
    version = re.match(r'__version__ = "(.*?)"', file.read_text(encoding="utf-8") if file.is_file() else "")
    tested = f"diffusers {version[1]}" if version else "an unknown version"
    package = " --own-package" if options.own_package else ""
    lines = [
        f"# diffusers' model tests for {family.title}, {how}",
        "",
        f"`bash scripts/check_upstream.sh --source DIR --family {options.family}{package}`; tests of "
        f"{tested}, file `{family.file}`.",
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"{pairs(installed(PACKAGES))}.",
        *table(" | ".join(["run", *kinds]), rows),
        "",
        f"The fork was installed in {forked['models']} models; attention calls: {calls or 'none'}.",
        f"Tests that end otherwise with the fork: {', '.join(differing) or 'none'}.",
        "Skipped tests want an accelerator, the network or a quantisation package.",
    ]
    return "\n".join(lines) + "\n"


class Fork:
    """Installs the fork in every model and counts its calls; used by the hooks of pytest below."""

    def __init__(self, counts_file: Path) -> None:
        self.counts_file = counts_file
        self.handles: list[Any] = []

    def patch(self, model_class: type) -> None:
        """Wraps the constructor of a transformer class."""
        from radial_attn import RadialConfig
        from radial_attn.models import apply_radial_attention

        upstream_init = model_class.__init__

        @functools.wraps(upstream_init)
        def init(model: object, *args: object, **kwargs: object) -> None:
            upstream_init(model, *args, **kwargs)
            self.handles.append(apply_radial_attention(model, RadialConfig(**DENSITY_ONE)))

        model_class.__init__ = init

    def pytest_sessionfinish(self) -> None:
        """Writes the counts; a model that ran at another density fails the run."""
        reports = [handle.report() for handle in self.handles]
        densities = {entry["density"] for report in reports for entry in report["grids"]}
        calls = sum((Counter(report["calls"]) for report in reports), Counter())
        self.counts_file.write_text(json.dumps({"models": len(reports), "calls": calls}), encoding="utf-8")
        if densities - {1.0}:
            pytest.exit(f"every model must run at density 1.0, got {sorted(densities)}", returncode=1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --fork-class and --fork-counts."""
    parser.addoption("--fork-class", required=True, help="transformer class of diffusers")
    parser.addoption("--fork-counts", type=Path, required=True, help="file of attention calls by backend")


def pytest_configure(config: pytest.Config) -> None:
    """Patches the class before any test is collected."""
    import diffusers

    fork = Fork(config.getoption("--fork-counts"))
    fork.patch(getattr(diffusers, config.getoption("--fork-class")))
    config.pluginmanager.register(fork)


if __name__ == "__main__":
    sys.exit(main())
