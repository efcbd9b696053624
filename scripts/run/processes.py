"""Numbers this process among torchrun's, silences all but the first, and ends it so no other must wait."""

import ctypes
import os
import signal
import sys
import time
from datetime import timedelta
from typing import NoReturn

from scripts.run.errors import UsageError, one_line

LOST = ("connection closed", "connection reset", "broken pipe", "timed out", "gloo", "nccl", "process group")
LAUNCHER = "RADIAL_LAUNCHER"  # variable of the environment: the number of the process that starts others
PARENT_DEATH_SIGNAL = 1  # option of prctl
PATIENCE = {"first": 0.0, "other": 2.0, "lost": 10.0}  # seconds before a process reports its failure


def processes() -> int:
    """Returns how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Returns how many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the number of this process among all."""
    return int(os.environ.get("RANK", "0"))


def prepare() -> None:
    """Prepares one of several processes: silences all but the first, and gives each its own GPU."""
    if processes() == 1:
        return
    end_with_parent()
    import torch

    if (local := int(os.environ.get("LOCAL_RANK", "0"))) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    if rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        os.environ["TQDM_DISABLE"] = "1"


def end_with_parent() -> None:
    """Makes the kernel end this process with the one that started it, however that ends."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
        leave(2)  # it ended before the line above


def end_all(error: Exception) -> NoReturn:
    """Ends this process with one line and exit code 2; torchrun stops the others.

    If every rank has the same error, only rank 0 reports it: the others wait, and are stopped before they
    report. A rank that only lost its connection to a failed one waits too.
    """
    text = " ".join(str(error).split()) or one_line(error)
    lost = any(word in text.lower() for word in LOST)
    time.sleep(PATIENCE["lost" if lost else "first" if rank() == 0 else "other"])
    if not first_to_speak():
        leave(2)
    line = f"error: rank {rank()}: {text}"
    if rank() == 0 and isinstance(error, UsageError):  # raised before there is a progress bar
        print(line, file=sys.stderr, flush=True)
    else:
        say(line)
    leave(2)


def first_to_speak() -> bool:
    """Returns whether this process is the first to report a failure, by the store of torchrun's agent.

    Returns True if there is no such store; the waiting in `end_all` must do then.
    """
    if processes() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=5))
        return store.add("radial_attn/told", 1) == 1
    except RuntimeError:  # the agent is gone, and all processes with it
        return rank() == 0


def interrupted(text: str) -> int:
    """Prints `text` and returns the exit code after Ctrl-C; one of several processes just ends silently."""
    if processes() > 1:
        leave(130)
    print(f"interrupted; {text}", file=sys.stderr)
    return 130


def no_reader() -> int:
    """Returns the exit code if nobody reads the output, as in `--help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def say(line: str) -> None:
    """Prints to stderr below a progress bar that another process may have left open."""
    print(f"\n{line}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Ends at once, without the libraries' exit handlers, which wait for processes that may be gone."""
    sys.stdout.flush()
    os._exit(code)
