"""Starts several processes on this machine by torchrun: `python -m scripts.launch [arguments of generate]`.

NPROC sets their number; the default is one a GPU, or 2 without a GPU. On several machines NNODES says
how many, NODE_RANK which, MASTER_ADDR the address of the first, MASTER_PORT its port (29500).
`--module=scripts.train_lora` as the first argument trains instead, without a GPU in one process. The first
failure is reported in one line; then all processes are stopped.
"""

import logging
import os
import runpy
import signal
import socket
import sys
import uuid
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scripts.run.command_line import choose_config, parse
from scripts.run.errors import UsageError, one_line
from scripts.run.processes import LAUNCHER, say

WITHOUT_GPU = {"scripts.generate": 2, "scripts.train_lora": 1}  # module -> processes
MODULE = "--module="
SPOKEN = (1, 2, 130)  # exit codes of processes that have reported their failure


def count(module: str = "scripts.generate") -> int:
    """Returns the number of processes to start; UsageError if NPROC is not a number of processes."""
    return number("NPROC", torch.cuda.device_count() or WITHOUT_GPU[module])


def number(name: str, default: int, low: int = 1) -> int:
    """Reads a whole number from the environment; UsageError for other text."""
    text = os.environ.get(name, "") or str(default)
    if not text.isdecimal() or int(text) < low:
        raise UsageError(f"{name}: got {text!r}, must be a whole number of at least {low}")
    return int(text)


def machines() -> dict[str, Any]:
    """Returns how the processes of all machines find each other, as arguments of `LaunchConfig`."""
    nodes = number("NNODES", 1)
    if nodes == 1:
        here = {"min_nodes": 1, "max_nodes": 1, "run_id": uuid.uuid4().hex}
        return here | {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    address, rank = os.environ.get("MASTER_ADDR", ""), number("NODE_RANK", nodes, low=0)
    if not address or rank >= nodes:
        raise UsageError(
            f"NNODES: got {nodes}, so set MASTER_ADDR to the address of the first machine, and NODE_RANK to "
            f"0 on the first, up to {nodes - 1} on the last"
        )
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UsageError(
            f"MASTER_ADDR: got {address!r}, which is no known address; set it to that of the first machine"
        ) from error
    endpoint = f"{address}:{number('MASTER_PORT', 29500)}"
    all_nodes = {"min_nodes": nodes, "max_nodes": nodes, "run_id": "radial", "rdzv_configs": {"rank": rank}}
    return all_nodes | {"rdzv_backend": "static", "rdzv_endpoint": endpoint}


def launch(arguments: list[str], processes: int, module: str = "scripts.generate") -> int:
    """Runs a module in every process and returns the exit code of the first that failed, else 0."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = str(os.getpid())
    options = {"nproc_per_node": processes, "max_restarts": 0, "monitor_interval": 0.1} | machines()
    config = LaunchConfig(**options)
    try:
        elastic_launch(config, sys.executable)("-P", "-m", module, *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode not in SPOKEN:
            say(f"error: rank {rank} {_end(failure.exitcode)}; all are stopped")
        return failure.exitcode if failure.exitcode > 0 else 2
    except (KeyboardInterrupt, SignalException) as stopped:
        signal_number = getattr(stopped, "sigval", signal.SIGINT)
        say(f"stopped by {signal.Signals(signal_number).name}; the files that were written are whole")
        return 128 + signal_number
    except (RuntimeError, OSError, RendezvousError) as error:  # the machines did not find each other
        say(f"error: the processes cannot be started: {one_line(error)}")
        return 2
    return 0


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    hint = " (is the machine out of memory?)" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def chosen(arguments: list[str]) -> list[str]:
    """Adds a configuration with the reason: one process chooses for all, by the memory that it has."""
    command = parse(arguments)
    if command.config_file is not None:
        return arguments
    config_file, overrides, reason = choose_config(command)
    return [config_file, *overrides, f"--reason={reason}", *(["--dry-run"] if command.dry_run else [])]


def main(arguments: list[str]) -> int:
    """Starts the processes and returns their exit code; one process of training, and help, run here."""
    module = "scripts.generate"
    if arguments and arguments[0].startswith(MODULE):
        module = arguments.pop(0).removeprefix(MODULE)
        if module not in WITHOUT_GPU:
            raise UsageError(f"{MODULE}: got {module!r}, allowed: {', '.join(WITHOUT_GPU)}")
    needs_help = "--help" in arguments or "-h" in arguments
    if not needs_help and (module == "scripts.generate" or count(module) > 1):
        return launch(chosen(arguments) if module == "scripts.generate" else arguments, count(module), module)
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
