"""Serves the attention calls of one patched model of ComfyUI by radial attention.

`PatchedModel.apply_model` wraps every call of the diffusion model. It puts its override into the call's
options, above an override that is there, and takes it out after the call: nothing stays behind, and a node
that is added later cannot push it out. What the layers keep belongs to one run of a sampler.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from radial_attn import BlockMask, TokenGrid
from radial_attn.attention import choose_backend, require
from radial_attn.chooser import Choice, Chooser
from radial_attn.kernels.contract import Call
from radial_attn.masks.density import TOLERANCE
from radial_attn.models.profile import MeasuredModel, ModelProfile
from radial_attn.models.published import nearest_settings
from radial_attn.models.runtime.adaptive import Adaptive
from radial_attn.models.runtime.choices import Choices, least_mask
from radial_attn.models.runtime.layer_attention import AttentionCall, attend, record
from radial_attn.trial import DENSE

from .protocol import (
    OVERRIDE,
    Layer,
    LayerCounter,
    NotServedError,
    family_of,
    from_heads,
    halves_of,
    layout_of,
    read_blocks,
    text_lengths,
    to_heads,
    traits_of,
)
from .state import Forward, Plan, Run, Settings

STATE = "radial_attention"  # key of a call's state in `transformer_options`
REASONS = ("dense_step", "dense_block", "too_short", "mask", "refused", "cross_attention")


class PatchedModel:
    """Holds the settings and the run of one patched model; clones of the model share it."""

    def __init__(self, settings: Settings, tune: str = "auto") -> None:
        """Takes the inputs of the node, and `tune` as `radial_attn.chooser.Chooser` has it.

        Raises:
            ValueError: a setting with a wrong value, or a profile that cannot be read.
        """
        profile = settings.profile or None
        self.settings, self.dense_blocks = settings, read_blocks(settings.dense_blocks)
        self.adaptive = Adaptive(settings.selection, far_field=settings.far_field, profile=profile)
        self._profile = None if profile is None else ModelProfile.read(profile)
        self._chooser, self._core = Chooser(tune), None
        self._core_name = ""
        self.run, self._is_over = Run(), True
        self._said: set[str] = set()
        self.override = torch.compiler.disable(self._override)

    def apply_model(self, executor: Any, x: Any, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Wraps a call of the diffusion model, as a wrapper of ComfyUI's kind "apply_model"."""
        names = ("c_concat", "c_crossattn", "control", "transformer_options")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        options = arguments.setdefault("transformer_options", {})
        try:
            forward = self._begin(executor.class_obj, x, t, arguments)
        except NotServedError as error:
            self.note(str(error))
            return executor(x, t, *args, **kwargs)
        before = {key: options[key] for key in (OVERRIDE, STATE) if key in options}
        options.update({OVERRIDE: self.override, STATE: forward})
        began = _now(x.device)
        try:
            given = [arguments.pop(name, None) for name in names]
            output = executor(x, t, *given, **arguments)
        finally:
            for key in (OVERRIDE, STATE):
                options.pop(key, None)
            options.update(before)
        self._end(forward, _now(x.device) - began)
        return output

    def clean_up(self, *_: Any) -> None:
        """Frees what the layers keep, as a callback of ComfyUI's kind "on_cleanup"; the counts stay."""
        self.run.choices.clear()
        self._core, self._is_over = None, True

    def note(self, text: str) -> None:
        """Keeps a line for the report of the run, and logs it once."""
        if text not in self.run.notes:
            self.run.notes.append(text)
        if text not in self._said:
            self._said.add(text)
            logging.getLogger("radial_attn").warning("Radial Attention: %s", text)

    def report(self) -> dict[str, Any]:
        """Returns what ran in the latest run, as values that JSON can hold.

        - `grid`: frames, height and width in tokens, and tokens of text; `density`: of the mask.
        - `calls`: self-attention calls by backend, "dense" for ComfyUI's.
        - `stayed_dense`: calls by reason: "dense_step", "dense_block", those "too_short" to gain, a "mask"
          that keeps all, those that were "refused" (`notes` says why), and "cross_attention".
        - `seconds`: median of a call of the model in which all is dense, and of the others, None for none.
        - `tuning`: as `RadialAttentionHandle.report` has it.
        """
        run, grid = self.run, self.run.grid
        return {
            "grid": None if grid is None else [grid.frames, grid.height, grid.width, grid.text],
            "density": run.density,
            "calls": dict(run.calls),
            "stayed_dense": {reason: run.reasons[reason] for reason in REASONS},
            "model_calls": {name: len(values) for name, values in run.seconds.items()},
            "seconds": {name: median(values) if values else None for name, values in run.seconds.items()},
            "tuning": self._chooser.report(),
            "notes": list(run.notes),
        }

    def _begin(self, base: Any, latents: Any, t: Tensor, arguments: dict[str, Any]) -> Forward:
        """Returns the state of a call; begins a run with the first one."""
        model, options = base.diffusion_model, arguments["transformer_options"]
        model = getattr(model, "_orig_mod", model)
        layout = layout_of(model, latents, arguments)
        sigmas = options.get("sample_sigmas")
        planned = None if sigmas is None else tuple(sigmas.tolist()[:-1]) or None
        if self._is_over or planned != self.run.sigmas:
            percents, sampling = (self.settings.start_percent, self.settings.end_percent), base.model_sampling
            window = tuple(float(sampling.percent_to_sigma(percent)) for percent in percents)
            config = nearest_settings(traits_of(model)).config
            config = replace(config, density=self.settings.density or None)
            self.run, self._is_over = Run(planned, window, config), False
        counter = LayerCounter(layout, len(getattr(model, "double_blocks", ())))
        return Forward(model, layout, counter, float(t.max()), options, options.get(OVERRIDE))

    def _end(self, forward: Forward, seconds: float) -> None:
        """Ends a call of the diffusion model."""
        self.run.seconds["sparse" if forward.sparse else "dense"].append(seconds)
        if self._chooses and forward.sparse:
            densities = [call.choices.report()["density"] for _, call in forward.plan.calls]
            self.run.density = sum(densities) / len(densities)

    @property
    def _chooses(self) -> bool:
        """Tells whether heads have masks of their own."""
        return self.settings.selection != "static"

    def _override(  # noqa: PLR0917 (as the core calls it)
        self,
        func: Callable[..., Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Computes one attention call of ComfyUI's core, as its override; `func` is core's attention."""
        options = kwargs.get("transformer_options") or {}
        forward = options.get(STATE)
        core = func if forward is None or forward.previous is None else partial(forward.previous, func)
        layout = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        dense = partial(core, q, k, v, heads, mask=mask, attn_precision=attn_precision, **layout, **kwargs)
        if forward is None:
            return dense()
        tensors = [to_heads(x, heads, skip_reshape) for x in (q, k, v)]
        grid = _grid(forward, tensors, options)
        if grid is None:
            self.run.reasons["cross_attention"] += 1
            return dense()
        self._core = partial(core, skip_reshape=True, skip_output_reshape=True, **kwargs)
        self._core_name = getattr(func, "__name__", "attention")
        plan, layer = self._plan(forward, grid, tensors, mask, kwargs), forward.counter.next(options)
        reason = "dense_block" if layer.index in self.dense_blocks else plan.reason
        if reason is None:
            return from_heads(self._sparse(forward, plan, grid, tensors, layer), skip_output_reshape)
        self.run.calls["dense"] += 1
        self.run.reasons[reason] += 1
        output = dense()
        if reason == plan.reason and plan.calls:
            whole = to_heads(output, heads, skip_output_reshape)
            *tensors, whole = (_turn(x, forward.text_before(grid)) for x in (*tensors, whole))
            for rows, call in plan.calls:
                record([x[rows] for x in tensors], whole[rows], call, layer)
        return output

    def _sparse(
        self, forward: Forward, plan: Plan, grid: TokenGrid, tensors: Sequence[Tensor], layer: Layer
    ) -> Tensor:
        """Computes sparse attention `[B, S, H, D]`, each condition by its own choices."""
        before = forward.text_before(grid)
        tensors = [_turn(x, before) for x in tensors]
        output = [attend(*(x[rows] for x in tensors), call, layer) for rows, call in plan.calls]
        backend = _backend_of(plan.calls[0][1])
        self.run.calls[backend] += 1
        self.run.reasons["too_short"] += backend == DENSE
        forward.sparse = forward.sparse or backend != DENSE
        return _turn(output[0] if len(output) == 1 else torch.cat(output), -before)

    def _plan(
        self,
        forward: Forward,
        grid: TokenGrid,
        tensors: Sequence[Tensor],
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Plan:
        """Returns the plan of a forward pass, made at its first self-attention call."""
        seen = forward.planned_for
        if seen is None or seen[0] != grid or seen[1] is not mask:
            forward.planned_for = grid, mask
            try:
                if options.get("scale") is not None or options.get("enable_gqa"):
                    raise NotServedError("attention with a scale or groups of its own stays dense")
                layout = forward.layout
                lengths = text_lengths(mask, grid, layout.batch, text_first=layout.text_first)
                forward.plan = self._make_plan(forward, grid, tensors[0], lengths)
            except (NotServedError, ValueError, ImportError) as error:
                self.note(str(error))
                forward.plan = Plan("refused")
        return forward.plan

    def _make_plan(self, forward: Forward, grid: TokenGrid, query: Tensor, lengths: Tensor | None) -> Plan:
        """Returns the plan for queries `[B, S, H, D]`.

        Raises:
            ValueError, ImportError: the backend, the density or the profile does not serve the call.
        """
        run, adaptive = self.run, self.adaptive
        if grid.tokens < self.settings.min_tokens:
            self.note(
                f"{grid.tokens} tokens are below min_tokens={self.settings.min_tokens}: dense is as fast"
            )
            return Plan("too_short")
        mask = least_mask(grid, run.config, query.shape[2]) if self._chooses else run.mask(grid)
        density = run.config.density or run.mask(grid).density
        halves = self._halves(forward, grid, query, density)
        is_ready = all(choices is None or choices.ready for _, choices in halves)
        dense = run.is_dense(forward.sigma) or (adaptive.needs_dense_step and not is_ready)
        records = dense and adaptive.records and run.precedes_sparse(forward.sigma)
        if dense and not records:
            return Plan("dense_step")
        run.grid, run.density = grid, run.density if self._chooses else mask.density
        if not self._chooses and abs(mask.density - density) > TOLERANCE * density:
            self.note(f"no mask of this size has density {density:g}: the nearest has {mask.density:.3f}")
        density = density if self._chooses else mask.density
        first, is_padded = query[halves[0][0]], lengths is not None
        backend, choice = self._backend(forward, mask, first, density, is_padded=is_padded)
        if choice is not None and choice.name == DENSE:
            return Plan("too_short")
        if mask.is_dense and self.settings.backend == "auto":
            return Plan("mask")
        shared = {"far_field": adaptive.far_field, "choice": choice}
        shared["chooser"] = None if choice is None else self._chooser
        calls = []
        for rows, choices in halves:
            if records:
                choices.begin_dense()
            text = None if lengths is None else lengths[rows]
            calls.append((rows, AttentionCall(mask, backend, text_lengths=text, choices=choices, **shared)))
        return Plan("dense_step" if dense else None, tuple(calls))

    def _halves(
        self, forward: Forward, grid: TokenGrid, query: Tensor, density: float
    ) -> list[tuple[slice, Choices | None]]:
        """Returns the rows of each condition with what its layers keep; all rows if they keep nothing."""
        if not self.adaptive.has_state:
            return [(slice(None), None)]
        alike = self._profile is not None  # the masks of a profile are the same for all
        parts = [(None, slice(None))] if alike else halves_of(forward.options, forward.layout.batch)
        if alike:
            self._check_profile(forward.model, query.shape[2], query.shape[3])
        halves = []
        for key, rows in parts:
            if key not in self.run.choices:
                config = self.run.config
                self.run.choices[key] = Choices(self.adaptive, config, profile=self._profile)
            choices = self.run.choices[key]
            try:
                choices.begin(forward.model, grid, video=0, densities=[density], first=True)
            except ValueError:
                del self.run.choices[key]  # it has begun in part
                raise
            if alike:
                choices.begin_part(forward.sigma, query.device)
            halves.append((rows, choices))
        return halves

    def _check_profile(self, model: Any, heads: int, width: int) -> None:
        """Raises ValueError if the profile was measured on another model."""
        measured = MeasuredModel(family_of(model).name, traits_of(model).layers, heads, width)
        difference = self._profile.model.other(measured)
        if difference is not None:
            raise ValueError(f"the profile was measured on another model: {difference}; calibrate this one")

    def _backend(
        self, forward: Forward, mask: BlockMask, query: Tensor, density: float, *, is_padded: bool
    ) -> tuple[str, Choice | None]:
        """Returns the backend of sparse calls, and the choice that replaces it once it is measured."""
        call = Call(query.device, query.dtype, query.shape[3], torch.is_grad_enabled(), mask)
        call = replace(call, far_field=self.adaptive.far_field)
        if self.settings.backend != "auto":
            require(self.settings.backend, call)
            return self.settings.backend, None
        if mask.is_dense or not self._chooser.measures(query.device):
            return choose_backend(call), None
        choice = self._chooser.open(
            call,
            query.shape,
            density,
            about={"dense": f"ComfyUI's {self._core_name}", "padded_text": is_padded},
            dense=self._dense,
            calls=traits_of(forward.model).layers * len(self.run.sigmas or ()),
        )
        return choice.name or choose_backend(call), choice if choice.name in {None, DENSE} else None

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, *, text_lengths: Tensor | None = None) -> Tensor:
        """Computes dense attention `[B, S, H, D]` as ComfyUI does."""
        bias = None
        if text_lengths is not None:
            video = self.run.grid.video_tokens
            valid = torch.arange(q.shape[1]) < video + text_lengths[:, None]
            bias = valid[:, None, None].to(q.device)
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        return self._core(*heads, q.shape[2], mask=bias).transpose(1, 2)


def _grid(forward: Forward, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> TokenGrid | None:
    """Returns the grid of a call if it is self-attention of the video, else None."""
    query, key, value = tensors
    if not query.shape == key.shape == value.shape or len(query) != forward.layout.batch:
        return None
    return forward.layout.grid(query.shape[1], options)


def _turn(tensor: Tensor, tokens: int) -> Tensor:
    """Moves the first tokens of `[B, S, H, D]` to the end; a negative number moves them back."""
    return tensor.roll(-tokens, 1) if tokens else tensor


def _backend_of(call: AttentionCall) -> str:
    return call.backend if call.choice is None or call.choice.name is None else call.choice.name


def _now(device: torch.device) -> float:
    """Returns the seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
