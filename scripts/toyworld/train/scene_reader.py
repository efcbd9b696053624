"""Teaches a transformer to see which shape a noisy video shows, and along which path it moves.

A line and a circle differ in the product of their movements in x and y. The flow loss rewards neither factor
without the other, so without this loss "around" and "diagonally" became one word. Shapes differ in a few
pixels, and HunyuanVideo ignored their words.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.toyworld.render import VOCABULARY, Scene

KINDS = (  # paths, with the direction of those that have one
    ("horizontally", 0),
    ("vertically", 0),
    ("around", -1),
    ("around", 1),
    ("diagonally", -1),
    ("diagonally", 1),
)
SHAPES = VOCABULARY["shape"]
MOVEMENT_WEIGHT, WORD_WEIGHT = 0.5, 0.2
OFFSET_SCALE = 3.2  # brings offsets from tokens to the shape, as shares of the image, to about 1


def kind(scene: Scene) -> int:
    """Returns which of `KINDS` a scene shows."""
    motion = scene.attributes.motion
    return KINDS.index((motion, scene.direction if motion in ("around", "diagonally") else 0))


def movement(scene: Scene, frames: int, step: int) -> Tensor:
    """Returns (x, y) from the middle, in shares of the image, and rates from -1 to 1, `[latent frames, 4]`.

    `step`: frames of a latent frame after the first, which is one frame.
    """
    last = torch.arange(0, frames, step, dtype=torch.float32)
    middle = last - (step - 1) / 2 * (last > 0)
    quarter = scene.period / 4  # of a sine, a quarter of a period later, is its rate
    now, later = (torch.stack(scene.position(time), dim=1) for time in (middle, middle + quarter))
    return torch.cat([now, (later - torch.tensor(scene.centre)) / torch.tensor(scene.reach)], dim=1)


class SceneReader(nn.Module):
    """Reads movement from each token after a third and two thirds of the blocks, and then kind and shape.

    It reads linearly: each token has to tell how far the shape of its frame is from it, and where it goes.
    """

    def __init__(self, blocks: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.movement = nn.ModuleList(nn.Linear(width, 4) for _ in range(2))
        self.kind, self.shape = nn.Linear(width, len(KINDS)), nn.Linear(width, len(SHAPES))
        self.seen: dict[int, Tensor] = {}
        for share in (1, 2):
            blocks[share * len(blocks) // 3].register_forward_pre_hook(partial(self.keep, share))

    def keep(self, share: int, _block: nn.Module, inputs: tuple) -> None:
        """Keeps the tokens `[B, S, width]` that enter a block, for `loss`."""
        self.seen[share] = inputs[0]

    def loss(self, scenes: list[Scene], frames: int, step: int) -> Tensor:
        """Returns the loss of the last forward pass, for its scenes, of `frames` square frames each."""
        device = self.kind.weight.device
        place, rate = torch.stack([movement(s, frames, step) for s in scenes]).to(device).chunk(2, dim=-1)
        kinds = torch.tensor([kind(scene) for scene in scenes], device=device)
        shapes = torch.tensor([SHAPES.index(scene.attributes.shape) for scene in scenes], device=device)
        total = torch.zeros((), device=device)
        for share, reader in enumerate(self.movement, 1):
            tokens = self.seen.pop(share).float()
            tokens = functional.layer_norm(tokens, tokens.shape[-1:]).unflatten(1, (place.shape[1], -1))
            offset = OFFSET_SCALE * (place[:, :, None] - token_places(tokens.shape[2]).to(device))
            goal = torch.cat([offset, rate[:, :, None].expand_as(offset)], dim=-1)  # [B, F, H W, 4]
            total = total + MOVEMENT_WEIGHT / 2 * functional.mse_loss(reader(tokens), goal)
        whole = tokens.mean(dim=(1, 2))
        words = functional.cross_entropy(self.kind(whole), kinds)
        return total + WORD_WEIGHT * (words + functional.cross_entropy(self.shape(whole), shapes))


def token_places(tokens: int) -> Tensor:
    """Returns (x, y) of the tokens of a square frame from its middle, in shares of its side, `[S, 2]`."""
    side = math.isqrt(tokens)
    line = (torch.arange(side) + 0.5) / side - 0.5
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
