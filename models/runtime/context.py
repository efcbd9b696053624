"""Shares step, grid and mask between the transformers of a pipeline and their processors.

A pre-hook on the transformer finds the denoising step and the token grid of the call and chooses its mask and
backend. A hook on the rotary embedding passes both to the blocks, as further entries of the rotary tuple.
They travel with the arguments of a block: gradient checkpointing repeats a block with the mask of its call,
and a compiled block uses the backend that the report names. A hook after the transformer reads the notes of
the layers on their outputs.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.attention import choose_backend, report_choice
from radial_attn.kernels.contract import Call
from radial_attn.masks.density import resolve_near
from radial_attn.selection import floor_blocks

from .adaptive import Adaptive
from .choices import Choices
from .dense_backend import DenseBackend, dense_attention
from .observe import Observer
from .output_check import OutputCheck
from .schedule import Schedule, StepCounter

SLICED_DEVICES = ("cuda",)  # elsewhere dense attention masks padded text, bit by bit as upstream does
PLAIN = {"selection": "static", "far_field": "none", "residual": "none"}  # one mask for all heads


class AttentionCall(NamedTuple):
    """Tells the layers of a call how to attend, unless upstream serves them.

    Attributes:
        mask: blocks that are computed.
        backend: a backend of `radial_attention`, or "dense": upstream's dispatch, which several processes and
            an observer need here, or a ring's own.
        quantize: as in `radial_attention`.
        compare: also compare with the definition.
        text_lengths: valid text tokens of each sample, int64 `[B]` on the CPU, None for all.
        parallel: the processes that share the sequence.
        valid: keys for the dispatch: a mask, bool `[B, 1, 1, S]`, or how many each sample has; None for all.
        observe: gets the inputs of each layer, None without an observer.
        far_field: as in `radial_attention`.
        choices: what the layers chose and kept at the last dense step, None if that plays no part.
        records: the sparse call that a dense one prepares, None if no sparse step follows.
    """

    mask: BlockMask
    backend: str
    quantize: str | None = None
    compare: bool = False
    text_lengths: Tensor | None = None
    parallel: Any = None
    valid: Tensor | tuple[int, ...] | None = None
    observe: Callable[..., None] | None = None
    far_field: str = "none"
    choices: Choices | None = None
    records: "AttentionCall | None" = None


def attend(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, processor: Any) -> Tensor:
    """Computes attention `[B, S, H, D]` of a layer that upstream does not serve; its check notes it."""
    if call.observe is not None:
        call.observe(processor, query, key, value)
    of_all = partial(_attend, call=call, processor=processor)
    if call.parallel is None:
        return of_all(query, key, value)
    choices = call.choices if call.records is None else call.records.choices
    heads = None if choices is None else choices.deal(processor)
    return call.parallel.exchange(query, key, value, call.mask.grid, of_all, heads=heads)


def _attend(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, processor: Any) -> Tensor:
    if call.parallel is not None and call.parallel.ring is not None:
        output = call.parallel.ring.attend(
            query, key, value, call.mask, backend=call.backend, text_lengths=call.text_lengths
        )
        if processor.layer_check is not None and call.backend != "dense" and output.numel():
            processor.layer_check.note((query, key, value), output, None, None)
        return output
    if call.backend == "dense":
        named = getattr(processor, "_attention_backend", None)
        output = dense_attention(query, key, value, valid=call.valid, backend=named)
    elif call.choices is None:
        output = _sparse(query, key, value, call.mask, call.text_lengths, call=call, processor=processor)
    else:
        sparse = partial(_sparse, call=call, processor=processor)
        options = {"text_lengths": call.text_lengths, "sparse": sparse}
        return call.choices.attend(processor, (query, key, value), call.mask, **options)
    if call.records is not None and not processor.dense:
        then = call.records
        sparse = partial(_sparse, call=then, processor=processor)
        options = {"text_lengths": then.text_lengths, "sparse": sparse}
        then.choices.record(processor, (query, key, value), output, then.mask, **options)
    return output


def _sparse(  # noqa: PLR0917 (the choices of the layers give all but the call)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    text_lengths: Tensor | None,
    bias: Tensor | None = None,
    *,
    call: AttentionCall,
    processor: Any,
) -> Tensor:
    options = {"text_lengths": text_lengths, "backend": call.backend, "quantize": call.quantize}
    options |= {"far_field": call.far_field, "far_bias": bias}
    output = radial_attention(query, key, value, mask, **options)
    if processor.layer_check is not None:
        compared = mask if call.compare else None
        far = call.far_field, bias
        processor.layer_check.note((query, key, value), output, compared, text_lengths, far=far)
    return output


class TextLengths:
    """Counts valid text tokens of each sample, once for each of a family's latest mask tensors."""

    def __init__(self, family: ModuleType) -> None:
        self._find = getattr(family, "text_mask", None)
        self._latest: list[tuple[Tensor, Tensor]] = []

    def read(self, arguments: dict[str, Any]) -> Tensor | None:
        """Returns int64 `[B]` on the CPU; None if the family has video tokens alone, or no mask was given.

        Raises ValueError if valid tokens do not come first.
        """
        mask = None if self._find is None else self._find(arguments)
        if mask is None:
            return None
        for seen, lengths in self._latest:
            if seen is mask:
                return lengths
        valid = mask.bool().cpu()
        lengths = valid.sum(dim=-1)
        if not torch.equal(valid, torch.arange(valid.shape[-1]) < lengths.unsqueeze(-1)):
            raise ValueError(
                f"valid text tokens must come first, got a mask {valid.int().tolist()}; pad texts at the end"
            )
        self._latest = [(mask, lengths), *self._latest[:1]]
        return lengths


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
        refused = parallel.ring.refusal(quantize, output_check.check, dense.name) if self._in_ring else None
        if refused is not None:
            raise ValueError(refused.reason)
        if self._in_ring and self.adaptive != replace(self.adaptive, **PLAIN):
            words = ", ".join(f"{name}={value!r}" for name, value in vars(self.adaptive).items())
            raise ValueError(
                f"a ring does not support {words}: no process has all keys; allowed: selection='static', "
                "far_field='none', residual='none'"
            )
        self._radial_call: AttentionCall | None = None
        self._dense_call: AttentionCall | None = None
        self._dtype, self._dense_steps = torch.float32, 0
        self._family, self._layers, self._always_dense = family, layers, always_dense
        self._text = TextLengths(family)
        self._counter = StepCounter(pipeline, rising=getattr(family, "TIMESTEPS_RISE", False))
        self._densities: dict[TokenGrid, float] = {}  # of the latest static mask
        self._calls: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a copy or a pickle, without the latest calls, whose masks hold kernels."""
        return {**vars(self), "_family": self._family.__name__, "_radial_call": None, "_dense_call": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _family=import_module(state["_family"]))

    @torch.compiler.disable
    def before_call(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Chooses the calls of a transformer's layers, as its forward pre-hook; None is upstream's."""
        arguments = inspect.signature(type(transformer).forward).bind(transformer, *args, **kwargs).arguments
        latents, grid = arguments["hidden_states"], self._family.token_grid(transformer, arguments)
        lengths = self._text.read(arguments)
        if self.parallel is not None:
            self.parallel.begin(grid, self.config.block_size)
        step, begins = self._counter.advance(arguments["timestep"])
        if begins and step == 0 and self.config.pattern != "dense" and self.observer is None:
            self.schedule.check_run(*self._counter.plan)
        plan = self._counter.plan
        dense = self.config.pattern == "dense" or self.schedule.is_dense(step, *plan)
        records = False
        if self._choices is not None and self.config.pattern != "dense":
            self._begin_choices(transformer, grid, step, first=begins)
            dense = dense or (self.adaptive.needs_dense_step and not self._choices.ready)
            records = dense and self.adaptive.records and self.schedule.precedes_sparse(step, *plan)
            if self.adaptive.selection == "profile" and (records or not dense):
                self._choices.begin_part(self._counter.sigma(), latents.device)
        self._dense_steps += begins and dense
        self._dtype = _working_dtype(latents)
        mask, attends = self._mask(transformer, grid, step), records or not dense
        compare = self.output_check.begin(transformer, None if dense else mask, arguments)
        self._dense_call = None
        if dense or self.schedule.dense_layers:
            self._dense_call = self._choose_dense(transformer, latents, mask, lengths, records)
        self._radial_call = self._dense_call
        if attends:
            sparse = self._sparse_call(latents, transformer.config.attention_head_dim, mask, lengths)
            self._radial_call = sparse._replace(compare=compare)
        if records:
            self._choices.begin_dense()
            self._radial_call = self._dense_call._replace(records=sparse)
        if self.observer is not None:
            sigma = self._counter.sigmas and self._counter.sigmas[step]
            note = self.observer.of_call(step=step, sigma=sigma, mask=mask, text_lengths=lengths)
            calls = self._radial_call, self._dense_call
            self._radial_call, self._dense_call = (call and call._replace(observe=note) for call in calls)
        self._count(mask, None if dense else self._radial_call.backend)

    def attach_to_rope(self, rope: torch.nn.Module, args: tuple, rotary: tuple) -> tuple:
        """Adds the calls of radial and of always dense layers, as forward hook of the rotary embedding."""
        if self.parallel is not None:
            rotary = (self.parallel.shard(table, self._family.ROTARY_TOKENS) for table in rotary)
        return (*rotary, self._radial_call, self._dense_call)

    @torch.compiler.disable
    def after_call(self, transformer: torch.nn.Module, args: tuple, output: Any) -> None:
        """Ends a call, as forward hook of a transformer; raises CheckError if it fails its check."""
        if self._choices is not None:
            self._choices.end_call()
        if self.output_check.check == "off":
            return
        calls = self._radial_call, self._dense_call
        planned = self.schedule.num_steps or self._counter.planned_steps
        step = f"step {self._counter.step + 1}" + (f" of {planned}" if planned else "")
        backends = tuple("dense" if call is None else call.backend for call in calls)
        moment = f"{step}, {str(self._dtype).removeprefix('torch.')}"
        self.output_check.end(transformer, output[0], backends, moment)

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
            "calls": {name: count for name, count in self._calls.items() if count},
            "quantize": self.quantize,
            "adaptive": vars(self.adaptive) | (chosen or {}),
            "dense_backend": self.dense.report(),
            "check": self.output_check.report(),
        }

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
        heads = transformer.config.num_attention_heads
        return _per_head(
            grid, self.config, -(-heads // (1 if self.parallel is None else self.parallel.degree))
        )

    def _sparse_call(
        self, latents: Tensor, width: int, mask: BlockMask, lengths: Tensor | None
    ) -> AttentionCall:
        """Returns how the layers of a sparse call attend."""
        return AttentionCall(
            mask,
            self._choose(latents, width, mask),
            self.quantize,
            text_lengths=lengths,
            parallel=self.parallel,
            far_field=self.adaptive.far_field,
            choices=self._choices,
        )

    def _choose(self, latents: torch.Tensor, width: int, mask: BlockMask) -> str:
        """Returns the backend of radial layers with heads `width` wide; logs the choice of "auto"."""
        if self.backend != "auto":
            return self.backend
        call = Call(latents.device, self._dtype, width, torch.is_grad_enabled(), mask, self.quantize)
        call = replace(call, partial=self._in_ring, far_field=self.adaptive.far_field)
        chosen = choose_backend(call)
        levels = self._choices.densities if self._choices is not None else ()
        asked = " to ".join(f"{density:.3f}" for density in sorted({*levels[:1], *levels[-1:]}))
        report_choice(chosen, latents, mask, f"{asked} (chosen)" if levels else "")
        return chosen

    def _choose_dense(
        self,
        transformer: torch.nn.Module,
        latents: Tensor,
        mask: BlockMask,
        lengths: Tensor | None,
        records: bool,
    ) -> AttentionCall | None:
        """Returns how dense layers attend: None by upstream, whose backend may be chosen by time first."""
        grid = mask.grid
        if self.dense.name == "sage" or self._in_ring:
            mask = radial_mask(grid, replace(self.config, pattern="dense"))
            backend = "dense" if self._in_ring else "sage"
            return AttentionCall(mask, backend, text_lengths=lengths, parallel=self.parallel)
        settings = transformer.config
        heads = -(-settings.num_attention_heads // (1 if self.parallel is None else self.parallel.degree))
        shape = len(latents), grid.tokens, heads, settings.attention_head_dim
        self.dense.prepare(shape, self._dtype, latents.device, mask)
        sliced = lengths is not None and latents.device.type in SLICED_DEVICES
        masks = getattr(self._family, "DENSE_HAS_MASK", False)
        if self.parallel is None and self.observer is None and not records and not (sliced and masks):
            return None
        valid = None
        if sliced:
            valid = tuple((lengths + grid.video_tokens).tolist())
        elif lengths is not None:
            valid = torch.arange(grid.tokens) < grid.video_tokens + lengths[:, None]
            valid = valid[:, None, None].to(latents.device)
        return AttentionCall(mask, "dense", text_lengths=lengths, parallel=self.parallel, valid=valid)

    def _count(self, mask: BlockMask, backend: str | None) -> None:
        """Counts the attention calls that follow; a compiled block cannot count them itself."""
        before = self._densities.pop(mask.grid, None)
        self._densities[mask.grid] = mask.density if before is None or backend is not None else before
        dense = self._layers if backend is None else self._always_dense
        self._calls["dense"] += dense
        if backend is not None:
            self._calls[backend] += self._layers - dense


@lru_cache(maxsize=8)
def _per_head(grid: TokenGrid, config: RadialConfig, heads: int) -> BlockMask:
    """Returns the least mask that heads may choose, one pattern for each."""
    return BlockMask(grid, config.block_size, floor_blocks(grid, config).repeat(heads, 1, 1))


def _working_dtype(latents: torch.Tensor) -> torch.dtype:
    """Returns the dtype of the attention: autocast's if it is on."""
    kind = latents.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return latents.dtype
