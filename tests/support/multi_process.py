"""Several processes of one program that begin as copies of the test's own process, or by torchrun.

A copy has imported everything; torchrun's processes import for seconds what they run for one. torchrun
starts them if there is CUDA, which a copy cannot use.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from scripts.run.config import ROOT


def environment() -> dict[str, str]:
    """Sets one thread for each process, since there are more processes than cores."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(processes: int, module: str, *arguments: object) -> list[str]:
    """Returns the command that starts a module in this many processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launch, "-m", module, *map(str, arguments)]


def run_ranks(processes: int, module: str, *arguments: object, timeout: float = 880) -> None:
    """Runs a module's `main(arguments)` in each process; raises AssertionError with their output."""
    if can_copy():
        _run_copies(partial(import_module(module).main, list(map(str, arguments))), processes, timeout)
        return
    options = {"env": environment(), "timeout": timeout, "capture_output": True, "text": True}
    done = subprocess.run(torchrun(processes, module, *arguments), cwd=ROOT, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]


def can_copy() -> bool:
    """Tells whether a copy of this process can do what this one can."""
    return "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()


def _run_copies(program: Callable[[], object], processes: int, timeout: float) -> None:
    """Sets the rank in each copy's environment, as torchrun names it; a copy succeeds with None or 0."""
    with TemporaryDirectory() as folder, socket.socket() as port:
        port.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port.getsockname()[1])}
        port.close()
        logs = [Path(folder) / str(rank) for rank in range(processes)]
        context = multiprocessing.get_context("fork")
        given = [(program, rank, processes, address, log) for rank, log in enumerate(logs)]
        copies = [context.Process(target=_begin, args=arguments) for arguments in given]
        for copy in copies:
            copy.start()
        _wait(copies, time.monotonic() + timeout)
        logged = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
        assert [copy.exitcode for copy in copies] == [0] * processes, logged


def _wait(copies: list, end: float) -> None:
    """Waits until all have succeeded or one has failed, then ends the rest."""
    while any(copy.is_alive() for copy in copies) and time.monotonic() < end:
        if any(copy.exitcode for copy in copies):
            break
        time.sleep(0.02)
    for copy in copies:
        copy.kill() if copy.is_alive() else None
        copy.join()


def _begin(program: Callable[[], object], rank: int, processes: int, address: dict, log: Path) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update(address, **{name: str(value) for name, value in ranks.items()})
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        torch.set_num_threads(1)
        for state in (AcceleratorState, PartialState, GradientState):  # of a run in the process copied
            state._reset_state()
        code = program()
    sys.exit(code or 0)
