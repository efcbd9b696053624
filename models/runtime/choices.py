"""Holds what the layers of a running video choose and keep: masks per head, residuals.

At a dense step that a sparse one follows, each layer reads where its attention lies, and keeps what its
sparse output lacks. The state belongs to one video, one size and one transformer: a new one begins with a
dense call. Calls of a step are told apart by their order, so each half of guidance has a state of its own.
The masks of a profile need no dense step, and are the same for all calls of a part of the schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radial_attn import BlockMask, RadialConfig, TokenGrid
from radial_attn.residual import Residual
from radial_attn.selection import Budget, far_correction, floor_blocks, measure_blocks
from radial_attn.shards import HeadDeal

from ..profile import ModelProfile
from .adaptive import Adaptive

Attend = Callable[..., Tensor]  # of query, key, value, mask, text lengths and the bias of the far field


@dataclass
class _Layer:
    """Holds the state of one layer in one call of a step.

    Attributes:
        loss: of each block, `[B, H, Q, K]`, until the blocks are chosen.
        correct: returns the bias of the far field for the blocks that are kept, until then.
        levels: how many densities keep a block, uint8 `[B, H, Q, K]`; None for the static mask.
        biases: of the far field at each density, `[B, H, 1, 1]`.
        masks: of each sample, at density number `level`.
        deal: the heads that each process computes; None if all are in order.
        heads: those of each process as the residual has them; None if all are in order.
    """

    loss: Tensor | None = None
    correct: Callable[[Tensor], Tensor] | None = None
    levels: Tensor | None = None
    biases: list[Tensor] = field(default_factory=list)
    masks: list[BlockMask] = field(default_factory=list)
    level: int = -1
    residual: Residual | None = None
    deal: HeadDeal | None = None
    heads: Tensor | None = None


class Choices:
    """Holds the state of a video; see the module.

    Args:
        parallel: the processes that share the heads, or None.
        profile: for that selection.
    """

    def __init__(
        self,
        options: Adaptive,
        config: RadialConfig,
        parallel: Any = None,
        profile: ModelProfile | None = None,
    ) -> None:
        self.options, self._config, self._parallel, self._profile = options, config, parallel, profile
        self._calls: dict[int, dict[Any, _Layer]] = {}
        self._profiled: list[_Layer] = []  # by layer, for the part of the schedule
        self._part = -1
        self._owner: tuple[Any, ...] = ()
        self._call, self._level = 0, 0
        self._grid: TokenGrid | None = None
        self._budget: Budget | None = None
        self._histogram: Tensor | int = 0
        self._busiest = self._mean = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Returns the options for a copy or a pickle, which begins with a dense call."""
        names = ("options", "_config", "_parallel", "_profile")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state.values())

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
            self._owner, self._grid, self._calls, self._part = owner, grid, {}, -1
            if self.options.selection != "static":
                apart = self._parallel is not None and self._profile is None
                total = self._parallel.sum_heads if apart else None
                floor, tokens = floor_blocks(grid, self._config), grid.block_tokens(self._config.block_size)
                self._budget = Budget(floor, tokens, sorted(set(densities)), self.options.budget, total)

    def begin_part(self, sigma: float, device: torch.device) -> None:
        """Chooses the blocks of all layers by the profile, if the noise level begins another part of it."""
        part = self._profile.part(sigma)
        if part == self._part:
            return
        self._part = part
        self._profiled = [self._by_profile(layer, device) for layer in range(self._profile.model.layers)]
        histograms = [self._budget.histogram(self._counting(state.loss)) for state in self._profiled]
        if self.options.budget == "model":
            histograms = [sum(histograms)] * len(histograms)
        for state, histogram in zip(self._profiled, histograms, strict=True):
            self._fix(state, self._budget.cuts(histogram))
            if self._parallel is not None:
                degree, rank = self._parallel.degree, self._parallel.rank
                state.levels, *state.biases = (
                    x.chunk(degree, dim=1)[rank].clone() for x in (state.levels, *state.biases)
                )

    @property
    def densities(self) -> tuple[float, ...]:
        """Returns the densities of the masks that layers choose, the largest first; () for a static mask."""
        return () if self._budget is None else self._budget.densities

    @property
    def density(self) -> float | None:
        """Returns the density of the masks that layers choose for this call; None for a static mask."""
        return None if self._budget is None else self._budget.densities[self._level]

    @property
    def ready(self) -> bool:
        """Tells whether this call of a step has a state."""
        return self._call in self._calls

    def begin_dense(self) -> None:
        """Begins a dense call: it makes the state of a layer anew, unless a cache skips that layer."""
        self._calls.setdefault(self._call, {})
        self._histogram = 0

    def set_density(self, density: float) -> None:
        """Sets the density of the sparse call that follows."""
        self._level = 0 if self._budget is None else self._budget.densities.index(density)

    @torch.compiler.disable
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
            self._keep(state, Residual.of("output", dense.detach(), dense, self._config.block_size))
            return
        if self.options.measures:
            tensors, far = [x.detach() for x in tensors], self.options.far_field != "none"
            options = {"far_field": far, "text_lengths": text_lengths}
            measured = measure_blocks(tensors, self._grid, self._config.block_size, **options)
            state.loss, state.correct = measured.loss, partial(far_correction, measured)
        if self.options.selection == "dense_step":
            histogram = self._budget.histogram(self._counting(state.loss))
            if self.options.budget == "model":
                self._histogram = self._histogram + histogram
                return
            self._fix(state, self._budget.cuts(histogram))
        elif self.options.measures:
            state.biases = [state.correct(mask.blocks.to(dense.device))]
            state.loss = state.correct = None
        if self.options.residual != "none":
            options = {"text_lengths": text_lengths, "sparse": sparse}
            lacking = self.attend(layer, tensors, mask, **options, residual=False)
            video = slice(self._grid.video_tokens)  # rows of text are dense in every mask
            kind, size = self.options.residual, self._config.block_size
            self._keep(state, Residual.of(kind, dense[:, video], lacking[:, video], size))
            deal = self._blocks(layer).deal
            state.heads = None if deal is None else deal.heads

    def end_call(self) -> None:
        """Chooses the blocks of all layers, if the whole model shares the budget."""
        layers = [state for state in self._calls.get(self._call, {}).values() if state.loss is not None]
        if layers:
            cuts = self._budget.cuts(self._histogram)
            for state in layers:
                self._fix(state, cuts)

    def deal(self, layer: Any) -> Tensor | None:
        """Deals the heads of a layer by the blocks that they keep in this call; their state goes with them.

        Returns the heads of each process, as in `HeadDeal`; None for all in order.
        """
        state, kept = self._blocks(layer), self._calls.get(self._call, {}).get(layer)
        if state.levels is None:
            return None
        if state.deal is None or state.level != self._level:
            before = None if state.deal is None else state.deal.heads
            state.deal = self._parallel.deal((state.levels > self._level).sum((0, 2, 3)), before)
            hand_over = partial(self._parallel.hand_over, before=before, after=state.deal.heads)
            state.levels, state.level = hand_over(state.levels, 1), -1
            state.biases = [hand_over(bias, 1) for bias in state.biases]
        heads = state.deal.heads
        if kept is not None and kept.residual is not None and kept.heads is not heads:
            tensors = kept.residual.values, kept.residual.scales
            values, scales = (
                None if x is None else self._parallel.hand_over(x, 2, kept.heads, heads) for x in tensors
            )
            self._keep(kept, replace(kept.residual, values=values, scales=scales))
            kept.heads = heads
        return None if state.deal.in_order else heads

    @torch.compiler.disable
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
        kept = self._calls.get(self._call, {}).get(layer, _Layer()).residual
        if kept is not None and kept.kind == "output":
            return kept.values.to(tensors[0].device, non_blocking=True)
        state = self._blocks(layer)
        masks = [mask] if state.levels is None else self._masks(state)
        bias = state.biases[self._level] if state.biases else None
        if len(masks) == 1:
            output = sparse(*tensors, masks[0], text_lengths, bias)
        else:
            parts = []
            for i, own in enumerate(masks):
                one = [x if x is None else x[i : i + 1] for x in (*tensors, text_lengths, bias)]
                parts.append(sparse(*one[:3], own, *one[3:]))
            output = torch.cat(parts)
        if residual and state.deal is not None:
            self._busiest += state.deal.loads.max().item()
            self._mean += state.deal.loads.double().mean().item()
        if not residual or kept is None:
            return output
        video = self._grid.video_tokens
        whole = kept.add_to(output[:, :video])
        return torch.cat([whole, output[:, video:]], dim=1) if self._grid.text else whole

    def report(self) -> dict[str, Any]:
        """Returns the options, the mean density of the latest masks, and the bytes of all residuals.

        `imbalance` is the work of the busiest process over the mean, in all sparse calls of layers; None if
        one process has all heads.
        """
        layers = [state for layers in self._calls.values() for state in layers.values()] + self._profiled
        densities = [mask.density for state in layers for mask in state.masks]
        return {
            **vars(self.options),
            "density": sum(densities) / len(densities) if densities else None,
            "residual_bytes": sum(state.residual.bytes for state in layers if state.residual is not None),
            "imbalance": self._busiest / self._mean if self._mean else None,
        }

    def mask(self, layer: int) -> BlockMask | None:
        """Returns what the heads of a layer keep for the first sample of a step's first call; None before it.

        `layer`: its index by order of execution.
        """
        states = self._profiled[layer : layer + 1]
        states += [state for at, state in self._calls.get(0, {}).items() if at.index == layer]
        return next((state.masks[0] for state in states if state.masks), None)

    def _blocks(self, layer: Any) -> _Layer:
        """Returns the state that holds a layer's masks."""
        if self._profile is not None:
            return self._profiled[layer.index]
        return self._calls.get(self._call, {}).get(layer, _Layer())

    def _by_profile(self, layer: int, device: torch.device) -> _Layer:
        """Returns what a layer loses, with heads of zeros to fill up the last of several processes."""
        profile, far = self._profile, self.options.far_field != "none"
        loss = profile.losses(self._part, layer, self._grid, self._config.block_size, far_field=far)
        heads = profile.model.heads
        fill = [0, 0, 0, 0, 0, 0 if self._parallel is None else -heads % self._parallel.degree]

        def correct(kept: Tensor, part: int = self._part) -> Tensor:
            return F.pad(profile.bias(part, layer, kept[:, :heads]), fill)

        return _Layer(loss=F.pad(loss.to(device), fill), correct=correct)

    def _counting(self, loss: Tensor) -> Tensor:
        """Returns the heads that share a budget: those of this process, or all of a profile."""
        if self._parallel is None or self.options.budget == "head":
            return loss
        if self._profile is not None:
            return loss[:, : self._profile.model.heads]
        return loss[:, : self._parallel.own_heads(loss.shape[1])]

    def _fix(self, state: _Layer, cuts: Tensor) -> None:
        """Turns what was measured into levels; heads that only fill up a process keep the floor."""
        loss, correct, state.loss, state.correct = state.loss, state.correct, None, None
        loss[:, self._counting(loss).shape[1] :] = 0
        state.levels = self._budget.levels(loss, cuts)
        if self.options.far_field == "linear":
            levels = range(len(self._budget.densities))
            state.biases = [correct((state.levels > level).to(loss.device)) for level in levels]

    def _keep(self, state: _Layer, residual: Residual) -> None:
        state.residual = residual.to_host() if self.options.residual_memory == "host" else residual

    def _masks(self, state: _Layer) -> list[BlockMask]:
        """Returns the masks of each sample at the density of the call."""
        if state.level != self._level:
            kept = state.levels > self._level
            same = len(kept) > 1 and bool((kept[1:] == kept[:1]).all())
            size = self._config.block_size
            state.masks = [BlockMask(self._grid, size, x) for x in (kept[:1] if same else kept)]
            state.level = self._level
        return state.masks


@lru_cache(maxsize=8)
def least_mask(grid: TokenGrid, config: RadialConfig, heads: int) -> BlockMask:
    """Returns the least mask that heads may choose, one pattern for each."""
    return BlockMask(grid, config.block_size, floor_blocks(grid, config).repeat(heads, 1, 1))
