"""Digests everything that a cached result depends on."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.run.config import Config
from scripts.run.loras import find_file

RESULTS_VERSION = 1  # raise it when the same configuration gives another video or reading
LARGE = 2**26  # bytes; larger files count by size and time of change


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
