"""Profiles: what is measured on cells, its file, and how it is stretched to other grids."""

from dataclasses import replace

import pytest
import torch

from radial_attn import TokenGrid
from radial_attn.models import profile as profiles
from radial_attn.models.profile import SHARES, MeasuredModel, ModelProfile, Reading
from radial_attn.selection import far_correction, measure_blocks

GRID = TokenGrid(4, 4, 8, text=5)
MODEL = MeasuredModel("wan", layers=2, heads=3, width=8, weights="abc")
EDGES = (0.8, 0.0)


def tensors(seed: int, grid: TokenGrid = GRID, batch: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, grid.tokens, MODEL.heads, MODEL.width, generator=generator) for _ in "qkv"]


def read(grid: TokenGrid = GRID, batch: int = 1) -> Reading:
    reading = Reading(grid, 16)
    for part in range(2):
        for layer in range(2):
            reading.add(part, layer, tensors(10 * part + layer, grid, batch), None)
    return reading


@pytest.fixture(scope="module")
def profile() -> ModelProfile:
    return ModelProfile.of(read(), MODEL, EDGES, about={"prompts": 1})


@pytest.mark.parametrize("far_field", [False, True])
def test_the_same_grid_gets_what_was_measured(profile, far_field):
    """Up to one factor for all heads and layers, and float16."""
    factors = []
    for part in range(2):
        for layer in range(2):
            truth = measure_blocks(tensors(10 * part + layer), GRID, 16, far_field=far_field).loss[
                ..., :8, :8
            ]
            losses = profile.losses(part, layer, GRID, 16, far_field=far_field)[..., :8, :8]
            factors.append((losses.sum() / truth.sum()).item())
            torch.testing.assert_close(losses / factors[-1], truth, rtol=0.02, atol=0.002)
    assert max(factors) < 1.01 * min(factors)


def test_the_bias_is_that_of_the_kept_blocks():
    grid = replace(GRID, text=0)
    made = ModelProfile.of(read(grid), MODEL, EDGES)
    measured = measure_blocks(tensors(11, grid), grid, 16, far_field=True)
    loss = measured.loss.clone()
    loss.diagonal(dim1=-2, dim2=-1).fill_(9.0)
    for share in (SHARES[4], SHARES[10]):
        kept = loss.flatten(2).argsort(-1, descending=True).argsort(-1).view(loss.shape) < round(share * 64)
        torch.testing.assert_close(
            made.bias(1, 1, kept), far_correction(measured, kept), rtol=2e-3, atol=2e-3
        )


def test_other_lengths_and_sizes_keep_the_shape():
    """A head that sees its own frame does so at any size; the total of a row is that of its neighbours."""
    own_frame = torch.eye(4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    reading = read(replace(GRID, text=0))
    reading.sums = {at: own_frame.expand(4, 3, 8, 8).clone() for at in reading.sums}
    made = ModelProfile.of(reading, MODEL, EDGES)
    for grid, size in ((TokenGrid(4, 8, 8), 32), (TokenGrid(4, 8, 8, 3), 16), (TokenGrid(4, 4, 6), 16)):
        losses = made.losses(0, 0, grid, size, far_field=True)[0, 0]
        frames = torch.arange(grid.video_tokens) // grid.tokens_per_frame
        block = torch.arange(grid.video_tokens) // size
        alone = torch.zeros(*losses.shape, dtype=torch.bool)
        for first in range(len(losses)):
            for second in range(len(losses)):
                alone[first, second] = not set(frames[block == first].tolist()) & set(
                    frames[block == second].tolist()
                )
        assert losses[alone].abs().max() < 1e-3 and losses[~alone].min() >= 0
        assert losses.diagonal()[: grid.video_tokens // size].min() > 0.1
    long = made.losses(0, 0, TokenGrid(7, 4, 8), 16, far_field=True)[0, 0]
    torch.testing.assert_close(long[::4, ::4].diagonal(), long[0, 0].expand(4), rtol=0.02, atol=0)


def test_another_order_of_the_tokens_is_refused(tmp_path):
    tiles = replace(GRID, order="tiles")
    file = tmp_path / "a.safetensors"
    file.write_bytes(ModelProfile.of(read(tiles), MODEL, EDGES).to_bytes())
    made = ModelProfile.read(file)
    assert made.losses(0, 0, tiles, 16, far_field=False).isfinite().all()
    with pytest.raises(ValueError, match="tokens in the order 'tiles', got 'raster'; calibrate again"):
        made.losses(0, 0, GRID, 16, far_field=False)


def test_file_is_small_and_read_back(profile, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(profile.to_bytes())
    again = ModelProfile.read(file)
    assert again.model == MODEL and again.edges == EDGES and again.about == {"prompts": 1}
    for name in ("basis", "parts", "biases"):
        assert torch.equal(getattr(again, name), getattr(profile, name))
    assert [profile.part(sigma) for sigma in (1.0, 0.8, 0.79, 0.0, -1.0)] == [0, 0, 1, 1, 1]


def test_file_keeps_to_its_limit(monkeypatch):
    """Takes fewer maps, also if it finds them by random projections, the same ones each time."""
    monkeypatch.setattr(profiles, "BYTES", 15_000)
    monkeypatch.setattr(profiles, "EXACT", 1)
    made = [ModelProfile.of(read(replace(GRID, text=0)), MODEL, EDGES) for _ in range(2)]
    assert 1 < len(made[0].basis) < 30 and torch.equal(made[0].basis, made[1].basis)
    assert len(made[0].to_bytes()) <= 15_000


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: b"", "cannot be read: .*calibrate again"),
        (lambda content: content[:-10], "cannot be read"),
        (lambda content: content.replace(b'"version":"1"', b'"version":"9"'), "no profile of version 1"),
        (lambda content: content.replace(b'\\"heads\\": 3', b'\\"heads\\": 4'), "its parts must be finite"),
        (lambda content: content.replace(b'\\"edges\\"', b'\\"edgez\\"'), "cannot be read: 'edges'"),
    ],
)
def test_damage_is_told(profile, tmp_path, spoil, message):
    file = tmp_path / "a.safetensors"
    file.write_bytes(spoil(profile.to_bytes()))
    with pytest.raises(ValueError, match=message):
        ModelProfile.read(file)


def test_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        ModelProfile.read(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, None),
        ({"weights": None}, None),
        ({"weights": "other"}, "other weights"),
        ({"heads": 4}, "heads 3, not 4"),
        ({"family": "mochi"}, "family wan, not mochi"),
    ],
)
def test_models_are_told_apart(other, message):
    assert MODEL.other(replace(MODEL, **other)) == message
