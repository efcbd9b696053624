"""Holds the settings of a patched model, and what belongs to a run and to one forward pass of it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask
from radial_attn.masks.density import resolve_near
from radial_attn.models.runtime.choices import Choices
from radial_attn.models.runtime.layer_attention import AttentionCall

from .protocol import LayerCounter, Layout, step_of

EDGE = 1e-4  # noise levels that differ by this share are the same


@dataclass(frozen=True)
class Settings:
    """Holds the inputs of the node.

    Attributes:
        density: share of the token pairs that is kept; 0 for the published mask of the model.
        selection, far_field, profile: as in `radial_attn.models.runtime.adaptive.Adaptive`.
        start_percent, end_percent: part of the sampling that is sparse, as ComfyUI counts it.
        dense_blocks: numbers of blocks that are always dense.
        backend: as in `radial_attn.radial_attention`.
        min_tokens: sequences below stay dense.
    """

    density: float = 0.25
    selection: str = "static"
    far_field: str = "none"
    start_percent: float = 0.25
    end_percent: float = 1.0
    dense_blocks: str = "0"
    backend: str = "auto"
    min_tokens: int = 4096
    profile: str = ""


@dataclass
class Run:
    """Holds what belongs to one run of a sampler.

    Attributes:
        sigmas: noise level of each step, None if they are not known.
        window: noise levels between which steps are sparse; one that begins at the first is, at the last not.
        config: of the mask.
        masks: static masks by grid.
        choices: what layers chose, by condition.
        calls: self-attention calls by backend.
        reasons: calls that stayed dense, by reason.
        seconds: of each call of the model, "dense" or "sparse".
        grid, density: of the latest sparse or recording call.
        notes: why calls were refused.
    """

    sigmas: tuple[float, ...] | None = None
    window: tuple[float, float] = (1.0, 0.0)
    config: RadialConfig = field(default_factory=RadialConfig)
    masks: dict[TokenGrid, BlockMask] = field(default_factory=dict)
    choices: dict[Any, Choices] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"dense": [], "sparse": []})
    grid: TokenGrid | None = None
    density: float | None = None
    notes: list[str] = field(default_factory=list)

    def is_dense(self, sigma: float) -> bool:
        """Tells whether the step at noise level `sigma` is dense."""
        level = sigma if self.sigmas is None else self.sigmas[step_of(sigma, self.sigmas)]
        first, last = (edge * (1 + EDGE) for edge in self.window)
        return not last < level <= first

    def mask(self, grid: TokenGrid) -> BlockMask:
        """Returns the static mask of a grid, with the nearest density if none has that asked for."""
        if grid not in self.masks:
            try:
                self.masks[grid] = radial_mask(grid, self.config)
            except ValueError:
                self.masks[grid] = radial_mask(grid, resolve_near(grid, self.config))
        return self.masks[grid]

    def precedes_sparse(self, sigma: float) -> bool:
        """Tells whether a sparse step may follow that at `sigma`."""
        if self.sigmas is None:
            return sigma > self.window[1]
        following = step_of(sigma, self.sigmas) + 1
        return following < len(self.sigmas) and not self.is_dense(self.sigmas[following])


class Plan(NamedTuple):
    """Tells the self-attention calls of a forward pass what to do.

    Attributes:
        reason: why all are dense, None if they are sparse.
        calls: rows of the batch, and how they attend; of a dense pass, how the steps after it will.
    """

    reason: str | None = None
    calls: tuple[tuple[slice, AttentionCall], ...] = ()


@dataclass
class Forward:
    """Holds the state of one call of the diffusion model; a copy of the options around it shares it."""

    model: Any
    layout: Layout
    counter: LayerCounter
    sigma: float
    options: dict[str, Any]
    previous: Callable[..., Any] | None
    plan: Plan | None = None
    planned_for: tuple[TokenGrid, Tensor | None] | None = None
    sparse: bool = False

    def text_before(self, grid: TokenGrid) -> int:
        """Counts the tokens of text that the model puts before the video."""
        return grid.text if self.layout.text_first else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forward":
        return self
