"""Decides which denoising steps and layers are dense, and to which step a call of a transformer belongs."""

import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from radial_attn.masks.radial import is_share

DENSE_STEPS_FORM = (
    "a number of first steps, a share such as 20%, sigma>0.9, or a list of steps from 0 such as [0, 1, 10]"
)
DENSITY_FORM = "a number above 0 up to 1, or {start: 0.4, end: 0.15}"
LEVELS = 8  # most densities of a run, because each has masks of its own


class AboveSigma(float):
    """Marks a noise level, from 0 to 1: all steps above it are dense."""

    def __str__(self) -> str:
        return f"sigma>{float(self):g}"


DenseSteps = int | float | AboveSigma | tuple[int, ...]


def read_dense_steps(value: Any) -> DenseSteps:
    """Reads which steps are dense.

    Args:
        value: a number of first steps; a share of the steps in (0, 1), also as "20%"; "sigma>0.9"; a list of
            step numbers from 0; or any of these as text.

    Raises:
        ValueError: another form, or a number that is out of range or there twice.
    """
    refusal = ValueError(f"dense_steps must be {DENSE_STEPS_FORM}, got {value!r}")
    text = value.replace(" ", "") if isinstance(value, str) else ""
    try:
        if text.startswith("sigma>"):
            value = AboveSigma(text.removeprefix("sigma>"))
        elif text.endswith("%"):
            value = float(text.removesuffix("%")) / 100
        elif text[:1] + text[-1:] == "[]":
            value = [int(part) for part in text[1:-1].split(",")]
        elif text:
            value = float(text) if "." in text else int(text)
    except ValueError:
        raise refusal from None
    if isinstance(value, AboveSigma):
        good = 0 <= value < 1
    elif isinstance(value, float):
        good = 0 < value < 1
    elif isinstance(value, list | tuple):
        value = [int(step) if isinstance(step, str) and step.isdecimal() else step for step in value]
        good = bool(value) and all(_counts(step) for step in value) and len(set(value)) == len(value)
        value = tuple(sorted(value)) if good else value
    else:
        good = _counts(value)
    if not good:
        raise refusal
    return value


