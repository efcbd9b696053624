"""Passes query, key and value of every attention layer of a running model to a callback."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radial_attn import BlockMask

from .transformers import is_compiled


class Seen(NamedTuple):
    """Describes one call of one attention layer, dense or not.

    Attributes:
        layer: its index by order of execution, from 0; the control layers of Wan-VACE come first.
        step: denoising step, from 0.
        sigma: its noise level, 1 for noise; None if no scheduler is at hand.
        query, key, value: `[B, S, H, D]`, normed and rotated, detached; not to be written to.
        mask: mask of the model's configuration for the grid of the call, at dense steps and in dense layers
            too.
        text_lengths: valid text tokens of each sample, int64 `[B]` on the CPU, or None for all.
    """

    layer: int
    step: int
    sigma: float | None
    query: Tensor
    key: Tensor
    value: Tensor
    mask: BlockMask
    text_lengths: Tensor | None


class Observer:
    """Passes the inputs of one application's attention layers to `callback`, before they attend."""

    def __init__(self, callback: Callable[[Seen], None]) -> None:
        self._callback = callback

    def of_call(self, **call: Any) -> Callable[..., None]:
        """Returns the function that notes a processor's tensors; `call`: the other fields of `Seen`."""
        return partial(self._note, **call)

    @torch.compiler.disable
    def _note(self, processor: Any, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> None:
        tensors = {"query": query.detach(), "key": key.detach(), "value": value.detach()}
        self._callback(Seen(processor.index, **tensors, **call))


def refusal(models: Iterable[torch.nn.Module], parallel: Any) -> str | None:
    """Returns why these transformers, as they were given, cannot be observed; None if they can."""
    if parallel is not None:
        got = type(parallel).__name__
        return f"observe needs all tokens in one process, got parallel={got}; leave one of the two out"
    if any(map(is_compiled, models)):
        return "observe cannot see the calls of a compiled transformer; observe it before compiling"
    return None
