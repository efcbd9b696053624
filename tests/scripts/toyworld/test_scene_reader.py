"""What the trainer shows a transformer of a scene: shape, path and places."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from radial_attn.models.apply import family_of
from scripts.toyworld import Attributes, random_scene
from scripts.toyworld.render import VOCABULARY
from scripts.toyworld.train.hunyuan_video import Denoiser as HunyuanVideo
from scripts.toyworld.train.options import Options, draw_scene, generator
from scripts.toyworld.train.scene_reader import (
    KINDS,
    SHAPES,
    WORD_WEIGHT,
    SceneReader,
    kind,
    movement,
    token_places,
)
from scripts.toyworld.train.wan import Denoiser as Wan


@pytest.mark.parametrize("motion", VOCABULARY["motion"])
def test_movement_is_the_place_of_the_shape_and_its_rate(motion):
    """A latent frame stands at the mean time of its frames: 0, then 2.5, 6.5 and so on."""
    scene = random_scene(Attributes("red", "circle", motion, "navy"), torch.Generator().manual_seed(2))
    times = torch.tensor([0, 2.5, 6.5], dtype=torch.float64)
    place, next_place = (torch.stack(scene.position(t), dim=1) for t in (times, times + 1e-4))
    step = 1e-4 * 2 * math.pi / scene.period  # radians
    rate = (next_place - place) / (step * torch.tensor(scene.reach))
    expected = torch.cat([place, rate], dim=1).float()
    torch.testing.assert_close(movement(scene, 9, 4), expected, atol=1e-3, rtol=0)


def test_tokens_stand_in_the_middle_of_their_pixels():
    expected = torch.tensor([[-0.25, -0.25], [0.25, -0.25], [-0.25, 0.25], [0.25, 0.25]])
    assert torch.equal(token_places(4), expected)


@pytest.mark.parametrize("denoiser", [Wan, HunyuanVideo])
def test_scene_loss_trains_the_blocks_before_it_without_a_caption(denoiser):
    """Blocks after the last reading get no gradient."""
    scenes = [draw_scene(generator(Options(), 3, number)) for number in range(40)]
    assert {kind(scene) for scene in scenes} == set(range(len(KINDS)))
    torch.manual_seed(0)
    one, latents = denoiser(), torch.randn(40, 16, 3, 2, 2)
    one(latents, torch.full((40,), 0.5), [""] * 40)
    one.reader.loss(scenes, 9, 4).backward()
    layers = family_of(one.transformer).attention_layers(one.transformer)
    assert [layer.to_v.weight.grad is not None for layer in layers] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("name", "told"),
    [("kind", kind), ("shape", lambda scene: SHAPES.index(scene.attributes.shape))],
)
def test_tokens_that_tell_kind_or_shape_have_less_loss(name, told):
    """Its reading of them is one cross-entropy, which vanishes for tokens that are far on the right side."""
    scenes = [draw_scene(generator(Options(), 3, number)) for number in range(8)]
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Identity() for _ in range(3))
    reader, tokens = SceneReader(blocks, 8), torch.zeros(8, 3 * 4, 8)

    def loss(numbers: list[int]) -> float:
        with torch.no_grad():
            getattr(reader, name).weight.copy_(20 * torch.eye(8)[: len(getattr(reader, name).weight)])
            x = tokens + functional.one_hot(torch.tensor(numbers), 8)[:, None]
            for block in blocks:
                x = block(x)
            return reader.loss(scenes, 9, 4).item()

    right = [told(scene) for scene in scenes]
    wrong = [(number + 1) % len(getattr(reader, name).weight) for number in right]
    assert loss(wrong) - loss(right) > 5 * WORD_WEIGHT
