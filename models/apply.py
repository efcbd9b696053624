"""Radial attention for the transformers of diffusers: applied to one instance, taken back without a trace."""

import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Self

import torch

from radial_attn import RadialConfig
from radial_attn.dispatch import BACKENDS
from radial_attn.kernels.contract import QUANTIZE

from .runtime.context import RadialContext
from .runtime.dense_backend import DenseBackend
from .runtime.observe import Observer, Seen, refusal
from .runtime.output_check import OutputCheck, resolve_check
from .runtime.schedule import Schedule

TRANSFORMERS = {
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan_vace",
    "MochiTransformer3DModel": "mochi",
    "LTXVideoTransformer3DModel": "ltx",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
}
HANDLE = "_radial_attention"  # attribute of a transformer: the handle of what is applied to it


def apply_radial_attention(
    model: Any,
    config: RadialConfig,
    *,
    dense_steps: int | float = 0,
    dense_layers: int = 0,
    dense_last_steps: int = 0,
    backend: str = "auto",
    quantize: str | None = None,
    dense_backend: str = "auto",
    check: str = "auto",
    num_steps: int | None = None,
    parallel: Any = None,
    agree: Callable[[Any], Any] | None = None,
    observe: Callable[[Seen], None] | None = None,
) -> "RadialAttentionHandle":
    """Routes the self-attention of a transformer, or of those of a pipeline, through `radial_attention`.

    Layers `0 .. dense_layers - 1` stay dense at every step, steps `0 .. dense_steps - 1` and the last
    `dense_last_steps` in every layer; a control layer of Wan-VACE counts as the layer that it feeds. A float
    as `dense_steps` is a share of the steps of each run. The mask follows the size of the latents at each
    call. `backend` and `quantize` are those of `radial_attention`.

    Dense is upstream's own processor, and `set_attention_backend` governs it. Where that was not used,
    `dense_backend="auto"` takes on CUDA the fastest of a few that it times once on the shape of the run;
    "native" leaves all to upstream, "sage" is our own, and a name of diffusers' dispatch ("flash") is set.

    `check="nan"` raises `CheckError` (runtime/output_check.py) after the first call of a transformer in which
    an output of `radial_attention` is not finite; it names the layer (from 0), step (from 1) and backend.
    "reference" also compares the first radial output of each layer and video size with the definition, on a
    sample of query blocks, logs the errors to "radial_attn", and raises above relative L2 0.2. "auto" is
    "nan" for quantised backends and "sage", else "off".

    Two transformers of one pipeline (Wan2.2 A14B) share one count of steps. `num_steps`, the denoising steps
    of a video, is read from `pipeline.scheduler` unless given; a transformer alone needs it for
    `dense_last_steps`. Without a pipeline a lower timestep is the next step and a higher one the next video
    (for Mochi, whose timesteps rise, a higher and a lower one). In training, where timesteps are random, keep
    `dense_steps` and `dense_last_steps` at 0: every call is radial then.

    `parallel`, a `SequenceParallel` or `RingParallel` of parallel/, shares the sequence with
    other processes, which make the same calls. `agree(value)`, of several processes, gives what the first of
    them has: all take the dense backend that it finds the fastest.

    `observe(seen)`, a `Seen` of runtime/observe.py, is called by every attention layer at every step before
    it attends. Dense layers then go through diffusers' dispatch in place of upstream's processor, with the
    same result. Neither a compiled transformer nor several processes can be observed.

    Raises:
        ValueError: no RadialConfig, an unknown transformer class, self-attention processors other than
            upstream's (so a second application too), an unknown backend or check, a count below 0, more dense
            layers than there are, last steps that cannot be known, or what cannot be observed. The model is
            left as it was.
        ImportError: the library of a named `dense_backend` is missing.
    """
    if not isinstance(config, RadialConfig):
        raise ValueError(f"config must be a RadialConfig, got {type(config).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize must be one of {QUANTIZE}, got {quantize!r}")
    output_check = OutputCheck(resolve_check(check, quantize, backend, dense_backend))
    dense = DenseBackend(dense_backend, agree)
    schedule = Schedule(dense_steps, dense_layers, dense_last_steps, num_steps)
    pipeline = None if isinstance(model, torch.nn.Module) else model
    transformers = transformers_of(model)
    families = [family_of(transformer) for transformer in transformers]
    reason = None if observe is None else refusal(_parts(model), parallel)
    if reason is not None:
        raise ValueError(reason)
    for transformer, family in zip(transformers, families, strict=True):
        _check_layers(transformer, family, dense_layers)
    if pipeline is None:
        schedule.is_dense(schedule.leading_steps(None), None)
    numbers = [number for number, _ in _numbering(transformers[0], families[0])]
    context = RadialContext(
        config,
        schedule=schedule,
        backend=backend,
        quantize=quantize,
        output_check=output_check,
        dense=dense,
        family=families[0],
        layers=len(numbers),
        always_dense=sum(number < dense_layers for number in numbers),
        pipeline=pipeline,
        parallel=parallel,
        observer=None if observe is None else Observer(observe),
    )
    return RadialAttentionHandle(context, transformers, families[0])


