"""Digests what a result depends on: weights, LoRAs, configuration."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from radial_attn.models.pipeline.load import is_local
from radial_attn.models.runtime.transformers import NAMES
from scripts.run.config import Config, find_path
from scripts.run.loras import find_file

RESULTS_VERSION = 1  # raise it when the same configuration gives another video or reading
LARGE = 2**26  # bytes; larger files count by size and time of change
PARTS, PART = 64, 2**14  # how many parts of a file are read, and their bytes
MODEL = (".safetensors", ".json", ".model", ".txt")


def digest(config: Config, path: str, *facts: Any) -> str:
    """Returns the SHA-256 of a resolved configuration, the weights, the LoRAs and `facts`, as hex.

    The program counts by `RESULTS_VERSION`, not by its source text.
    """
    others = [find_file("model.loras", entry) for entry in config.model.loras]
    others += [find_path(file) for name in NAMES if (file := getattr(config.model, name)) is not None]
    weights = sorted(file for file in Path(path).rglob("*") if file.suffix in (".safetensors", ".json"))
    total = hashlib.sha256(json.dumps([RESULTS_VERSION, asdict(config), facts]).encode())
    for file in [*weights, *others]:
        about = file.stat()
        large = about.st_size > LARGE
        total.update(f"{about.st_size} {about.st_mtime_ns}".encode() if large else file.read_bytes())
    return total.hexdigest()


def model_digest(path: str, files: Mapping[str, Path] | None = None) -> str | None:
    """Returns a SHA-256 of the model in a folder, as hex; None for a hub id, whose name tells the model.

    Counts names, sizes and evenly spread parts of its files: training changes all weights, and a model of
    tens of gigabytes takes no time. A copy of the folder is the same model.

    Args:
        files: those that hold the weights of a transformer, by its name; their own names do not count.
    """
    if not is_local(path) and not files:
        return None
    total = hashlib.sha256()
    inside = Path(path).rglob("*") if is_local(path) else ()
    for file in sorted(file for file in inside if file.suffix in MODEL and file.is_file()):
        total.update(os.fsencode(file.relative_to(path)) + b" ")
        _add_parts(total, file)
    for name, file in (files or {}).items():
        total.update(f"{name} ".encode())
        _add_parts(total, file)
    return total.hexdigest()


def file_digest(file: Path) -> str:
    """Returns a SHA-256 of size and evenly spread parts of a file, as hex."""
    total = hashlib.sha256()
    _add_parts(total, file)
    return total.hexdigest()


def _add_parts(total: Any, file: Path) -> None:
    """Adds size and evenly spread parts of a file to a digest."""
    size = file.stat().st_size
    total.update(f"{size} ".encode())
    with file.open("rb") as stream:
        for start in range(0, size, max(PART, size // PARTS)):
            stream.seek(start)
            total.update(stream.read(PART))
