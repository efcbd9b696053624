"""pytest plugin of check_upstream: every model of one class made in the run gets the fork at density 1.0.

`pytest -p scripts.upstream_plugin --fork-class CLASS --fork-counts FILE ...` patches the class, a transformer
of diffusers, for this run only, and writes the attention calls by backend as JSON at its end.
"""

import functools
import json
from collections import Counter
from pathlib import Path

import pytest

from models import RadialAttentionHandle, apply_radial_attention
from radial_attn import RadialConfig

# no band narrower than the frame, no frame pair left out: every block is kept
DENSITY_ONE = RadialConfig(decay_factor=1e6, block_size=16, decimation_width=1)


class Fork:
    """Installs the fork in every model and adds up what it did."""

    def __init__(self, counts_file: Path) -> None:
        self.counts_file = counts_file
        self.handles: list[RadialAttentionHandle] = []

    def patch(self, model_class: type) -> None:
        """Wraps the constructor of a transformer class."""
        upstream_init = model_class.__init__

        @functools.wraps(upstream_init)
        def init(model: object, *args: object, **kwargs: object) -> None:
            upstream_init(model, *args, **kwargs)
            self.handles.append(apply_radial_attention(model, DENSITY_ONE))

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
    parser.addoption(
        "--fork-counts", type=Path, required=True, help="file for the attention calls by backend"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Patches the class before any test is collected."""
    import diffusers

    fork = Fork(config.getoption("--fork-counts"))
    fork.patch(getattr(diffusers, config.getoption("--fork-class")))
    config.pluginmanager.register(fork)
