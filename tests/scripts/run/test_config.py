"""Schema, YAML, overrides and presets."""

import json
from dataclasses import asdict, replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from radial_attn import RadialConfig
from radial_attn.block_mask import BLOCK_SIZES
from radial_attn.dispatch import BACKENDS
from radial_attn.kernels.contract import QUANTIZE
from radial_attn.masks.radial import COMPAT
from radial_attn.models.pipeline.load import FAMILIES
from radial_attn.models.pipeline.rope_scaling import METHODS
from radial_attn.models.runtime.output_check import CHECKS
from scripts.run.attention import attention_arguments, radial_config
from scripts.run.config import ROOT, AttentionConfig, keys, read_config
from scripts.run.errors import UsageError, multiples_around, nearest_key, one_line
from scripts.run.option_checks import check_options

PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
TINY = "configs/wan_tiny.yaml"
OPTIONAL = {
    "model": "transformer transformer_2 controlnet loras lora_mode lora_unmatched offload quantization "
    "vae_tiling compile cache cache_threshold cache_ratios positions positions_frames",
    "attention": "density compat selection profile budget far_field residual residual_memory tune",
    "generation": "prompt_file image last_image video mask pose_video face_video segment_frames "
    "reference_images guidance_scale_2 true_cfg_scale stg_scale modality_scale prompt_template seeds",
    "output": "overwrite",
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
    assert choices["attention.compat"] == tuple(COMPAT)
    assert choices["model.family"] == tuple(FAMILIES)
    assert choices["model.positions"] == METHODS
    for key in ("pattern", "neighbour"):
        for choice in choices[f"attention.{key}"]:
            RadialConfig(**{key: choice})


def test_every_key_of_attention_reaches_the_model():
    config = read_config(TINY, ["attention.quantize=int8", "attention.check=nan"])
    options = attention_arguments(config.attention)
    given = set(options) - {"config", "density_range"} | set(asdict(options["config"]))
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


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("generation: {prompt: no}", "prompt", "no"),
        ("generation: {prompt: 1.50}", "prompt", "1.50"),
        ("generation: {prompt: 2026-11-29}", "prompt", "2026-11-29"),
        ("generation: {prompt: 12:30}", "prompt", "12:30"),
        ("generation: {prompt: '${oc.env:HOME} ${5}'}", "prompt", "${oc.env:HOME} ${5}"),
        ("generation: {prompt: 'a\u2028b'}", "prompt", "a\u2028b"),
        ("generation: {prompt_file: 'null'}", "prompt_file", "null"),
        ("generation: {prompt_file: null}", "prompt_file", None),
        ("generation: {prompt_file: ~}", "prompt_file", None),
        ("generation: {seed: 010}", "seed", 10),
        ("generation: {guidance_scale: 1e1}", "guidance_scale", 10.0),
        ("x: &x {seed: 3}\ngeneration: {<<: *x}", "seed", UsageError),
    ],
)
def test_a_value_of_a_file_is_what_its_key_takes(tmp_path, text, name, value):
    (tmp_path / "mine.yaml").write_text(text)
    if value is UsageError:
        with pytest.raises(UsageError, match=r"unknown key 'x\.seed'"):
            read_config(str(tmp_path / "mine.yaml"), [])
    else:
        assert getattr(read_config(str(tmp_path / "mine.yaml"), []).generation, name) == value


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.yaml", "generation: {seed: 1}\nmodel: {}\ngeneration: {steps: 2}", "line 3: 'generation' twice"),
        ("a.yaml", "generation:\n  seed: 1\n  seed: 2", "line 3: 'seed' twice"),
        ("a.yaml", "model.path: a", "write 'model', and 'path' below it, indented"),
        ("a.yaml", "model:\n\tpath: a", "line 2: found character"),
        ("a.yaml", "[a]", "holds a list, must hold groups of keys: model, "),
        ("a.yaml", "", "is empty, must hold groups"),
        ("a.yaml", "generation: {seed: 0x10}", "generation.seed: got '0x10', must be a whole number"),
        ("a.yaml", "generation: {prompt: [a]}", "generation.prompt: got"),
        ("a.yaml", "? [a]\n: b", "line 1: found unhashable key"),
        ("a.yaml", "[" * 5000, "RecursionError|recursion"),
        ("a.yaml", b"generation: {prompt: \xe9}", "line 1 is not UTF-8"),
        ("a.json", '{"attention": {"sink": 2}}', "attention.sink: got 2, allowed: true, false"),
        ("a.json", '{"generation": {"seed": 1, "seed": 2}}', "'seed' is given twice"),
        ("a.json", '{"generation":\n {', "line 2"),
    ],
)
def test_a_file_that_cannot_be_read_as_written_is_refused(tmp_path, name, text, reason):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=reason) as refusal:
        read_config(str(tmp_path / name), [])
    assert "\n" not in str(refusal.value)


def test_a_record_is_a_configuration(tmp_path):
    words = [
        "generation.prompt=${a} \\${b} 😀",
        "generation.flow_shift=null",
        "model.loras=[{path: no, scale: 0.5}]",
    ]
    before = read_config("configs/wan_tiny_4x.yaml", words)
    (tmp_path / "a.json").write_text(json.dumps({"config": asdict(before), "seconds": {}}))
    assert read_config(str(tmp_path / "a.json"), []) == before
    assert read_config(str(tmp_path / "a.json"), ["generation.seed=5"]).generation.seed == 5


def test_the_mask_of_a_program_replaces_options_of_a_preset(tmp_path):
    """A record of it is a configuration; only what is given beside it is refused."""
    config = read_config("configs/wan_tiny.yaml", ["attention.compat=kijai"])
    assert vars(config.attention)["neighbour"] == "half" and config.attention.decimation_width == 128
    assert radial_config(replace(config.attention, block_size=64)) == RadialConfig(0.5, 64, compat="kijai")
    (tmp_path / "a.json").write_text(json.dumps({"config": asdict(config)}))
    assert read_config(str(tmp_path / "a.json"), []) == config
    (tmp_path / "a.yaml").write_text("attention:\n  compat: kijai\n  sink: false\n")
    for file, words in (
        ("a.json", ["attention.sink=true"]),
        ("a.yaml", []),
        ("a.yaml", ["attention.sink=true"]),
    ):
        with pytest.raises(UsageError, match=r"attention.sink: got .*"):
            read_config(str(tmp_path / file), words)
    assert not read_config(str(tmp_path / "a.yaml"), ["attention.compat=none"]).attention.sink


@given(st.text(alphabet="\\\\${}ab:\"' ", min_size=1, max_size=9))
def test_text_is_taken_literally(text):
    assert read_config(TINY, [f"generation.prompt={text}"]).generation.prompt == text


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
