"""Schema, YAML, overrides and presets."""

from dataclasses import asdict

import pytest
import yaml

from radial_attn import RadialConfig
from radial_attn.block_mask import BLOCK_SIZES
from radial_attn.dispatch import BACKENDS
from radial_attn.kernels.contract import QUANTIZE
from radial_attn.models.pipeline.load import FAMILIES
from radial_attn.models.pipeline.rope_scaling import METHODS
from radial_attn.models.runtime.output_check import CHECKS
from scripts.run.config import ROOT, AttentionConfig, keys, read_config
from scripts.run.errors import multiples_around, nearest_key, one_line
from scripts.run.option_checks import check_options
from scripts.run.plan import attention_arguments, radial_config

PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
TINY = "configs/wan_tiny.yaml"
OPTIONAL = {
    "model": "loras lora_mode lora_unmatched offload quantization vae_tiling compile cache cache_threshold "
    "cache_ratios positions positions_frames",
    "attention": "density",
    "generation": "prompt_file image last_image video mask reference_images guidance_scale_2 true_cfg_scale "
    "prompt_template",
    "parallel": "ulysses_degree ring_degree cfg_degree data_degree",
}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_sets_every_key_and_is_valid(preset):
    content = yaml.safe_load(preset.read_text())
    named = {f"{group}.{key}" for group, values in content.items() for key in values}
    optional = {f"{group}.{name}" for group, names in OPTIONAL.items() for name in names.split()}
    assert set(keys()) - named <= optional
    config = read_config(str(preset), [])
    check_options(config)
    assert isinstance(radial_config(config.attention), RadialConfig)
    assert preset.read_text().startswith("# ")
    assert config.output.path == f"outputs/{preset.stem}"


def test_presets_hold_the_settings_of_the_papers_table():
    config = read_config("configs/wan2.1_t2v_14b.yaml", [])
    generation, attention = config.generation, config.attention
    assert (generation.size, generation.steps) == ((69, 768, 1280), 50)
    assert (attention.dense_steps, attention.dense_layers, attention.decay_factor) == (12, 1, 0.2)
    smaller = read_config("configs/wan2.1_t2v_1.3b.yaml", []).attention
    assert smaller == attention == AttentionConfig()
    longer = read_config("configs/wan_tiny_4x.yaml", [])
    assert longer.generation.num_frames == 129
    (adapter,) = longer.model.loras
    assert adapter.path == "assets/wan-tiny-4x-lora"
    short = read_config(TINY, ["attention.dense_steps=4", f"model.loras={adapter.path}"])
    assert (longer.model, longer.attention) == (short.model, short.attention)


def test_choices_are_those_of_the_packages_below():
    choices = {key: entry.metadata["choices"] for key, entry in keys().items()}
    assert choices["attention.backend"] == BACKENDS
    assert choices["attention.quantize"] == ("none", *QUANTIZE[1:])
    assert choices["attention.check"] == CHECKS
    assert choices["attention.block_size"] == tuple(BLOCK_SIZES)
    assert choices["model.family"] == tuple(FAMILIES)
    assert choices["model.positions"] == METHODS
    for key in ("pattern", "neighbour"):
        for choice in choices[f"attention.{key}"]:
            RadialConfig(**{key: choice})


def test_every_key_of_attention_reaches_the_model():
    config = read_config(TINY, ["attention.quantize=int8", "attention.check=nan"])
    options = attention_arguments(config.attention)
    given = set(options) - {"config"} | set(asdict(options["config"]))
    assert given == set(asdict(config.attention))
    assert (options["quantize"], options["check"]) == ("int8", "nan")
    assert attention_arguments(read_config(TINY, []).attention)["quantize"] is None


def test_precedence_defaults_then_file_then_command_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("generation: {seed: 7, steps: 9}\n")
    config = read_config(str(file), ["generation.steps=3"])
    assert (config.generation.seed, config.generation.steps, config.generation.height) == (7, 3, 768)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("generation.prompt=a: ${b} [c, {d", "a: ${b} [c, {d"),
        ("generation.prompt=true", "true"),
        ("generation.prompt=x=y", "x=y"),
        ("generation.prompt_file=null", None),
        ("generation.prompt_file=~", "~"),
        ("generation.prompt_file=", ""),
        ("generation.prompt_file=1:30", "1:30"),
        ("generation.prompt=null", "null"),
        ("generation.seed=010", 10),
        ("generation.guidance_scale=1e1", 10.0),
        ("attention.decimation_width=block", "block"),
        ("attention.decimation_width=64", 64),
        ("attention.sink=false", False),
        ("attention.decay_factor=1", 1.0),
        ("output.path=a b/ü.mp4", "a b/ü.mp4"),
    ],
)
def test_values_of_the_command_line(override, value):
    group, name = override.split("=")[0].split(".")
    assert asdict(read_config(TINY, [override]))[group][name] == value


def test_a_config_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config(TINY, []).generation.height == 64


def test_nearest_key():
    known = ["model.path", "output.path", "generation.seed"]
    assert nearest_key("outptu.path", known) == "output.path"
    assert nearest_key("sed", known) == "generation.seed"


@pytest.mark.parametrize(
    ("value", "step", "offset", "around"),
    [(100, 16, 0, (96, 112)), (5, 16, 0, (16, 16)), (32, 4, 1, (29, 33)), (2, 4, 1, (1, 5))],
)
def test_multiples_around(value, step, offset, around):
    assert multiples_around(value, step, offset) == around


def test_one_line_of_an_empty_message_is_the_exceptions_name():
    assert one_line(ValueError("\n a \n b")) == "a"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
