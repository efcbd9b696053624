"""Decides which denoising steps and layers are dense, and to which step a call of a transformer belongs."""

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Schedule:
    """Decides which denoising steps and layers are dense.

    Steps `0 .. dense_steps - 1` and the last `dense_last_steps` are dense in every layer, layers
    `0 .. dense_layers - 1` at every step. A float as `dense_steps` is a share of the steps of each run,
    rounded to the nearest step. `num_steps`: denoising steps of a video, if no pipeline knows them. Raises
    ValueError for a value that is not a whole number of at least 0, and for a share outside (0, 1).
    """

    dense_steps: int | float = 0
    dense_layers: int = 0
    dense_last_steps: int = 0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "dense_steps" and isinstance(value, float):
                if not 0 < value < 1:
                    raise ValueError(
                        f"dense_steps as a share of the steps must be above 0 and below 1, got {value!r}"
                    )
                continue
            allowed = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not allowed and not (name == "num_steps" and value is None):
                raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")

    def is_dense(self, step: int, planned_steps: int | None) -> bool:
        """Returns whether `step` (from 0) is dense in every layer.

        `planned_steps`: steps of the scheduler, used if `num_steps` is None. Raises ValueError if neither is
        known and a share of the steps or the last steps are to be dense.
        """
        leading = self.leading_steps(planned_steps)
        if step < leading or self.dense_last_steps == 0:
            return step < leading
        return step >= self._total("dense_last_steps", planned_steps) - self.dense_last_steps

    def precedes_sparse(self, step: int, planned_steps: int | None) -> bool:
        """Returns whether a step follows that is not dense; arguments and errors as in `is_dense`."""
        total = self.num_steps or planned_steps
        return (total is None or step + 1 < total) and not self.is_dense(step + 1, planned_steps)

    def leading_steps(self, planned_steps: int | None) -> int:
        """Returns how many steps at the start are dense; arguments and errors as in `is_dense`."""
        if isinstance(self.dense_steps, int):
            return self.dense_steps
        return round(self.dense_steps * self._total("dense_steps", planned_steps))

    def check_run(self, planned_steps: int | None) -> None:
        """Raises ValueError for more dense steps than a run has; warns if that leaves no radial step.

        Nothing is checked if the number of steps is not known.
        """
        total = self.num_steps or planned_steps
        if total is None:
            return
        for name in ("dense_steps", "dense_last_steps"):
            if getattr(self, name) > total:
                got = getattr(self, name)
                raise ValueError(
                    f"{name} must be at most {total}, the steps of this run, got {got}; lower it, or give "
                    "dense_steps as a share such as 0.24"
                )
        if all(self.is_dense(step, planned_steps) for step in range(total)):
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


class StepCounter:
    """Finds the denoising step of a transformer call from its timestep.

    With a pipeline, the step is the index of the timestep in `pipeline.scheduler.timesteps`, and a new tensor
    there (every video calls `set_timesteps`) begins a new video. Without a pipeline, or if the timestep is
    not in that list, an equal timestep is the same step (the other guidance half), a lower one the next step,
    and a higher one a new video. With `rising` a higher one is the next step, a lower one a new video. This
    rule means nothing for random timesteps, as in training. A copy or a pickle follows the scheduler that was
    copied with it.
    """

    def __init__(self, pipeline: Any = None, *, rising: bool = False) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._copied_scheduler: Any = None
        self._timesteps: torch.Tensor | None = None
        self._planned: list[float] = []
        self._timestep, self._direction = float("inf"), 1 if rising else -1
        self.step = self.steps_begun = self.videos_begun = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pipeline": None, "_copied_scheduler": self._any_scheduler()}

    @property
    def planned_steps(self) -> int | None:
        """Returns the steps of the video as the scheduler plans them, None without a scheduler."""
        return len(self._planned) or None

    def advance(self, timestep: torch.Tensor) -> tuple[int, bool]:
        """Returns the step, and whether this call begins it.

        `timestep`: `[B]`, or `[B, S]` for each token; the maximum counts.
        """
        value = float(timestep.max())
        new_video = self._read_plan() or self.videos_begun == 0
        step = self._planned_step(value, timestep.dtype)
        if step is None:
            if self._copied_scheduler is not None:
                self._planned = []  # its pipeline has another scheduler by now
            ahead = self._direction * (value - self._timestep)
            new_video = new_video or ahead < 0
            step = 0 if new_video else self.step + (ahead > 0)
        new_video = new_video or step < self.step
        begins = new_video or step != self.step
        self.step, self._timestep = step, value
        self.steps_begun += begins
        self.videos_begun += new_video
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
        return True

    def _planned_step(self, value: float, dtype: torch.dtype) -> int | None:
        """Returns the index of `value` in the planned timesteps, up to rounding of `dtype`; None if absent.

        If several fit, after rounding or in a steep schedule, the scheduler's own index decides.
        """
        tolerance = torch.finfo(dtype).eps * abs(value) if dtype.is_floating_point else 1.0
        near = [index for index, planned in enumerate(self._planned) if abs(planned - value) <= tolerance]
        if len(near) < 2:
            return near[0] if near else None
        scheduler = self._scheduler()
        current = getattr(scheduler, "step_index", None) or getattr(scheduler, "begin_index", None) or 0
        return current if current in near else min(near, key=lambda index: abs(self._planned[index] - value))
