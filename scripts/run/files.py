"""Files that are never half written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A file beside `path` that takes its place when the block ends without an error, else it is removed.

    `suffix`: of its name, for programs that go by it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part{suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The whole text or what was there before; OSError where it cannot be written."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
