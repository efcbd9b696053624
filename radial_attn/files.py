"""Writes files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

LONGEST = 255  # bytes of a file name


@contextmanager
def whole_file(path: Path, part: Path | None = None) -> Iterator[Path]:
    """Yields a file next to `path`. It replaces `path` if the block ends without an error, else is removed.

    `part`: this file, which the block makes; by default `.NAME.UNIQUE-PID.part`, shortened if necessary.
    """
    if part is None:
        end = f".{uuid4().hex[:8]}-{os.getpid()}.part"
        part = path.with_name(f".{cut_name(path.name, LONGEST - 1 - len(end))}{end}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cut_name(name: str, length: int) -> str:
    """Returns the start of a file name, at most `length` bytes."""
    return os.fsencode(name)[:length].decode(errors="ignore")
