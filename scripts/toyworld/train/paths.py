"""Teaches a transformer to see along which path the shape of a noisy video moves.

A line and a circle differ in the product of their movements in x and y. The flow loss rewards neither factor
without the other, so without this loss "around" and "diagonally" became one word.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.toyworld.render import Scene

KINDS = (  # paths, with the direction of those that have one
    ("horizontally", 0),
    ("vertically", 0),
    ("around", -1),
    ("around", 1),
    ("diagonally", -1),
    ("diagonally", 1),
)
KIND_WEIGHT = 0.2  # of the loss of the kind, beside that of the movement


def kind(scene: Scene) -> int:
    """Returns which of `KINDS` a scene shows."""
    motion = scene.attributes.motion
    return KINDS.index((motion, scene.direction if motion in ("around", "diagonally") else 0))


def movement(scene: Scene, frames: int, step: int) -> Tensor:
    """Returns (x, y) from the middle of the path and their rates, each from -1 to 1, `[latent frames, 4]`.

    `step`: frames of a latent frame after the first, which is one frame.
    """
    last = torch.arange(0, frames, step, dtype=torch.float32)
    middle = last - (step - 1) / 2 * (last > 0)
    quarter = scene.period / 4  # of a sine, a quarter of a period later, is its rate
    now, later = (torch.stack(scene.position(time), dim=1) for time in (middle, middle + quarter))
    centre, reach = torch.tensor(scene.centre), torch.tensor(scene.reach)
    return torch.cat([(now - centre) / reach, (later - centre) / reach], dim=1)


class PathReader(nn.Module):
    """Reads movement after a third and two thirds of the blocks, and the kind of path after two thirds.

    It reads linearly, from the mean of each frame's tokens, so the tokens have to hold both.
    """

    def __init__(self, blocks: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.movement = nn.ModuleList(nn.Linear(width, 4) for _ in range(2))
        self.kind = nn.Linear(width, len(KINDS))
        self.seen: dict[int, Tensor] = {}
        for share in (1, 2):
            blocks[share * len(blocks) // 3].register_forward_pre_hook(partial(self.keep, share))

    def keep(self, share: int, _block: nn.Module, inputs: tuple) -> None:
        """Keeps the tokens `[B, S, width]` that enter a block, for `loss`."""
        self.seen[share] = inputs[0]

    def loss(self, scenes: list[Scene], frames: int, step: int) -> Tensor:
        """Returns the loss of the last forward pass, for its scenes, of `frames` frames each."""
        moves = torch.stack([movement(scene, frames, step) for scene in scenes])
        kinds = torch.tensor([kind(scene) for scene in scenes])
        total = 0.0
        for share, reader in enumerate(self.movement, 1):
            tokens = self.seen.pop(share).float()
            tokens = functional.layer_norm(tokens, tokens.shape[-1:]).unflatten(1, (moves.shape[1], -1))
            means = tokens.mean(dim=2)  # [B, F, width]
            total = total + functional.mse_loss(reader(means), moves.to(means.device)) / 2
        return total + KIND_WEIGHT * functional.cross_entropy(
            self.kind(means.mean(dim=1)), kinds.to(means.device)
        )
