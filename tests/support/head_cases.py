"""Heads of the large models, dealt to processes; they keep blocks as unevenly as those of the bundled Wan.

`python -m tests.support.head_cases` prints the table of results/adaptive_2026-11-30.md.
"""

from collections.abc import Iterable

import numpy as np
import torch

from radial_attn.shards import deal_heads

HEADS = {"Wan2.1 14B": 40, "HunyuanVideo, Mochi": 24}
PROCESSES = (2, 4, 8)
SPREADS = {  # deciles of a head's blocks over the mean of its layer, by budget and density
    "layer, 0.21": (0.13, 0.63, 0.73, 0.80, 0.87, 0.90, 0.97, 1.16, 1.40, 1.61, 1.78),
    "model, 0.105": (0.34, 0.44, 0.62, 0.78, 0.89, 1.02, 1.05, 1.10, 1.27, 1.54, 2.45),
}


def loads(model: str, spread: str, processes: int, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the work of each process with the heads in order and dealt, int64 `[layers, processes]`."""
    drawn = np.random.default_rng(0).random((layers, HEADS[model]))
    blocks = torch.from_numpy(np.interp(drawn, np.linspace(0, 1, 11), SPREADS[spread]) * 1e5).long()
    return blocks.unflatten(1, (processes, -1)).sum(2), torch.stack(
        [deal_heads(work, processes).loads for work in blocks]
    )


def imbalance(load: torch.Tensor) -> float:
    """Returns the work of the busiest process of each layer over the mean, as the report of a run does."""
    return (load.amax(1).sum() / load.double().mean(1).sum()).item()


def rows(layers: int = 480) -> Iterable[str]:
    """Yields the rows of the table."""
    for model in HEADS:
        for spread in SPREADS:
            for processes in PROCESSES:
                before, after = loads(model, spread, processes, layers)
                worst = max(imbalance(layer[None]) for layer in after)
                values = " | ".join(f"{value:.3f}" for value in (imbalance(before), imbalance(after), worst))
                yield f"| {model} | {spread} | {processes} | {values} |"


if __name__ == "__main__":
    print("| model | blocks | processes | in order | dealt | worst layer |\n|---|---|---|---|---|---|")
    print("\n".join(rows()))
