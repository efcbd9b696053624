"""What masks keep of the attention of a dense run: recall and output error by step, layer and head."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from radial_attn import RadialConfig, radial_mask
from radial_attn.analysis.recall import Kept, kept_by, sample_rows
from radial_attn.models.runtime.observe import Seen

Levels = list[list[list[float]]]  # [step][layer][head]
KINDS = Kept._fields
DIGITS = 6


@dataclass
class Readings:
    """Reads the calls that an application of radial attention is observed by.

    Attributes:
        masks: of each setting to judge, which must not depend on the model.
        rows: query tokens of each call, the same in all.
        steps: denoising steps, from 1, that are looked at.
        layers: of the model.
        synchronize: waits for the device's work.
        seconds: spent here since they were last taken.
    """

    masks: dict[str, RadialConfig]
    rows: int
    steps: Sequence[int]
    layers: int
    synchronize: Callable[[], None]
    seconds: float = 0.0
    _found: dict[tuple[RadialConfig, int, int], list[Tensor]] = field(default_factory=dict)

    @torch.inference_mode()
    def see(self, seen: Seen) -> None:
        """Notes `KINDS` of each head for every mask; calls of one step (guidance) are averaged."""
        if seen.step + 1 not in self.steps:
            return
        self.synchronize()
        start = time.perf_counter()
        rows, configs = sample_rows(seen.mask.grid, self.rows), list(set(self.masks.values()))
        masks = [radial_mask(seen.mask.grid, config) for config in configs]
        found = kept_by(seen.query, seen.key, seen.value, masks, rows, text_lengths=seen.text_lengths)
        for config, kept in zip(configs, found, strict=True):
            every = torch.stack(kept).mean(dim=1)  # [kind, head]
            self._found.setdefault((config, seen.step + 1, seen.layer), []).append(every)
        self.synchronize()
        self.seconds += time.perf_counter() - start

    def take_seconds(self) -> float:
        """The seconds spent here, which count from 0 again."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def table(self, kinds: Sequence[str] = ("recall", "mse")) -> dict[str, dict[str, Any]]:
        """By setting: `steps`, those in which no cache left a layer out, and the `kinds` of these."""
        layers = range(self.layers)
        seen = Counter(step for step, _ in {(step, layer) for _, step, layer in self._found})
        steps = sorted(step for step, count in seen.items() if count == self.layers)

        def heads(mask: RadialConfig, step: int, layer: int, kind: str) -> list[float]:
            values = torch.stack(self._found[mask, step, layer]).mean(dim=0)[KINDS.index(kind)]
            return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]

        def levels(mask: RadialConfig, kind: str) -> Levels:
            return [[heads(mask, step, layer, kind) for layer in layers] for step in steps]

        return {
            name: {"steps": steps} | {kind: levels(mask, kind) for kind in kinds}
            for name, mask in self.masks.items()
        }


def averaged(tables: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean over videos of one setting's tables, at the steps that all have; None without any."""
    tables = list(tables)
    steps = sorted(set.intersection(*(set(table["steps"]) for table in tables))) if tables else []
    if not steps:
        return None
    levels = {
        kind: [[table[kind][table["steps"].index(step)] for step in steps] for table in tables]
        for kind in ("recall", "mse")
    }
    return {"steps": steps, **{kind: _mean_of(values) for kind, values in levels.items()}}


def overall(levels: Levels) -> float:
    """The mean over steps, layers and heads."""
    return mean(value for layers in levels for heads in layers for value in heads)


def _mean_of(values: list[Any]) -> Any:
    """Entry by entry of nested lists of one shape."""
    if isinstance(values[0], list):
        return [_mean_of(list(entries)) for entries in zip(*values, strict=True)]
    return float(f"{mean(values):.{DIGITS}g}")
