"""Compares what masks keep of each head, on maps of blocks: the configuration's mask and chosen blocks."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from radial_attn.models.profile import Reading
from radial_attn.selection import BUDGETS, Budget, floor_blocks
from scripts.run.plan import RunPlan
from scripts.run.results import rounded, subplots, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 6  # heads of the picture
MEANING = """Every mask keeps {density:.3f} of the token pairs. "Kept" is the share of the softmax mass.
"Left" is the root of the squared contributions of the dropped blocks over that of all blocks; beside a far
field it is what their means do not replace. Chosen blocks are the best for the mean of these calls. A run
chooses by a single step, or by a profile of other videos."""


def maps(reading: Reading, plan: RunPlan) -> dict[str, Any]:
    """Returns the table of options, and maps and masks of `SHOWN` heads, for the JSON."""
    to_blocks = reading.cells.weights(plan.grid, plan.config.attention.block_size)
    means = torch.stack([reading.sums[at] / reading.counts[at] for at in sorted(reading.sums)])
    means = to_blocks @ means @ to_blocks.T  # [L, 4, H, Q, K]
    layers = [layer for _, layer in sorted(reading.sums)]
    near, far, mass = means[:, 0], means[:, 1], means[:, 2]
    static = plan.block_mask.blocks.expand_as(mass)
    masks = {plan.mask.pattern: static}
    for budget in BUDGETS:
        masks[f"chosen, budget of a {budget}"] = _chosen(near.sqrt(), plan, budget)
    options = [
        {
            "name": name,
            "kept": rounded((mass * kept).sum() / mass.sum()),
            "left": rounded(((near * ~kept).sum() / near.sum()).sqrt()),
            "left_far": rounded(((far * ~kept).sum() / near.sum()).sqrt()),
        }
        for name, kept in masks.items()
    ]
    share = (mass * static).sum((2, 3)) / mass.sum((2, 3))
    order = share.flatten().argsort()
    picked = order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)]
    chosen, heads = masks["chosen, budget of a layer"], []
    for layer, head in ((int(n) // mass.shape[1], int(n) % mass.shape[1]) for n in picked):
        attention = mass[layer, head]
        heads.append(
            {
                "layer": layers[layer],
                "head": head,
                "mass": rounded(attention),
                "kept": {
                    name: rounded((attention * kept[layer, head]).sum() / attention.sum())
                    for name, kept in (("static", static), ("chosen", chosen))
                },
                "chosen": chosen[layer, head].int().tolist(),
            }
        )
    return {"options": options, "heads": heads, "static": plan.block_mask.blocks.int().tolist()}


def _chosen(losses: Tensor, plan: RunPlan, budget: str) -> Tensor:
    """Returns the blocks that heads choose by their losses `[L, H, Q, K]`, as many as the mask keeps."""
    grid, size = plan.grid, plan.config.attention.block_size
    floor, densities = floor_blocks(grid, plan.mask), [plan.block_mask.density]
    chooser = Budget(floor, grid.block_tokens(size), densities, budget)
    counts = [chooser.histogram(loss[None]) for loss in losses]
    counts = [sum(counts)] * len(counts) if budget == "model" else counts
    pairs = zip(losses, counts, strict=True)
    return torch.cat([chooser.levels(loss[None], chooser.cuts(count)) > 0 for loss, count in pairs])


def lines(data: dict[str, Any], picture: str) -> list[str]:
    """Returns Markdown of the table and the picture."""
    rows = ((x["name"], *(f"{x[key]:.3f}" for key in ("kept", "left", "left_far"))) for x in data["options"])
    return [*table("mask | kept | left | left beside a far field", rows), "", f"![heads]({picture})"]


def draw(data: dict[str, Any]) -> "Figure":
    """Draws a row for each head: its attention, and what both masks keep of it."""
    heads = data["heads"]
    figure, axes = subplots((7.2, 2.3 * len(heads)), len(heads), 3)
    for row, head in zip(np.atleast_2d(axes), heads, strict=True):
        mass = np.array(head["mass"])
        logs = np.log10(np.maximum(mass, 1e-5 * mass.max()))
        seen = (None, np.array(data["static"]), np.array(head["chosen"]))
        kept = head["kept"]
        titles = (
            f"layer {head['layer']}, head {head['head']}",
            *(
                f"{name} keeps {kept[key]:.0%}"
                for name, key in (("the mask", "static"), ("chosen", "chosen"))
            ),
        )
        for axis, mask, title in zip(row, seen, titles, strict=True):
            shown = logs if mask is None else np.where(mask, logs, np.nan)
            axis.imshow(shown, vmin=logs.min(), vmax=logs.max(), cmap="magma")
            axis.set_facecolor("#d8d8d8")
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.supxlabel("key block", fontsize=9)
    figure.supylabel("query block", fontsize=9)
    return figure
