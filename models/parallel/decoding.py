"""Decoding shared by processes: each runs some of the tiles of a video, the first puts all together.

Upstream's own decode runs with another forward in the place of its decoder's, first to list the calls, which
fall into tiles. Each process then makes the calls of its own tiles; on the first one decode runs again and is
handed all outputs, own and received. Tiles, their order and their blending are upstream's, for every VAE.
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
    """Calls of the decoder that hand on one state: the chunks of one place, one after the other in time."""

    state: Any
    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def cost(self) -> int:
        """Latent values to decode."""
        return sum(args[0].numel() for args, _ in self.calls)


class ParallelDecode:
    """The tiles of a VAE's `decode` on the processes of a group; `remove()`, or leaving `with`, ends it.

    All processes call `decode` with the same latents. The first gets the video, bit for bit that of one
    process; the others get room for one frame, of no meaning. Tiles are those of upstream: in space where
    `enable_tiling` was called and the video is larger than one, in time where framewise decoding is on, as in
    HunyuanVideo. A video of one tile is decoded by the first process, while the others wait.

    Attributes:
        owners: of the latest video, the process of each tile.
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
        """Puts back what was before; a second time does nothing."""
        self._undo()
        self._undo = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _decode(self, decode: Callable, *args: Any, **kwargs: Any) -> Any:
        """Upstream's decode, its decoder's work shared."""
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
        """Notes a call; returns room for a pixel, and the tile as the state that its next call hands in."""
        state = kwargs.get("feat_cache", kwargs.get("conv_cache"))
        if state is None or not any(state is x for tile in tiles[-1:] for x in (tile, tile.state)):
            tiles.append(Tile(state))
        tiles[-1].calls.append((args, kwargs))
        pixel = args[0].new_zeros(len(args[0]), self._vae.config.out_channels, 1, 1, 1)
        return self._answer(pixel, tiles[-1])

    def _run(self, tile: Tile) -> None:
        """Turns all calls of a tile into outputs; of the states, which are large, none is kept."""
        state = None
        for args, kwargs in tile.calls:
            if self._states_return:
                output, state = self._forward(*args, **(kwargs | {"conv_cache": state}))
            else:
                output = self._forward(*args, **kwargs)
            tile.outputs.append(output)
        tile.calls, tile.state = [], None

    def _next(self, outputs: Iterator[Tensor], *args: Any, **kwargs: Any) -> Any:
        """The output of the call whose turn it is."""
        return self._answer(next(outputs), None)

    def _answer(self, output: Tensor, state: Any) -> Any:
        return (output, state) if self._states_return else output

    def _send(self, tiles: Sequence[Tile]) -> None:
        """Own outputs to the first process, before them their shapes, int64 `[calls, 5]`."""
        outputs = [x for tile in tiles for x in tile.outputs]
        if not outputs:
            return
        shapes = torch.tensor([x.shape for x in outputs], device=outputs[0].device)
        for x in (shapes, *outputs):
            torch.distributed.send(x.contiguous(), group=self._group, group_dst=0)

    def _receive(self, tiles: Sequence[Tile]) -> None:
        """The outputs of all others, process by process; like one's own, which the largest tile is among."""
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
    """Those of all calls, in the order of the calls; none is kept."""
    for tile in tiles:
        while tile.outputs:
            yield tile.outputs.pop(0)


def share(costs: Sequence[int], processes: int) -> list[int]:
    """The process of each piece of work: the largest first, each to the one that has the least so far."""
    loads, owners = [0] * processes, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += costs[place]
    return owners


def _replace(module: torch.nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of one instance; returns what puts back that of before."""
    before = vars(module).get(name)
    setattr(module, name, value)
    return partial(delattr, module, name) if before is None else partial(setattr, module, name, before)