def read_density(value: Any) -> float | tuple[float, float] | None:
    """Reads a density: a number in (0, 1], `{"start": ..., "end": ...}`, that as text, or None.

    Raises ValueError for anything else.
    """
    refusal = ValueError(f"density must be {DENSITY_FORM}, got {value!r}")
    if isinstance(value, str):
        parts = value.strip(" {}").split(",")
        try:
            pairs = dict(part.split(":") for part in parts) if ":" in value else {}
            value = {name.strip(" \"'"): float(number) for name, number in pairs.items()} or float(value)
        except ValueError:
            raise refusal from None
    if value is None:
        return None
    if isinstance(value, Mapping):
        with suppress(ValueError):
            value = {name: float(x) if isinstance(x, str) else x for name, x in value.items()}
        if set(value) != {"start", "end"} or not all(is_share(number) for number in value.values()):
            raise refusal
        return float(value["start"]), float(value["end"])
    if not is_share(value):
        raise refusal
    return float(value)


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Schedule:
    """Decides which denoising steps and layers are dense, and the density of the others.

    Layers `0 .. dense_layers - 1` are dense at every step, `dense_steps` and the last `dense_last_steps` in
    every layer. `read_dense_steps` has the forms of `dense_steps`; a share is of the steps of each run,
    rounded to the nearest step, and a sigma is the noise level at the start of a step. With a `density_range`
    the density goes evenly from its first number, at the first sparse step, to its second, at the last, in at
    most `LEVELS` values. `num_steps`: denoising steps of a video, if no pipeline knows them.

    Raises:
        ValueError: a value of another form, or a count that is not a whole number of at least 0.
    """

    dense_steps: Any = 0
    dense_layers: int = 0
    dense_last_steps: int = 0
    num_steps: int | None = None
    density_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_steps", read_dense_steps(self.dense_steps))
        for name in ("dense_layers", "dense_last_steps", "num_steps"):
            value = getattr(self, name)
            if not _counts(value) and not (name == "num_steps" and value is None):
                raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")

    def is_dense(self, step: int, planned_steps: int | None, sigmas: Sequence[float] | None = None) -> bool:
        """Returns whether `step` (from 0) is dense in every layer.

        Args:
            planned_steps: steps of the scheduler, used if `num_steps` is None.
            sigmas: noise level of each step, 1 for noise.

        Raises:
            ValueError: the schedule depends on the number of steps or the noise levels, and they are not
                known.
        """
        chosen = self._is_chosen(step, planned_steps, sigmas)
        if chosen or self.dense_last_steps == 0:
            return chosen
        return step >= self._total("dense_last_steps", planned_steps) - self.dense_last_steps

    def _is_chosen(self, step: int, planned_steps: int | None, sigmas: Sequence[float] | None) -> bool:
        if isinstance(self.dense_steps, AboveSigma):
            if sigmas is None:
                raise ValueError(
                    f"dense_steps={str(self.dense_steps)!r} needs the noise levels of a scheduler; give a "
                    "number of steps or a share"
                )
            return step < len(sigmas) and sigmas[step] > self.dense_steps
        if isinstance(self.dense_steps, tuple):
            return step in self.dense_steps
        return step < self.leading_steps(planned_steps)

    def precedes_sparse(
        self, step: int, planned_steps: int | None, sigmas: Sequence[float] | None = None
    ) -> bool:
        """Returns whether a step follows that is not dense; arguments and errors as in `is_dense`."""
        total = self.num_steps or planned_steps
        return (total is None or step + 1 < total) and not self.is_dense(step + 1, planned_steps, sigmas)

    def leading_steps(self, planned_steps: int | None) -> int:
        """Returns how many steps at the start are dense, for a number or a share of them."""
        if isinstance(self.dense_steps, int):
            return self.dense_steps
        return round(self.dense_steps * self._total("dense_steps", planned_steps))

    def densities(self, planned_steps: int | None, sigmas: Sequence[float] | None = None) -> dict[int, float]:
        """Returns the density of each sparse step, if there is a range; errors as in `is_dense`.

        A step that is dense because an expert begins counts as sparse here.
        """
        if self.density_range is None:
            return {}
        total = self._total("density_range", planned_steps)
        levels = None if sigmas is None else tuple(sigmas)
        return _densities(self, type(self.dense_steps), total, levels)

    def check_run(self, planned_steps: int | None, sigmas: Sequence[float] | None = None) -> None:
        """Raises ValueError for more dense steps than a run has; warns if that leaves no radial step.

        Nothing is checked if the number of steps is not known.
        """
        total = self.num_steps or planned_steps
        if total is None:
            return
        for name in ("dense_steps", "dense_last_steps"):
            got = getattr(self, name)
            if isinstance(got, int) and got > total:
                raise ValueError(
                    f"{name} must be at most {total}, the steps of this run, got {got}; lower it, or give "
                    "dense_steps as a share such as 0.24"
                )
            if isinstance(got, tuple) and got[-1] >= total:
                raise ValueError(
                    f"dense_steps must be 0 to {total - 1}, the steps of this run, got {got[-1]}"
                )
        if all(self.is_dense(step, planned_steps, sigmas) for step in range(total)):
            logging.getLogger("radial_attn").warning(
                "all %d steps of this run are dense: dense_steps=%s, dense_last_steps=%s",
                *(total, self.dense_steps, self.dense_last_steps),
            )

    def _total(self, option: str, planned_steps: int | None) -> int:
        """Returns the steps of a video; raises ValueError, which names the option, if they are not known."""
        total = self.num_steps or planned_steps
        if total is None:
            raise ValueError(
                f"{option}={getattr(self, option)} needs the number of steps, got num_steps=None: give "
                "num_steps, or a pipeline whose scheduler.set_timesteps was called"
            )
        return total


@lru_cache(maxsize=64)
def _densities(
    schedule: Schedule, _kind: type, total: int, sigmas: tuple[float, ...] | None
) -> dict[int, float]:
    """Computes `Schedule.densities`; `_kind` of dense steps tells a share from an equal noise level."""
    start, end = schedule.density_range
    sparse = [step for step in range(total) if not schedule.is_dense(step, total, sigmas)]
    last, most = max(1, len(sparse) - 1), min(LEVELS, len(sparse)) - 1
    level = [round(number / last * most) / max(1, most) for number in range(len(sparse))]
    return {step: start + (end - start) * x for step, x in zip(sparse, level, strict=True)}


