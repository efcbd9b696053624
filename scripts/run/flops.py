"""Counts the floating-point operations of a run."""

from typing import NamedTuple

from radial_attn import TokenGrid
from radial_attn.selection import block_rows
from scripts.run.model_info import ModelInfo


class Beyond(NamedTuple):
    """Counts what adaptive attention adds, in dense self-attention calls of one layer.

    Attributes:
        sparse: of a layer in a sparse step: its far field.
        measured: of a layer in a dense step that a sparse one follows: its sampled rows.
        lacking: there too: the sparse output for the residual.
        steps: how many such dense steps there are.
    """

    sparse: float = 0.0
    measured: float = 0.0
    lacking: float = 0.0
    steps: int = 0


STATIC = Beyond()


def beyond_mask(
    model: ModelInfo,
    grid: TokenGrid,
    block_size: int,
    *,
    density: float,
    steps: int,
    far_field: str,
    measures: bool,
    residual: bool,
) -> Beyond:
    """Counts adaptive attention with `steps` dense steps that a sparse one follows.

    A pooled key costs what a key costs; a first-order matrix two products of `n D^2` for each head, to make
    and to use. A measured row computes its scores and the contribution of each block, exact and pooled.

    Args:
        density: of the first sparse step.
        measures: whether rows are measured.
    """
    n, pooled = grid.tokens, grid.video_tokens / block_size
    far = 0.0 if far_field == "none" else pooled / n
    far += model.head_dim / n if far_field == "linear" else 0.0
    rows = len(block_rows(grid, block_size)) / n if measures else 0.0
    return Beyond(far, rows * (1 + pooled / n), density + far if residual else 0.0, steps)


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

    def sparse_share(self, steps: int, sparse: int) -> float:
        """Returns the operations of one of `sparse` steps over those of a dense one, of `steps` in all."""
        return 1 - steps / sparse * (self.dense - self.sparse) / (self.dense + self.other)


def count_flops(
    model: ModelInfo,
    grid: TokenGrid,
    density: float,
    *,
    steps: int = 1,
    dense_steps: int = 0,
    dense_layers: int = 0,
    calls: int = 1,
    beyond: Beyond = STATIC,
) -> Flops:
    """Counts the transformer's operations in `steps` steps of `calls` passes each.

    `density` is the mean of the sparse steps.

    Self-attention takes 4 n^2 d for a layer's scores and weighted sum. All else is projections, feed-forward,
    cross-attention, and the layers of a decoder or a control net, each with its self-attention.
    """
    one = 4.0 * grid.tokens**2 * model.width * calls
    everything = steps * model.attention_layers()
    able = model.attention_layers(dense_layers)  # layers that may be sparse
    sparse = (steps - dense_steps) * able
    added = beyond.sparse * sparse + (beyond.measured + beyond.lacking) * beyond.steps * able
    linear = 2.0 * grid.tokens * model.macs + 4.0 * model.text_tokens * model.width**2
    cross = 4.0 * grid.tokens * model.text_tokens * model.width
    other = steps * calls * model.attention_layers() * (linear + cross)
    copies = 2 * grid.video_tokens  # that a decoder's layer attends over
    decoder = 4.0 * copies**2 * model.width + 2.0 * copies * model.macs
    other += steps * calls * model.decoder_layers * decoder
    controls = 4.0 * grid.tokens**2 * model.width + linear + cross + 2.0 * grid.tokens * model.width**2
    other += steps * calls * model.controlnet_layers * controls
    return Flops(one * everything, one * (everything - sparse + sparse * density + added), other)
