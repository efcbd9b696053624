"""Backends whose calls take a time that the test names, on a clock that only they move."""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor

from radial_attn import trial
from radial_attn.dispatch import kernel
from radial_attn.models.runtime import layer_attention


class Costs:
    """Sets what a call costs in seconds, and how a backend fails; counts the calls.

    `seconds`: by backend, and "dense"; `spoil`: backend -> what becomes of its output, or an error.
    """

    def __init__(self, patch: pytest.MonkeyPatch, seconds: Mapping[str, float]) -> None:
        self.seconds, self.spoil, self.calls = dict(seconds), {}, dict.fromkeys(seconds, 0)
        self._now = 0.0
        patch.setattr(trial, "clock", lambda: self._now)
        for name in self.seconds.keys() - {"dense"}:
            module = kernel(name)
            for function in {"attention", "partial_attention", "with_far_field"} & vars(module).keys():
                patch.setattr(module, function, partial(self.pay, name, getattr(module, function)))

    def charge_models(self, patch: pytest.MonkeyPatch) -> None:
        """Also sets what dense attention costs in models that measure."""
        dispatch = partial(self.pay, "dense", layer_attention.dispatch_attention_fn)
        patch.setattr(layer_attention, "dispatch_attention_fn", dispatch)

    def pay(self, name: str, attend: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
        """Calls a backend, moves the clock, and spoils the output if asked."""
        if torch.compiler.is_compiling():  # a clock in the graph would compile it again at each tick
            return attend(*args, **options)
        self.calls[name] += 1
        self._now += self.seconds[name]
        spoil = self.spoil.get(name)
        if isinstance(spoil, Exception):
            raise spoil
        output = attend(*args, **options)
        return output if spoil is None else spoil(output)


def sdpa(query: Tensor, key: Tensor, value: Tensor, text_lengths: Tensor | None = None) -> Tensor:
    """Computes dense attention `[B, S, H, D]`; padded text is attended to."""
    heads = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
