"""Extends a model to longer video than in training: its rotary embedding turns by other angles per frame.

Hooks on the rotary embedding rewrite the temporal part of its tables, or change the learned frequencies from
which it makes them. They run before the hooks of runtime/context.py, which split the tables and add to them:
the order in which the two are installed does not matter.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor

from ..runtime.transformers import transformers_of

METHODS = ("plain", "riflex", "interpolate", "ntk", "yarn")
WAN_BASE = 10000.0  # base of Wan's rotary embedding, which does not store it
ONE_PERIOD = 0.9  # share of a period that RIFLEx lets the new length fill
KEPT, STRETCHED = 2.0, 1.0  # turns in training: yarn keeps from, stretches up to
LEARNED = "MochiRoPE"  # gets its frequencies as an argument
ROPES = ("WanRotaryPosEmbed", "HunyuanVideoRotaryPosEmbed", "HunyuanVideo15RotaryPosEmbed", LEARNED)
FAMILIES = "Wan, Wan-VACE, HunyuanVideo, HunyuanVideo 1.5, Mochi"


def extend_positions(model: Any, method: str, train_frames: int, frames: int) -> "PositionsHandle":
    """Changes the temporal frequencies of a transformer, or of a pipeline's, for a longer video.

    Args:
        method: "plain" changes nothing; `rescale` explains the others.
        train_frames, frames: latent frames (temporal tokens) of the training and of the video to come. If
            `frames <= train_frames`, nothing is changed either.

    Raises:
        ValueError: the method or family is unknown, a length is below 1 or beyond the tables, or a
            transformer's positions are extended already. The model is left as it was.
    """
    _check(method, train_frames, frames)
    ropes = [_rope(transformer, frames) for transformer in transformers_of(model)]
    return PositionsHandle(ropes, (method, train_frames, frames))


class PositionsHandle:
    """Holds one extension of positions; `remove()`, or leaving its `with` block, undoes it."""

    def __init__(self, ropes: list[torch.nn.Module], change: tuple[str, int, int]) -> None:
        self._hooks = [hook for rope in ropes for hook in _install(rope, change)]

    def remove(self) -> None:
        """Removes the hooks; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def temporal_frequencies(channels: int, base: float) -> Tensor:
    """Returns radians per latent frame, base^(-2 i / channels), highest first, float64 `[channels / 2]`."""
    return base ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def turns_of(rope: torch.nn.Module | None) -> list[float]:
    """Returns by how many radians a rotary embedding turns from frame to frame of tokens, the most first.

    Empty for learned frequencies, and for embeddings of other kinds.
    """
    if type(rope).__name__ not in ROPES or type(rope).__name__ == LEARNED:
        return []
    wan = type(rope).__name__ == "WanRotaryPosEmbed"
    return temporal_frequencies(*((rope.t_dim, WAN_BASE) if wan else (rope.rope_dim[0], rope.theta))).tolist()


