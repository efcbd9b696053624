"""Reads text as it was written, writes files whole or not at all, and tells their content apart."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BYTE_ORDER_MARKS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}


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


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, without its byte order mark, and changes nothing else.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or holds a NUL; the message names the line and the remedy.
    """
    content = path.read_bytes()
    for encoding, marks in BYTE_ORDER_MARKS.items():
        if content.startswith(marks):
            raise ValueError(f"it is {encoding}, save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise ValueError(f"line {line} is not UTF-8 (byte 0x{byte:02x}), save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"line {line} holds a NUL character, so it is no text file")
    return text


def read_lines(path: Path) -> dict[int, str]:
    """Reads the lines of a UTF-8 file that are not blank, by number from 1; a line ends at LF or CRLF.

    Raises:
        OSError, ValueError: as `read_text`, or a carriage return stands inside a line.
    """
    lines = {n: line.removesuffix("\r") for n, line in enumerate(read_text(path).split("\n"), 1)}
    if number := next((number for number, line in lines.items() if "\r" in line), None):
        raise ValueError(f"line {number} holds a carriage return (CR), end lines with LF or CRLF")
    return {number: line for number, line in lines.items() if line.strip()}


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
