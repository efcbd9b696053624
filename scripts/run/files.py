"""Writes files whole or not at all, and tells their content apart."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yields a file next to `path`. It replaces `path` if the block ends without an error, else is removed.

    `suffix`: the end of its name, for programs that infer the format from it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part{suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Makes the folder and writes the whole file; OSError if that fails, and then no file changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
