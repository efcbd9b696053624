"""Masks per head by a profile, through pipelines: measured on some videos, used in others."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from radial_attn import BlockMask, RadialConfig, TokenGrid, calibrate, enable
from radial_attn.models import apply_radial_attention
from radial_attn.models.profile import ModelProfile
from radial_attn.models.runtime import layer_attention
from radial_attn.selection import Budget, floor_blocks
from tests.support.families import assert_near
from tests.support.pipelines import KINDS

CONFIG = RadialConfig(block_size=16, density=0.9)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Callable[[str], Path]:
    files: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in files:
            files[name] = tmp_path_factory.mktemp(name) / "profile.safetensors"
            pipeline = KINDS[name].make()
            with calibrate(pipeline, files[name], block_size=16, parts=2):
                KINDS[name].generate(pipeline, 4)
        return files[name]

    return of


@pytest.mark.parametrize(
    "name", ["wan", "wan-a14b", "mochi", "hunyuan_video", "vace-reference", "kandinsky5", "ltx"]
)
def test_all_blocks_are_dense_and_videos_repeat(name, calibrated):
    kind, pipeline = KINDS[name], KINDS[name].make()
    expected = kind.generate(pipeline, 3)
    options = {"selection": "profile", "profile": calibrated(name)}
    with apply_radial_attention(pipeline, RadialConfig(block_size=16, density=1.0), **options) as handle:
        assert_near(kind.generate(pipeline, 3), expected)
        assert handle.report()["dense_steps"] == 0 and handle.report()["density"] == 1.0
    with apply_radial_attention(pipeline, CONFIG, **options, far_field="linear") as handle:
        first = kind.generate(pipeline, 3)
        assert torch.equal(kind.generate(pipeline, 3), first)
        assert not torch.equal(first, expected)
        assert 0.8 < handle.report()["density"] <= 0.9
    assert torch.equal(kind.generate(pipeline, 3), expected)


@pytest.mark.parametrize("budget", ["head", "layer", "model"])
def test_layers_keep_the_blocks_that_cost_most(budget, calibrated, monkeypatch):
    seen, attention = [], layer_attention.radial_attention

    def noted(*args, **options):
        seen.append(args[3])
        return attention(*args, **options)

    monkeypatch.setattr(layer_attention, "radial_attention", noted)
    kind, profile = KINDS["wan"], ModelProfile.read(calibrated("wan"))
    pipeline = kind.make()
    options = {"selection": "profile", "profile": calibrated("wan"), "budget": budget}
    with apply_radial_attention(pipeline, CONFIG, **options):
        kind.generate(pipeline, 3)
        sigmas = pipeline.scheduler.sigmas[:3].tolist()
    masks = [mask for part in map(profile.part, sigmas) for mask in expected_masks(profile, part, budget)]
    layers = profile.model.layers
    for number, mask in enumerate(seen):
        step, layer = number // (2 * layers), number % layers  # two halves of guidance
        assert torch.equal(mask.blocks, masks[step * layers + layer].blocks)
    assert len(seen) == 3 * 2 * layers and len({profile.part(sigma) for sigma in sigmas}) == 2


def expected_masks(profile: ModelProfile, part: int, budget: str) -> list[BlockMask]:
    grid = TokenGrid(*KINDS["wan"].grid)
    chooser = Budget(floor_blocks(grid, CONFIG), grid.block_tokens(16), [0.9], budget)
    layers = range(profile.model.layers)
    losses = [profile.losses(part, layer, grid, 16, far_field=False) for layer in layers]
    counts = [chooser.histogram(loss) for loss in losses]
    counts = [sum(counts)] * len(counts) if budget == "model" else counts
    levels = [chooser.levels(x, chooser.cuts(count)) for x, count in zip(losses, counts, strict=True)]
    return [BlockMask(grid, 16, level[0] > 0) for level in levels]


def test_a_copy_and_a_density_range(calibrated):
    kind, pipeline = KINDS["wan"], KINDS["wan"].make()
    options = {"selection": "profile", "profile": calibrated("wan"), "density_range": (1.0, 0.85)}
    with apply_radial_attention(pipeline, RadialConfig(block_size=16), **options) as handle:
        expected = kind.generate(pipeline, 3)
        assert handle.report()["density"] < 0.86
        assert torch.equal(kind.generate(copy.deepcopy(pipeline), 3), expected)


def test_enable_says_so(calibrated, capsys):
    pipeline = KINDS["wan"].make()
    file = calibrated("wan")
    enable(pipeline, selection="profile", profile=file, density=0.9, block_size=16).remove()
    assert f"selection=profile, budget=layer, profile={file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "profile"}, "selection='profile' needs the file of a profile, got profile=None"),
        ({"profile": "a"}, "profile='a' serves selection='profile' alone, got selection='static'"),
        ({"selection": "profile", "profile": "a"}, "profile 'a' cannot be read: No such file"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        apply_radial_attention(KINDS["wan"].make(), CONFIG, **options)


def test_other_models_and_bare_transformers_are_refused(calibrated):
    options = {"selection": "profile", "profile": calibrated("wan")}
    with pytest.raises(ValueError, match="was measured on another model: family wan, not mochi; calibrate"):
        apply_radial_attention(KINDS["mochi"].make(), CONFIG, **options)
    pipeline = KINDS["wan"].make()
    message = "needs the noise levels of a scheduler; enable it on the pipeline"
    enabled = apply_radial_attention(pipeline.transformer, CONFIG, **options, num_steps=3)
    with enabled, pytest.raises(ValueError, match=message):
        KINDS["wan"].generate(pipeline, 3)


def test_calibration_writes_whole_files_of_one_size(tmp_path):
    kind, pipeline, file = KINDS["wan"], KINDS["wan"].make(), tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="must have one size, got"), calibrate(pipeline, file):
        kind.generate(pipeline, 4)
        kind.generate(pipeline, 4, num_frames=9)
    with pytest.raises(ValueError, match="as many steps, got 3; make more steps"), calibrate(pipeline, file):
        kind.generate(pipeline, 3)
    with pytest.raises(ValueError, match="noise levels"), calibrate(pipeline.transformer, file):
        kind.generate(pipeline, 4)
    assert not list(tmp_path.iterdir())
    with calibrate(pipeline, file):
        kind.generate(pipeline, 4)
    profile = ModelProfile.read(file)
    assert len(profile.edges) == 4 and profile.frequencies[0] == 1 and list(tmp_path.iterdir()) == [file]
