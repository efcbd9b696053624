"""Adapts a command to what it was started in: its terminal or pipe, and bytes on its command line.

It runs before the modules of the command are loaded, so that Ctrl-C then, too, is one line.
"""

import atexit
import os
import sys
from types import TracebackType

from scripts.run.errors import reason_of


def adapt() -> None:
    """Makes this process print any character, report what its surroundings do to it in one line, and exit.

    Characters that stdout and stderr cannot encode are printed as escapes. A closed one is not written to.
    Ends the process with code 2 if an argument is not UTF-8.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
        else:
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = report
    atexit.register(flush)
    for argument in sys.argv:
        if any("\udc80" <= letter <= "\udcff" for letter in argument):  # each stands for a byte
            print(f"error: got {argument!r}, which is not UTF-8; use other characters", file=sys.stderr)
            sys.exit(2)


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an exception that no command catches: one line for Ctrl-C and files, else the traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; nothing was written", file=sys.stderr)
        os._exit(130)
    if issubclass(kind, BrokenPipeError):
        os._exit(1)
    if issubclass(kind, OSError):
        name = f": {error.filename!r}" if error.filename else ""
        print(f"error: {reason_of(error)}{name}", file=sys.stderr)
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


def flush() -> None:
    """Writes what stdout still holds; if nobody can read it, ends with code 1, or with 2 and one line."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(1)
    except OSError as error:
        print(f"error: stdout cannot be written ({error.strerror})", file=sys.stderr)
        os._exit(2)
