"""LoRAs for Mochi under its authors' names, as their fine-tuner writes them."""

import json

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers

from radial_attn.models.lora.names_mochi import LAST_BLOCK, NAMES
from tests.support.tiny_lora import Tiny, add_fused, check_converted, fused_pairs, write
from tests.support.tiny_mochi import mochi_inputs, mochi_transformer

CLOSE = {"atol": 5e-5, "rtol": 0}
TINY = Tiny(mochi_transformer, mochi_inputs)
QKV = {
    "attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
}
PROJ = {"attn.proj_x": ("attn1.to_out.0",), "attn.proj_y": ("attn1.to_add_out",)}
SETTINGS = {
    "qkv_proj_lora_rank": 3,
    "qkv_proj_lora_alpha": 6,
    "qkv_proj_lora_dropout": 0.0,
    "out_proj_lora_rank": 3,
    "out_proj_lora_alpha": 1,
    "out_proj_lora_dropout": 0.0,
}


def blocks(table: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The authors' names of layers in 4 blocks; the last one has no proj_y."""
    return {
        f"blocks.{i}.{name}": tuple(f"transformer_blocks.{i}.{layer}" for layer in layers)
        for i in range(4)
        for name, layers in table.items()
        if (i, name) != (3, "attn.proj_y")
    }


def spell(pairs, prefix: str = "", ending: str = "") -> dict[str, torch.Tensor]:
    state = {}
    for name, (down, up) in pairs.items():
        state |= {
            f"{prefix}{name}.lora_A{ending}": down.clone(),
            f"{prefix}{name}.lora_B{ending}": up.clone(),
        }
    return state


def test_the_names_and_rows_are_those_that_diffusers_converts():
    names = [
        (name.replace("#", str(i)), tuple(layer.replace("#", str(i)) for layer in layers))
        for name, layers in [*NAMES.items(), *LAST_BLOCK.items()]
        for i in range(48 if "#" in name else 1)
    ]
    convert = convert_mochi_transformer_checkpoint_to_diffusers
    check_converted(mochi_transformer(num_layers=48), names, convert, "pos_frequencies")


@pytest.mark.parametrize("mode", ["separate", "fused"])
def test_a_file_of_the_fine_tuner(mode, tmp_path):
    """Keys that end at lora_A, and alpha for query, key, value and for the output among its settings."""
    qkv, proj = blocks(QKV), blocks(PROJ)
    pairs = fused_pairs(mochi_transformer(), qkv | proj)
    file = write(tmp_path / "model_2000.lora.safetensors", spell(pairs), kwargs=json.dumps(SETTINGS))
    changed = add_fused(mochi_transformer(), qkv, {name: pairs[name] for name in qkv}, 0.7 * 6 / 3)
    changed = add_fused(changed, proj, {name: pairs[name] for name in proj}, 0.7 * 1 / 3)
    assert (TINY.run(changed) - TINY.run(mochi_transformer())).abs().max() > 1e-2
    torch.testing.assert_close(TINY.loaded(file, 0.7, mode=mode), TINY.run(changed), **CLOSE)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("ending", ["", ".weight"])
def test_other_prefixes_and_endings(prefix, ending, tmp_path):
    names = blocks(QKV | PROJ)
    pairs = fused_pairs(mochi_transformer(), names)
    file = write(tmp_path / "a.safetensors", spell(pairs, prefix, ending), kwargs="of another program")
    torch.testing.assert_close(TINY.loaded(file), TINY.expected(names, pairs), **CLOSE)


@torch.no_grad()
def test_halves_of_the_gated_layer_change_places(tmp_path):
    transformer = mochi_transformer()
    down, up = torch.randn(2, 24), torch.randn(128, 2)
    pairs = {"blocks.1.mlp_x.w1": (down, up)}
    found = TINY.loaded(write(tmp_path / "a.safetensors", spell(pairs)))
    change = up @ down
    transformer.transformer_blocks[1].ff.net[0].proj.weight.add_(torch.cat([change[64:], change[:64]]))
    torch.testing.assert_close(found, TINY.run(transformer), **CLOSE)


def test_unmatched_keys_are_listed_and_settings_must_be_json(tmp_path):
    names = blocks(QKV | PROJ)
    state = spell(fused_pairs(mochi_transformer(), names)) | {
        "blocks.3.attn.proj_y.lora_A": torch.ones(3, 24),
        "blocks.0.attn.qkv_z.lora_B": torch.ones(72, 3),
    }
    file = write(tmp_path / "a.safetensors", state)
    words = r"2 of 32 keys match nothing.*blocks.0.attn.qkv_z.lora_B.*blocks.3.attn.proj_y.lora_A"
    with pytest.raises(ValueError, match=words):
        TINY.loaded(file)
    file = write(tmp_path / "b.safetensors", state, kwargs="{'qkv_proj_lora_alpha': 6}")
    with pytest.raises(ValueError, match="settings that are not a JSON object"):
        TINY.loaded(file)
