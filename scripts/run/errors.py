"""One exception for everything the user can put right, and the one-line texts it carries."""

import argparse
import difflib
import math
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn


class UsageError(ValueError):
    """Bad input: the message is one line that names the key, the value and what is allowed."""


class DiskFullError(UsageError):
    """There is no room for the output: no further video can be written either."""


class GenerationError(RuntimeError):
    """A run that started and could not finish: non-finite values, a backend that failed."""


def exit_code(work: Callable[[], object], stopped: str, *also: type[Exception]) -> int:
    """Carries out a command of one process. 0: done; 130: interrupted, `stopped` says what is left of it.

    2: bad input, a run that failed, a file that cannot be written, or an error of `also`, in one line.
    """
    try:
        work()
    except (UsageError, GenerationError, OSError, *also) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {stopped}", file=sys.stderr)
        return 130
    return 0


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose error is one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def divided(self, words: Iterable[str], default: str) -> tuple[str, list[str]]:
        """The one word without `=`, else the default, and the words `key=value`; an error for two."""
        words = list(words)
        configs = [word for word in words if "=" not in word] or [default]
        if len(configs) > 1:
            self.error(f"one configuration at most, got {' and '.join(map(repr, configs))}")
        return configs[0], [word for word in words if "=" in word]


def positive(text: str) -> int:
    """An argument's whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """An argument's number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def one_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message, or the exception's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def raised_in(error: BaseException, *modules: str) -> bool:
    """Whether the error came up through one of these modules or a module below it."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(f"{name}.".startswith(f"{module}.") for name in names for module in modules)


def nearest_key(unknown: str, known: Iterable[str]) -> str:
    """The known dotted key most like `unknown`; the last component counts when the whole does not match."""
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
    """The nearest allowed numbers `offset + k * step`, both positive, below and above `value`."""
    below = (value - offset) // step * step + offset
    smallest = offset if offset > 0 else step
    return max(below, smallest), max(below + step, smallest)
