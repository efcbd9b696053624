"""Turns radial attention on in one line, with the settings that are published for the model."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from radial_attn import RadialConfig, radial_mask

from .apply import HANDLE, RadialAttentionHandle, apply_radial_attention, family_of
from .published import ModelTraits, PublishedSettings, nearest_settings, traits_of
from .runtime.observe import Seen
from .runtime.schedule import AboveSigma, Schedule, read_density
from .runtime.transformers import transformers_of


def enable(
    model: Any,
    *,
    density: float | Mapping[str, float] | None = None,
    decay_factor: float | None = None,
    block_size: int | None = None,
    sink: bool | int | None = None,
    neighbour: float | str | None = None,
    decimation_width: int | str | None = None,
    pattern: str | None = None,
    compat: str = "none",
    dense_steps: int | float | str | Sequence[int] | None = None,
    dense_layers: int | None = None,
    dense_last_steps: int = 0,
    num_steps: int | None = None,
    selection: str = "static",
    budget: str = "layer",
    far_field: str = "none",
    residual: str = "none",
    residual_memory: str = "device",
    profile: str | Path | None = None,
    backend: str = "auto",
    quantize: str | None = None,
    dense_backend: str = "auto",
    tune: str = "auto",
    check: str = "auto",
    parallel: Any = None,
    agree: Callable[[Any], Any] | None = None,
    observe: Callable[[Seen], None] | None = None,
    quiet: bool = False,
    **unknown: Any,
) -> RadialAttentionHandle:
    """Routes the self-attention of a pipeline of diffusers, or of its transformer, through radial attention.

    The settings are those published for the model, or the nearest ones (`models.published`). An option that
    is None keeps its published value. `RadialConfig` and `apply_radial_attention` explain the options.
    `density` replaces `decay_factor`; `{"start": 0.4, "end": 0.15}` changes it from the first sparse step to
    the last. `compat` names the program whose mask to make; leave out the options that it fixes.

    The published number of dense steps is a share of the steps: 12 of 50 become 7 of 30. The pipeline's
    scheduler has the number of steps when a run begins; a transformer alone needs `num_steps`. `dense_steps`
    is a number of first steps, a share (0.2 or "20%"), a noise level ("sigma>0.9") or a list of steps from 0.

    `selection="dense_step"` lets each head choose its blocks at the dense steps, and `far_field="linear"`
    lets the dropped blocks count by their means: much closer to dense attention at the same density.
    `selection="profile"` needs no dense step, but a file that calibration made as `profile`.

    Unless `quiet`, two lines on stdout show the settings and their source. The returned handle has `report()`
    and `remove()`, and works as a context manager; `disable(model)` finds it again.

    Raises:
        TypeError: an option does not exist.
        ValueError: the model is no pipeline or transformer, or of another family; an option has a wrong
            value; both `density` and `decay_factor` are given; a transformer alone has no `num_steps`; or
            radial attention is on already. The model is left as it was.
        ImportError: the library of a named `dense_backend` is missing.
    """
    if unknown:
        raise TypeError(_unknown_option(next(iter(unknown))))
    if density is not None and decay_factor is not None:
        raise ValueError(
            f"density and decay_factor exclude each other, got {density!r} and {decay_factor!r}; give one"
        )
    transformers = transformers_of(model)
    family_of(transformers[0])
    traits = traits_of(transformers[0], experts=getattr(model, "transformer_2", None) is not None)
    settings = nearest_settings(traits)
    density_range = read_density(density)
    if not isinstance(density_range, tuple):
        density, density_range = density_range, None
    mask_options = {
        "density": None if density_range else density,
        "decay_factor": decay_factor,
        "block_size": block_size,
        "sink": sink,
        "neighbour": neighbour,
        "decimation_width": decimation_width,
        "pattern": pattern,
        "compat": compat,
    }
    config = settings.mask({name: value for name, value in mask_options.items() if value is not None})
    schedule = Schedule(
        dense_steps=settings.dense_share if dense_steps is None else dense_steps,
        dense_layers=settings.dense_layers if dense_layers is None else dense_layers,
        dense_last_steps=dense_last_steps,
        num_steps=num_steps,
        density_range=density_range,
    )
    adaptive = {"selection": selection, "budget": budget, "far_field": far_field, "profile": profile}
    adaptive |= {"residual": residual, "residual_memory": residual_memory}
    handle = apply_radial_attention(
        model,
        config,
        **vars(schedule),
        **adaptive,
        backend=backend,
        quantize=quantize,
        dense_backend=dense_backend,
        tune=tune,
        check=check,
        parallel=parallel,
        agree=agree,
        observe=observe,
    )
    if not quiet:
        kernel = backend if quantize is None else f"{backend}, quantize={quantize}"
        plain = ("static", "none", "device", None)
        changed = {name: value for name, value in adaptive.items() if value not in plain}
        if selection == "static":
            changed.pop("budget")
        kernel = ", ".join([kernel, *(f"{name}={value}" for name, value in changed.items())])
        print(_mask_line(settings, traits, config, schedule, kernel))
        reads = selection == "dense_step" or residual != "none"  # then the first step is always dense
        shown = replace(schedule, dense_steps=schedule.dense_steps or int(reads))
        print(_dense_line(settings, traits, config, shown))
    return handle


def disable(model: Any) -> bool:
    """Undoes `enable` or `apply_radial_attention`; returns whether there was anything to undo.

    `model` is the pipeline or its transformer, compiled or not. Two transformers that were enabled as one
    pipeline are both restored. Raises ValueError if it is neither a pipeline nor a transformer.
    """
    handles = [vars(transformer).get(HANDLE) for transformer in transformers_of(model)]
    handles = [handle for handle in handles if handle is not None]
    for handle in handles:
        handle.remove()
    return bool(handles)


def _unknown_option(name: str) -> str:
    """Returns the message for an option that does not exist."""
    options = [
        option for option in inspect.signature(enable).parameters if option not in ("model", "unknown")
    ]
    nearest = get_close_matches(name, options, n=1)
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"allowed: {', '.join(options)}"
    return f"enable has no option {name!r}; {remedy}"


def _mask_line(
    settings: PublishedSettings, traits: ModelTraits, config: RadialConfig, schedule: Schedule, backend: str
) -> str:
    """Describes the model, its mask, and the source of the settings."""
    model = settings.model
    if traits != settings.traits:
        model = f"{traits.transformer} ({traits.layers} layers, width {traits.width}), nearest to {model}"
    strength = "decay_factor" if config.density is None else "density"
    names = [strength, "neighbour", "sink", "block_size", "decimation_width"]
    names += [] if config.pattern == "radial" else ["pattern"]
    names += [] if config.compat == "none" else ["compat"]
    text = ", ".join(f"{name}={value}" for name in names if (value := getattr(config, name)) is not None)
    if schedule.density_range is not None:
        text = text.replace(
            f"{strength}={getattr(config, strength)}", "density={:g} to {:g}".format(*schedule.density_range)
        )
    published = vars(settings.config) | {
        "dense_steps": settings.dense_share,
        "dense_layers": settings.dense_layers,
    }
    chosen = vars(config) | vars(schedule)
    changed = [name for name, value in published.items() if chosen[name] not in (value, None)]
    source = settings.source + (f"; changed: {', '.join(changed)}" if changed else "")
    return f"Radial attention for {model}: {text}, backend={backend} ({source})."


def _dense_line(
    settings: PublishedSettings, traits: ModelTraits, config: RadialConfig, schedule: Schedule
) -> str:
    """Describes the dense steps and layers, and the density of the mask if a usual video's is known."""
    if config.pattern == "dense":
        return "Dense: every step and every layer, since pattern=dense."
    layers = "layer 0" if schedule.dense_layers == 1 else f"layers 0 to {schedule.dense_layers - 1}"
    last = (
        "the last step" if schedule.dense_last_steps == 1 else f"the last {schedule.dense_last_steps} steps"
    )
    parts = _leading_text(settings, schedule), layers, last
    counts = schedule.dense_steps, schedule.dense_layers, schedule.dense_last_steps
    dense = ", ".join(part for part, count in zip(parts, counts, strict=True) if count) or "nothing"
    known = settings.grid is not None and traits == settings.traits
    if known and config.pattern == "radial" and config.density is None:
        density = radial_mask(settings.grid, config).density
        return f"Dense: {dense}. Mask density: {density:.3f} at {settings.size}, else see handle.report()."
    return f"Dense: {dense}. Mask density: see handle.report() after the first step."


def _leading_text(settings: PublishedSettings, schedule: Schedule) -> str:
    """Describes the dense steps at the start: their number if it is known, else the share."""
    if isinstance(schedule.dense_steps, AboveSigma):
        return f"steps at {schedule.dense_steps}"
    if isinstance(schedule.dense_steps, tuple):
        return f"steps {', '.join(map(str, schedule.dense_steps))} (from 0)"
    if schedule.num_steps is not None:
        return f"the first {schedule.leading_steps(None)} of {schedule.num_steps} steps"
    if isinstance(schedule.dense_steps, int):
        return "the first step" if schedule.dense_steps == 1 else f"the first {schedule.dense_steps} steps"
    share = f"the first {100 * schedule.dense_steps:g} % of the steps"
    if schedule.dense_steps != settings.dense_share:
        return share
    return f"{share} ({settings.dense_steps} of {settings.steps})"