class RadialAttentionHandle:
    """One application of radial attention; `remove()`, or leaving its `with` block, takes it back."""

    def __init__(
        self, context: RadialContext, transformers: Sequence[torch.nn.Module], family: ModuleType
    ) -> None:
        self._context = context
        self._replaced: list[tuple[torch.nn.Module, Any, Any]] = []
        self._hooks: list[Any] = []
        self._transformers = [weakref.ref(transformer) for transformer in transformers]
        for transformer in transformers:
            self._install(transformer, family)
            vars(transformer)[HANDLE] = self

    def remove(self) -> None:
        """Puts back the very processors of before and removes the hooks; a second time does nothing."""
        for attention, before, ours in self._replaced:
            self._context.dense.remove(ours, before)
            attention.processor = before
        for hook in self._hooks:
            hook.remove()
        for transformer in filter(None, (reference() for reference in self._transformers)):
            if vars(transformer).get(HANDLE) is self:
                del vars(transformer)[HANDLE]
        self._replaced, self._hooks, self._transformers = [], [], []

    def report(self) -> dict[str, Any]:
        """What ran since the application, as values that JSON can hold.

        `density` and `grid` (`[frames, height, width]` in tokens) of the latest call, None before the first;
        `grids`, both for every grid seen, the latest last; `videos`, `steps` and `dense_steps` begun;
        `layers` and `dense_layers` of one transformer; `calls`, attention calls by backend ("dense", ...);
        `quantize`; `dense_backend`: `name`, the `backend` in use, and the `seconds` of those that were timed;
        `check`: `mode`, the number of outputs `compared`, and the `worst` (`where`, `relative_l2`, `cosine`).
        """
        return self._context.report()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _install(self, transformer: torch.nn.Module, family: ModuleType) -> None:
        context = self._context
        layers = zip(family.attention_layers(transformer), _numbering(transformer, family), strict=True)
        for place, (attention, (number, name)) in enumerate(layers):
            before, always_dense = attention.processor, number < context.schedule.dense_layers
            ours = family.RadialProcessor(
                always_dense, context.output_check.add_layer(transformer, always_dense, name)
            )
            vars(ours).update(vars(before))
            context.dense.install(ours)
            if context.observer is not None:
                context.observer.add(ours, place)
            attention.processor = ours
            self._replaced.append((attention, before, ours))
        self._hooks.append(transformer.register_forward_pre_hook(context.before_call, with_kwargs=True))
        self._hooks.append(transformer.rope.register_forward_hook(context.attach_to_rope))
        if context.parallel is not None:
            self._hooks += context.parallel.install(transformer, family)
        if context.output_check.check != "off":
            self._hooks.append(transformer.register_forward_hook(context.after_call))


def _parts(model: Any) -> list[torch.nn.Module]:
    """The model, or the `transformer` and `transformer_2` of a pipeline."""
    if isinstance(model, torch.nn.Module):
        return [model]
    found = [getattr(model, name, None) for name in ("transformer", "transformer_2")]
    return [part for part in found if part is not None]


def transformers_of(model: Any) -> list[torch.nn.Module]:
    """Return the transformers of a model, without torch.compile's wrapper; ValueError if it has none."""
    found = [getattr(part, "_orig_mod", part) for part in _parts(model)]
    if not found:
        raise ValueError(f"expected a transformer, or a pipeline that has one, got {type(model).__name__}")
    return found


def family_of(transformer: torch.nn.Module) -> ModuleType:
    """The fork of a transformer's family; ValueError where it has none."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in TRANSFORMERS:
            return import_module(f".{TRANSFORMERS[cls.__name__]}", __package__)
    raise ValueError(
        f"transformer must be one of {', '.join(TRANSFORMERS)}, got {type(transformer).__name__}"
    )


def _numbering(transformer: torch.nn.Module, family: ModuleType) -> list[tuple[int, str]]:
    """Number, which is dense below `dense_layers`, and name of each self-attention layer, as they run."""
    if hasattr(family, "numbering"):
        return family.numbering(transformer)
    return [(place, f"layer {place}") for place in range(len(family.attention_layers(transformer)))]


def _check_layers(transformer: torch.nn.Module, family: ModuleType, dense_layers: int) -> None:
    name, upstream = type(transformer).__name__, family.UPSTREAM_PROCESSOR
    kinds = {type(attention.processor) for attention in family.attention_layers(transformer)}
    if family.RadialProcessor in kinds:
        raise ValueError(
            f"radial attention is already applied to this {name}; call remove() first, or disable(model)"
        )
    if kinds != {upstream}:
        got = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"self-attention processors of {name} must be {upstream.__name__}, got {got}")
    layers = 1 + max(number for number, _ in _numbering(transformer, family))
    if dense_layers > layers:
        raise ValueError(
            f"dense_layers must be at most {layers}, the layers of this {name}, got {dense_layers}"
        )
