"""Finds the options of a radial mask that keeps a wanted share of a grid's token pairs.

`python -m radial_attn density --frames 18 --height 48 --width 80` prints the densities that a grid has.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import product

from ..grid import TokenGrid
from .radial import RadialConfig, half_width, is_share, radial_rule_mask

TOLERANCE = 0.02
NEAR = (0.1, 0.3, 0.9)  # tolerances of the densities of a range, tried in turn
CLOSE = 0.25  # part of the tolerance at which the search of one option ends
LEAST = 0.001  # smallest share of a frame that `neighbour` is tried at
STEPS = 256  # decay factors to each doubling: from one to the next a half-width grows by 0.3 %


def solve_density(
    grid: TokenGrid, config: RadialConfig, target: float, tolerance: float = TOLERANCE
) -> RadialConfig:
    """Returns the options of a mask of this grid whose density is within `tolerance` (relative) of `target`.

    Changes as little of `config` as possible, in this order, a later option only if the earlier ones cannot
    reach the target:

    1. `decay_factor`, from the value at which every band of frame distance 2 and more is at its least, a
       block each way (the sparse end of the authors' family), to the one at which each is a whole frame;
    2. `neighbour`, the half-width at frame distance 1: below that family down to a block, above it up to the
       whole frame; in a gap between two decay factors down from the upper one;
    3. `decimation_width`: for sparser masks up by powers of two to the largest in a frame, which leaves only
       the far frames at power-of-two distances; for denser ones down until no frame is skipped. Widths
       between powers of two are tried only in a gap. For each width the first two options are solved again
       and use up what it gained beyond the target;
    4. `sink`: off below, on above, with the first three solved again;
    5. in a gap that is left, and below all these, `neighbour` below a block, with widths up to twice the
       largest, which leaves each frame alone.

    Blocks are kept whole, so densities come in steps. The possible range depends on the grid and the block
    size alone, the result on all arguments. It has no `density` of its own. A density of 1 is met exactly.
    A call takes the time of one to forty masks, in a gap of step 5 of up to a hundred;
    `RadialConfig(density=...)` solves each grid once.

    Raises:
        ValueError: a target outside (0, 1], the dense pattern, the mask of another program, or a density
            that no such mask of this grid has; the message then gives the possible range, or the nearest
            density on each side.
    """
    if not is_share(target):
        raise ValueError(f"density must be a number in (0, 1], got {target!r}")
    if config.pattern == "dense":
        raise ValueError(f"pattern must be 'radial' to solve for a density, got {config.pattern!r}")
    if config.compat != "none":
        raise ValueError(f"compat must be 'none' to solve for a density, got {config.compat!r}")
    tolerance = tolerance if target < 1 else 0.0
    search = _Search(grid, replace(config, density=None), target, tolerance)
    for combination, least in search.combinations():
        solved = search.nearest(combination, least)
        if search.error(solved) <= tolerance:
            return solved
    raise ValueError(search.failure())


@lru_cache(maxsize=32)
def resolve_density(grid: TokenGrid, config: RadialConfig, tolerance: float = TOLERANCE) -> RadialConfig:
    """Solves the density of `config` for this grid, once; ignores it if it is None or the pattern is dense.

    Raises:
        ValueError: as in `solve_density`.
    """
    start = replace(config, density=None)
    if config.density is None or config.pattern == "dense":
        return start
    solved = solve_density(grid, replace(start, pattern="radial"), config.density, tolerance)
    return replace(solved, pattern=config.pattern)


def resolve_near(grid: TokenGrid, config: RadialConfig) -> RadialConfig:
    """Solves about the density of `config`, for a range that crosses gaps; errors as in `solve_density`."""
    for tolerance in NEAR[:-1]:
        with suppress(ValueError):
            return resolve_density(grid, config, tolerance)
    return resolve_density(grid, config, NEAR[-1])


def density_of(grid: TokenGrid, config: RadialConfig) -> float:
    """Returns the density of a radial mask; does not cache the mask, because a search makes many."""
    return radial_rule_mask(grid, config).density


def estimate(grid: TokenGrid, config: RadialConfig) -> float:
    """Estimates a density in microseconds: bands are smooth strips, half a block wider than their half-width.

    The estimate is within 1 % if frames are whole blocks and bands are steps apart. It is 17 % off at worst,
    in narrow bands of other frames, because it counts their shared blocks twice.
    """
    frames, frame = grid.frames, grid.tokens_per_frame
    kept = float(frames)
    for distance in range(1, frames):
        width = half_width(distance, frame, config)
        reach = -1.0 if width is None else (width + config.block_size / 2) / frame
        band = 0.0 if width is None else 1 - max(0.0, 1 - reach) ** 2
        kept += 2 * (frames - distance) * band + config.sink * (1 - band)
    return 1 - (1 - kept / frames**2) * (grid.video_tokens / grid.tokens) ** 2


def decay_factors(grid: TokenGrid, config: RadialConfig) -> Sequence[float]:
    """Returns rising decay factors of four digits, from the last that narrows a band to one that fills all.

    Returns only the configured one if there is no frame distance of 2, or if a block is as wide as a frame.
    """
    frame, farthest = grid.tokens_per_frame, grid.frames - 1
    if farthest < 2 or config.block_size >= frame:
        return (config.decay_factor,)
    power = 1 << (frame.bit_length() - 1)
    low, high = 2 * config.block_size / power, 1.001 * frame * (1 << (farthest.bit_length() - 1)) / power
    count = math.ceil(STEPS * math.log2(high / low))
    return [float(f"{low * 2 ** (step / STEPS):.4g}") for step in range(count + 1)]


def neighbours(
    grid: TokenGrid, config: RadialConfig, least: float | None = None, wider: bool = False
) -> Sequence[float | str]:
    """Returns rising values of `neighbour`, 0.001 apart, from `least`, or a block, to the configured one.

    With `wider` they go from that to "full".
    """
    given, share = config.neighbour, config.neighbour_share
    least = least or config.block_size / grid.tokens_per_frame
    if wider:
        steps = range(math.floor(1000 * share) + 1, 1000)
        return [given, *(step / 1000 for step in steps), *(["full"] if share < 1 else [])]
    return [*(step / 1000 for step in range(math.ceil(1000 * least), math.ceil(1000 * share))), given]


def decimation_widths(grid: TokenGrid, config: RadialConfig, denser: bool = False) -> Sequence[int | str]:
    """Returns the configured width, then powers of two: up to the largest in a frame or, if `denser`, down.

    Leaves out widths that skip no frame of this grid: those below twice the last of the denser ones.
    """
    given = config.block_size if config.decimation_width == "block" else config.decimation_width
    level, farthest = grid.tokens_per_frame.bit_length() - 1, max(grid.frames - 1, 1).bit_length() - 1
    powers, idle = (
        [1 << step for step in range(max(level, given.bit_length()) + 1)],
        1 << max(level - farthest, 0),
    )
    if denser:
        further = [width for width in reversed(powers) if idle <= width < given >= 2 * idle]
    else:
        further = [width for width in powers if max(given + 1, 2 * idle) <= width <= 1 << level]
    return [config.decimation_width, *further]


def alone_width(grid: TokenGrid) -> int:
    """Returns the least `decimation_width` that leaves each frame alone."""
    return 1 << grid.tokens_per_frame.bit_length()


class _Search:
    """Keeps the density of every mask that a search has tried, and compares it with the target."""

    def __init__(self, grid: TokenGrid, start: RadialConfig, target: float, tolerance: float) -> None:
        self._grid, self._start, self._target, self._tolerance = grid, start, target, tolerance
        self._tried: dict[RadialConfig, float] = {}

    def density(self, config: RadialConfig) -> float:
        if config not in self._tried:
            self._tried[config] = density_of(self._grid, config)
        return self._tried[config]

    def error(self, config: RadialConfig) -> float:
        """Returns the relative distance from the target."""
        return abs(self.density(config) / self._target - 1)

    def combinations(self) -> Iterator[tuple[RadialConfig, float | None]]:
        """Yields options of width and sink that span the target, each with the least `neighbour` for them.

        First the start, then decimation widths, then the same with the other sink; widths between two powers
        of two come after those, for a gap that whole blocks leave. Last, for a gap that is left, widths from
        the largest power of two in a frame to twice that, with neighbours below a block.
        """
        yield self._start, None
        denser = max(self._tried.values()) < self._target
        widths = decimation_widths(self._grid, self._start, denser)
        for sink in dict.fromkeys((self._start.sink, denser and (self._start.sink or True))):
            options = [replace(self._start, sink=sink, decimation_width=width) for width in widths]
            options = [option for option in options if self.spans(option, denser)]
            yield from ((option, None) for option in options if option != self._start)
            powers = widths[1:] if denser else [option.decimation_width for option in options]
            between = {width * part // 8 for width in powers if width in widths[1:] for part in (5, 6, 7)}
            for width in sorted(between - {0, *widths}, reverse=denser) if options else ():
                option = replace(self._start, sink=sink, decimation_width=width)
                if self.spans(option, denser):
                    yield option, None
        alone = alone_width(self._grid)
        for sink, part in product((True, False), range(16, 33)):
            option = replace(self._start, sink=sink, decimation_width=max(1, alone * part // 32))
            if self.spans(option, True) and self.spans(option, False, LEAST):
                yield option, LEAST

    def spans(self, config: RadialConfig, denser: bool, least: float | None = None) -> bool:
        """Tells whether decay factor and neighbour reach the target: as dense if `denser`, else as sparse."""
        if denser:
            return self.density(self.densest(config)) >= self._target * (1 - self._tolerance)
        return self.density(self.sparsest(config, least)) <= self._target * (1 + self._tolerance)

    def sparsest(self, config: RadialConfig, least: float | None = None) -> RadialConfig:
        """Returns `config` with the least decay factor and neighbour."""
        decay = decay_factors(self._grid, config)[0]
        return replace(config, decay_factor=decay, neighbour=neighbours(self._grid, config, least)[0])

    def densest(self, config: RadialConfig) -> RadialConfig:
        """Returns `config` with the largest decay factor and neighbour."""
        decay = decay_factors(self._grid, config)[-1]
        return replace(config, decay_factor=decay, neighbour=neighbours(self._grid, config, wider=True)[-1])

    def nearest(self, config: RadialConfig, least: float | None = None) -> RadialConfig:
        """Returns the nearest options by decay factor, or by neighbour too if those miss the tolerance."""
        candidates = self.around(config, "decay_factor", decay_factors(self._grid, config))
        best = min(candidates, key=self.error)
        if self.error(best) > self._tolerance:
            upper = max(candidates, key=self.density)
            wider = self.density(upper) < self._target
            candidates += self.around(upper, "neighbour", neighbours(self._grid, config, least, wider))
        return min(candidates, key=self.error)

    def around(self, config: RadialConfig, name: str, values: Sequence) -> list[RadialConfig]:
        """Returns `config` with the two of one option's ascending `values` just below and above the target.

        Returns one alone if the values end there, or if it is close. The estimate, scaled by its error at
        the last mask, chooses the next value; every other time the middle is taken, so the search ends.
        """
        below, above, aim, turn = -1, len(values), self._target, 0
        options = [{name: value} for value in values]
        while above - below > 1:
            guess = bisect_left(
                options, aim, key=lambda option: estimate(self._grid, replace(config, **option))
            )
            guess = min(max(guess, below + 1), above - 1)
            guess = (below + above) // 2 if turn > 1 and turn % 2 else guess
            tried = replace(config, **options[guess])
            below, above = (guess, above) if self.density(tried) < self._target else (below, guess)
            if self.error(tried) <= CLOSE * self._tolerance:
                return [tried]
            aim, turn = self._target * estimate(self._grid, tried) / self.density(tried), turn + 1
        return [replace(config, **options[i]) for i in (below, above) if 0 <= i < len(values)]

    def failure(self) -> str:
        """Returns the message that says which densities there are, once every combination was tried."""
        grid, target, start = self._grid, self._target, self._start
        thin = replace(start, sink=False, decimation_width=alone_width(grid))
        thick = replace(
            start, sink=start.sink or True, decimation_width=decimation_widths(grid, start, denser=True)[-1]
        )
        low, high = self.density(self.sparsest(thin)), self.density(self.densest(thick))
        densities = sorted(density for density in set(self._tried.values()) if low <= density <= high)
        text = f" and {grid.text} text" if grid.text else ""
        size = f"{grid.frames} x {grid.height} x {grid.width}{text} tokens in blocks of {start.block_size}"
        span = f"{low:.4g} to {high:.4g}" if low < high else f"{low:.4g}"
        if not low < target < high:
            return f"density must be {span} for {size}, got {target!r}"
        split = bisect_left(densities, target)
        return (
            f"density must be within {self._tolerance:.0%} of {densities[split - 1]:.4g} or "
            f"{densities[split]:.4g}, the nearest for {size} ({span} in steps), got {target!r}"
        )
