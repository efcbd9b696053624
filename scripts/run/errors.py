"""Defines the errors that a user can put right, and helpers that make their one-line messages."""

import argparse
import difflib
import errno
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NoReturn


class UsageError(ValueError):
    """Reports bad input in one line that names the key, the value and the remedy."""


class DiskFullError(UsageError):
    """Reports that there is no room for the output; no further video can be written either."""


class GenerationError(RuntimeError):
    """Reports a run that started and could not finish: non-finite values, a backend that failed."""


def exit_code(work: Callable[[], int | None], stopped: str, *also: type[Exception]) -> int:
    """Runs a command of one process and returns its exit code; a failure is one line on stderr.

    0, or what `work` returns: done. 2: bad input, a failed run, a file that cannot be written, or an error of
    `also`.
    130: interrupted; the line then ends with `stopped`, which says what remains or how to resume.
    """
    try:
        return work() or 0
    except (UsageError, GenerationError, OSError, *also) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {stopped}", file=sys.stderr)
        return 130


class OneLineParser(argparse.ArgumentParser):
    """Parses arguments; an error is one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def divided(self, arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
        """Returns the one argument without `=`, or the default, and those with it; two are an error."""
        configs = [argument for argument in arguments if "=" not in argument] or [default]
        if len(configs) > 1:
            self.error(f"got {' and '.join(map(repr, configs))}; name one configuration at most")
        return configs[0], [argument for argument in arguments if "=" in argument]


def positive(text: str) -> int:
    """Reads an argument that is a whole number of at least 1; raises ArgumentTypeError for others."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """Reads an argument that is a number above 0; raises ArgumentTypeError for others."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def one_line(error: BaseException) -> str:
    """Returns the first non-empty line of an exception's message, or the exception's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def reason_of(error: BaseException) -> str:
    """Returns what the system says of an OSError, without number and file; else as `one_line`."""
    return getattr(error, "strerror", None) or one_line(error)


def cannot_write(error: OSError, message: str) -> UsageError:
    """Returns the error with this message, which tells by its type whether the disk is full."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (DiskFullError if full else UsageError)(message)


def raised_in(error: BaseException, *modules: str) -> bool:
    """Returns whether the error passed through one of these modules or a module below one."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(f"{name}.".startswith(f"{module}.") for name in names for module in modules)


def nearest_key(unknown: str, known: Iterable[str]) -> str:
    """Returns the known dotted key most like `unknown`, by the last component if the whole matches none."""
    known = list(known)
    leaf = unknown.rsplit(".", 1)[-1]
    same_leaf = [key for key in known if key.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return difflib.get_close_matches(unknown, same_leaf, n=1, cutoff=0.0)[0]
    whole = difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)
    if whole:
        return whole[0]
    score = {key: difflib.SequenceMatcher(None, leaf, key.rsplit(".", 1)[-1]).ratio() for key in known}
    return max(score, key=score.__getitem__)


def multiples_around(value: int, step: int, offset: int = 0) -> tuple[int, int]:
    """Returns the nearest allowed numbers `offset + k * step` below and above `value`, both positive."""
    below = (value - offset) // step * step + offset
    smallest = offset if offset > 0 else step
    return max(below, smallest), max(below + step, smallest)
