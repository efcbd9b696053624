"""Describes the machine of a GPU benchmark, runs the kernel tests, and measures in the child process."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from radial_attn.kernels.triton.configs import launch
from scripts.benchmarks.attention import AttentionBench
from scripts.benchmarks.cases import Task
from scripts.benchmarks.steps import StepBench
from scripts.benchmarks.tuner import candidates, entry, row
from scripts.run.system import hardware, installed, versions

PACKAGES = (
    "triton",
    "flash-attn",
    "flash-attn-4",
    "apache-tvm-ffi",
    "nvidia-cutlass-dsl",
    "flashinfer-python",
    "flashinfer-jit-cache",
    "sageattention",
    "spas-sage-attn",
)
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
NO_NAME = {"nvidia", "amd", "instinct", "geforce", "radeon", "tesla", "quadro", "graphics", "generation"}
NO_NAME |= {"pcie", "nvl", "hbm2", "hbm2e", "hbm3", "hbm3e", "sxm", "sxm2", "sxm3", "sxm4", "sxm5"}
TESTS = ("triton/test_op.py", "flash4/test_op.py", "test_flex.py")  # of the kernels
TEST_PROCESSES = 6
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")


class Session:
    """Measures in the child process. `profile`: whether each call's kernels are listed."""

    def __init__(self, device: str, tiny: bool, profile: bool) -> None:
        self._device, dtype = device, torch.bfloat16 if device == "cuda" else torch.float32
        self._attention, self._steps = AttentionBench(device, dtype, profile), StepBench(device, dtype, tiny)

    def run(self, task: Task) -> dict[str, Any]:
        """Returns the result of one task; frees the tensors of the other kind of task first."""
        if task.kind == "machine":
            if self._device == "cuda" and not torch.cuda.is_available():
                raise ValueError("torch finds no CUDA device here")
            return machine(self._device)
        if task.kind == "step":
            self._attention.forget()
            return self._steps.run(task)
        self._steps.forget()
        if task.kind == "compile":
            return self._measure(task.detail[0], self._attention.compile)
        return self._measure(task, self._attention.run)

    def _measure(self, task: Task, run: Callable[[Task], dict[str, Any]]) -> dict[str, Any]:
        """Runs a task of attention, with the launch configuration that it names."""
        if task.kind != "launch":
            return run(task)
        device, width = torch.device(self._device), task.case.width
        current, *others = candidates(launch("forward", device, width), "forward", width)
        buffered = [x for x in others if x.stages > 1 or current.stages == 1]
        chosen = buffered[task.detail[0] - 1]
        with entry("forward", device, width, chosen):
            return {"launch": row("forward", width, chosen)} | run(task)


def short_name(gpu: str) -> str:
    """Shortens the GPU's name for a file: "NVIDIA H200" becomes "h200"."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    kept = [word for word in words if word not in NO_NAME and not re.fullmatch(r"\d+gb", word)]
    return "-".join(kept) or "gpu"


def smi() -> str:
    """Returns one line of nvidia-smi (`QUERY`), or why there is none."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi here"
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (subprocess.SubprocessError, OSError) as error:
        return f"nvidia-smi failed: {error}".split("\n")[0]
    return text.strip().split("\n")[0]


def machine(device: str) -> dict[str, Any]:
    """Returns hardware and versions, read in the process that measures."""
    about: dict[str, Any] = {"device": device, "versions": versions() | installed(PACKAGES)}
    with suppress(ImportError):  # psutil
        about |= hardware(device)
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(0)),
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "cudnn": torch.backends.cudnn.version(),
        }
    return about


def flashinfer_obstacle() -> str | None:
    """Returns why not to use FlashInfer; None if its kernels are built or come with a package."""
    if find_spec("flashinfer") is None:
        return "needs flashinfer: pip install flashinfer-python"
    if find_spec("flashinfer_jit_cache") is not None:
        return None
    cache = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", Path.home())) / ".cache/flashinfer"
    if next(cache.rglob("*prefill*.so"), None) is not None:
        return None
    return "its kernels are not built, which takes nvcc minutes: --build-flashinfer"


def run_tests(seconds: float) -> dict[str, Any]:
    """Runs the kernel tests that need a GPU, for at most `seconds`; returns counts of their outcomes."""
    if find_spec("pytest") is None:
        return {"note": "needs pytest: pip install pytest"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--noconftest", "-p", "no:cacheprovider"]
    if find_spec("xdist") is not None:
        command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *(f"tests/radial_attn/kernels/{name}" for name in TESTS)],
            cwd=Path(__file__).parents[2],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return read_log(log.read(), code, seconds)


def read_log(text: str, code: int | None, seconds: float) -> dict[str, Any]:
    """Counts the outcomes in pytest's verbose output; names tests that failed, and why it ended early."""
    outcomes = {}
    for line in text.splitlines():
        outcome, test = OUTCOME.search(line), re.search(r"tests/\S+", line)
        if outcome and test:
            outcomes.setdefault(test[0], outcome[1].lower())
    counts = Counter(outcomes.values())
    bad = [test for test, outcome in outcomes.items() if outcome in {"failed", "error"}]
    result: dict[str, Any] = {"counts": dict(counts), "failed": bad[:10], "exit_code": code}
    if code is None:
        result["note"] = f"ended after {seconds:.0f} s"
    elif code not in (0, 1) or counts["error"]:
        reasons = [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")]
        result["note"] = (reasons or text.splitlines() or ["pytest printed nothing"])[-1]
    return result
