"""The table of published settings: it equals the presets, finds each model, and is printed in two lines."""

import diffusers
import pytest
import torch
from omegaconf import OmegaConf

from radial_attn import radial_mask
from radial_attn.models.apply import TRANSFORMERS
from radial_attn.models.enable import enable
from radial_attn.models.published import CLASSES, PUBLISHED, nearest_settings, traits_of
from tests.support.real_sizes import FULL_SIZE
from tests.support.tiny import wan_pipeline, wan_transformer
from tests.support.tiny_mochi import mochi_transformer


def test_every_supported_class_has_settings():
    assert set(CLASSES) == set(TRANSFORMERS)


PRESETS = {
    "Wan2.1 T2V 14B": "wan2.1_t2v_14b",
    "Wan2.1 T2V 1.3B": "wan2.1_t2v_1.3b",
    "Wan2.1 I2V 14B": "wan2.1_i2v_14b_720p",
    "Wan2.2 T2V A14B": "wan2.2_t2v_a14b",
    "Wan2.2 I2V A14B": "wan2.2_i2v_a14b",
    "HunyuanVideo": "hunyuan_t2v",
    "HunyuanVideo I2V": "hunyuan_i2v",
    "Mochi 1": "mochi_t2v",
    "the bundled Wan": "wan_tiny",
    "the bundled Wan I2V": "wan_i2v_tiny",
    "the bundled HunyuanVideo": "hunyuan_tiny",
    "the bundled Mochi": "mochi_tiny",
}


@pytest.mark.parametrize("model", PRESETS)
def test_rows_are_the_presets(model):
    (row,) = (row for row in PUBLISHED if row.model == model)
    config = OmegaConf.load(f"configs/{PRESETS[model]}.yaml")
    attention = dict(config.attention)
    mask = dict(vars(row.config))
    assert (mask.pop("density"), mask.pop("compat")) == (None, "none")
    assert {name: attention[name] for name in mask} == mask
    steps = attention["dense_steps"], config.generation.steps, attention["dense_layers"]
    assert (row.dense_steps, row.steps, row.dense_layers) == steps
    assert attention["dense_last_steps"] == 0
    if row.size is not None:
        video = config.generation
        assert row.size == f"{video.num_frames} frames of {video.height}x{video.width}"


def test_densities_of_the_rows_are_the_published_ones():
    """Compares with the paper's Wan row at half neighbour, and with the bundled models as measured."""
    density = {row.model: radial_mask(row.grid, row.config).density for row in PUBLISHED if row.grid}
    assert density["Wan2.1 T2V 14B"] == pytest.approx(1 - 0.7366, abs=5e-4)
    assert density["the bundled Wan"] == pytest.approx(0.573, abs=5e-4)
    assert density["the bundled Mochi"] == pytest.approx(0.902, abs=1e-3)
    assert density["the bundled HunyuanVideo"] == pytest.approx(0.795, abs=5e-4)


BUNDLED = {
    "the bundled Wan": ("Wan", "wan-tiny"),
    "the bundled Wan I2V": ("Wan", "wan-i2v-tiny"),
    "the bundled HunyuanVideo": ("HunyuanVideo", "hunyuan-tiny"),
    "the bundled Mochi": ("Mochi", "mochi-tiny"),
}


def full_size(name, **changes):
    """Makes a transformer of a published size without memory for its weights."""
    with torch.device("meta"):
        return getattr(diffusers, f"{name}Transformer3DModel")(**changes)


@pytest.mark.parametrize("model", FULL_SIZE)
def test_published_models_are_recognised(model, capsys):
    name, changes = FULL_SIZE[model]
    transformer = full_size(name, **changes)
    settings = nearest_settings(traits_of(transformer))
    assert settings.model == model and settings.traits == traits_of(transformer)
    with enable(transformer, num_steps=50) as handle:
        assert handle.report()["dense_layers"] == settings.dense_layers
    assert capsys.readouterr().out.startswith(f"Radial attention for {model}: ")


