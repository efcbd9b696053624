"""Counts the floating-point operations of a run."""

from typing import NamedTuple

from radial_attn import TokenGrid
from scripts.run.model_info import ModelInfo


class Flops(NamedTuple):
    """Holds the operations of a run: self-attention all dense, self-attention as configured, all else."""

    dense: float
    sparse: float
    other: float

    @property
    def share(self) -> float:
        """Returns the share of attention in a dense run."""
        return self.dense / (self.dense + self.other)

    @property
    def fewer(self) -> float:
        """Returns how many times fewer operations the configured run has in all."""
        return (self.dense + self.other) / (self.sparse + self.other)


def count_flops(
    model: ModelInfo,
    grid: TokenGrid,
    density: float,
    *,
    steps: int = 1,
    dense_steps: int = 0,
    dense_layers: int = 0,
    calls: int = 1,
) -> Flops:
    """Counts the transformer's operations in `steps` steps of `calls` passes each.

    Self-attention takes 4 n^2 d for a layer's scores and weighted sum. All else is projections, feed-forward
    and cross-attention.
    """
    one = 4.0 * grid.tokens**2 * model.width * calls
    everything = steps * model.attention_layers()
    sparse = (steps - dense_steps) * model.attention_layers(dense_layers)
    linear = 2.0 * grid.tokens * model.macs + 4.0 * model.text_tokens * model.width**2
    cross = 4.0 * grid.tokens * model.text_tokens * model.width
    other = steps * calls * model.attention_layers() * (linear + cross)
    return Flops(one * everything, one * (everything - sparse + sparse * density), other)
