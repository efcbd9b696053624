"""Reads program versions, machine, memory and time for a run's JSON."""

import os
import platform
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from radial_attn import __version__

PACKAGES = ("torch", "diffusers", "transformers", "imageio-ffmpeg")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # limit, use, and the entry of memory.stat that can be dropped: version 2, version 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


class Clock:
    """Measures the seconds of each stage of one video and of each denoising step.

    Text encoding ends at the transformer's first call, denoising at the last step, decoding when the pipeline
    returns, or when the transformer is called for the next segment.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._mark = time.perf_counter()
        self.steps: list[float] = []
        self.seconds: dict[str, float] = {}
        self._denoising = False

    def call(self, *_: Any) -> None:
        """Ends the stage before the first call of a segment; a forward pre-hook of the transformer."""
        if not self._denoising:
            self._denoising = True
            self.end("decode" if self.steps else "encode_text")

    def step_done(self, last: bool) -> None:
        """Ends a step; `last`: of a segment."""
        self._denoising = not last
        self.steps.append(self.lap())
        self.seconds["denoise"] = round(sum(self.steps), 4)

    def end(self, stage: str) -> None:
        """Adds the seconds since the last mark to a stage."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + self.lap(), 4)

    def leave_out(self, seconds: float) -> None:
        """Excludes time that was spent on something else from the current lap."""
        self._mark += seconds

    def lap(self) -> float:
        """Returns the seconds since the last mark, and sets a new one."""
        self._synchronize()
        before, self._mark = self._mark, time.perf_counter()
        return round(self._mark - before, 4)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the block's seconds to `seconds` as `stage`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(time.perf_counter() - start, 4)


def synchronizer(device: str) -> Callable[[], None]:
    """Returns a function that waits for the device's work, so a lap contains all of it."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def versions() -> dict[str, str]:
    """Returns the versions of this project, of Python and of the packages that a video depends on."""
    return {
        "radial-attention": __version__,
        "python": platform.python_version(),
        **installed(PACKAGES),
        "torch": torch.__version__,
    }


def pairs(*groups: Mapping[str, Any]) -> str:
    """Writes all entries as `name value` in one line."""
    return ", ".join(f"{name} {value}" for group in groups for name, value in group.items())


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Returns the version of each package, or "absent"."""
    distributions = {name: next(iter(metadata.distributions(name=name)), None) for name in packages}
    return {name: "absent" if package is None else package.version for name, package in distributions.items()}


def hardware(device: str) -> dict[str, Any]:
    """Returns names and sizes of the processor and, if the run is on one, the GPU."""
    import psutil

    about = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        about |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory}
    return about


def _cpu_name() -> str:
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as stream:
        return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    return platform.processor() or platform.machine()


def peak_memory(device: str) -> dict[str, int]:
    """Returns the peak bytes of the process's resident memory so far, and of the GPU since its last reset."""
    peak = {"host_bytes": _host_peak()}
    if device == "cuda":
        peak["cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def _host_peak() -> int:
    """Returns VmHWM of /proc, which restarts with a program; else ru_maxrss, which a child inherits."""
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="utf-8") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def room(device: str) -> int:
    """Returns the bytes that a run of this process may take in all: free bytes and those that it holds."""
    return available_memory(device) + own_memory(device)


def available_memory(device: str) -> int:
    """Returns the free bytes of the GPU, or of the host within the limits of its control group."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return max(0, min([psutil.virtual_memory().available, *cgroup_free(CGROUPS)]))


def total_memory(device: str) -> int:
    """Returns all bytes of the GPU, or of the host."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    import psutil

    return psutil.virtual_memory().total


def own_memory(device: str) -> int:
    """Returns the bytes of this process: reserved by torch on the GPU, or host memory that no file backs."""
    if device == "cuda":
        return torch.cuda.memory_reserved()
    import psutil

    held = psutil.Process().memory_info()
    return held.rss - held.shared


def cgroup_free(root: Path) -> list[int]:
    """Returns the bytes that the memory limits of the control group at `root` leave; empty if it has none."""
    free = []
    for limit, use, droppable in CGROUP_FILES:
        try:
            left = int((root / limit).read_text()) - int((root / use).read_text())
            stat = (root / use).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
        free.append(left + sum(int(line.split()[1]) for line in stat if line.split()[0] == droppable))
    return free