def rescale(method: str, frequencies: Tensor, train_frames: int, frames: int) -> Tensor:
    """Returns a factor for each of `frequencies`, float64 `[..., P]`; exactly 1 for those that stay.

    With s = frames / train_frames above 1, n = P - 1 and periods of 2 pi / frequency latent frames:

    - "riflex" (RIFLEx, arXiv 2502.15894): only the intrinsic component k is lowered, to 0.9 * 2 pi / frames
      (Eq. 8, and the 0.9 of the authors' code), and only if `frames` exceed its period. Eq. 7 makes k the
      component of the period nearest to where videos are seen to repeat. That is not known of each model, so
      k is the component of the shortest period not below `train_frames`: shorter ones turned over in
      training. For HunyuanVideo (k = 4) and CogVideoX (k = 2) this is the authors' choice; for Wan it is 4,
      others take 6, as do `train_frames` of 34 to 51.
    - "interpolate": every component is multiplied by 1 / s.
    - "ntk": the base of the embedding is multiplied by s^(P / n), so component i by s^(-i / n): the highest
      stays, the lowest is interpolated.
    - "yarn": the parts of YaRN (arXiv 2309.00071, "NTK-by-parts"): components that turned twice or more in
      training stay, those that turned once or less are interpolated, with a linear ramp between. The 32 turns
      that YaRN asks for in text would keep none: in the 21 latent frames of Wan the highest turns 3.3 times,
      in the 33 of HunyuanVideo 5.3. Its temperature (Eq. 14) is left out: put into the tables, it would miss
      the text tokens of joint attention, which have none.

    Learned frequencies may have any order and sign, and each head is scaled by itself. "ntk" reads i / n off
    their logarithms, and 0, which does not turn, stays.
    """
    rates = frequencies.detach().double().abs()
    stays = torch.ones_like(rates)
    stretch = frames / train_frames
    if method == "plain" or stretch <= 1:
        return stays
    if method == "riflex":
        factors = _riflex(rates, train_frames, frames)
    elif method == "interpolate":
        factors = stays / stretch
    elif method == "ntk":
        factors = stretch ** -_depth(rates)
    else:
        turns = train_frames * rates / (2 * math.pi)
        kept = ((turns - STRETCHED) / (KEPT - STRETCHED)).clamp(0, 1)
        factors = torch.where(kept == 1, 1, kept + (1 - kept) / stretch)
    return torch.where(rates > 0, factors, stays)


def describe(method: str, train_frames: int, frames: int, frequencies: Tensor | None = None) -> str:
    """Describes what a method does to `frequencies`, `[P]`; None for learned ones, which differ by head.

    Raises ValueError as `extend_positions` does.
    """
    _check(method, train_frames, frames)
    lengths = f"{frames} latent frames, {train_frames} in training"
    if frequencies is None:
        return f"{method}, learned frequencies: {lengths}{'' if frames > train_frames else ', so no change'}"
    factors = rescale(method, frequencies, train_frames, frames)
    changed, count = (factors != 1).nonzero().flatten().tolist(), len(factors)
    if not changed:
        return f"{method}, no change: {lengths}"
    if len(changed) == 1:
        rate = (frequencies.double() * factors)[changed[0]].item()
        what = f"component {changed[0] + 1} of {count} lowered to a period of {2 * math.pi / rate:.1f}"
    else:
        least, most = (1 / factors[changed]).aminmax()
        span = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
        what = f"components {changed[0] + 1} to {changed[-1] + 1} of {count} divided by {span}"
    return f"{method}, {what}: {lengths}"


