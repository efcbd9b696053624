"""Writes files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

LONGEST = 255  # bytes of a file name


@contextmanager
def whole_file(path: Path, part: Path | None = None) -> Iterator[Path]:
    """Yields the path of a temporary file next to `path`, for the caller to write.

    At the end the file replaces `path`; after an error it is removed instead. `part` names it; by default it
    is `.NAME.UNIQUE-PID.part`, shortened if necessary.
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
