"""Measures what masks keep of the attention of a dense run: recall and output error, by step, layer, head."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radial_attn import RadialConfig, radial_mask
from radial_attn.analysis.recall import Kept, kept_by, sample_rows
from radial_attn.models.runtime.observe import Seen
from scripts.run.results import rounded

KINDS = Kept._fields


@dataclass
class Readings:
    """Observes the calls of a dense run.

    Attributes:
        masks: mask of each setting to judge; none may depend on the model.
        rows: query tokens of each call, the same in all.
        steps: denoising steps to observe, from 1.
        layers: number of the model's layers.
        synchronize: waits for the device's work.
        seconds: time spent here since it was last taken.
    """

    masks: dict[str, RadialConfig]
    rows: int
    steps: Sequence[int]
    layers: int
    synchronize: Callable[[], None]
    seconds: float = 0.0
    _calls: dict[tuple[RadialConfig, int, int], list[Tensor]] = field(default_factory=dict)

    @torch.inference_mode()
    def see(self, seen: Seen) -> None:
        """Notes `KINDS` of each head for every mask; `table` averages the calls of one step (guidance)."""
        if seen.step + 1 not in self.steps:
            return
        self.synchronize()
        start = time.perf_counter()
        rows, configs = sample_rows(seen.mask.grid, self.rows), list(set(self.masks.values()))
        masks = [radial_mask(seen.mask.grid, config) for config in configs]
        measured = kept_by(seen.query, seen.key, seen.value, masks, rows, text_lengths=seen.text_lengths)
        for config, kept in zip(configs, measured, strict=True):
            every = torch.stack(kept).mean(dim=1)  # [kind, head]
            self._calls.setdefault((config, seen.step + 1, seen.layer), []).append(every)
        self.synchronize()
        self.seconds += time.perf_counter() - start

    def take_seconds(self) -> float:
        """Returns the seconds spent here, and counts from 0 again."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def table(self, kinds: Sequence[str] = ("recall", "mse")) -> dict[str, dict[str, Any]]:
        """Returns by setting `steps`, those whose layers all ran, and `kinds`, `[step][layer][head]`.

        A cache may leave out layers.
        """
        counts = Counter(step for step, _ in {(step, layer) for _, step, layer in self._calls})
        steps = sorted(step for step, count in counts.items() if count == self.layers)

        def levels(mask: RadialConfig, kind: str) -> list[list[list[float]]]:
            at = KINDS.index(kind)
            calls = [[self._calls[mask, step, layer] for layer in range(self.layers)] for step in steps]
            return [[rounded(torch.stack(heads).mean(dim=0)[at]) for heads in step] for step in calls]

        return {
            name: {"steps": steps} | {kind: levels(mask, kind) for kind in kinds}
            for name, mask in self.masks.items()
        }


def averaged(tables: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Averages one setting's tables over videos, at the steps that all have; None if there are none."""
    tables = list(tables)
    steps = sorted(set.intersection(*(set(table["steps"]) for table in tables))) if tables else []
    if not steps:
        return None
    chosen = [[table["steps"].index(step) for step in steps] for table in tables]
    return {"steps": steps} | {
        kind: rounded(np.mean([np.array(x[kind])[at] for x, at in zip(tables, chosen, strict=True)], axis=0))
        for kind in ("recall", "mse")
    }
