"""Counts attention calls by backend, and those that were dense by reason."""

from collections import Counter
from types import ModuleType
from typing import Any

import torch

REASONS = ("dense_step", "dense_layer", "too_short", "mask", "cross_attention")


class Counts:
    """Counts the calls of one application, from numbers of layers: a compiled block cannot count itself.

    Args:
        layers: self-attention layers of a transformer.
        always_dense: those of them that are dense at every step.
        others: other attention layers of a transformer, which read the text.
    """

    def __init__(self, layers: int, always_dense: int, others: int) -> None:
        self._layers, self._always_dense, self._others = layers, always_dense, others
        self._calls: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def add(self, backend: str, reason: str | None) -> None:
        """Counts a call of the transformer.

        Args:
            backend: of the layers that are not dense at every step.
            reason: one of `REASONS` why they attend to everything, None if they do not.
        """
        able = self._layers - self._always_dense
        self._calls["dense"] += self._always_dense
        self._calls[backend] += able
        self._reasons["dense_layer" if backend != "dense" else reason] += self._always_dense
        if reason is not None:
            self._reasons[reason] += able
        self._reasons["cross_attention"] += self._others

    def report(self) -> dict[str, Any]:
        """Returns `calls`, and `stayed_dense` with a number for each of `REASONS`."""
        return {
            "calls": {name: count for name, count in self._calls.items() if count},
            "stayed_dense": {reason: self._reasons[reason] for reason in REASONS},
        }


def other_layers(transformer: torch.nn.Module, family: ModuleType) -> int:
    """Counts the attention layers of a transformer that are not its self-attention."""
    layers = sum(hasattr(module, "processor") for module in transformer.modules())
    return layers - len(family.attention_layers(transformer))
