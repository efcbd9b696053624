"""Shares guidance between two processes: each runs one half of every step, and both get both halves.

Some pipelines call their transformer twice a step, with the prompt and then without. They do so on both
processes. The process whose half it is not returns at once with an empty answer, which is filled in when the
other half is done, before the pipeline reads either. Other pipelines call it once, on a batch of both halves;
the batch is split and put together again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ..runtime.transformers import WHOLE_GUIDANCE


class GuidanceParallel:
    """Runs the halves of guidance on the two processes of a group; `remove()`, or leaving `with`, ends it.

    Args:
        transformers: the transformers of one pipeline, called in turn.
        group: two processes; the first one runs the half that comes first.
        batched: whether one call has both halves, the first half of the batch first (Mochi).

    Raises ValueError if the group does not have two processes, or the pipeline cannot share guidance.
    """

    def __init__(
        self,
        transformers: Sequence[torch.nn.Module],
        group: torch.distributed.ProcessGroup,
        *,
        batched: bool = False,
    ) -> None:
        names = {cls.__name__ for transformer in transformers for cls in type(transformer).__mro__}
        if refused := names.intersection(WHOLE_GUIDANCE):
            raise ValueError(
                f"two processes cannot share the guidance of {refused.pop()}: its pipeline reads one half "
                "before the other, or needs more passes; share its tokens instead"
            )
        processes = torch.distributed.get_world_size(group)
        if processes != 2:
            raise ValueError(f"group must have 2 processes, one for each half of guidance, got {processes}")
        self._group, self._rank = group, torch.distributed.get_rank(group)
        self._waiting: tuple[float, Tensor] | None = None
        self._undo: list[Callable[[], Any]] = []
        for transformer in transformers:
            if batched:
                before = transformer.register_forward_pre_hook(self._own_half, with_kwargs=True, prepend=True)
                after = transformer.register_forward_hook(self._both_halves)
                self._undo += [before.remove, after.remove]
            else:
                forward = vars(transformer).get("forward")
                transformer.forward = partial(self._half, transformer, transformer.forward)
                self._undo.append(partial(_restore, transformer, forward))

    def remove(self) -> None:
        """Restores the transformers; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _half(self, transformer: torch.nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> tuple:
        """Answers one of two calls with the same timestep; the second one completes both answers."""
        time = float(kwargs["timestep"].max())
        first = self._waiting is None or self._waiting[0] != time
        if first == (self._rank == 0):
            answer = forward(*args, **kwargs)[0].contiguous()
        else:
            latents, config = kwargs["hidden_states"], transformer.config
            channels = config.out_channels or config.in_channels
            answer = latents.new_empty(len(latents), channels, *latents.shape[2:])
        if first:
            self._waiting = time, answer
            return (answer,)
        _, earlier = self._waiting
        self._waiting = None
        halves = self._all(earlier if self._rank == 0 else answer)
        (answer if self._rank == 0 else earlier).copy_(halves[1 - self._rank])
        return (answer,)

    def _own_half(self, transformer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def half(value: Any) -> Any:
            return value.chunk(2)[self._rank] if isinstance(value, Tensor) else value

        return tuple(map(half, args)), {name: half(value) for name, value in kwargs.items()}

    def _both_halves(self, transformer: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        return torch.cat(self._all(output[0].contiguous())), *output[1:]

    def _all(self, half: Tensor) -> list[Tensor]:
        halves = [torch.empty_like(half) for _ in range(2)]
        torch.distributed.all_gather(halves, half, group=self._group)
        return halves


def _restore(transformer: torch.nn.Module, forward: Any) -> None:
    if forward is None:
        del transformer.forward
    else:
        transformer.forward = forward
