"""Lists the densities that a grid has, as lines and tables.

    python -m radial_attn density --frames 18 --height 48 --width 80 [--target 0.1 0.2]

prints the curve of the grid, or the options for the wanted densities.
"""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from ..grid import TokenGrid
from .density import (
    alone_width,
    decay_factors,
    decimation_widths,
    density_of,
    estimate,
    neighbours,
    solve_density,
)
from .make import radial_mask
from .radial import RadialConfig

KNOBS = ("decay_factor", "neighbour", "decimation_width", "sink")


def shown(value: float | str) -> str:
    """Formats an option as YAML and the command line take it."""
    return str(value).lower() if isinstance(value, bool | str) else f"{value:g}"


def changes(config: RadialConfig, start: RadialConfig) -> str:
    """Formats the options of a solved configuration: `decay_factor 0.125, neighbour 0.41`.

    Names the decay factor always, neighbour, decimation width and sink if they differ from `start`.
    """
    names = [name for name in KNOBS if name == KNOBS[0] or getattr(config, name) != getattr(start, name)]
    return ", ".join(f"{name} {shown(getattr(config, name))}" for name in names)


def density_curve(grid: TokenGrid, config: RadialConfig) -> list[tuple[float, RadialConfig]]:
    """Returns density against the options that `solve_density` changes, in its order, from least to most.

    There are up to eleven points: each frame alone, sink off, the widest decimation, the narrowest neighbour;
    then all these as in `config` with decay factors from the least to the most; then the whole neighbour and
    no decimation. A
    point is left out if it keeps no more blocks than the one before, or if another pattern has no mask about
    as dense.
    """
    start = replace(config, density=None)
    decays = decay_factors(grid, start)
    least = replace(start, decay_factor=decays[0])
    narrow = replace(least, neighbour=neighbours(grid, start)[0])
    thin = replace(narrow, decimation_width=decimation_widths(grid, start)[-1])
    filled = replace(start, decay_factor=decays[-1])
    low, high = estimate(grid, least), estimate(grid, filled)
    rising = [_by_decay(grid, start, low + part * (high - low) / 4) for part in (1, 2, 3)]
    whole = replace(filled, neighbour=neighbours(grid, start, wider=True)[-1])
    every = replace(whole, decimation_width=decimation_widths(grid, start, denser=True)[-1])
    bare = replace(thin, sink=False)
    alone = replace(bare, decimation_width=alone_width(grid))
    curve: dict[float, RadialConfig] = {}
    for point in (least, *rising, filled, whole, every, narrow, thin, bare, alone):
        with suppress(ValueError):  # a pattern may have no mask about as dense as the radial one
            curve.setdefault(radial_mask.__wrapped__(grid, point).density, point)  # kept by no cache
    return sorted(curve.items(), key=lambda entry: entry[0])


def _by_decay(grid: TokenGrid, config: RadialConfig, density: float) -> RadialConfig:
    """Returns `config` with a decay factor that gives about this density."""
    decays = decay_factors(grid, config)
    index = bisect_left(
        decays, density, key=lambda decay: estimate(grid, replace(config, decay_factor=decay))
    )
    return replace(config, decay_factor=decays[min(index, len(decays) - 1)])


def curve_lines(grid: TokenGrid, config: RadialConfig) -> list[str]:
    """Formats `density_curve` as lines below a head: `0.2641   decay_factor 0.125`."""
    curve = density_curve(grid, config)
    return ["density  options", *(f"{density:.4f}   {changes(point, config)}" for density, point in curve)]


def target_table(grid: TokenGrid, config: RadialConfig, targets: Sequence[float]) -> str:
    """Makes a Markdown table: the options for each wanted density, or why there are none."""
    lines = [f"| wanted | density | {' | '.join(KNOBS)} |", "|---" * (2 + len(KNOBS)) + "|"]
    for target in targets:
        try:
            solved = solve_density(grid, config, target)
        except ValueError as error:
            lines.append(f"| {target:g} | {error} |" + " |" * len(KNOBS))
            continue
        options = " | ".join(shown(getattr(solved, name)) for name in KNOBS)
        lines.append(f"| {target:g} | {density_of(grid, solved):.4f} | {options} |")
    return "\n".join(lines)
