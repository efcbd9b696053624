"""The tables of the ablation: which option each varies, over which values, around one configuration."""

import math
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask
from radial_attn.block_mask import BLOCK_SIZES
from radial_attn.masks.density_curve import density_curve
from radial_attn.masks.patterns import COMPARED, TOLERANCE
from scripts.run.config import Config
from scripts.run.errors import UsageError
from scripts.run.model_info import ModelInfo
from scripts.run.plan import dense_steps, radial_config, solved_config, token_grid
from scripts.toyworld import all_attributes
from scripts.toyworld.render import Attributes

Values = Callable[[Config, ModelInfo], list[Any]]
STRIDE = 77  # has no factor in common with the number of captions: each comes once, and all values early


class Table(NamedTuple):
    """One option of the attention group, and the values that it takes for a configuration."""

    title: str
    key: str
    values: Values


def _with_own(key: str, values: Values) -> Values:
    """Numbers, and the configuration's own among them, ascending."""
    return lambda config, model: sorted({*values(config, model), getattr(config.attention, key)})


def _steps(key: str, *counts: int) -> Values:
    return _with_own(key, lambda config, model: [n for n in counts if n < config.generation.steps])


def _layers(config: Config, model: ModelInfo) -> list[int]:
    return list(range(min(4, model.layers)))


def _decays(config: Config, model: ModelInfo) -> list[float]:
    return [config.attention.decay_factor * part for part in (0.5, 1, 2, 4, 8)]


def _densities(config: Config, model: ModelInfo) -> list[float]:
    """From the least that the grid has, in even parts of what there is."""
    curve = density_curve(token_grid(config, model), radial_config(config))
    low, high = curve[0][0], curve[-1][0]
    return [math.ceil(1000 * (low + part * (high - low))) / 1000 for part in (0, 0.2, 0.4, 0.6, 0.8)]


def _blocks(config: Config, model: ModelInfo) -> list[int]:
    frame = token_grid(config, model).tokens_per_frame
    return [size for size in BLOCK_SIZES if size <= frame]


TABLES = {
    "dense_steps": Table(
        "Dense steps at the start", "dense_steps", _steps("dense_steps", 0, 1, 2, 3, 4, 5, 8)
    ),
    "dense_last_steps": Table(
        "Dense steps at the end", "dense_last_steps", _steps("dense_last_steps", 0, 1, 2, 4)
    ),
    "dense_layers": Table("Dense layers", "dense_layers", _with_own("dense_layers", _layers)),
    "decay_factor": Table("Decay factor", "decay_factor", _decays),
    "density": Table("Density solved for", "density", _densities),
    "block_size": Table("Block size", "block_size", _with_own("block_size", _blocks)),
    "sink": Table("Attention sink", "sink", lambda *_: [True, False]),
    "neighbour": Table(
        "Half-width at frame distance 1, share of a frame",
        "neighbour",
        lambda *_: [0.25, "half", 0.75, "full"],
    ),
    "pattern": Table(
        f"Static masks of equal density, within {100 * TOLERANCE:g} %",
        "pattern",
        lambda *_: ["radial", *COMPARED],
    ),
}


@dataclass(frozen=True)
class Run:
    """One value of a table, its configuration, and what is known of its mask."""

    value: Any
    config: Config
    mask: BlockMask
    options: RadialConfig
    dense: frozenset[int]

    @property
    def layers(self) -> int:
        """Layers that are dense at every step."""
        return self.config.attention.dense_layers

    @property
    def words(self) -> str:
        """The options of its mask and how much is dense, in words."""
        options = {name: value for name, value in asdict(self.options).items() if value is not None}
        options |= {"dense_steps": len(self.dense), "dense_layers": self.layers}
        return ", ".join(f"{name} {value}" for name, value in options.items())

    @property
    def mask_name(self) -> str:
        """Equal for runs whose masks keep the same."""
        kept = self.mask.cached("digest", lambda: sha256(self.mask.blocks.numpy().tobytes()).hexdigest()[:12])
        return f"{self.mask.block_size}_{kept}"

    @property
    def pace(self) -> str:
        """Equal for runs whose radial steps take the same time."""
        return f"{self.mask_name}_{self.layers}"

    @property
    def identity(self) -> Hashable:
        """Equal for runs that give the same videos."""
        return self.pace, self.dense


def runs_of(table: Table, config: Config, model: ModelInfo) -> tuple[list[Run], list[str]]:
    """The runs of a table, and why values were left out: the grid has no mask of that density or pattern."""
    runs, left_out = [], []
    for value in table.values(config, model):
        attention = replace(config.attention, **{table.key: value})
        try:
            runs.append(_run(value, replace(config, attention=attention), model))
        except UsageError as error:
            left_out.append(str(error))
    return runs, left_out


def _run(value: Any, config: Config, model: ModelInfo) -> Run:
    options = solved_config(config, model)
    return Run(
        value, config, mask_of(token_grid(config, model), config), options, frozenset(dense_steps(config))
    )


def mask_of(grid: TokenGrid, config: Config) -> BlockMask:
    """The mask of a configuration on a grid."""
    return radial_mask(grid, radial_config(config))


def captions_of(count: int) -> list[Attributes]:
    """The first of all captions, in an order in which the values of an attribute come about equally often.

    Their places give the videos their seeds.
    """
    everything = all_attributes()
    return [everything[STRIDE * (i + 1) % len(everything)] for i in range(count)]