@pytest.mark.parametrize("model", BUNDLED)
def test_bundled_models_are_recognised(model):
    name, folder = BUNDLED[model]
    kind = getattr(diffusers, f"{name}Transformer3DModel")
    with torch.device("meta"):
        traits = traits_of(kind.from_config(kind.load_config(f"assets/{folder}/transformer")))
    settings = nearest_settings(traits)
    assert settings.model == model and settings.traits == traits


def test_two_experts_and_relatives():
    """A pipeline tells Wan2.2 A14B from Wan2.1 14B; VACE and unknown sizes take the nearest row."""
    wan = full_size("Wan", num_layers=1)
    assert nearest_settings(traits_of(wan)).model == "Wan2.1 T2V 14B"
    assert nearest_settings(traits_of(wan, experts=True)).model == "Wan2.2 T2V A14B"
    vace = full_size("WanVACE", num_layers=1, vace_layers=[0])
    assert nearest_settings(traits_of(vace)).model == "Wan2.1 T2V 14B"
    between = full_size("Wan", num_layers=1, num_attention_heads=16)
    assert nearest_settings(traits_of(between)).model == "Wan2.1 T2V 1.3B"
    assert nearest_settings(traits_of(wan_transformer())).model == "the bundled Wan"
    assert nearest_settings(traits_of(mochi_transformer())).model == "the bundled Mochi"


def test_a_subclass_is_of_its_family():
    transformer = wan_transformer()
    transformer.__class__ = type("MyWan", (type(transformer),), {})
    assert traits_of(transformer).transformer == "WanTransformer3DModel"


def test_two_lines(capsys):
    enable(wan_pipeline())
    mask, dense = capsys.readouterr().out.splitlines()
    assert "WanTransformer3DModel (4 layers, width 24), nearest to the bundled Wan" in mask
    assert "decay_factor=0.5" in mask and "block_size=16" in mask and "density=" not in mask
    assert "(this repository)" in mask and "Dense: nothing" in dense and "handle.report()" in dense


@pytest.mark.parametrize(
    "options, of_mask, of_dense",
    [
        ({}, "(arXiv 2506.19852, default length)", "first 24 % of the steps (12 of 50), layer 0. Mask"),
        ({"num_steps": 20}, "block_size=128", "first 5 of 20 steps, layer 0. Mask density: 0.263"),
        ({"dense_steps": 3, "dense_layers": 2}, "dense_steps, dense_layers)", "3 steps, layers 0 to 1"),
        ({"dense_steps": 0, "dense_last_steps": 2}, "changed: dense_steps)", "layer 0, the last 2 steps."),
        ({"dense_steps": 1, "dense_last_steps": 1}, "dense_steps)", "first step, layer 0, the last step."),
        ({"dense_steps": 0.1}, "changed: dense_steps)", "the first 10 % of the steps, layer 0."),
        ({"density": 0.2}, "density=0.2", "Mask density: see handle.report()"),
        ({"decay_factor": 0.5}, "decay_factor=0.5", "Mask density: 0."),
        ({"quantize": "int8"}, "backend=auto, quantize=int8", "layer 0"),
        ({"dense_steps": 0, "selection": "dense_step"}, "selection=dense_step", "Dense: the first step, "),
        ({"dense_steps": 2, "residual": "int8"}, "residual=int8", "Dense: the first 2 steps, layer 0."),
        ({"pattern": "dense"}, "changed: pattern)", "Dense: every step and every layer"),
    ],
)
def test_lines_of_a_published_model(options, of_mask, of_dense, capsys):
    pipeline = wan_pipeline()
    pipeline.transformer = full_size("Wan")
    enable(pipeline, **options)
    mask, dense = capsys.readouterr().out.splitlines()
    assert mask.startswith("Radial attention for Wan2.1 T2V 14B: ") and of_dense in dense
    assert of_mask in mask


def test_quiet(capsys):
    with enable(wan_pipeline(), quiet=True):
        assert capsys.readouterr().out == ""
