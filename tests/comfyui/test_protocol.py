"""What the node pack reads of ComfyUI's calls."""

from types import SimpleNamespace

import pytest
import torch

from comfyui.protocol import (
    Layer,
    LayerCounter,
    NotServedError,
    halves_of,
    layout_of,
    read_blocks,
    step_of,
    text_lengths,
    traits_of,
)
from radial_attn import TokenGrid
from tests.support.comfy_stub import HunyuanVideo, WanModel

LOW = torch.finfo(torch.float32).min
GRID = TokenGrid(1, 2, 2, text=3)


def make(name: str, **attributes):
    return type(name, (), attributes)()


FRAMES = torch.zeros(1, 4, 2, 12, 16)
MOCHI = make("AsymmDiTJoint", patch_size=2, blocks=range(3), hidden_size_x=3072)
LTX = make("LTXVModel", transformer_blocks=range(28), inner_dim=2048)
BLOCK = torch.nn.Module()
BLOCK.attn = SimpleNamespace(heads=56, head_dim=128)
MINIMAX = make("MiniMaxH3Model", patch_size=(1, 2, 2), blocks=torch.nn.ModuleList([BLOCK]))
PACKED = {"latent_shapes": [(1, 24, 7, 11, 16), (1, 32, 2, 5)]}


@pytest.mark.parametrize(
    ("model", "sizes", "arguments", "tokens", "grid"),
    [
        (WanModel(), (5, 11, 16), {}, 240, TokenGrid(5, 6, 8)),
        (HunyuanVideo(), (5, 12, 15), {}, 249, TokenGrid(5, 6, 8, 9)),
        (
            HunyuanVideo(),
            (5, 12, 16),
            {"ref_latent": torch.zeros(1, 4, 2, 12, 16)},
            345,
            TokenGrid(7, 6, 8, 9),
        ),
        (MOCHI, (5, 12, 16), {}, 249, TokenGrid(5, 6, 8, 9)),
        (LTX, (5, 6, 8), {}, 240, TokenGrid(5, 6, 8)),
        (LTX, (5, 6, 8), {"keyframe_idxs": torch.zeros(1, 3, 48)}, 240, TokenGrid(4, 6, 8, 48)),
        (LTX, (5, 6, 8), {"latent_shapes": [(1, 4, 7, 6, 8), (1, 8, 30, 16)]}, 336, TokenGrid(7, 6, 8)),
        (LTX, (5, 6, 8), {}, 250, None),  # audio
        (MINIMAX, (5, 6, 8), PACKED, 7 * 48 + 9 + 10, TokenGrid(7, 6, 8, 19)),
        (WanModel(), (5, 12, 16), {}, 100, None),  # fewer tokens than the video has
        (HunyuanVideo(), (1, 4, 4), {}, 9, None),  # as many as the text has: the refiner
    ],
)
def test_the_grid_of_a_call(model, sizes, arguments, tokens, grid):
    arguments = {"c_crossattn": torch.zeros(1, 9, 16), **arguments}
    layout = layout_of(model, torch.zeros(1, 4, *sizes), arguments)
    assert layout.grid(tokens, {}) == grid


@pytest.mark.parametrize(
    ("model", "latents", "arguments", "words"),
    [
        (make("Flux"), torch.zeros(1, 4, 2, 4, 4), {}, "Flux stays dense: this node serves"),
        (HunyuanVideo(), torch.zeros(1, 4, 4, 4), {}, "its latents are no video"),
        (LTX, torch.zeros(1, 1, 99), {}, "its latents are no video"),
        (LTX, torch.zeros(1, 4, 2, 4, 4), {"keyframe_idxs": torch.zeros(1, 3, 5)}, "not whole frames of 16"),
    ],
)
def test_a_model_or_latents_that_are_not_served(model, latents, arguments, words):
    with pytest.raises(NotServedError, match=words):
        layout_of(model, latents, arguments)


