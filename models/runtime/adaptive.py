"""Holds what the layers of a running video choose and keep at its dense steps: masks per head, residuals.

At a dense step that a sparse one follows, each layer reads where its attention lies, and keeps what its
sparse output lacks. The state belongs to one video, one size and one transformer: a new one begins with a
dense call. Calls of a step are told apart by their order, so each half of guidance has a state of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from radial_attn import BlockMask, RadialConfig, TokenGrid
from radial_attn.kernels.contract import FAR_FIELDS
from radial_attn.residual import RESIDUALS, Residual
from radial_attn.selection import (
    BUDGETS,
    SELECTIONS,
    Budget,
    Measured,
    far_correction,
    floor_blocks,
    measure_blocks,
)
from radial_attn.shards import HeadDeal

Attend = Callable[..., Tensor]  # of query, key, value, mask, text lengths and the bias of the far field


@dataclass(frozen=True)
class Adaptive:
    """Holds the options that go beyond one mask for all heads; the defaults change nothing.

    Attributes:
        selection: "static" for the mask of the configuration; "dense_step" for the blocks that it would have
            cost most to drop at the last dense step.
        budget: who shares the number of blocks: the rows of a "head", the heads of a "layer", or all
            layers of the "model".
        far_field: how dropped blocks count, as in `radial_attention`; with "linear" a dense step also
            measures the bias of each head.
        residual: how the difference to the last dense output is kept and added: "none", "mean" of each block,
            "int8" or "int4". "output" keeps that output instead, and sparse steps compute no attention: the
            control that any other setting must beat.

    Raises:
        ValueError: an unknown value, a residual with a budget of the whole model, or "output" beside blocks
            that count.
    """

    selection: str = "static"
    budget: str = "layer"
    far_field: str = "none"
    residual: str = "none"

    def __post_init__(self) -> None:
        choices = {
            "selection": SELECTIONS,
            "budget": BUDGETS,
            "far_field": FAR_FIELDS,
            "residual": RESIDUALS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {got!r}")
        if self.residual != "none" and self.budget == "model" and self.selection == "dense_step":
            raise ValueError(
                "budget='model' is known only after the last layer of a dense step, too late for "
                f"residual={self.residual!r}; use budget='layer'"
            )

        if self.residual == "output" and (self.selection, self.far_field) != ("static", "none"):
            raise ValueError(
                "residual='output' computes no attention at sparse steps; set selection='static' and "
                f"far_field='none', got {self.selection!r} and {self.far_field!r}"
            )

    @property
    def needs_dense_step(self) -> bool:
        """Tells whether a sparse call needs a dense one before it."""
        return self.selection == "dense_step" or self.residual != "none"

    @property
    def records(self) -> bool:
        """Tells whether a dense step is of use to the sparse ones after it."""
        return self.needs_dense_step or self.far_field == "linear"


@dataclass
class _Layer:
    """Holds the state of one layer in one call of a step.

    Attributes:
        measured: of the blocks, while it waits for the budget of the whole model.
        levels: how many densities keep a block, uint8 `[B, H, Q, K]`; None for the static mask.
        biases: of the far field at each density, `[B, H, 1, 1]`.
        masks: of each sample, at density number `level`.
        deal: the heads that each process computes; None if one has all, or before the first sparse call.
    """

    measured: Measured | None = None
    levels: Tensor | None = None
    biases: list[Tensor] = field(default_factory=list)
    masks: list[BlockMask] = field(default_factory=list)
    level: int = -1
    residual: Residual | None = None
    deal: HeadDeal | None = None


class Choices:
    """Holds the state of a video; see the module. `parallel`: the processes that share the heads, or None."""

    def __init__(self, options: Adaptive, config: RadialConfig, parallel: Any = None) -> None:
        self.options, self._config, self._parallel = options, config, parallel
        self._calls: dict[int, dict[Any, _Layer]] = {}
        self._owner: tuple[Any, ...] = ()
        self._call, self._level = 0, 0
        self._grid: TokenGrid | None = None
        self._budget: Budget | None = None
        self._histogram: Tensor | int = 0
        self._busiest = self._mean = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Returns the options for a copy or a pickle, which begins with a dense call."""
        return {"options": self.options, "_config": self._config, "_parallel": self._parallel}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["options"], state["_config"], state["_parallel"])

    def begin(
        self, transformer: Any, grid: TokenGrid, *, video: int, densities: Sequence[float], first: bool
    ) -> None:
        """Begins a call; drops the state of another video, size or transformer.

        Args:
            video: number of the video.
            densities: of all sparse steps of the run.
            first: whether the call is the first of its step.

        Raises:
            ValueError: a density below what every mask keeps.
        """
        owner = id(transformer), grid, video
        self._call = 0 if first or owner != self._owner else self._call + 1
        if owner != self._owner:
            self._owner, self._grid, self._calls = owner, grid, {}
            if self.options.selection != "static":
                total = self._sum_heads if self._parallel is not None else None
                floor, tokens = floor_blocks(grid, self._config), grid.block_tokens(self._config.block_size)
                self._budget = Budget(floor, tokens, sorted(set(densities)), self.options.budget, total)

    @property
    def ready(self) -> bool:
        """Tells whether this call of a step has a state."""
        return self._call in self._calls

    def clear_call(self) -> None:
        """Drops the state of this call: a dense step is about to fill it again."""
        self._calls[self._call], self._histogram = {}, 0

    def set_density(self, density: float) -> None:
        """Sets the density of the sparse call that follows."""
        self._level = 0 if self._budget is None else self._budget.densities.index(density)

    def record(
        self,
        layer: Any,
        tensors: Sequence[Tensor],
        dense: Tensor,
        mask: BlockMask,
        *,
        text_lengths: Tensor | None,
        sparse: Attend,
    ) -> None:
        """Keeps what a layer needs for the sparse steps to come.

        Args:
            layer: key of the layer.
            tensors: query, key and value, `[B, S, H, D]`.
            dense: the dense output `[B, S, H, D]`.
            mask: the static mask.
            text_lengths: valid text tokens of each sample, int64 `[B]`, or None for all.
            sparse: computes the sparse output with a mask.
        """
        state = self._calls[self._call][layer] = _Layer()
        if self.options.residual == "output":
            state.residual = Residual(
                "output", dense.detach(), None, self._config.block_size, dense.shape[-1]
            )
            return
        if self.options.selection == "dense_step" or self.options.far_field == "linear":
            state.measured = measure_blocks(
                [x.detach() for x in tensors],
                self._grid,
                self._config.block_size,
                far_field=self.options.far_field != "none",
                text_lengths=text_lengths,
            )
        if self.options.selection == "dense_step":
            owned = self._own_heads(dense.shape[2])
            histogram = self._budget.histogram(state.measured.loss[:, :owned])
            if self.options.budget == "model":
                self._histogram = self._histogram + histogram
                return
            self._fix(state, self._budget.cuts(histogram))
        elif self.options.far_field == "linear":
            state.biases = [far_correction(state.measured, mask.blocks.to(dense.device))]
            state.measured = None
        if self.options.residual != "none":
            options = {"text_lengths": text_lengths, "sparse": sparse}
            lacking = self.attend(layer, tensors, mask, **options, residual=False)
            video = slice(self._grid.video_tokens)  # rows of text are dense in every mask
            state.residual = Residual.of(
                self.options.residual, dense[:, video], lacking[:, video], self._config.block_size
            )

    def end_call(self) -> None:
        """Chooses the blocks of all layers, if the whole model shares the budget."""
        layers = [state for state in self._calls.get(self._call, {}).values() if state.measured is not None]
        if layers:
            cuts = self._budget.cuts(self._histogram)
            for state in layers:
                self._fix(state, cuts)

    def deal(self, layer: Any) -> Tensor | None:
        """Deals the heads of a layer to the processes for the sparse call that follows.

        Returns the heads of each process, as in `HeadDeal`; None for all in order.
        """
        state = self._calls.get(self._call, {}).get(layer)
        if state is None or state.levels is None:
            return None
        if state.deal is None or state.level != self._level:
            self._deal(state)
        self._busiest += state.deal.loads.max().item()
        self._mean += state.deal.loads.double().mean().item()
        return None if state.deal.in_order else state.deal.heads

    def attend(
        self,
        layer: Any,
        tensors: Sequence[Tensor],
        mask: BlockMask,
        *,
        text_lengths: Tensor | None,
        sparse: Attend,
        residual: bool = True,
    ) -> Tensor:
        """Computes a layer's sparse attention `[B, S, H, D]`; arguments are as in `record`."""
        state = self._calls.get(self._call, {}).get(layer)
        if state is not None and state.residual is not None and state.residual.kind == "output":
            return state.residual.values
        masks = [mask] if state is None or state.levels is None else self._masks(state)
        bias = state.biases[self._level] if state is not None and state.biases else None
        if len(masks) == 1:
            output = sparse(*tensors, masks[0], text_lengths, bias)
        else:
            parts = []
            for i, own in enumerate(masks):
                one = [x if x is None else x[i : i + 1] for x in (*tensors, text_lengths, bias)]
                parts.append(sparse(*one[:3], own, *one[3:]))
            output = torch.cat(parts)
        if not residual or state is None or state.residual is None:
            return output
        video = self._grid.video_tokens
        whole = state.residual.add_to(output[:, :video])
        return torch.cat([whole, output[:, video:]], dim=1) if self._grid.text else whole

    def report(self) -> dict[str, Any]:
        """Returns the options, the mean density of the latest masks, and the bytes of all residuals.

        `imbalance` is the work of the busiest process over the mean, in all sparse calls of layers; None if
        one process has all heads.
        """
        layers = [state for layers in self._calls.values() for state in layers.values()]
        densities = [mask.density for state in layers for mask in state.masks]
        return {
            **vars(self.options),
            "density": sum(densities) / len(densities) if densities else None,
            "residual_bytes": sum(state.residual.bytes for state in layers if state.residual is not None),
            "imbalance": self._busiest / self._mean if self._mean else None,
        }

    def _fix(self, state: _Layer, cuts: Tensor) -> None:
        """Turns what was measured into levels; heads that only fill up a process keep the floor."""
        measured, state.measured = state.measured, None
        loss = measured.loss
        loss[:, self._own_heads(loss.shape[1]) :] = 0
        state.levels = self._budget.levels(loss, cuts)
        if self.options.far_field == "linear":
            levels = range(len(self._budget.densities))
            kept = ((state.levels > level).to(loss.device) for level in levels)
            state.biases = [far_correction(measured, blocks) for blocks in kept]

    def _deal(self, state: _Layer) -> None:
        """Deals the heads by the blocks that they keep in this call; their state goes with them."""
        before = None if state.deal is None else state.deal.heads
        state.deal = self._parallel.deal((state.levels > self._level).sum((0, 2, 3)), before)
        hand_over = partial(self._parallel.hand_over, before=before, after=state.deal.heads)
        state.levels, state.level = hand_over(state.levels, 1), -1
        state.biases = [hand_over(bias, 1) for bias in state.biases]
        if state.residual is not None:
            kept = state.residual.values, state.residual.scales
            values, scales = (None if x is None else hand_over(x, 2) for x in kept)
            state.residual = replace(state.residual, values=values, scales=scales)

    def _masks(self, state: _Layer) -> list[BlockMask]:
        """Returns the masks of each sample at the density of the call."""
        if state.level != self._level:
            kept = state.levels > self._level
            same = len(kept) > 1 and bool((kept[1:] == kept[:1]).all())
            size = self._config.block_size
            state.masks = [BlockMask(self._grid, size, x) for x in (kept[:1] if same else kept)]
            state.level = self._level
        return state.masks

    def _own_heads(self, heads: int) -> int:
        """Returns how many of this process's heads share a budget; the rest only fill it up."""
        alone = self._parallel is None or self.options.budget == "head"
        return heads if alone else self._parallel.own_heads(heads)

    def _sum_heads(self, counts: Tensor) -> Tensor:
        return self._parallel.sum_heads(counts)
