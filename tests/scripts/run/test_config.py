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
from scripts.run.config import ROOT, AttentionConfig, help_text, keys, read_config
from scripts.run.errors import UsageError, multiples_around, nearest_key, one_line
from scripts.run.option_checks import check_options
from scripts.run.plan import attention_arguments, radial_config

PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
TINY = "configs/wan_tiny.yaml"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_sets_every_key_and_is_valid(preset):
    content = yaml.safe_load(preset.read_text())
    named = {f"{group}.{key}" for group, values in content.items() for key in values}
    optional = {
        "generation.prompt_file",
        "generation.image",
        "generation.video",
        "generation.mask",
        "attention.density",
        "generation.guidance_scale_2",
        "generation.prompt_template",
        "model.loras",
        "model.lora_mode",
        "model.lora_unmatched",
        "model.offload",
        "model.quantization",
        "model.vae_tiling",
        "model.compile",
        "model.cache",
        "model.cache_threshold",
        "model.cache_ratios",
        "model.positions",
        "model.positions_frames",
        "parallel.ulysses_degree",
        "parallel.ring_degree",
        "parallel.cfg_degree",
        "parallel.data_degree",
    }
    assert set(keys()) - named <= optional
    config = read_config(str(preset), [])
    check_options(config)
    assert isinstance(radial_config(config.attention), RadialConfig)
    assert preset.read_text().startswith("# ")
    assert config.output.path == f"outputs/{preset.stem}"


def test_presets_hold_the_settings_of_the_papers_table():
    config = read_config("configs/wan2.1_t2v_14b.yaml", [])
    generation, attention = config.generation, config.attention
    assert (generation.height, generation.width, generation.num_frames, generation.steps) == (
        768,
        1280,
        69,
        50,
    )
    assert (attention.dense_steps, attention.dense_layers, attention.decay_factor) == (12, 1, 0.2)
    smaller = read_config("configs/wan2.1_t2v_1.3b.yaml", []).attention
    assert smaller == attention == AttentionConfig()
    longer = read_config("configs/wan_tiny_4x.yaml", [])
    assert longer.generation.num_frames == 129
    (adapter,) = longer.model.loras
    assert adapter.path == "assets/wan-tiny-4x-lora"
    words = ["attention.dense_steps=4", f"model.loras={adapter.path}"]
    short = asdict(read_config(TINY, words))
    assert {key: value for key, value in asdict(longer).items() if key in ("model", "attention")} == {
        key: short[key] for key in ("model", "attention")
    }


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
    ("override", "group", "name", "value"),
    [
        ("generation.prompt=a: ${b} [c, {d", "generation", "prompt", "a: ${b} [c, {d"),
        ("generation.prompt=true", "generation", "prompt", "true"),
        ("generation.prompt=x=y", "generation", "prompt", "x=y"),
        ("generation.prompt_file=null", "generation", "prompt_file", None),
        ("generation.prompt_file=~", "generation", "prompt_file", "~"),
        ("generation.prompt_file=", "generation", "prompt_file", ""),
        ("generation.prompt_file=1:30", "generation", "prompt_file", "1:30"),
        ("generation.prompt=null", "generation", "prompt", "null"),
        ("generation.seed=010", "generation", "seed", 10),
        ("generation.guidance_scale=1e1", "generation", "guidance_scale", 10.0),
        ("attention.decimation_width=block", "attention", "decimation_width", "block"),
        ("attention.decimation_width=64", "attention", "decimation_width", 64),
        ("attention.sink=false", "attention", "sink", False),
        ("attention.decay_factor=1", "attention", "decay_factor", 1.0),
        ("output.path=a b/ü.mp4", "output", "path", "a b/ü.mp4"),
    ],
)
def test_values_of_the_command_line(override, group, name, value):
    assert getattr(getattr(read_config(TINY, [override]), group), name) == value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["generation.hieght=3"], ["generation.hieght", "generation.height"]),
        (["prompt=a"], ["'prompt'", "generation.prompt"]),
        (["modell.path=a"], ["modell.path", "model.path"]),
        (["output.pth=a"], ["output.pth", "output.path"]),
        (["generation=3"], ["'generation'"]),
        (["generation.seed=abc"], ["generation.seed", "'abc'", "whole number"]),
        (["generation.height=64.5"], ["generation.height", "64.5", "whole number"]),
        (["generation.seed=true"], ["generation.seed", "'true'"]),
        (["generation.num_frames=1:30"], ["generation.num_frames", "'1:30'", "whole number"]),
        (["generation.seed=0x10"], ["generation.seed", "'0x10'", "whole number"]),
        (["generation.flow_shift=1:30.5"], ["generation.flow_shift", "'1:30.5'", "number above 0"]),
        (["generation.seed=[1"], ["generation.seed", "'[1'"]),
        (["generation.seed={a: 1}"], ["generation.seed", "whole number"]),
        (["generation.seed="], ["generation.seed", "whole number"]),
        (["attention.sink=maybe"], ["attention.sink", "'maybe'", "true, false"]),
        (["attention.decimation_width=1.5"], ["attention.decimation_width", "1.5", "block"]),
    ],
)
def test_bad_overrides_are_one_line_with_key_and_remedy(overrides, words):
    with pytest.raises(UsageError) as raised:
        read_config(TINY, overrides)
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("generation: [1, 2", ["mine.yaml", "YAML"]),
        ("", ["mine.yaml", "generation"]),
        ("- a\n- b\n", ["mine.yaml"]),
        ("seed: 3\n", ["'seed'", "generation.seed"]),
        ("output:\n", ["output"]),
        ("generation: {sead: 3}\n", ["generation.sead", "generation.seed"]),
        ("generation: {seed: x}\n", ["generation.seed", "'x'"]),
        ("generation: {prompt: '${nothing.there}'}\n", ["mine.yaml", "nothing"]),
        ("\x00\x01", ["mine.yaml"]),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, words):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        read_config(str(file), [])
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words)


def test_a_missing_file_names_the_bundled_ones():
    with pytest.raises(UsageError, match=r"'nope\.yaml' not found.*configs/wan_tiny\.yaml"):
        read_config("nope.yaml", [])


def test_a_config_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config(TINY, []).generation.height == 64


def test_help_names_every_key_and_preset():
    text = help_text()
    assert all(f"  {key}=" in text for key in keys())
    assert all(f"configs/{preset.name}" in text for preset in PRESETS)
    assert text.splitlines()[0].startswith(
        "usage: bash scripts/wan_t2v_inference.sh [CONFIG.yaml] [key=value ...]"
    )


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
