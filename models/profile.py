"""Keeps what each head of a model loses with each part of the video, for runs without a dense step.

A few dense videos show it. `Reading` adds up what `measure_blocks` finds, and `ModelProfile` holds it in a
small file: maps over a coarse grid of cells, frames by positions in a frame, of each head and part of the
schedule. They serve other sizes as they are. At another length the logarithm of a map, which is a score, is a
sum of waves over the distance of two frames: the rotary embedding turns query and key against each other by
known angles a frame, so that heads of a longer video look also a whole period further.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from radial_attn.grid import TokenGrid
from radial_attn.selection import Measured, far_correction, measure_blocks

CELLS = 160  # along one side of a map, at most if frames alone are not more
BYTES = 1_000_000  # of a file, at most
COMPONENTS = 48  # at most: more add nothing that was measured
SHARES = tuple(step / 16 for step in range(16))  # of a head's blocks that are kept, with a correction each
EXACT = 1024  # rows up to which all components are computed
LEAST, RIDGE = 1e-4, 0.03  # of waves: smallest value of a map, weight of small amplitudes
EDGE = 1e-4  # noise levels that differ less are the same
VERSION = "1"


@dataclass(frozen=True)
class MeasuredModel:
    """Tells which model a profile belongs to.

    Attributes:
        family: as `radial_attn.models` names its fork: "wan", "mochi", ...
        layers: with self-attention over the video, in order of execution.
        heads, width: of a layer, and channels of a head.
        weights: digest of the weights, or None if it is not known.
    """

    family: str
    layers: int
    heads: int
    width: int
    weights: str | None = None

    def other(self, model: "MeasuredModel") -> str | None:
        """Returns how another model differs from this one, as text, None if it may be the same."""
        for name, value in asdict(self).items():
            theirs = getattr(model, name)
            if value != theirs and None not in (value, theirs):
                return "other weights" if name == "weights" else f"{name} {value}, not {theirs}"
        return None


@dataclass
class Cells:
    """Divides the video of a grid into cells: frames, and equal runs of tokens of each frame.

    Attributes:
        frames, positions: their numbers.
        order: of the tokens, as in `TokenGrid`.
    """

    frames: int
    positions: int
    order: str = "raster"

    @classmethod
    def of(cls, grid: TokenGrid, block_size: int) -> "Cells":
        """Returns cells of one block, or as many as `CELLS` allows."""
        in_frame = -(-grid.tokens_per_frame // block_size)
        return cls(grid.frames, max(1, min(in_frame, CELLS // grid.frames)), grid.order)

    def weights(self, grid: TokenGrid, block_size: int) -> Tensor:
        """Returns the share of each cell in the tokens of each block, float32 `[Q, cells]`; text has none.

        Raises ValueError for a grid of another order: its cells lie elsewhere in the frame.
        """
        if grid.order != self.order:
            raise ValueError(
                f"the profile is of tokens in the order {self.order!r}, got {grid.order!r}; calibrate again"
            )
        token = torch.arange(grid.video_tokens)
        frame = token // grid.tokens_per_frame
        position = token % grid.tokens_per_frame * self.positions // grid.tokens_per_frame
        counts = grid.block_tokens(block_size)
        total = torch.zeros(len(counts), self.frames * self.positions)
        ones = torch.ones(grid.video_tokens)
        total.index_put_((token // block_size, frame * self.positions + position), ones, accumulate=True)
        return total / counts[:, None]


@dataclass
class Reading:
    """Adds up the calls of a dense run, layer by layer, in each part of the schedule.

    Attributes:
        grid, block_size: of the run.
        sums: by part and layer, float32 `[4, H, cells, cells]`: the squared loss without and with a far
            field, the mass, and the mass of the pooled keys.
        counts: samples in each sum.
    """

    grid: TokenGrid
    block_size: int
    sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    counts: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def cells(self) -> Cells:
        return Cells.of(self.grid, self.block_size)

    def add(self, part: int, layer: int, tensors: Sequence[Tensor], text_lengths: Tensor | None) -> None:
        """Measures a call of a layer: query, key and value `[B, S, H, D]`."""
        to_cells = self.cells.weights(self.grid, self.block_size)
        to_cells = (to_cells / to_cells.sum(0).clamp(min=1e-9)).to(tensors[0].device)
        near, far = (
            measure_blocks(tensors, self.grid, self.block_size, far_field=far, text_lengths=text_lengths)
            for far in (False, True)
        )
        measured = torch.stack([near.loss.square(), far.loss.square(), far.mass, far.pooled]).sum(1)
        at = part, layer
        self.sums[at] = self.sums.get(at, 0) + (to_cells.T @ measured @ to_cells).cpu()
        self.counts[at] = self.counts.get(at, 0) + len(tensors[0])

    def __add__(self, other: "Reading") -> "Reading":
        sums = {at: self.sums[at] + other.sums[at] for at in self.sums}
        counts = {at: self.counts[at] + other.counts[at] for at in self.counts}
        return Reading(self.grid, self.block_size, sums, counts)


@dataclass(frozen=True, eq=False)
class ModelProfile:
    """Holds the profile of a model; `losses` and `bias` read it.

    Attributes:
        model: that it was measured on.
        cells: of its maps.
        edges: least noise level of each part of the schedule, descending, 1 for noise; the last part takes
            all below.
        frequencies: radians by which the rotary embedding in time turns from frame to frame; empty if it is
            learned.
        basis: maps that all heads are sums of, float16 `[R, cells * cells]`.
        parts: of each basis map in the root of each head's loss without a far field, of its loss with one,
            and of its mass, float16 `[3, P, L, H, R]`.
        biases: of each head's far field, float16 `[P, L, H, len(SHARES)]`, by the share of blocks that it
            keeps.
        about: how it was made, for people.
    """

    model: MeasuredModel
    cells: Cells
    edges: tuple[float, ...]
    frequencies: tuple[float, ...]
    basis: Tensor = field(repr=False)
    parts: Tensor = field(repr=False)
    biases: Tensor = field(repr=False)
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        reading: Reading,
        model: MeasuredModel,
        edges: Sequence[float],
        *,
        frequencies: Sequence[float] = (),
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> "ModelProfile":
        """Makes a profile that `to_bytes` writes in at most `BYTES`."""
        every = [(part, layer) for part in range(len(edges)) for layer in range(model.layers)]
        means = torch.stack([reading.sums[at] / reading.counts[at] for at in every])  # [P L, 4, H, c, c]
        powers = torch.tensor([0.25, 0.25, 0.5]).view(3, 1, 1, 1)  # roots: large and small ones both count
        roots = means[:, :3].clamp(min=0) ** powers
        rows = roots.movedim(1, 0).flatten(0, 2).flatten(1)  # [2 P L H, c c]
        scale = 1.0 / max(1e-30, rows.max().item())  # float16 holds what is near 1 best
        fitting = (BYTES - 2 * len(every) * model.heads * len(SHARES) - 10_000) // (2 * sum(rows.shape))
        parts, basis = _components(rows * scale, max(1, min(COMPONENTS, fitting)))
        shape = 3, len(edges), model.layers, model.heads
        biases = [_biases(Measured(mass, pooled, loss)) for _, loss, mass, pooled in means]
        return cls(
            model=model,
            cells=reading.cells,
            edges=tuple(map(float, edges)),
            frequencies=tuple(map(float, frequencies)),
            basis=basis.half(),
            parts=parts.view(*shape, -1).half(),
            biases=torch.stack(biases).view(*shape[1:], -1).half(),
            about=dict(about),
        )

    def part(self, sigma: float) -> int:
        """Returns the part of the schedule that a noise level, 1 for noise, belongs to."""
        above = (number for number, edge in enumerate(self.edges) if sigma >= edge - EDGE)
        return next(above, len(self.edges) - 1)

    def losses(self, part: int, layer: int, grid: TokenGrid, block_size: int, *, far_field: bool) -> Tensor:
        """Returns what each head loses with each block, float32 `[1, H, Q, K]`, up to a factor for all."""
        at, cells = (part, layer), self.cells
        roots = (self.parts[[int(far_field), 2]][:, *at].float() @ self.basis.float()).clamp(min=0)
        maps = roots.square().unflatten(-1, (cells.frames, cells.positions) * 2)  # [2, H, F, P, F, P]
        if grid.frames == cells.frames:
            losses = maps[0]
        else:
            losses, mass = _at_length(maps, grid.frames, self.frequencies)
            losses = losses / mass.sum((-2, -1), keepdim=True)
            cells = replace(cells, frames=grid.frames)
        to_blocks = cells.weights(grid, block_size)
        return (to_blocks @ losses.flatten(-2).flatten(-3, -2) @ to_blocks.T)[None]

    def bias(self, part: int, layer: int, kept: Tensor) -> Tensor:
        """Returns the bias of each head's far field, float32 `[1, H, 1, 1]`, if it keeps `[1, H, Q, K]`."""
        places = (kept.float().mean((2, 3))[0] * len(SHARES)).clamp(max=len(SHARES) - 1)
        lower = places.floor().long().clamp(max=len(SHARES) - 2)
        curve = self.biases[part, layer].float()
        ends = (curve.gather(1, (lower + step)[:, None])[:, 0] for step in (0, 1))
        return torch.lerp(*ends, places - lower).view(1, -1, 1, 1)

    def to_bytes(self) -> bytes:
        """Returns the content of a file, in safetensors format."""
        facts = {"model": asdict(self.model), "cells": asdict(self.cells), "edges": self.edges}
        facts["frequencies"] = self.frequencies
        head = {"version": VERSION, "profile": json.dumps(facts | {"about": dict(self.about)})}
        tensors = {name: getattr(self, name).contiguous() for name in ("basis", "parts", "biases")}
        return save(tensors, head)

    @classmethod
    def read(cls, file: str | Path) -> "ModelProfile":
        """Reads a file.

        Raises:
            ValueError: it does not exist, is no profile, or is damaged.
        """
        try:
            with safe_open(file, "pt") as stored:
                head = stored.metadata() or {}
                if head.get("version") != VERSION:
                    raise ValueError(f"it is no profile of version {VERSION}")
                facts = json.loads(head["profile"])
                tensors = {name: stored.get_tensor(name) for name in ("basis", "parts", "biases")}
            profile = cls(
                MeasuredModel(**facts["model"]),
                Cells(**facts["cells"]),
                *(tuple(map(float, facts[name])) for name in ("edges", "frequencies")),
                **tensors,
                about=facts["about"],
            )
            profile._check()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"profile {str(file)!r} cannot be read: {reason}; calibrate again") from error
        return profile

    def _check(self) -> None:
        """Raises ValueError unless all shapes fit together and all values are finite."""
        model, cells = self.model, (self.cells.frames * self.cells.positions) ** 2
        heads = len(self.edges), model.layers, model.heads
        count = len(self.basis)
        wanted = {"basis": (count, cells), "parts": (3, *heads, count), "biases": (*heads, len(SHARES))}
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or not tensor.isfinite().all():
                raise ValueError(f"its {name} must be finite, {list(shape)}, got {list(tensor.shape)}")


