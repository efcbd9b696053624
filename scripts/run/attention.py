"""Reads the group `attention`: its schedule, its mask and its densities, step by step."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask
from radial_attn.chooser import Choice, Chooser
from radial_attn.kernels.contract import Call
from radial_attn.masks.density import resolve_density, resolve_near
from radial_attn.masks.patterns import COMPARED
from radial_attn.masks.radial import FIXED
from radial_attn.models.profile import MeasuredModel, ModelProfile
from radial_attn.models.runtime.adaptive import Adaptive
from radial_attn.models.runtime.schedule import AboveSigma, Schedule, read_density
from radial_attn.selection import Budget, floor_blocks
from scripts.run.config import AttentionConfig, MaskConfig
from scripts.run.errors import UsageError
from scripts.run.schema import find_path

ADAPTIVE_OPTIONS = ("selection", "budget", "far_field", "residual", "residual_memory")
MASK_OPTIONS = ("decay_factor", "block_size", "pattern", "compat", *FIXED)


def schedule_of(attention: AttentionConfig, steps: int) -> Schedule:
    """Returns which steps are dense, and the range of the density."""
    density = read_density(attention.density)
    counts = attention.dense_steps, attention.dense_layers, attention.dense_last_steps
    return Schedule(*counts, steps, density if isinstance(density, tuple) else None)


def dense_steps(
    attention: AttentionConfig,
    steps: int,
    sigmas: list[float] | None = None,
    boundary: float | None = None,
) -> tuple[int, ...]:
    """Returns the numbers of the denoising steps, from 0, that are dense in every layer.

    The second expert of Wan2.2, below the noise level `boundary`, begins with a dense step if its layers
    choose blocks or keep residuals. Raises UsageError if they depend on noise levels that are not known.
    """
    if attention.pattern == "dense":
        return tuple(range(steps))
    schedule = schedule_of(attention, steps)
    if isinstance(schedule.dense_steps, AboveSigma) and sigmas is None:
        raise UsageError(
            f"attention.dense_steps: got {attention.dense_steps!r}, but the noise levels of this model are "
            "not known before it is loaded; set generation.flow_shift, or give a number or share of steps"
        )
    dense = {step for step in range(steps) if schedule.is_dense(step, None, sigmas)}
    if boundary is not None and sigmas is not None and adaptive_of(attention).needs_dense_step:
        dense |= set([step for step, sigma in enumerate(sigmas) if sigma < boundary][:1])
    return tuple(sorted(dense))


def adaptive_of(attention: AttentionConfig) -> Adaptive:
    """Returns the options that go beyond one mask for all heads."""
    profile = None if attention.profile is None else str(find_path(attention.profile))
    return Adaptive(**{name: getattr(attention, name) for name in ADAPTIVE_OPTIONS}, profile=profile)


def sparse_name(attention: Mapping[str, Any]) -> str:
    """Names what runs at sparse steps by the group `attention`: a pattern, chosen blocks, a kept output."""
    if attention["pattern"] != "dense":
        if attention.get("residual") == "output":
            return "kept output"
        if attention.get("selection", "static") != "static":
            return "chosen"
    return attention["pattern"]


def check_profile(attention: AttentionConfig, model: MeasuredModel) -> None:
    """Raises UsageError for a profile that cannot be read, or that was measured on another model."""
    if attention.profile is None:
        return
    remedy = "make one for it: bash scripts/calibrate.sh CONFIG.yaml"
    try:
        difference = ModelProfile.read(find_path(attention.profile)).model.other(model)
    except ValueError as error:
        raise UsageError(f"attention.profile: {error}") from error
    if difference is not None:
        raise UsageError(
            f"attention.profile: got {attention.profile!r}, measured on another model: {difference}; {remedy}"
        )


def step_densities(
    attention: AttentionConfig,
    dense: tuple[int, ...],
    grid: TokenGrid,
    *,
    steps: int,
    sigmas: list[float] | None,
    mask: RadialConfig,
) -> dict[int, float]:
    """Returns the density of each step that is not dense, by number; `sigmas`: noise level of each step.

    Raises UsageError for a density that no mask has, or below what every mask keeps, and for a selection or a
    residual without a dense step before the first sparse one.
    """
    sparse = sorted(set(range(steps)) - set(dense))
    for name, plain in (("selection", "static"), ("residual", "none")):
        got = getattr(attention, name)
        if got not in (plain, "profile") and sparse and sparse[0] == 0:
            raise UsageError(
                f"attention.{name}: got {got!r}, which needs a dense step before the first sparse one; set "
                "attention.dense_steps=1 or more"
            )
    schedule = schedule_of(attention, steps)
    densities: dict[int, float] = {}
    if schedule.density_range is not None:
        everything = schedule.densities(None, sigmas)
        densities = {step: density for step, density in everything.items() if step not in dense}
    if not densities:
        given = read_density(attention.density)
        static = attention.selection == "static" or given is None
        densities = dict.fromkeys(sparse, radial_mask(grid, mask).density if static and sparse else given)
    elif attention.selection == "static":
        densities = {step: _near(attention, grid, mask, density) for step, density in densities.items()}
    if attention.residual == "output":
        return dict.fromkeys(densities, 0.0)
    if attention.selection != "static" and densities:
        try:
            tokens = grid.block_tokens(attention.block_size)
            Budget(floor_blocks(grid, mask), tokens, list(densities.values()), attention.budget)
        except ValueError as error:
            raise UsageError(
                f"attention.density: {str(error).removeprefix('density ')}; the blocks with text and the "
                "diagonal are always kept"
            ) from error
    return densities


def _near(attention: AttentionConfig, grid: TokenGrid, mask: RadialConfig, density: float) -> float:
    """Returns the density of the static mask nearest to one of a range."""
    try:
        solved = resolve_near(grid, replace(mask, density=density))
    except ValueError as error:
        raise UsageError(
            f"attention.density: got {attention.density}, but no mask has {density:.4g}: {error}"
        ) from error
    return radial_mask(grid, solved).density


def radial_config(attention: MaskConfig, references: int = 0) -> RadialConfig:
    """Returns the group `attention` as the method's own options.

    With a sink every query also sees the frames of VACE's `references`, which come before the video's first.
    Raises UsageError for options that `attention.compat` does not take.
    """
    options = {name: getattr(attention, name) for name in MASK_OPTIONS}
    density = read_density(attention.density)
    options["density"] = None if isinstance(density, tuple) else density
    if references and attention.sink:
        options["sink"] = references + 1
    if attention.compat == "none":
        return RadialConfig(**options)
    if density is not None:
        raise UsageError(
            f"attention.density: got {attention.density}, but attention.compat={attention.compat} has a rule "
            "of its own; set attention.density=null"
        )
    try:
        return RadialConfig(**options | dict.fromkeys(FIXED))
    except ValueError as error:
        raise UsageError(f"attention.{error}") from error


def solve_mask(attention: MaskConfig, grid: TokenGrid, references: int = 0) -> RadialConfig:
    """Returns the options of the mask with `attention.density` solved for this grid.

    Raises UsageError if the grid has no mask of that density, if another pattern has none about as dense, or
    if the program of `attention.compat` has none.
    """
    wanted = radial_config(attention, references)
    if getattr(attention, "selection", "static") != "static":
        wanted = replace(wanted, density=None)  # the heads choose; this mask is not used
    try:
        solved = resolve_density(grid, wanted)
    except ValueError as error:
        raise UsageError(f"attention.density: got {wanted.density:g}, which no mask has: {error}") from error
    try:
        if solved.compat != "none":
            radial_mask(grid, solved)
    except ValueError as error:
        raise UsageError(f"attention.compat: got {solved.compat!r}: {error}") from error
    try:
        if solved.pattern in COMPARED:
            radial_mask(grid, solved)  # raises if there is none; the mask is cached
    except ValueError as error:
        raise UsageError(
            f"attention.pattern: got {solved.pattern!r}, which has no mask about as dense: {error}"
        ) from error
    return solved


def sparse_call(attention: AttentionConfig, mask: BlockMask, device: str, dtype: str, width: int) -> Call:
    """Returns what decides which backends serve the sparse calls of heads `width` wide."""
    quantize = None if attention.quantize == "none" else attention.quantize
    far_field = "none" if attention.pattern == "dense" else attention.far_field
    return Call(
        torch.device(device), getattr(torch, dtype), width, False, mask, quantize, far_field=far_field
    )


def measured(attention: AttentionConfig, call: Call, tokens: int) -> list[str]:
    """Returns what is measured at the first sparse call; [] if an order decides."""
    kept = attention.pattern == "dense" or attention.residual == "output" or call.mask.is_dense
    if attention.backend != "auto" or kept or not Chooser(attention.tune).measures(call.device):
        return []
    return Choice(call, (1, tokens, 1, call.width), call.mask.density, "").candidates()


def attention_arguments(attention: AttentionConfig, references: int = 0) -> dict[str, Any]:
    """Returns the group `attention` as the keyword arguments of `apply_radial_attention`."""
    names = ("dense_steps", "dense_layers", "dense_last_steps", "dense_backend", "backend", "tune", "check")
    arguments = {name: getattr(attention, name) for name in names}
    if attention.pattern != "dense":  # which has no blocks to choose and drops none
        arguments |= vars(adaptive_of(attention))
    density = read_density(attention.density)
    arguments["density_range"] = density if isinstance(density, tuple) else None
    quantize = None if attention.quantize == "none" else attention.quantize
    return arguments | {"config": radial_config(attention, references), "quantize": quantize}
