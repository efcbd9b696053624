"""Which of torchrun's processes this is, what it prints, and how it ends without keeping others waiting."""

import os
import sys
import time
from datetime import timedelta
from typing import NoReturn

from scripts.run.errors import UsageError, one_line

LOST = ("connection closed", "connection reset", "broken pipe", "timed out", "gloo", "nccl", "process group")
PATIENCE = {"first": 0.0, "other": 2.0, "lost": 10.0}  # seconds before a process speaks of its failure


def processes() -> int:
    """How many torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def prepare() -> None:
    """Of several processes only the first prints, since all would say the same, and each has its own GPU."""
    if processes() == 1:
        return
    import torch

    if (local := int(os.environ.get("LOCAL_RANK", "0"))) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    if rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        os.environ["TQDM_DISABLE"] = "1"


def end_all(error: Exception) -> NoReturn:
    """Ends this process with one line and exit code 2; torchrun stops the others.

    What all find at once the first one says: the others wait, and are stopped before they speak. So does one
    that only lost its connection to a process which failed.
    """
    text = " ".join(str(error).split()) or one_line(error)
    lost = any(word in text.lower() for word in LOST)
    time.sleep(PATIENCE["lost" if lost else "first" if rank() == 0 else "other"])
    if not first_to_speak():
        leave(2)
    line = f"error: rank {rank()}: {text}"
    if rank() == 0 and isinstance(error, UsageError):  # found before there is a progress bar
        print(line, file=sys.stderr, flush=True)
    else:
        say(line)
    leave(2)


def first_to_speak() -> bool:
    """Whether no process has told of its failure so far, by the store of torchrun's agent; now one has.

    Where there is no such store, waiting has to do.
    """
    if processes() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        return store.add("radial_attn/told", 1) == 1
    except RuntimeError:  # the agent is gone, and all with it
        return rank() == 0


def interrupted(text: str) -> int:
    """Exit code after Ctrl-C; says `text`, but of several processes each ends at once without a word."""
    if processes() > 1:
        leave(130)
    print(f"interrupted; {text}", file=sys.stderr)
    return 130


def no_reader() -> int:
    """Exit code where nobody reads what is printed, as in `--help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def say(line: str) -> None:
    """Prints to stderr below a progress bar that another process may have left open."""
    print(f"\n{line}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Ends at once, without the libraries' farewells, which wait for processes that may be gone."""
    sys.stdout.flush()
    os._exit(code)
