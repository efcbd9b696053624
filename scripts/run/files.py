"""Reads text as it was written, writes files whole or not at all, and claims them between processes."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from radial_attn.files import LONGEST, cut_name, whole_file

LEFT = re.compile(r"\.(.*)\.(?:(\w{8})-)?(\d+)\.part(?:\.\w+)?")  # of `temporary`, or of `whole_file`
LOCK = ".lock"
DAY = 24 * 3600
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some network file systems
BYTE_ORDER_MARKS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}


@cache
def machine() -> str:
    """Names this start of this machine, or of this container: here a process number means one process."""
    names = [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("".join(names).encode()).hexdigest()[:8]


def temporary(path: Path, suffix: str = "") -> Path:
    """Returns the name next to `path` of the file that this process writes: `.NAME.MACHINE-PID.part`.

    `suffix`: the end of the name. A name too long for the file system is cut.
    """
    end = f".{machine()}-{os.getpid()}.part{suffix}"
    return path.with_name(f".{cut_name(path.name, LONGEST - 1 - len(end))}{end}")


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yields a file next to `path`. It replaces `path` if the block ends without an error, else is removed.

    `suffix`: the end of its name, for programs that infer the format from it. What a dead process left of the
    same file is removed. An OSError names the file, also one that torch hides in an error of its own.
    """
    part = temporary(path, suffix)
    remove_leftovers(path.parent, cut_name(path.name, LONGEST - 1))
    try:
        with whole_file(path, part):
            yield part
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            reason.filename = reason.filename or str(path)
            raise reason from None
        if "inline_container" in str(error):  # of torch's writer, which does not say more
            raise OSError(errno.EIO, "torch cannot write it; is the disk full?", str(path)) from error
        raise


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files and locks of dead processes from a folder; `name`: only those of this file.

    A video without a record, whose temporary file is there, is half of a pair, and goes too. Files of other
    machines go after a day.
    """
    with suppress(OSError):
        files = [file for file in folder.iterdir() if file.name.startswith(f".{name or ''}")]
        for file in files:
            match = LEFT.fullmatch(file.name)
            if match and (name is None or match[1] == name) and _is_dead(file, match[2], int(match[3])):
                video = file.with_name(match[1]).with_suffix(".mp4")
                if name is None and not video.with_suffix(".json").exists():
                    video.unlink(missing_ok=True)
                file.unlink() if file.is_file() else shutil.rmtree(file, ignore_errors=True)
            elif file.name.endswith(LOCK) and file.name != LOCK and name is None:
                with claim(file.with_name(file.name[1 : -len(LOCK)])):  # removes it, unless it is held
                    pass


def _is_dead(file: Path, of: str | None, number: int) -> bool:
    """Returns whether the process that wrote a temporary file has ended."""
    if of == machine():
        return not Path(f"/proc/{number}").exists()
    return time.time() - file.stat().st_mtime > DAY


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Claims a file that several processes may want to make; yields whether this process has the claim.

    The claim is a lock on `.NAME.lock` next to it. It ends with the block, or with the process, however that
    ends. On a file system without locks every process has the claim.
    """
    file = path.with_name(f".{cut_name(path.name, LONGEST - 1 - len(LOCK))}{LOCK}")
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())
        except OSError as error:
            current, held = True, error.errno not in NO_LOCKS
        else:
            held = False
        if current:
            break
        os.close(descriptor)  # another process removed it between the two calls
    try:
        yield not held
    finally:
        if not held:
            file.unlink(missing_ok=True)
        os.close(descriptor)


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
    return {number: line for number, line in lines.items() if not is_blank(line)}


def is_blank(text: str) -> bool:
    """Returns whether a text shows nothing: spaces, byte order marks, zero-width and control characters."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def write_text(path: Path, text: str) -> Path:
    """Makes the folder and writes the whole file; OSError if that fails, and then no file changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def user_path(name: str | Path) -> Path:
    """Returns a path with `~` expanded; that of an unknown user, which pathlib refuses, stays as it is."""
    return Path(os.path.expanduser(name))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
