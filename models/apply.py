"""Applies radial attention to one transformer or pipeline of diffusers, and removes it without a trace."""

import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch

from radial_attn import BlockMask, RadialConfig
from radial_attn.chooser import Chooser
from radial_attn.dispatch import BACKENDS
from radial_attn.kernels.contract import QUANTIZE

from .profile import MeasuredModel, ModelProfile
from .runtime.adaptive import Adaptive
from .runtime.choices import Choices
from .runtime.context import RadialContext
from .runtime.counts import other_layers
from .runtime.dense_backend import DenseBackend
from .runtime.observe import Observer, Seen, refusal
from .runtime.output_check import OutputCheck, resolve_check
from .runtime.schedule import Schedule
from .runtime.transformers import head_sizes, parts_of, transformers_of

TRANSFORMERS = {
    "WanTransformer3DModel": "wan",
    "WanVACETransformer3DModel": "wan_vace",
    "SkyReelsV2Transformer3DModel": "skyreels",
    "ChronoEditTransformer3DModel": "chronoedit",
    "AnyFlowTransformer3DModel": "anyflow",
    "WanAnimateTransformer3DModel": "wan_animate",
    "MochiTransformer3DModel": "mochi",
    "LTXVideoTransformer3DModel": "ltx",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    "Kandinsky5Transformer3DModel": "kandinsky5",
}
REFUSED = {  # transformers of video without full self-attention over frames, height and width, and why
    "HeliosTransformer3DModel": "its self-attention joins new frames with coarser tokens of earlier ones",
    "WanAnimate2Transformer3DModel": "its self-attention also reads a cached video, by a mask of its own",
    "AnyFlowFARTransformer3DModel": "its self-attention is causal, over chunks of frames and cached keys",
    "SanaVideoTransformer3DModel": "its self-attention is linear, without a score for each pair of tokens",
    "Cosmos3OmniTransformer": "its video tokens attend in a packed sequence with text, sound and actions",
    "Kandinsky6SRTransformer3DModel": "its self-attention is sparse already, by a mask of its own (NABLA)",
}
HANDLE = "_radial_attention"  # attribute of a transformer that holds its handle


