"""A page that offers one tiny random model, whose videos take a second."""

from pathlib import Path
from typing import Any

from scripts.run.config import find_path
from scripts.web.choices import Request
from scripts.web.videos import Studio
from tests.support.plans import TINY

MODEL, FRAMES = "random Wan", 5
CHANGES = {
    "num_frames: 33": f"num_frames: {FRAMES}",
    "steps: 20": "steps: 3",
    "dense_steps: 0": "dense_steps: 1",
}


def make_studio(model: Path, folder: Path) -> Studio:
    """Writes two presets of the model in a folder, static and chosen; returns a studio for its videos."""
    text = find_path(TINY).read_text(encoding="utf-8")
    for before, after in {"assets/wan-tiny": str(model), **CHANGES}.items():
        assert f"{before}\n" in text
        text = text.replace(f"{before}\n", f"{after}\n")
    chosen = "attention:\n  density: 0.8\n  selection: dense_step\n  far_field: linear\n"
    (folder / "tiny.yaml").write_text(text)
    (folder / "tiny_adaptive.yaml").write_text(text.replace("attention:\n", chosen))
    return Studio({MODEL: (str(folder / "tiny"),)}, str(folder / "videos"))


def request(**changes: Any) -> Request:
    """Returns a request that is right, with some changes."""
    values = {"model": MODEL, "frames": FRAMES, "prompt": "a circle", "selection": "static", "density": 0.8}
    return Request(**values | {"seed": 1, "layer": 1, "head": 1} | changes)
