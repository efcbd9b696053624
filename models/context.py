"""What the transformers of one pipeline share with their processors: step, grid, mask, dense or not.

A pre-hook on the transformer finds the denoising step and the token grid of the call and chooses its mask
and backend; a hook on the rotary embedding hands both to the blocks, as further entries of the rotary tuple.
So they travel with the arguments of a block: gradient checkpointing repeats a block with the mask of its
call, and a compiled block uses the backend that the report names. A hook after the transformer reads what the
layers noted of their outputs.
"""

import inspect
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.dense import DenseBackend
from models.guard import Guard, Watch
from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.attention import choose_backend, report_choice
from radial_attn.backends import Call


@dataclass(frozen=True)
class Schedule:
    """Which denoising steps and layers are dense.

    Steps `0 .. dense_steps - 1` and the last `dense_last_steps` are dense in every layer, layers
    `0 .. dense_layers - 1` at every step. `num_steps`: denoising steps of a video, where no pipeline tells.
    Raises ValueError for a value that is no whole number from 0 on.
    """

    dense_steps: int = 0
    dense_layers: int = 0
    dense_last_steps: int = 0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            allowed = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not allowed and not (name == "num_steps" and value is None):
                raise ValueError(f"{name} must be a whole number from 0 on, got {value!r}")

    def is_dense(self, step: int, planned_steps: int | None) -> bool:
        """Whether `step` (from 0) is dense in every layer.

        `planned_steps`: what the scheduler says, for want of `num_steps`. Raises ValueError where neither is
        known and the last steps are to be dense.
        """
        if step < self.dense_steps or self.dense_last_steps == 0:
            return step < self.dense_steps
        total = self.num_steps or planned_steps
        if total is None:
            raise ValueError(
                f"dense_last_steps={self.dense_last_steps} needs the number of steps: give num_steps, or a "
                f"pipeline whose scheduler.set_timesteps was called; got num_steps=None"
            )
        return step >= total - self.dense_last_steps


class StepCounter:
    """Finds the denoising step of a transformer call from its timestep.

    With a pipeline, the step is the place of the timestep in `pipeline.scheduler.timesteps`, and a new tensor
    there (every video calls `set_timesteps`) begins a new video. Without one, or where the timestep is not in
    that list: an equal timestep is the same step (the other guidance half), a lower one the next step, a
    higher one a new video. To random timesteps, as in training, this rule means nothing.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._timesteps: torch.Tensor | None = None
        self._planned: list[float] = []
        self._timestep = float("inf")
        self.step = self.steps_begun = self.videos_begun = 0

    @property
    def planned_steps(self) -> int | None:
        """Steps of the video as the scheduler plans them, None where no scheduler tells."""
        return len(self._planned) or None

    def advance(self, timestep: torch.Tensor) -> tuple[int, bool]:
        """(step, whether this call begins it); `timestep` `[B]`, or `[B, S]` a token: the maximum counts."""
        value = float(timestep.max())
        new_video = self._read_plan() or self.videos_begun == 0
        step = self._planned_step(value, timestep.dtype)
        if step is None:
            new_video = new_video or value > self._timestep
            step = 0 if new_video else self.step + (value < self._timestep)
        new_video = new_video or step < self.step
        begins = new_video or step != self.step
        self.step, self._timestep = step, value
        self.steps_begun += begins
        self.videos_begun += new_video
        return step, begins

    def _scheduler(self) -> Any:
        """The scheduler of the pipeline, None unless its timesteps were set."""
        pipeline = self._pipeline and self._pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        return scheduler if getattr(scheduler, "num_inference_steps", None) else None

    def _read_plan(self) -> bool:
        """Reads the scheduler's timesteps; whether they were set anew since the last call."""
        timesteps = getattr(self._scheduler(), "timesteps", None)
        if timesteps is self._timesteps:
            return False
        self._timesteps = timesteps
        self._planned = [] if timesteps is None else timesteps.tolist()
        return True

    def _planned_step(self, value: float, dtype: torch.dtype) -> int | None:
        """Place of `value` among the planned timesteps up to the rounding of `dtype`; None if it has none.

        Where rounding or a steep schedule makes several fit, the scheduler's own index decides.
        """
        tolerance = torch.finfo(dtype).eps * abs(value) if dtype.is_floating_point else 1.0
        near = [index for index, planned in enumerate(self._planned) if abs(planned - value) <= tolerance]
        if len(near) < 2:
            return near[0] if near else None
        scheduler = self._scheduler()
        current = getattr(scheduler, "step_index", None) or getattr(scheduler, "begin_index", None) or 0
        return current if current in near else min(near, key=lambda index: abs(self._planned[index] - value))


class Way(NamedTuple):
    """How the layers of a call attend where not by upstream; `compare`: with the definition, too."""

    mask: BlockMask
    backend: str
    quantize: str | None = None
    compare: bool = False


def attend(query: Tensor, key: Tensor, value: Tensor, way: Way, watch: Watch | None) -> Tensor:
    """Attention of a layer that upstream does not serve, under its watch; `[B, S, H, D]`."""
    output = radial_attention(query, key, value, way.mask, backend=way.backend, quantize=way.quantize)
    if watch is not None:
        watch.note(query, key, value, output, way.mask if way.compare else None)
    return output


