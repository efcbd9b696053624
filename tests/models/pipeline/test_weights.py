"""What the check of weights refuses: parts that are not whole or do not fit their configuration."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from radial_attn.models.pipeline.load import read_index
from radial_attn.models.pipeline.weights import FILES, check_weights

QUERY = {
    "transformer": "blocks.0.attn1.to_q.weight",
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
}
STATE = {"transformer": FILES["diffusers"], "text_encoder": FILES["transformers"]}
PARTS = list(QUERY)


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree("assets/wan-tiny", tmp_path / "m"))


def check(model: Path, part: str) -> None:
    check_weights(model, read_index(str(model)), [part])


def edit(model: Path, part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a part."""
    file = model / part / STATE[part]
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def set_quantized(model: Path, part: str, method: str) -> None:
    """Writes to the configuration of a part that it was saved quantized."""
    file = model / part / "config.json"
    settings = {"quantization_config": {"quant_method": method}}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_shape(model, part):
    name = QUERY[part]
    edit(model, part, lambda state: state.update({name: state[name][:-1].clone()}))
    (rows, columns) = load_file(model / part / STATE[part])[name].shape
    message = (
        rf"{part}/{STATE[part]} has {name} of shape \[{rows}, {columns}\], but .* \[{rows + 1}, {columns}\]"
    )
    with pytest.raises(ValueError, match=message):
        check(model, part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_integers_in_place_of_numbers(model, part, dtype):
    name = QUERY[part]
    edit(model, part, lambda state: state.update({name: state[name].to(dtype)}))
    with pytest.raises(ValueError, match=f"{STATE[part]} has {name} as integers"):
        check(model, part)


@pytest.mark.parametrize("part", PARTS)
def test_layers_that_the_configuration_leaves_out(model, part):
    file = model / part / "config.json"
    settings = json.loads(file.read_text())
    layers = settings["num_layers"]
    file.write_text(json.dumps(settings | {"num_layers": layers - 1}))
    last = rf"\.{layers - 1}\."
    with pytest.raises(ValueError, match=rf"{part} holds .*{last}.* has no place for them"):
        check(model, part)


@pytest.mark.parametrize("part", PARTS)
def test_scales_of_8_bit_weights(model, part):
    """Weights in 8 bits may be taken as they are, but not if scales stand beside them."""
    name = QUERY[part]
    edit(model, part, lambda state: state.update({name: state[name].to(torch.float8_e4m3fn)}))
    check(model, part)
    scale = name.replace("weight", "scale_weight")
    edit(model, part, lambda state: state.update({scale: torch.ones(1)}))
    with pytest.raises(ValueError, match=f"{part} holds {scale}, scales"):
        check(model, part)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("method", "packed"),
    [
        ("bitsandbytes", ["{}", "{}.absmax"]),
        ("quanto", ["{}._data", "{}._scale"]),
        ("gptq", ["{module}.qweight", "{module}.scales"]),
        ("torchao", ["{module}._weight_qdata", "{module}._weight_scale"]),
        ("compressed-tensors", ["{}_packed", "{}_scale"]),
    ],
)
def test_a_part_that_was_saved_quantized(model, part, method, packed):
    name, module = QUERY[part], QUERY[part].removesuffix(".weight")
    edit(model, part, lambda state: state.pop(name))
    set_quantized(model, part, method)
    with pytest.raises(ValueError, match=f"{part} lacks 1 tensor of .*: {name}"):
        check(model, part)
    values = {form.format(name, module=module): torch.zeros(8, 1, dtype=torch.uint8) for form in packed}
    edit(model, part, lambda state: state.update(values))
    check(model, part)


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_another_format(model, part):
    file = model / part / STATE[part]
    file.rename(file.with_suffix(".bin"))
    name = file.with_suffix(".bin").name
    with pytest.raises(
        FileNotFoundError, match=f"{part} has no {STATE[part]}, only {name}, which is not read"
    ):
        check(model, part)


@pytest.mark.parametrize("part", PARTS)
def test_an_index_and_its_shards(model, part):
    """The index names a tensor that its shard lacks, a shard is cut, and then the index is damaged."""
    file = model / part / STATE[part]
    state, shard = load_file(file), f"{file.stem}-00001-of-00001.safetensors"
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, shard)}))
    file.unlink()
    save_file(state, file.with_name(shard), {"format": "pt"})
    check(model, part)
    del state[QUERY[part]]
    save_file(state, file.with_name(shard), {"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} lacks 1 tensor of .*: {QUERY[part]}"):
        check(model, part)
    file.with_name(shard).write_bytes(file.with_name(shard).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{shard} is not a whole safetensors file"):
        check(model, part)
    for content in ("[]", '{"weight_map": {"a": 1}}', "{", ""):
        index.write_text(content)
        with pytest.raises(
            ValueError, match=rf"{index.name} (must hold a JSON object|does not name the file)"
        ):
            check(model, part)