def test_layers_by_a_newer_core_and_by_counting():
    layout = layout_of(HunyuanVideo(2, 2), torch.zeros(1, 4, 2, 4, 4), {})
    told, counted = LayerCounter(layout, 2), LayerCounter(layout, 2)
    options = [
        {"block_index": index, "block_type": kind} for kind in ("double", "single") for index in (0, 1)
    ]
    assert [told.next(entry) for entry in options] == [Layer(0), Layer(1), Layer(2), Layer(3)]
    assert [counted.next({}) for _ in options] == [Layer(0), Layer(1), Layer(2), Layer(3)]
    assert told.next({"block_index": 0}) == Layer(0, turn=1)


def test_layers_of_vace():
    model = WanModel(4)
    model.vace_layers_mapping = {0: 0, 2: 1}
    layout = layout_of(model, torch.zeros(1, 4, 2, 4, 4), {"vace_context": torch.zeros(1, 2, 4, 2, 4, 4)})
    assert layout.layers == (0, 0, 0, 1, 2, 2, 2, 3)


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (None, None),
        (torch.tensor([[[0.0, 0, 0, 0, 0, LOW, LOW]]]), [1, 1]),
        (torch.tensor([[[0.0] * 7], [[0.0] * 6 + [-torch.inf]]]), [3, 2]),
        (torch.tensor([True] * 5 + [False] * 2)[None, None, None], [1, 1]),
    ],
)
def test_text_lengths(mask, lengths):
    turned = None if mask is None else mask.roll(3, -1)
    for got in (text_lengths(mask, GRID, 2), text_lengths(turned, GRID, 2, text_first=True)):
        assert (got if got is None else got.tolist()) == lengths


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 7, 7),  # not of keys alone
        torch.tensor([[[0.0, 0, 0, 0, 0.5, 0, 0]]]),  # weighs
        torch.tensor([[[0.0, 0, 0, 0, LOW, 0, 0]]]),  # valid text after padding
        torch.tensor([[[0.0, 0, 0, LOW, LOW, LOW, LOW]]]),  # hides video
    ],
)
def test_a_mask_that_is_not_of_padding_stays_dense(mask):
    with pytest.raises(NotServedError, match="stay dense"):
        text_lengths(mask, GRID, 2)


def test_halves_of_a_batch():
    window = SimpleNamespace(index_list=[0, 1, 2])
    assert halves_of({}, 2) == [((0, 0, None), slice(0, 2))]
    assert halves_of({"uuids": ["a", "b"], "cond_or_uncond": [1, 0]}, 4) == [
        (("a", 0, None), slice(0, 2)),
        (("b", 0, None), slice(2, 4)),
    ]
    assert halves_of({"cond_or_uncond": [0, 0], "context_window": window}, 2) == [
        ((0, 0, (0, 1, 2)), slice(0, 1)),
        ((0, 1, (0, 1, 2)), slice(1, 2)),
    ]


def test_the_step_of_a_noise_level():
    planned = [1.0, 0.75, 0.5, 0.25]
    assert [step_of(sigma, planned) for sigma in (1.0, 0.9, 0.7499999, 0.5, 0.3, 0.1)] == [0, 0, 1, 2, 2, 3]


def test_reading_dense_blocks():
    assert read_blocks("") == set() and read_blocks(" 0, 3-5,1 ") == {0, 1, 3, 4, 5}
    for text in ("a", "1-", "-1", "1.5", "9-3"):
        with pytest.raises(ValueError, match="dense_blocks must be numbers"):
            read_blocks(text)


def test_traits_tell_models_apart():
    assert traits_of(WanModel()).image is False
    model = WanModel()
    model.in_dim = 36
    assert traits_of(model).image and traits_of(model).a14b
    model.img_emb = object()
    assert traits_of(model).image and not traits_of(model).a14b
    newer = HunyuanVideo()
    newer.byt5_in = object()
    assert traits_of(newer).transformer == "HunyuanVideo15Transformer3DModel"
    assert traits_of(MINIMAX).width == 7168
