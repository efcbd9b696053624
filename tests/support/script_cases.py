"""Arguments that make a run small, and what a run that fails prints."""

from pathlib import Path
from typing import Any

import pytest

from scripts.generate import main
from tests.support.plans import TINY

SHORT = ["generation.steps=2", "generation.num_frames=5"]
SMALL = [
    "model.device=cpu",
    "model.dtype=float32",
    "attention.block_size=16",
    "attention.decimation_width=block",
    "attention.dense_steps=1",
    "generation.height=64",
    "generation.width=64",
    "generation.steps=3",
    "attention.check=reference",
]


def arguments(model: Path, output: Path, *overrides: str) -> list[str]:
    """Returns the arguments of a short run with the model in a folder."""
    return [TINY, f"model.path={model}", f"output.path={output}", *SHORT, *overrides]


def error_lines(capsys: pytest.CaptureFixture) -> list[str]:
    """Returns the lines of errors on stderr, which has nothing else but the progress bar."""
    printed = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert not [line for line in printed if line.strip() and not line.startswith(("error", "denoising"))]
    return [line for line in printed if line.startswith("error")]


def refused(capsys: pytest.CaptureFixture, argv: list[str], *parts: str) -> str:
    """Runs the command, which must fail with one line that has these parts; returns the line."""
    capsys.readouterr()
    assert main(argv) == 2
    (line,) = error_lines(capsys)
    assert line.startswith("error: ") and not [part for part in parts if part not in line], line
    return line


def timeless(data: dict[str, Any]) -> dict[str, Any]:
    """Leaves out of an evaluation's numbers its times, and what else differs between two calls."""
    times = dict.fromkeys(("seconds_step", "seconds_video"))
    settings = [setting | times for setting in data["settings"]]
    return data | {"settings": settings, "command": None, "hardware": None}
