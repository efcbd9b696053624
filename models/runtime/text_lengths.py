"""Reads how many text tokens of each sample are valid."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class TextLengths:
    """Counts valid text tokens of each sample, once for each of a family's latest mask tensors."""

    def __init__(self, family: ModuleType) -> None:
        self._find = getattr(family, "text_mask", None)
        self._latest: list[tuple[Tensor, Tensor]] = []

    def read(self, arguments: dict[str, Any]) -> Tensor | None:
        """Returns int64 `[B]` on the CPU; None if the family has video tokens alone, or no mask was given.

        Raises ValueError if valid tokens do not come first.
        """
        mask = None if self._find is None else self._find(arguments)
        if mask is None:
            return None
        for seen, lengths in self._latest:
            if seen is mask:
                return lengths
        valid = mask.bool().cpu()
        lengths = valid.sum(dim=-1)
        if not torch.equal(valid, torch.arange(valid.shape[-1]) < lengths.unsqueeze(-1)):
            raise ValueError(
                f"valid text tokens must come first, got a mask {valid.int().tolist()}; pad texts at the end"
            )
        self._latest = [(mask, lengths), *self._latest[:1]]
        return lengths