class StepCounter:
    """Finds the denoising step of a transformer call from its timestep.

    With a pipeline, the step is the index of the timestep in `pipeline.scheduler.timesteps`, and a new tensor
    there (every video calls `set_timesteps`) begins a new video. Without a pipeline, or if the timestep is
    not in that list, an equal timestep is the same step (the other guidance half), a lower one the next step,
    and a higher one a new video. With `rising` a higher one is the next step, a lower one a new video. This
    rule means nothing for random timesteps, as in training. With `indexed` the scheduler's own index is the
    step, because calls get other values than its timesteps. A copy or a pickle follows the scheduler that was
    copied with it.
    """

    def __init__(self, pipeline: Any = None, *, rising: bool = False, indexed: bool = False) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._copied_scheduler: Any = None
        self._timesteps: torch.Tensor | None = None
        self._planned: list[float] = []
        self.sigmas: list[float] | None = None  # noise level of each planned step, 1 for noise
        self._timestep, self._direction, self._indexed = float("inf"), 1 if rising else -1, indexed
        self.step = self.steps_begun = self.videos_begun = 0
        self.began = time.perf_counter()  # the latest video

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pipeline": None, "_copied_scheduler": self._any_scheduler()}

    @property
    def planned_steps(self) -> int | None:
        """Returns the steps of the video as the scheduler plans them, None without a scheduler."""
        return len(self._planned) or None

    @property
    def plan(self) -> tuple[int | None, list[float] | None]:
        """Returns `planned_steps`, and the noise level of each."""
        return self.planned_steps, self.sigmas

    def sigma(self) -> float:
        """Returns the noise level of the step; ValueError if no scheduler has it."""
        if self.sigmas is None or self.step >= len(self.sigmas):
            raise ValueError(
                "selection='profile' needs the noise levels of a scheduler; enable it on the pipeline, not "
                "on its transformer"
            )
        return self.sigmas[self.step]

    def advance(self, timestep: torch.Tensor) -> tuple[int, bool]:
        """Returns the step, and whether this call begins it.

        `timestep`: `[B]`, `[B, S]` for each token or `[B, 1, F, 1, 1]` for each frame; the maximum counts.
        """
        value = float(timestep.max())
        new_video = self._read_plan() or self.videos_begun == 0
        step = self._planned_step(value, timestep.dtype)
        if step is None:
            if self._copied_scheduler is not None:
                self._planned, self.sigmas = [], None  # its pipeline has another scheduler by now
            ahead = self._direction * (value - self._timestep)
            new_video = new_video or ahead < 0
            step = 0 if new_video else self.step + (ahead > 0)
        new_video = new_video or step < self.step
        begins = new_video or step != self.step
        self.step, self._timestep = step, value
        self.steps_begun += begins
        self.videos_begun += new_video
        self.began = time.perf_counter() if new_video else self.began
        return step, begins

    def _scheduler(self) -> Any:
        """Returns the scheduler of the pipeline, None unless its timesteps were set."""
        scheduler = self._any_scheduler()
        return scheduler if getattr(scheduler, "num_inference_steps", None) else None

    def _any_scheduler(self) -> Any:
        return getattr(self._pipeline and self._pipeline(), "scheduler", self._copied_scheduler)

    def _read_plan(self) -> bool:
        """Reads the scheduler's timesteps; returns whether they were set since the last call."""
        timesteps = getattr(self._scheduler(), "timesteps", None)
        if timesteps is self._timesteps:
            return False
        self._timesteps = timesteps
        self._planned = [] if timesteps is None else timesteps.tolist()
        levels = getattr(self._scheduler(), "sigmas", None)
        self.sigmas = None if levels is None else levels[: len(self._planned)].tolist()
        if self.sigmas is not None and levels[0] < levels[-1]:
            self.sigmas = [1 - level for level in self.sigmas]
        if max(self.sigmas or [0]) > 1:  # of x + sigma noise: its share in flow matching
            self.sigmas = [level / (1 + level) for level in self.sigmas]
        return True

    def _planned_step(self, value: float, dtype: torch.dtype) -> int | None:
        """Returns the index of `value` in the planned timesteps, up to rounding of `dtype`; None if absent.

        If several fit, after rounding or in a steep schedule, the scheduler's own index decides, as it does
        for all values of an indexed count.
        """
        tolerance = torch.finfo(dtype).eps * abs(value) if dtype.is_floating_point else 1.0
        near = [index for index, planned in enumerate(self._planned) if abs(planned - value) <= tolerance]
        if len(near) < 2 and not self._indexed:
            return near[0] if near else None
        scheduler = self._scheduler()
        current = getattr(scheduler, "step_index", None) or getattr(scheduler, "begin_index", None) or 0
        if self._indexed:
            return current if current < len(self._planned) else None
        return current if current in near else min(near, key=lambda index: abs(self._planned[index] - value))
