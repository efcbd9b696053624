"""Several processes on this machine, by torchrun: `python -m scripts.launch [words of scripts.generate]`.

NPROC says how many; left out, one a GPU, or 2 without any. For several machines see the README.
The first failure is told in one line; then all processes are stopped.
"""

import logging
import os
import signal
import sys
import uuid

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scripts.errors import UsageError

WITHOUT_GPU = 2  # processes
SPOKEN = (1, 2, 130)  # exit codes of processes that have said what was wrong


def count() -> int:
    """Processes to start; UsageError where NPROC is no number of them."""
    text = os.environ.get("NPROC", "")
    if not text:
        return torch.cuda.device_count() or WITHOUT_GPU
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"NPROC: got {text!r}, allowed: a whole number from 1 on")
    return int(text)


def launch(words: list[str], processes: int) -> int:
    """Runs `scripts.generate` in every process and returns the exit code of the first that failed, else 0."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "scripts.generate", *words)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode not in SPOKEN:
            print(f"error: rank {rank} {_end(failure.exitcode)}; all are stopped", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 2
    except KeyboardInterrupt:
        return 130
    return 0


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    hint = " (memory of the machine used up?)" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


if __name__ == "__main__":
    try:
        sys.exit(launch(sys.argv[1:], count()))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