def _at_length(maps: Tensor, frames: int, frequencies: Sequence[float]) -> Tensor:
    """Returns maps `[2, H, F, P, F, P]` for another number of frames, by the distance of two frames.

    Distances that were measured keep their mean square. Beyond them the logarithm is a sum of waves, fitted
    to those that were: only waves that went through a whole period are known well enough.
    """
    far = maps.shape[2] - 1
    squares = maps.square()
    diagonals = [squares.diagonal(d, 2, 4).mean(-1) for d in range(-far, far + 1)]
    measured = torch.stack(diagonals, -1).sqrt()  # [2, H, P, P, 2F - 1]
    known = [w for w in frequencies if w * (2 * far + 1) >= 2 * math.pi]
    near, wide = (_waves(known, reach) for reach in (far, frames - 1))
    logs = measured.clamp(min=LEAST * measured.amax((-3, -2, -1), keepdim=True).clamp(min=1e-30)).log()
    weights = far + 1.0 - torch.arange(-far, far + 1).abs()  # pairs of frames at a distance
    gram = near.T * weights @ near
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    ridge[0, 0] = 0
    fitted = logs @ (weights[:, None] * near) @ torch.linalg.inv(gram + ridge) @ wide.T
    curve = fitted.clamp(max=logs.amax((-3, -2, -1), keepdim=True)).exp()  # [2, H, P, P, 2 frames - 1]
    reach = min(far, frames - 1)
    curve[..., frames - 1 - reach : frames + reach] = measured[..., far - reach : far + reach + 1]
    pairs = torch.arange(frames) - torch.arange(frames)[:, None] + frames - 1
    return curve[..., pairs].permute(0, 1, 4, 2, 5, 3)


def _waves(frequencies: Sequence[float], reach: int) -> Tensor:
    """Returns 1, cosine and sine of each frequency at distances `-reach .. reach`, `[2 reach + 1, W]`."""
    angles = torch.outer(torch.arange(-reach, reach + 1.0), torch.tensor(frequencies))
    return torch.cat([torch.ones(len(angles), 1), angles.cos(), angles.sin()], 1)


def _components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns factors `[N, R]` and `[R, c]` of the best approximation of `[N, c]`, `R` at most `count`."""
    if min(rows.shape) <= EXACT:
        left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, sizes, right = torch.svd_lowrank(rows, count + 8, niter=4)
        right = right.T
    return left[:, :count] * sizes[:count], right[:count]


def _biases(measured: Measured) -> Tensor:
    """Returns the correction of each head `[H, len(SHARES)]` if it keeps that share of its blocks."""
    measured = Measured(*(x[None] for x in measured))
    loss = measured.loss.clone()
    loss.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    order = loss.flatten(2).argsort(-1, descending=True).argsort(-1).view(loss.shape)
    count = loss.shape[-1] ** 2
    kept = (order < round(share * count) for share in SHARES)
    return torch.cat([far_correction(measured, x)[0, :, 0] for x in kept], -1)