def apply_radial_attention(
    model: Any,
    config: RadialConfig,
    *,
    dense_steps: int | float | str | Sequence[int] = 0,
    dense_layers: int = 0,
    dense_last_steps: int = 0,
    backend: str = "auto",
    quantize: str | None = None,
    dense_backend: str = "auto",
    tune: str = "auto",
    check: str = "auto",
    density_range: tuple[float, float] | None = None,
    selection: str = "static",
    budget: str = "layer",
    far_field: str = "none",
    residual: str = "none",
    residual_memory: str = "device",
    profile: str | Path | None = None,
    num_steps: int | None = None,
    parallel: Any = None,
    agree: Callable[[Any], Any] | None = None,
    observe: Callable[[Seen], None] | None = None,
) -> "RadialAttentionHandle":
    """Routes the self-attention of a transformer, or of a pipeline's, through `radial_attention`.

    Layers `0 .. dense_layers - 1` stay dense at every step. The `dense_steps`, in any form of
    `runtime.schedule.read_dense_steps`, and the last `dense_last_steps` stay dense in every layer. A control
    layer of Wan-VACE counts as the layer that it feeds. The mask follows the size of the latents at each
    call. With a `density_range` the density of the mask goes from the first sparse step to the last.
    `backend` and `quantize` are passed to `radial_attention`.

    `selection`, `budget`, `far_field`, `residual` and `residual_memory` are explained in
    `runtime.adaptive.Adaptive`. With selection="dense_step" the heads choose their own blocks, as many as the
    density of `config` or, without one, of its mask allows. If no dense step comes before the first sparse
    one, that one is dense. With selection="profile" they are chosen by a file of
    models/profile.py, `profile`, without a dense step.

    Dense attention runs upstream's own processor, and `set_attention_backend` governs it. If that was not
    used, `dense_backend="auto"` times a few backends on CUDA, once for the shape of the run, and takes the
    fastest. "native" leaves the choice to upstream, "sage" and "flash4" are backends of
    `radial_attention`, and a name of diffusers' dispatch ("flash") is set. `tune` says whether
    `backend="auto"` measures the backends at the first sparse call of a shape
    (`radial_attn.chooser.Chooser`): "off", "once", "always", or "auto", which is "once" on CUDA and "off"
    elsewhere.

    `check="nan"` raises `CheckError` (runtime/output_check.py) after the first call of a transformer with
    values that are not finite. It names the step (from 1) and the first bad place: an input, the weights
    before a layer (from 0), the layer's attention and its backend, its output projection, or what follows the
    last layer. "reference" also compares the first radial output of each layer and video size with the
    definition, on a sample of query blocks. It logs the errors to "radial_attn" and raises above relative L2
    0.2. "auto" is "nan" for quantised backends and "sage", else "off".

    Two transformers of one pipeline (Wan2.2 A14B) share one count of steps. `num_steps`, the denoising steps
    of a video, is read from `pipeline.scheduler` unless given; a transformer alone needs it for
    `dense_last_steps`. Without a pipeline a lower timestep is the next step and a higher one the next video.
    Mochi's timesteps rise, so there it is the other way around. In training timesteps are random: keep
    `dense_steps` and `dense_last_steps` at 0, and every call is radial.

    `parallel`, a `SequenceParallel` or `RingParallel` of parallel/, shares the sequence with other processes,
    which make the same calls. `agree(value)` returns the value of the first of several processes: all use
    the backends that are the fastest on the first one. With `parallel` but no `agree`, sparse backends are
    not measured.

    `observe(seen)`, with a `Seen` of runtime/observe.py, is called by every attention layer at every step
    before it attends. Dense layers then run diffusers' dispatch instead of upstream's processor, with the
    same result. A compiled transformer or several processes cannot be observed.

    Raises:
        ValueError: the config is no RadialConfig, the profile cannot be read or is of another model, the
            transformer's class is unknown, its self-attention processors are not upstream's (so for a second
            application too), a backend or check is unknown, a count is below 0, `dense_layers` is above the
            number of layers, the last steps cannot be known, or the model cannot be observed. The model is
            left as it was.
        ImportError: the library of a named `dense_backend` is missing.
    """
    if not isinstance(config, RadialConfig):
        raise ValueError(f"config must be a RadialConfig, got {type(config).__name__}")
    if density_range is not None and config.compat != "none":
        raise ValueError(f"density must be left out with compat={config.compat!r}, got {density_range}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize must be one of {QUANTIZE}, got {quantize!r}")
    output_check = OutputCheck(resolve_check(check, quantize, backend, dense_backend))
    dense, chooser = DenseBackend(dense_backend, agree), Chooser(tune, agree)
    schedule = Schedule(dense_steps, dense_layers, dense_last_steps, num_steps, density_range)
    profile = None if profile is None else str(profile)
    adaptive = Adaptive(selection, budget, far_field, residual, residual_memory, profile)
    pipeline = None if isinstance(model, torch.nn.Module) else model
    transformers = transformers_of(model)
    families = [family_of(transformer) for transformer in transformers]
    reason = None if observe is None else refusal(parts_of(model), parallel)
    if reason is not None:
        raise ValueError(reason)
    for transformer, family in zip(transformers, families, strict=True):
        _check_layers(transformer, family, dense_layers)
    measured = None if profile is None else _read_profile(profile, transformers[0], families[0])
    if pipeline is None:
        schedule.is_dense(0, None)
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
        other_layers=other_layers(transformers[0], families[0]),
        chooser=chooser,
        adaptive=adaptive,
        choices=Choices(adaptive, config, parallel, measured) if adaptive.has_state else None,
        pipeline=pipeline,
        parallel=parallel,
        observer=None if observe is None else Observer(observe),
    )
    return RadialAttentionHandle(context, transformers, families[0])


