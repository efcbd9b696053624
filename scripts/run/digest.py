"""Digests what a result depends on: weights, LoRAs, configuration."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from radial_attn.models.pipeline.load import is_local
from scripts.run.config import Config
from scripts.run.loras import find_file

RESULTS_VERSION = 1  # raise it when the same configuration gives another video or reading
LARGE = 2**26  # bytes; larger files count by size and time of change
PARTS, PART = 64, 2**14  # how many parts of a file are read, and their bytes
MODEL = (".safetensors", ".json", ".model", ".txt")


def digest(config: Config, path: str, *facts: Any) -> str:
    """Returns the SHA-256 of a resolved configuration, the weights at `path`, the LoRAs and `facts`, as hex.

    The program counts by `RESULTS_VERSION`, not by its source text.
    """
    loras = [find_file("model.loras", entry) for entry in config.model.loras]
    weights = sorted(file for file in Path(path).rglob("*") if file.suffix in (".safetensors", ".json"))
    total = hashlib.sha256(json.dumps([RESULTS_VERSION, asdict(config), facts]).encode())
    for file in [*weights, *loras]:
        about = file.stat()
        large = about.st_size > LARGE
        total.update(f"{about.st_size} {about.st_mtime_ns}".encode() if large else file.read_bytes())
    return total.hexdigest()


def model_digest(path: str) -> str | None:
    """Returns a SHA-256 of the model in a folder, as hex; None for a hub id, whose name tells the model.

    Counts names, sizes and evenly spread parts of its files: training changes all weights, and a model of
    tens of gigabytes takes no time. A copy of the folder is the same model.
    """
    if not is_local(path):
        return None
    total = hashlib.sha256()
    for file in sorted(file for file in Path(path).rglob("*") if file.suffix in MODEL and file.is_file()):
        size = file.stat().st_size
        total.update(os.fsencode(file.relative_to(path)) + f" {size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(PART, size // PARTS)):
                stream.seek(start)
                total.update(stream.read(PART))
    return total.hexdigest()