class RadialContext:
    """State of one application: the schedule, the step, the masks of the running call, the counts."""

    def __init__(
        self,
        config: RadialConfig,
        *,
        schedule: Schedule,
        backend: str,
        quantize: str | None,
        guard: Guard,
        dense: DenseBackend,
        token_grid: Callable[[torch.nn.Module, dict[str, Any]], TokenGrid],
        layers: int,
        pipeline: Any = None,
    ) -> None:
        self.config, self.schedule, self.backend, self.quantize = config, schedule, backend, quantize
        self.guard, self.dense = guard, dense
        self._radial_way: Way | None = None
        self._dense_way: Way | None = None
        self._dtype = torch.float32
        self._token_grid, self._layers = token_grid, layers
        self._counter = StepCounter(pipeline)
        self._grids: list[TokenGrid] = []
        self._dense_steps = 0
        self._calls: Counter[str] = Counter()

    @torch.compiler.disable
    def before_call(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a transformer: chooses the ways of its layers; None is upstream's."""
        arguments = inspect.signature(type(transformer).forward).bind(transformer, *args, **kwargs).arguments
        latents, grid = arguments["hidden_states"], self._token_grid(transformer, arguments)
        step, begins = self._counter.advance(arguments["timestep"])
        dense = self.config.pattern == "dense" or self.schedule.is_dense(step, self._counter.planned_steps)
        self._dense_steps += begins and dense
        self._dtype = _working_dtype(latents)
        mask = None if dense else radial_mask(grid, self.config)
        compare = self.guard.begin(transformer, mask, latents.device)
        self._dense_way = None
        if dense or self.schedule.dense_layers:
            self._dense_way = self._choose_dense(transformer, latents, grid)
        self._radial_way = self._dense_way
        if mask is not None:
            backend = self._choose(latents, transformer.config.attention_head_dim, mask)
            self._radial_way = Way(mask, backend, self.quantize, compare)
        self._count(grid, None if dense else self._radial_way.backend)

    def carry(self, rope: torch.nn.Module, args: tuple, rotary: tuple) -> tuple:
        """Forward hook of the rotary embedding: adds the ways of radial and of always dense layers."""
        return (*rotary, self._radial_way, self._dense_way)

    @torch.compiler.disable
    def after_call(self, transformer: torch.nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of a transformer: CheckError where a layer's output is not what it should be."""
        ways = self._radial_way, self._dense_way
        if not any(ways):
            return
        planned = self.schedule.num_steps or self._counter.planned_steps
        step = f"step {self._counter.step + 1}" + (f" of {planned}" if planned else "")
        backends = tuple("dense" if way is None else way.backend for way in ways)
        self.guard.end(transformer, backends, f"{step}, {str(self._dtype).removeprefix('torch.')}")

    def report(self) -> dict[str, Any]:
        """The counts; RadialAttentionHandle.report says what they are."""
        grids = [
            {
                "grid": [grid.frames, grid.height, grid.width],
                "density": radial_mask(grid, self.config).density,
            }
            for grid in self._grids
        ]
        return {
            **(grids[-1] if grids else {"grid": None, "density": None}),
            "grids": grids,
            "videos": self._counter.videos_begun,
            "steps": self._counter.steps_begun,
            "dense_steps": self._dense_steps,
            "layers": self._layers,
            "dense_layers": self.schedule.dense_layers,
            "calls": {name: count for name, count in self._calls.items() if count},
            "quantize": self.quantize,
            "dense_backend": self.dense.report(),
            "check": self.guard.report(),
        }

    def _choose(self, latents: torch.Tensor, width: int, mask: BlockMask) -> str:
        """The backend of this call's radial layers, of heads `width` wide; what "auto" takes is logged."""
        if self.backend != "auto":
            return self.backend
        gradients = torch.is_grad_enabled()
        chosen = choose_backend(Call(latents.device, self._dtype, width, gradients, mask, self.quantize))
        report_choice(chosen, latents, mask)
        return chosen

    def _choose_dense(
        self, transformer: torch.nn.Module, latents: torch.Tensor, grid: TokenGrid
    ) -> Way | None:
        """How dense layers attend: None by upstream, whose backend may be chosen by time first."""
        if self.dense.name == "sage":
            return Way(radial_mask(grid, replace(self.config, pattern="dense")), "sage")
        settings = transformer.config
        shape = len(latents), grid.tokens, settings.num_attention_heads, settings.attention_head_dim
        self.dense.prepare(shape, self._dtype, latents.device, radial_mask(grid, self.config))
        return None

    def _count(self, grid: TokenGrid, backend: str | None) -> None:
        """Counts the attention calls that follow; here, since a compiled block cannot count."""
        self._grids = [seen for seen in self._grids if seen != grid] + [grid]
        dense = self._layers if backend is None else self.schedule.dense_layers
        self._calls["dense"] += dense
        if backend is not None:
            self._calls[backend] += self._layers - dense


def _working_dtype(latents: torch.Tensor) -> torch.dtype:
    """That of the attention: autocast's where it is on."""
    kind = latents.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return latents.dtype
