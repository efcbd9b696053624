"""Shares step, grid and mask between the transformers of a pipeline and their processors.

A pre-hook on the transformer finds the denoising step and the token grid of the call and chooses its mask and
backend. A hook on the rotary embedding passes both to the blocks, as further entries of the rotary tuple, or
the fork puts them into another argument. They travel with the arguments of a block: gradient checkpointing
repeats a block with the mask of its call, and a compiled block uses the backend that the report names. A hook
after the transformer reads the notes of the layers on their outputs.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.attention import choose_backend, report_choice
from radial_attn.chooser import Choice, Chooser
from radial_attn.kernels.contract import Call
from radial_attn.masks.density import resolve_near
from radial_attn.trial import DENSE

from .adaptive import Adaptive
from .choices import Choices, least_mask
from .counts import Counts
from .dense_backend import OURS, DenseBackend
from .layer_attention import AttentionCall, dense_attention, valid_keys
from .observe import Observer
from .output_check import OutputCheck
from .schedule import Schedule, StepCounter
from .text_lengths import TextLengths
from .transformers import head_sizes, is_compiled

ASSUMED_STEPS = 50  # of a run whose steps are not known
PLAIN = {"selection": "static", "far_field": "none", "residual": "none"}  # one mask for all heads


class RadialContext:
    """Holds the state of one application: schedule, step, masks of the running call, counts."""

    def __init__(
        self,
        config: RadialConfig,
        *,
        schedule: Schedule,
        backend: str,
        quantize: str | None,
        output_check: OutputCheck,
        dense: DenseBackend,
        family: ModuleType,
        layers: int,
        always_dense: int,
        other_layers: int,
        chooser: Chooser,
        adaptive: Adaptive,
        choices: Choices | None = None,
        pipeline: Any = None,
        parallel: Any = None,
        observer: Observer | None = None,
    ) -> None:
        self.config, self.schedule, self.backend, self.quantize = config, schedule, backend, quantize
        self.adaptive, self._choices = adaptive, choices
        self.output_check, self.dense, self.parallel, self.observer = output_check, dense, parallel, observer
        self._in_ring = parallel is not None and parallel.ring is not None
        if self._in_ring:
            self._check_ring()
        self._radial_call: AttentionCall | None = None
        self._dense_call: AttentionCall | None = None
        self._dtype, self._dense_steps = torch.float32, 0
        self._family, self._layers, self._always_dense = family, layers, always_dense
        self._chooser, self._counts = chooser, Counts(layers, always_dense, other_layers)
        self._choice, self._reason, self._begins = None, None, False  # of the running call
        self._text = TextLengths(family)
        self._counter = StepCounter(pipeline, rising=getattr(family, "TIMESTEPS_RISE", False))
        self._densities: dict[TokenGrid, float] = {}  # of the latest static mask

    def _check_ring(self) -> None:
        """Raises ValueError for an option that a ring does not support."""
        refused = self.parallel.ring.refusal(self.quantize, self.output_check.check, self.dense.name)
        if refused is not None:
            raise ValueError(refused.reason)
        if self.adaptive != replace(self.adaptive, **PLAIN):
            words = ", ".join(f"{name}={value!r}" for name, value in vars(self.adaptive).items())
            raise ValueError(
                f"a ring does not support {words}: no process has all keys; allowed: selection='static', "
                "far_field='none', residual='none'"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a copy or a pickle, without the latest calls, whose masks hold kernels."""
        state = {**vars(self), "_family": self._family.__name__}
        return state | {"_radial_call": None, "_dense_call": None, "_choice": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _family=import_module(state["_family"]))

    @torch.compiler.disable
    def before_call(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Chooses the calls of a transformer's layers, as its forward pre-hook; None is upstream's.

        Returns other arguments if the calls go with them and not with the rotary tables (`with_calls`).
        """
        arguments = inspect.signature(type(transformer).forward).bind(transformer, *args, **kwargs).arguments
        latents, grid = arguments["hidden_states"], self._family.token_grid(transformer, arguments)
        lengths = self._text.read(arguments)
        if self.parallel is not None:
            self.parallel.begin(grid, self.config.block_size)
        step, self._begins = self._counter.advance(arguments["timestep"])
        if self._begins and step == 0 and self.config.pattern != "dense" and self.observer is None:
            self.schedule.check_run(*self._counter.plan)
        plan = self._counter.plan
        dense = scheduled = self.config.pattern == "dense" or self.schedule.is_dense(step, *plan)
        records = False
        if self._choices is not None and self.config.pattern != "dense":
            self._begin_choices(transformer, grid, step, first=self._begins)
            dense = dense or (self.adaptive.needs_dense_step and not self._choices.ready)
            records = dense and self.adaptive.records and self.schedule.precedes_sparse(step, *plan)
            if self.adaptive.selection == "profile" and (records or not dense):
                self._choices.begin_part(self._counter.sigma(), latents.device)
        self._dtype, mask = _working_dtype(latents), self._mask(transformer, grid, step)
        attends = records or not dense
        may_attend = attends or not scheduled
        self._choice = self._open_choice(transformer, latents, mask, lengths) if may_attend else None
        if self._stays_dense:
            dense, records, attends = True, False, False
        self._reason = self._reason_of(scheduled) if dense else None
        compare = self.output_check.begin(transformer, None if dense else mask, arguments)
        self._set_calls(transformer, latents, mask, lengths, dense=dense, attends=attends, records=records)
        if attends and not records:
            self._radial_call = self._radial_call._replace(compare=compare)
        if self.observer is not None:
            sigma = self._counter.sigmas and self._counter.sigmas[step]
            note = self.observer.of_call(step=step, sigma=sigma, mask=mask, text_lengths=lengths)
            calls = self._radial_call, self._dense_call
            self._radial_call, self._dense_call = (call and call._replace(observe=note) for call in calls)
        before = self._densities.pop(grid, None)
        self._densities[grid] = mask.density if before is None or not dense else before
        if not hasattr(self._family, "with_calls"):
            return None
        del arguments["self"]
        return (), self._family.with_calls(arguments, self._radial_call, self._dense_call)

    def _set_calls(
        self,
        transformer: torch.nn.Module,
        latents: Tensor,
        mask: BlockMask,
        lengths: Tensor | None,
        *,
        dense: bool,
        attends: bool,
        records: bool,
    ) -> None:
        """Sets how radial and always dense layers attend; `records`: the former prepare sparse steps."""
        self._dense_call = None
        if dense or self.schedule.dense_layers:
            self._dense_call = self._choose_dense(transformer, latents, mask, lengths, records)
        self._radial_call = self._dense_call
        if attends:
            self._radial_call = self._sparse_call(latents, head_sizes(transformer)[1], mask, lengths)
        if records:
            self._choices.begin_dense()
            self._radial_call = self._dense_call._replace(records=self._radial_call)

    def attach_to_rope(self, rope: torch.nn.Module, args: tuple, rotary: Any) -> tuple:
        """Adds the calls of radial and of always dense layers, as forward hook of the rotary embedding."""
        tables = rotary.values() if isinstance(rotary, dict) else rotary
        if self.parallel is not None:
            tables = (self.parallel.shard(table, self._family.ROTARY_TOKENS) for table in tables)
        return (*tables, self._radial_call, self._dense_call)

    @torch.compiler.disable
    def after_call(self, transformer: torch.nn.Module, args: tuple, output: Any) -> None:
        """Ends a call, as forward hook of a transformer; raises CheckError if it fails its check."""
        if self._choices is not None:
            self._choices.end_call()
        if self._stays_dense and self._reason is None:
            self._reason = "too_short"
            self.output_check.leave_out()
        self._dense_steps += self._begins and self._reason is not None
        whole = self._radial_call is not None and self._radial_call.mask.is_dense
        self._counts.add(self._backend_of(self._radial_call), self._reason or ("mask" if whole else None))
        if self.output_check.check == "off":
            return
        calls = self._radial_call, self._dense_call
        planned = self.schedule.num_steps or self._counter.planned_steps
        step = f"step {self._counter.step + 1}" + (f" of {planned}" if planned else "")
        backends = tuple(map(self._backend_of, calls))
        moment = f"{step}, {str(self._dtype).removeprefix('torch.')}"
        sample = output if isinstance(output, Tensor) else output[0]
        self.output_check.end(transformer, sample, backends, moment)

    def report(self) -> dict[str, Any]:
        """Returns the counts that RadialAttentionHandle.report explains."""
        chosen = None if self._choices is None else self._choices.report()
        static = self.adaptive.selection == "static"
        grids = [
            {
                "grid": [grid.frames, grid.height, grid.width],
                "density": density if static else chosen["density"],
            }
            for grid, density in self._densities.items()
        ]
        return {
            **(grids[-1] if grids else {"grid": None, "density": None}),
            "grids": grids,
            "videos": self._counter.videos_begun,
            "steps": self._counter.steps_begun,
            "dense_steps": self._dense_steps,
            "layers": self._layers,
            "dense_layers": self._always_dense,
            **self._counts.report(),
            "tuning": self._chooser.report(),
            "quantize": self.quantize,
            "adaptive": vars(self.adaptive) | (chosen or {}),
            "dense_backend": self.dense.report(),
            "check": self.output_check.report(),
        }

    def chosen(self, layer: int) -> BlockMask | None:
        """Returns what RadialAttentionHandle.chosen explains."""
        return None if self._choices is None else self._choices.mask(layer)

    def _begin_choices(
        self, transformer: torch.nn.Module, grid: TokenGrid, step: int, *, first: bool
    ) -> None:
        """Begins a call of the layers' choices; ValueError for a density below what every mask keeps."""
        densities = self.schedule.densities(*self._counter.plan)
        if not densities:
            given = self.config.density
            densities = {step: radial_mask(grid, self.config).density if given is None else given}
        video = self._counter.videos_begun
        self._choices.begin(transformer, grid, video=video, densities=densities.values(), first=first)
        if step in densities:
            self._choices.set_density(densities[step])

    def _mask(self, transformer: torch.nn.Module, grid: TokenGrid, step: int) -> BlockMask:
        """Returns the static mask of a step, or one that stands for those that the layers choose."""
        if self.config.pattern == "dense":
            return radial_mask(grid, self.config)
        if self.adaptive.selection == "static":
            density = self.schedule.densities(*self._counter.plan).get(step)
            if density is None:
                return radial_mask(grid, self.config)
            return radial_mask(grid, resolve_near(grid, replace(self.config, density=density)))
        heads, _ = head_sizes(transformer)
        return least_mask(
            grid, self.config, -(-heads // (1 if self.parallel is None else self.parallel.degree))
        )

    @property
    def _stays_dense(self) -> bool:
        """Tells whether dense attention is as fast for the shape of the call."""
        return self._choice is not None and self._choice.name == DENSE

    def _sparse_call(
        self, latents: Tensor, width: int, mask: BlockMask, lengths: Tensor | None
    ) -> AttentionCall:
        """Returns how the layers of a sparse call attend."""
        is_open = self._choice is not None and self._choice.name is None
        return AttentionCall(
            mask,
            self._choose(latents, width, mask),
            self.quantize,
            text_lengths=lengths,
            parallel=self.parallel,
            far_field=self.adaptive.far_field,
            choices=self._choices,
            choice=self._choice if is_open else None,
            chooser=self._chooser if is_open else None,
        )

    def _choose(self, latents: Tensor, width: int, mask: BlockMask) -> str:
        """Returns the backend of radial layers with heads `width` wide; logs the choice of "auto"."""
        if self.backend != "auto":
            return self.backend
        if self._choice is not None and self._choice.name is not None:
            return self._choice.name
        chosen = choose_backend(self._asked(latents, width, mask))
        if self._choice is None:
            levels = self._choices.densities if self._choices is not None else ()
            asked = " to ".join(f"{density:.3f}" for density in sorted({*levels[:1], *levels[-1:]}))
            report_choice(chosen, latents, mask, f"{asked} (chosen)" if levels else "")
        return chosen

    def _asked(self, latents: Tensor, width: int, mask: BlockMask) -> Call:
        call = Call(latents.device, self._dtype, width, torch.is_grad_enabled(), mask, self.quantize)
        return replace(call, partial=self._in_ring, far_field=self.adaptive.far_field)

    def _open_choice(
        self, transformer: torch.nn.Module, latents: Tensor, mask: BlockMask, lengths: Tensor | None
    ) -> Choice | None:
        """Returns the choice of this call's radial layers; None if backends are not measured.

        In training, and if blocks are compiled, no layer can stop to measure. So this measures, on random
        values.
        """
        settled = self.backend != "auto" or self._in_ring or mask.is_dense
        if settled or self.adaptive.residual == "output" or not self._chooser.measures(latents.device):
            return None
        call = self._asked(latents, head_sizes(transformer)[1], mask)
        density = None if self._choices is None else self._choices.density
        if self.parallel is not None and not self._chooser.agrees:
            return None
        if density is not None and (call.gradients or is_compiled(transformer)):
            return None
        self._choose_dense(transformer, latents, mask, lengths, False)
        choice = self._chooser.open(
            call,
            self._shape(transformer, latents, mask.grid),
            mask.density if density is None else density,
            about={
                "dense": self.dense.report()["backend"],
                "pattern": self.config.pattern,
                "padded_text": lengths is not None,
            },
            dense=self._dense(mask),
            calls=(self._layers - self._always_dense)
            * (self.schedule.num_steps or self._counter.planned_steps or ASSUMED_STEPS),
            spent=time.perf_counter() - self._counter.began,
        )
        if choice.name is None and (call.gradients or is_compiled(transformer)):
            self._chooser.settle_alone(choice, lengths)
        return choice

    def _dense(self, mask: BlockMask) -> Callable[..., Tensor]:
        """Returns dense attention of query, key, value and text lengths, as dense layers compute it."""
        if self.dense.name in OURS:
            whole = radial_mask(mask.grid, replace(self.config, pattern="dense"))
            return partial(radial_attention, mask=whole, backend=self.dense.name)
        return partial(dense_attention, grid=mask.grid, backend=self.dense.in_use)

    def _shape(self, transformer: torch.nn.Module, latents: Tensor, grid: TokenGrid) -> tuple[int, ...]:
        """Returns `[B, S, H, D]` of the tensors that this process attends over."""
        heads, width = head_sizes(transformer)
        heads = -(-heads // (1 if self.parallel is None else self.parallel.degree))
        return len(latents), grid.tokens, heads, width

    def _reason_of(self, scheduled: bool) -> str:
        """Says why a call is dense."""
        if self.config.pattern == "dense":
            return "mask"
        return "too_short" if self._stays_dense and not scheduled else "dense_step"

    @staticmethod
    def _backend_of(call: AttentionCall | None) -> str:
        if call is None:
            return DENSE
        return call.backend if call.choice is None or call.choice.name is None else call.choice.name

    def _choose_dense(
        self,
        transformer: torch.nn.Module,
        latents: Tensor,
        mask: BlockMask,
        lengths: Tensor | None,
        records: bool,
    ) -> AttentionCall | None:
        """Returns how dense layers attend, None for upstream; may first choose upstream's backend by time."""
        grid = mask.grid
        if self.dense.name in OURS or self._in_ring:
            mask = radial_mask(grid, replace(self.config, pattern="dense"))
            backend = "dense" if self._in_ring else self.dense.name
            return AttentionCall(mask, backend, text_lengths=lengths, parallel=self.parallel)
        self.dense.prepare(self._shape(transformer, latents, grid), self._dtype, latents.device, mask)
        valid = valid_keys(grid, lengths, latents.device)
        sliced = isinstance(valid, tuple) and getattr(self._family, "DENSE_HAS_MASK", False)
        if self.parallel is None and self.observer is None and not records and not sliced:
            return None
        return AttentionCall(mask, "dense", text_lengths=lengths, parallel=self.parallel, valid=valid)


def _working_dtype(latents: torch.Tensor) -> torch.dtype:
    """Returns the dtype of the attention: autocast's if it is on."""
    kind = latents.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return latents.dtype
