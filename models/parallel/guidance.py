"""Guidance shared by two processes: each runs one half of every step, and both get both.

A pipeline that calls its transformer twice a step, with the prompt and then without, does so on both
processes; the one whose half it is not returns at once with room for the answer, which is filled in when the
other half is done, before the pipeline reads either. A pipeline that calls it once, on a batch of both
halves, has the batch split and put together again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor


class GuidanceParallel:
    """The halves of guidance on the two processes of a group; `remove()`, or leaving `with`, takes it back.

    Args:
        transformers: those of one pipeline, called in turn.
        group: two processes, the first of which runs the half that comes first.
        batched: whether one call has both halves, the first half of the batch first (Mochi).

    Raises ValueError for a group that is not of two.
    """

    def __init__(
        self,
        transformers: Sequence[torch.nn.Module],
        group: torch.distributed.ProcessGroup,
        *,
        batched: bool = False,
    ) -> None:
        processes = torch.distributed.get_world_size(group)
        if processes != 2:
            raise ValueError(f"guidance has two halves, got a group of {processes} processes")
        self._group, self._rank = group, torch.distributed.get_rank(group)
        self._waiting: tuple[float, Tensor] | None = None
        self._undo: list[Callable[[], Any]] = []
        for transformer in transformers:
            (self._split_batches if batched else self._take_turns)(transformer)

    def remove(self) -> None:
        """Puts back what was before; a second time does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _take_turns(self, transformer: torch.nn.Module) -> None:
        before = vars(transformer).get("forward")
        transformer.forward = partial(self._half, transformer, transformer.forward)
        self._undo.append(partial(_restore, transformer, before))

    def _half(self, transformer: torch.nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> tuple:
        """One of two calls with the same timestep; the second makes both answers whole."""
        time = float(kwargs["timestep"].max())
        first = self._waiting is None or self._waiting[0] != time
        if first == (self._rank == 0):
            own = forward(*args, **kwargs)[0].contiguous()
        else:
            latents, config = kwargs["hidden_states"], transformer.config
            channels = config.out_channels or config.in_channels
            own = latents.new_empty(len(latents), channels, *latents.shape[2:])
        if first:
            self._waiting = time, own
            return (own,)
        _, earlier = self._waiting
        self._waiting = None
        halves = self._all(earlier if self._rank == 0 else own)
        (own if self._rank == 0 else earlier).copy_(halves[1 - self._rank])
        return (own,)

    def _split_batches(self, transformer: torch.nn.Module) -> None:
        before = transformer.register_forward_pre_hook(self._own_half, with_kwargs=True, prepend=True)
        after = transformer.register_forward_hook(self._both_halves)
        self._undo += [before.remove, after.remove]

    def _own_half(self, transformer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def half(value: Any) -> Any:
            return value.chunk(2)[self._rank] if isinstance(value, Tensor) else value

        return tuple(map(half, args)), {name: half(value) for name, value in kwargs.items()}

    def _both_halves(self, transformer: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        return torch.cat(self._all(output[0].contiguous())), *output[1:]

    def _all(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(2)]
        torch.distributed.all_gather(parts, own, group=self._group)
        return parts


def _restore(transformer: torch.nn.Module, forward: Any) -> None:
    if forward is None:
        del transformer.forward
    else:
        transformer.forward = forward