class RadialAttentionHandle:
    """Holds one application of radial attention; `remove()`, or leaving its `with` block, undoes it.

    A copy or a pickle of the model has radial attention too, with a handle of its own, which
    `radial_attn.disable` finds.
    """

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

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_transformers": [reference() for reference in self._transformers]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        transformers = [weakref.ref(x) for x in state["_transformers"] if x is not None]
        vars(self).update(state, _transformers=transformers)

    def remove(self) -> None:
        """Restores the original processors and removes the hooks; a second call does nothing."""
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
        """Returns what ran since the application, as values that JSON can hold.

        - `density`, `grid` (`[frames, height, width]` in tokens): of the latest call, None before the first.
        - `grids`: both for every grid seen, the latest last.
        - `videos`, `steps`, `dense_steps`: how many began.
        - `layers`, `dense_layers`: of one transformer.
        - `calls`: self-attention calls by backend ("dense", ...).
        - `stayed_dense`: how many of them attend to everything because of a "dense_step", a "dense_layer", a
          sequence that is "too_short" to gain, or a "mask" that keeps all; also calls of "cross_attention".
        - `tuning`: what was measured for each `shape`: its `density`, the `backend` that was chosen, the
          `seconds` of those that were right, why others were `refused`, and the `efficiency`. The seconds
          were scaled from those at the density `measured_at`, unless this is None.
        - `quantize`: the option.
        - `adaptive`: the options. If layers choose or keep something, also the mean `density` and
          `residual_bytes` of this process, and the `imbalance` of those that share the heads: the work of the
          busiest over the mean, None for one process.
        - `dense_backend`: `name`, the `backend` in use, and the `seconds` of each that was timed.
        - `check`: `mode`, the number of outputs `compared`, and the `worst` (`where`, `relative_l2`,
          `cosine`).
        """
        return self._context.report()

    def chosen(self, layer: int) -> BlockMask | None:
        """Returns the blocks that the heads of a layer chose, as a mask of `[H, Q, K]`, at the latest step.

        They are those of the first sample; with guidance, of its first half. None if the layer has chosen
        nothing: with selection="static", in a dense layer, or before the first sparse step.

        `layer`: its index by order of execution, from 0.
        """
        return self._context.chosen(layer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _install(self, transformer: torch.nn.Module, family: ModuleType) -> None:
        context = self._context
        layers = zip(family.attention_layers(transformer), _numbering(transformer, family), strict=True)
        for index, (attention, (number, name)) in enumerate(layers):
            before, always_dense = attention.processor, number < context.schedule.dense_layers
            ours = family.RadialProcessor(
                always_dense, context.output_check.add_layer(transformer, always_dense, name)
            )
            vars(ours).update(vars(before))
            context.dense.install(ours)
            ours.index = index
            attention.processor = ours
            self._replaced.append((attention, before, ours))
        self._hooks.append(transformer.register_forward_pre_hook(context.before_call, with_kwargs=True))
        if not hasattr(family, "with_calls"):
            self._hooks.append(transformer.rope.register_forward_hook(context.attach_to_rope))
        if context.parallel is not None:
            self._hooks += context.parallel.install(transformer, family)
        self._hooks.append(transformer.register_forward_hook(context.after_call))


def family_of(transformer: torch.nn.Module) -> ModuleType:
    """Returns the fork of a transformer's family; ValueError if there is none."""
    for cls in type(transformer).__mro__:  # the nearest class decides
        if cls.__name__ in REFUSED:
            raise ValueError(f"radial attention cannot serve {cls.__name__}: {REFUSED[cls.__name__]}")
        if cls.__name__ in TRANSFORMERS:
            return import_module(f".{TRANSFORMERS[cls.__name__]}", __package__)
    raise ValueError(
        f"transformer must be one of {', '.join(TRANSFORMERS)}, got {type(transformer).__name__}"
    )


def measured_model(transformer: torch.nn.Module, family: ModuleType) -> MeasuredModel:
    """Returns what a profile says of its model, but for the weights."""
    name, layers = family.__name__.rpartition(".")[2], len(family.attention_layers(transformer))
    return MeasuredModel(name, layers, *head_sizes(transformer))


def _read_profile(file: str | Path, transformer: torch.nn.Module, family: ModuleType) -> ModelProfile:
    profile = ModelProfile.read(file)
    difference = profile.model.other(measured_model(transformer, family))
    if difference is not None:
        raise ValueError(
            f"profile {str(file)!r} was measured on another model: {difference}; calibrate this one"
        )
    return profile


def _numbering(transformer: torch.nn.Module, family: ModuleType) -> list[tuple[int, str]]:
    """Returns number (dense below `dense_layers`) and name of each self-attention layer, as they run."""
    if hasattr(family, "numbering"):
        return family.numbering(transformer)
    return [(index, f"layer {index}") for index in range(len(family.attention_layers(transformer)))]


def _check_layers(transformer: torch.nn.Module, family: ModuleType, dense_layers: int) -> None:
    name, upstream = type(transformer).__name__, family.UPSTREAM_PROCESSOR
    kinds = {type(attention.processor) for attention in family.attention_layers(transformer)}
    if family.RadialProcessor in kinds:
        raise ValueError(
            f"radial attention is already applied to this {name}; call remove() first, or disable(model)"
        )
    if kinds != {upstream}:
        got = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"self-attention processors of {name} must be {upstream.__name__}, got {got}; "
            "put upstream's back first"
        )
    layers = 1 + max(number for number, _ in _numbering(transformer, family))
    if dense_layers > layers:
        raise ValueError(
            f"dense_layers must be at most {layers}, the layers of this {name}, got {dense_layers}"
        )