class _Tables:
    """Changes the tables of a rotary embedding made of positions and a base, as its forward hook."""

    def __init__(self, frequencies: Tensor, patch: int, change: tuple[str, int, int]) -> None:
        factors = rescale(change[0], frequencies, *change[1:])
        (changed,) = (factors != 1).nonzero(as_tuple=True)
        self._frequencies, self._patch = (frequencies * factors)[changed], patch
        self.columns = torch.stack((2 * changed, 2 * changed + 1), dim=1).flatten()
        self._parts: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}

    @torch.compiler.disable
    def __call__(self, rope: torch.nn.Module, args: tuple, tables: tuple[Tensor, Tensor]) -> tuple:
        """Returns cos and sin, `[..., S, ..., D]` with the S tokens frame by frame, in changed copies."""
        columns, *parts = self._turned(args[0].shape[2] // self._patch, tables[0].device)
        copies = tuple(table.clone(memory_format=torch.contiguous_format) for table in tables)
        for table, part in zip(copies, parts, strict=True):
            rows = table.view(len(part), -1, table.shape[-1])
            rows[..., columns] = part[:, None].to(table.dtype)
        return copies

    def _turned(self, frames: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns changed columns, cos and sin, float32 `[frames, columns]`, cached by length and device."""
        if (frames, device) not in self._parts:
            angles = torch.outer(torch.arange(frames, dtype=torch.float64), self._frequencies)
            angles = angles.repeat_interleave(2, dim=1)
            parts = self.columns, angles.cos().float(), angles.sin().float()
            self._parts[frames, device] = tuple(part.to(device) for part in parts)
        return self._parts[frames, device]


class _Learned:
    """Changes the frequencies that a rotary embedding is given, `[3, H, P]`, time first, as pre-hook."""

    def __init__(self, change: tuple[str, int, int]) -> None:
        self._change, self._factors = change, None

    @torch.compiler.disable
    def __call__(self, rope: torch.nn.Module, args: tuple) -> tuple:
        """Returns the arguments with temporal frequencies multiplied, in float32 as the embedding does."""
        frequencies = args[0].float()
        if self._factors is None:  # not before a call, since offloaded weights are elsewhere until then
            method, *lengths = self._change
            self._factors = rescale(method, frequencies[0].cpu(), *lengths).float()
        temporal = frequencies[:1] * self._factors.to(frequencies.device)
        return (torch.cat((temporal, frequencies[1:])), *args[1:])


def _install(rope: torch.nn.Module, change: tuple[str, int, int]) -> list[Any]:
    """Adds hooks to a rotary embedding and returns their handles; none if nothing changes."""
    method, train_frames, frames = change
    if method == "plain" or frames <= train_frames:
        return []
    if type(rope).__name__ == LEARNED:
        return [rope.register_forward_pre_hook(_Learned(change), prepend=True)]
    if type(rope).__name__ == "WanRotaryPosEmbed":
        tables = _Tables(temporal_frequencies(rope.t_dim, WAN_BASE), rope.patch_size[0], change)
    else:
        tables = _Tables(temporal_frequencies(rope.rope_dim[0], rope.theta), rope.patch_size_t, change)
    return [rope.register_forward_hook(tables, prepend=True)] if len(tables.columns) else []


def _riflex(rates: Tensor, train_frames: int, frames: int) -> Tensor:
    """Computes `rescale` for "riflex"; without a period of `train_frames` or more, takes the longest."""
    periods = 2 * math.pi / rates
    turns = periods.isfinite()
    long = turns & (periods >= train_frames)
    shortest = periods.where(long, torch.inf).argmin(dim=-1, keepdim=True)
    longest = periods.where(turns, 0).argmax(dim=-1, keepdim=True)
    chosen = torch.where(long.any(dim=-1, keepdim=True), shortest, longest)
    period = periods.gather(-1, chosen)
    lowered = torch.where(frames > period, ONE_PERIOD * period / frames, 1)
    return torch.ones_like(rates).scatter(-1, chosen, lowered)


def _depth(rates: Tensor) -> Tensor:
    """Returns each component's position by logarithm, from 0, the highest, to 1, the lowest that is not 0."""
    below = torch.log(rates.amax(dim=-1, keepdim=True) / rates)
    span = below.where(rates > 0, 0).amax(dim=-1, keepdim=True)
    return torch.where(span > 0, below / span, 0)


def _check(method: str, train_frames: int, frames: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (("train_frames", train_frames), ("frames", frames)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _rope(transformer: torch.nn.Module, frames: int) -> torch.nn.Module:
    """Returns the rotary embedding of a transformer; ValueError if its positions cannot be extended."""
    name, rope = type(transformer).__name__, getattr(transformer, "rope", None)
    if type(rope).__name__ not in ROPES:
        raise ValueError(f"positions can be extended only for transformers of {FAMILIES}, got {name}")
    if frames > getattr(rope, "max_seq_len", frames):
        raise ValueError(
            f"frames must be at most {rope.max_seq_len}, the last position of this {name}, got {frames}"
        )
    hooks = (*rope._forward_hooks.values(), *rope._forward_pre_hooks.values())
    if any(isinstance(hook, _Tables | _Learned) for hook in hooks):
        raise ValueError(f"positions of this {name} are extended already; call remove() first")
    return rope
