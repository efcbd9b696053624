"""Looks into the attention of a running model: hands query, key and value of every layer to a callback."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radial_attn import BlockMask


class Seen(NamedTuple):
    """One call of one attention layer, dense or not.

    Attributes:
        layer: its place by order of execution, from 0; the control layers of Wan-VACE come first.
        step: denoising step, from 0.
        query, key, value: `[B, S, H, D]`, normed and rotated, detached; not to be written to.
        mask: of the model's configuration for the grid of the call, at dense steps and in dense layers too.
        text_lengths: valid text tokens of each sample, int64 `[B]` on the CPU, or None for all.
    """

    layer: int
    step: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: BlockMask
    text_lengths: Tensor | None


class Observer:
    """Hands what the attention layers of one application are given to `callback`, before they attend."""

    def __init__(self, callback: Callable[[Seen], None]) -> None:
        self._callback = callback
        self._places: dict[Any, int] = {}

    def add(self, processor: Any, layer: int) -> None:
        """The processor of a layer."""
        self._places[processor] = layer

    def of_call(self, step: int, mask: BlockMask, text_lengths: Tensor | None) -> Callable[..., None]:
        """What a processor of a call of the transformer notes its query, key and value with."""
        return partial(self._note, step=step, mask=mask, text_lengths=text_lengths)

    @torch.compiler.disable
    def _note(self, processor: Any, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> None:
        tensors = {"query": query.detach(), "key": key.detach(), "value": value.detach()}
        self._callback(Seen(self._places[processor], **tensors, **call))


def refusal(models: Iterable[torch.nn.Module], parallel: Any) -> str | None:
    """Why these transformers, as they were given, cannot be observed; None where they can."""
    if parallel is not None:
        return "observe: got several processes that share the sequence, allowed: one, which sees all tokens"
    if any(_is_compiled(part) for model in models for part in model.modules()):
        return "observe: got a compiled transformer, which hides its calls; observe it before compiling"
    return None


def _is_compiled(module: torch.nn.Module) -> bool:
    """By any of torch.compile(module), module.compile() and `module.forward = torch.compile(...)`."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
