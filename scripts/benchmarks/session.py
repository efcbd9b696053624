"""The child of the GPU benchmark: one object that makes every measurement."""

from dataclasses import dataclass
from typing import Any

import torch

from scripts.benchmarks.attention import AttentionBench
from scripts.benchmarks.cases import Task
from scripts.benchmarks.machine import machine


@dataclass(frozen=True)
class Settings:
    """`device`: "cuda" or "cpu"; `profile`: whether each call's kernels are listed."""

    device: str
    tiny: bool = False
    profile: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


class Session:
    """What the child runs tasks on. Raises RuntimeError where there is no such device."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._attention: AttentionBench | None = None
        self._steps: Any = None

    def run(self, task: Task) -> dict[str, Any]:
        """The result of one task; tensors of the other kind of task are let go first."""
        if task.kind == "machine":
            return self._machine()
        return self._steps_bench().run(task) if task.kind == "step" else self._attention_bench().run(task)

    def _machine(self) -> dict[str, Any]:
        if self._settings.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device here")
        return machine(self._settings.device)

    def _attention_bench(self) -> AttentionBench:
        if self._steps is not None:
            self._steps.forget()
        if self._attention is None:
            chosen = self._settings
            self._attention = AttentionBench(chosen.device, chosen.dtype, chosen.profile)
        return self._attention

    def _steps_bench(self) -> Any:
        from scripts.benchmarks.steps import StepBench

        if self._attention is not None:
            self._attention.forget()
        if self._steps is None:
            self._steps = StepBench(self._settings.device, self._settings.dtype, self._settings.tiny)
        return self._steps
