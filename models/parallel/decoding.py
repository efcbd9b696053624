"""Shares decoding between processes: each runs some of a video's tiles, the first assembles the video.

Upstream's own decode runs with a replaced forward of its decoder, first to list the calls, which fall into
tiles. Each process then makes the calls of its own tiles. The first process runs decode again and gives it
all outputs, own and received. Tiles, their order and their blending are upstream's, for every VAE.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(eq=False)
class Tile:
    """Holds the decoder calls that pass on one state: a tile's chunks, one after the other in time."""

    state: Any
    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """Returns the number of latent values to decode."""
        return sum(args[0].numel() for args, _ in self.calls)


class ParallelDecode:
    """Shares the tiles of a VAE's `decode` between the processes of a group.

    `remove()`, or leaving its `with` block, ends it. All processes call `decode` with the same latents. The
    first gets the video, bit for bit as from one process; the others get a tensor of one meaningless frame.
    Tiles are upstream's: in space if `enable_tiling` was called and the video is larger than one tile, in
    time if framewise decoding is on, as in HunyuanVideo. A video of one tile is decoded by the first process
    while the others wait.

    Attributes:
        owners: the process of each tile of the latest video.
    """

    def __init__(self, vae: torch.nn.Module, group: torch.distributed.ProcessGroup) -> None:
        self._vae, self._group = vae, group
        self._rank, self._processes = (
            torch.distributed.get_rank(group),
            torch.distributed.get_world_size(group),
        )
        self._states_return = "conv_cache" in inspect.signature(vae.decoder.forward).parameters
        self._forward = vae.decoder.forward
        self.owners: list[int] = []
        self._undo = _replace(vae, "decode", partial(self._decode, vae.decode))

    def remove(self) -> None:
        """Restores the VAE's own decode; a second call does nothing."""
        self._undo()
        self._undo = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _decode(self, decode: Callable, *args: Any, **kwargs: Any) -> Any:
        """Runs upstream's decode, with the decoder's work shared."""
        tiles: list[Tile] = []
        self._forward = self._vae.decoder.forward
        with self._decoder(partial(self._list, tiles)):
            empty = decode(*args, **kwargs)
        self.owners = share([tile.cost for tile in tiles], self._processes)
        if len(tiles) == 1:
            return empty if self._rank else decode(*args, **kwargs)
        for tile, owner in zip(tiles, self.owners, strict=True):
            if owner == self._rank:
                self._run(tile)
        if self._rank:
            self._send(tiles)
            return empty
        self._receive(tiles)
        with self._decoder(partial(self._next, _outputs(tiles))):
            return decode(*args, **kwargs)

    def _list(self, tiles: list[Tile], *args: Any, **kwargs: Any) -> Any:
        """Records a call; returns an empty pixel, and the tile as the state that its next call passes in."""
        state = kwargs.get("feat_cache", kwargs.get("conv_cache"))
        if state is None or not any(state is x for tile in tiles[-1:] for x in (tile, tile.state)):
            tiles.append(Tile(state))
        tiles[-1].calls.append((args, kwargs))
        pixel = args[0].new_zeros(len(args[0]), self._vae.config.out_channels, 1, 1, 1)
        return self._answer(pixel, tiles[-1])

    def _run(self, tile: Tile) -> None:
        """Turns all calls of a tile into outputs; keeps none of the states, which are large."""
        state = None
        for args, kwargs in tile.calls:
            if self._states_return:
                output, state = self._forward(*args, **(kwargs | {"conv_cache": state}))
            else:
                output = self._forward(*args, **kwargs)
            tile.outputs.append(output)
        tile.calls, tile.state = [], None

    def _next(self, outputs: Iterator[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the next call."""
        return self._answer(next(outputs), None)

    def _answer(self, output: Tensor, state: Any) -> Any:
        return (output, state) if self._states_return else output

    def _send(self, tiles: Sequence[Tile]) -> None:
        """Sends own outputs to the first process, after their shapes, int64 `[calls, 5]`."""
        outputs = [x for tile in tiles for x in tile.outputs]
        if not outputs:
            return
        shapes = torch.tensor([x.shape for x in outputs], device=outputs[0].device)
        for x in (shapes, *outputs):
            torch.distributed.send(x.contiguous(), group=self._group, group_dst=0)

    def _receive(self, tiles: Sequence[Tile]) -> None:
        """Receives the outputs of all others, process by process.

        They have the dtype and device of an own output: the first process always decodes the largest tile.
        """
        like = next(tile.outputs[0] for tile in tiles if tile.outputs)
        for rank in range(1, self._processes):
            theirs = [tile for tile, owner in zip(tiles, self.owners, strict=True) if owner == rank]
            if not theirs:
                continue
            receive = partial(torch.distributed.recv, group=self._group, group_src=rank)
            shapes = torch.empty(
                sum(len(tile.calls) for tile in theirs), 5, dtype=torch.int64, device=like.device
            )
            receive(shapes)
            sizes = iter(shapes.tolist())
            for tile in theirs:
                tile.outputs = [like.new_empty(next(sizes)) for _ in tile.calls]
                for output in tile.outputs:
                    receive(output)

    @contextmanager
    def _decoder(self, forward: Callable) -> Iterator[None]:
        undo = _replace(self._vae.decoder, "forward", forward)
        try:
            yield
        finally:
            undo()


def _outputs(tiles: Sequence[Tile]) -> Iterator[Tensor]:
    """Yields the outputs of all calls, in the order of the calls; keeps none."""
    for tile in tiles:
        while tile.outputs:
            yield tile.outputs.pop(0)


def share(costs: Sequence[int], processes: int) -> list[int]:
    """Returns the process of each piece of work: the largest first, each to the least loaded process."""
    loads, owners = [0] * processes, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def _replace(module: torch.nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of one instance; returns a function that restores the value before."""
    before = vars(module).get(name)
    setattr(module, name, value)
    return partial(delattr, module, name) if before is None else partial(setattr, module, name, before)
