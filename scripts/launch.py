"""Starts several processes on this machine by torchrun: `python -m scripts.launch [arguments of generate]`.

NPROC sets their number; the default is one a GPU, or 2 without a GPU. docs/multi-gpu.md has several machines.
`--module=scripts.train_lora` as the first argument trains instead, without a GPU in one process. The first
failure is reported in one line; then all processes are stopped.
"""

import logging
import os
import runpy
import signal
import sys
import uuid

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scripts.run.command_line import choose_config, parse
from scripts.run.errors import UsageError
from scripts.run.processes import say

WITHOUT_GPU = {"scripts.generate": 2, "scripts.train_lora": 1}  # module -> processes
MODULE = "--module="
SPOKEN = (1, 2, 130)  # exit codes of processes that have reported their failure


def count(module: str = "scripts.generate") -> int:
    """Returns the number of processes to start; UsageError if NPROC is not a number of processes."""
    text = os.environ.get("NPROC", "")
    if not text:
        return torch.cuda.device_count() or WITHOUT_GPU[module]
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"NPROC: got {text!r}, must be a whole number of at least 1")
    return int(text)


def launch(arguments: list[str], processes: int, module: str = "scripts.generate") -> int:
    """Runs a module in every process and returns the exit code of the first that failed, else 0."""
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
        elastic_launch(config, sys.executable)("-P", "-m", module, *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode not in SPOKEN:
            say(f"error: rank {rank} {_end(failure.exitcode)}; all are stopped")
        return failure.exitcode if failure.exitcode > 0 else 2
    except (KeyboardInterrupt, SignalException) as stopped:
        number = getattr(stopped, "sigval", signal.SIGINT)
        say(f"stopped by {signal.Signals(number).name}; the files that were written are whole")
        return 128 + number
    return 0


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    hint = " (is the machine out of memory?)" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def chosen(arguments: list[str]) -> list[str]:
    """Adds the name of a configuration: one process chooses for all, by the memory that it has."""
    command = parse(arguments)
    if command.help or command.config_file is not None:
        return arguments
    config_file, overrides, reason = choose_config(command)
    print(f"config: {config_file} ({reason})", flush=True)
    return [config_file, *overrides, *(["--dry-run"] if command.dry_run else [])]


def main(arguments: list[str]) -> int:
    """Starts the processes and returns their exit code; one process of training runs here."""
    if not arguments or not arguments[0].startswith(MODULE):
        return launch(chosen(arguments), count())
    module = arguments.pop(0).removeprefix(MODULE)
    if module not in WITHOUT_GPU:
        raise UsageError(f"{MODULE}: got {module!r}, allowed: {', '.join(WITHOUT_GPU)}")
    if (processes := count(module)) > 1:
        return launch(arguments, processes, module)
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
