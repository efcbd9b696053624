"""What a run's JSON says about program, machine and time."""

import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "imageio-ffmpeg")
VERSION = "0.1.0"


class Clock:
    """Seconds of each stage of one video and of each denoising step.

    Text encoding ends at the transformer's first call, denoising at the last step, decoding when the pipeline
    returns.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._mark = time.perf_counter()
        self.steps: list[float] = []
        self.seconds: dict[str, float] = {}

    def first_call(self, *_: Any) -> None:
        """Forward pre-hook of the transformer: closes the text stage once."""
        if "encode_text" not in self.seconds:
            self.seconds["encode_text"] = self.lap()

    def step_done(self) -> None:
        self.steps.append(self.lap())
        self.seconds["denoise"] = round(sum(self.steps), 4)

    def lap(self) -> float:
        """Seconds since the last mark."""
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
    """Waits for the device's work, so that a lap means what it says."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def versions() -> dict[str, str]:
    installed = {name: metadata.version(name) for name in PACKAGES}
    return {
        "radial-attention": VERSION,
        "python": platform.python_version(),
        **installed,
        "torch": torch.__version__,
    }


def hardware(device: str) -> dict[str, Any]:
    """Names and sizes of processor and, where the run is on one, of the GPU."""
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
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory(device: str) -> dict[str, int]:
    """Highest resident memory of the process so far (bytes), and of the GPU since its last reset."""
    peak = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device == "cuda":
        peak["cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def reset_peak(device: str) -> None:
    """Starts the GPU's peak anew; the host's cannot be."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def available_memory(device: str) -> int:
    """Bytes that a run may still take: free GPU memory, or the host's available memory within its limits."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return min([psutil.virtual_memory().available, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """Memory limits of the control group (version 2, version 1), where there are any."""
    limits = []
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(name, encoding="ascii") as stream:
                limits.append(int(stream.read()))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return limits
