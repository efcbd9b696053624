"""LoRAs for HunyuanVideo under the names that its authors, musubi-tuner and ComfyUI give its layers."""

import logging

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

from radial_attn.models.lora.keys import match_keys
from radial_attn.models.lora.load import Lora, load_loras
from radial_attn.models.lora.names_hunyuan_video import NAMES
from scripts.run.config import read_config
from scripts.run.errors import UsageError
from scripts.run.loras import find_loras
from tests.support.tiny_hunyuan import (
    hunyuan_image_pipeline,
    hunyuan_inputs,
    hunyuan_pipeline,
    hunyuan_transformer,
)
from tests.support.tiny_lora import Tiny, check_converted, fused_pairs, write

CLOSE = {"atol": 5e-5, "rtol": 0}
TINY = Tiny(hunyuan_transformer, hunyuan_inputs)
DOUBLE = {  # of a block: the authors' name, diffusers' layers
    "img_mod.linear": ("norm1.linear",),
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mod.linear": ("norm1_context.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.linear": ("norm.linear",),
}
OUTSIDE = {  # their names in diffusers are ends of other layers' names
    "final_layer.linear": ("proj_out",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": tuple(
        f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{part}" for part in "qkv"
    ),
}
COMFY = {
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "mod.linear": "mod.lin",
    "modulation.linear": "modulation.lin",
    "time_in.mlp.0": "time_in.in_layer",
}
FORMATS = {  # prefix, words of the two matrices
    "diffusion_model": ("diffusion_model.", "lora_A", "lora_B"),
    "transformer": ("transformer.", "lora_A", "lora_B"),
    "none": ("", "lora_A", "lora_B"),
    "default": ("", "lora_A.default", "lora_B.default"),
    "down": ("diffusion_model.", "lora_down", "lora_up"),
    "comfy": ("diffusion_model.", "lora_down", "lora_up"),
    "kohya": ("lora_unet_", "lora_down", "lora_up"),
}


def blocks(count: int = 2) -> dict[str, tuple[str, ...]]:
    """The authors' names of the layers in blocks -> diffusers' layers whose rows they hold."""
    kinds = (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    )
    return {
        f"{theirs}.{i}.{name}": tuple(f"{ours}.{i}.{layer}" for layer in layers)
        for theirs, ours, table in kinds
        for i in range(count)
        for name, layers in table.items()
    }


def spell(pairs, form: str, alpha: float | None = None) -> dict[str, torch.Tensor]:
    prefix, a, b = FORMATS[form]
    state = {}
    for name, (down, up) in pairs.items():
        stem = name
        for original, other in COMFY.items() if form == "comfy" else ():
            stem = stem.removesuffix(original) + other if stem.endswith(original) else stem
        stem = prefix + (stem.replace(".", "_") if form == "kohya" else stem)
        state |= {f"{stem}.{a}.weight": down.clone(), f"{stem}.{b}.weight": up.clone()}
        if alpha is not None or form == "kohya":
            state[f"{stem}.alpha"] = torch.tensor(float(alpha or len(down)))
    return state


def test_the_names_and_rows_are_those_that_diffusers_converts():
    """Every parameter of the full width, its rows among those of the authors' file."""
    width = {"num_attention_heads": 24, "attention_head_dim": 128, "guidance_embeds": True}
    with torch.device("meta"):
        model = hunyuan_transformer(num_layers=1, num_single_layers=1, **width)
    names = {
        name.replace("#", "0"): tuple(layer.replace("#", "0") for layer in layers)
        for name, layers in NAMES.items()
    }
    check_converted(model, names.items(), convert_hunyuan_video_transformer_to_diffusers)


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_is_what_is_added_by_hand(form, tmp_path):
    names = blocks() | OUTSIDE
    pairs = fused_pairs(hunyuan_transformer(), names)
    file = write(tmp_path / "a.safetensors", spell(pairs, form))
    torch.testing.assert_close(TINY.loaded(file), TINY.expected(names, pairs), **CLOSE)


@pytest.mark.parametrize("mode", ["separate", "fused"])
@pytest.mark.parametrize("form", ["kohya", "none"])
def test_alpha_scale_and_mode(form, mode, tmp_path):
    names = blocks()
    pairs = fused_pairs(hunyuan_transformer(), names)
    file = write(tmp_path / "a.safetensors", spell(pairs, form, 1.0))
    torch.testing.assert_close(
        TINY.loaded(file, 0.6, mode=mode), TINY.expected(names, pairs, 0.6 / 3), **CLOSE
    )


@pytest.mark.parametrize("name", ["single_blocks.1.linear1", *OUTSIDE])
def test_a_file_of_one_layer(name, tmp_path):
    """diffusers converts only files with img_attn_qkv; other layers' names end in some of these."""
    names = (blocks() | OUTSIDE)[name]
    pairs = fused_pairs(hunyuan_transformer(), {name: names})
    file = write(tmp_path / "a.safetensors", spell(pairs, "diffusion_model"))
    transformer = hunyuan_transformer()
    handle = load_loras(transformer, [Lora(file)])
    torch.testing.assert_close(TINY.run(transformer), TINY.expected({name: names}, pairs), **CLOSE)
    handle.remove()
    assert torch.equal(TINY.run(transformer), TINY.run(hunyuan_transformer()))


def test_ranks_differ_where_a_name_ends_others(tmp_path):
    wide = {name: layers for name, layers in blocks().items() if name.endswith("linear2")}
    narrow = {"final_layer.linear": ("proj_out",)}
    pairs = fused_pairs(hunyuan_transformer(), wide)
    pairs |= fused_pairs(hunyuan_transformer(), narrow, rank=2, seed=1)
    for part in (pairs, dict(reversed(pairs.items()))):
        file = write(tmp_path / "a.safetensors", spell(part, "none"))
        torch.testing.assert_close(TINY.loaded(file), TINY.expected(wide | narrow, pairs), **CLOSE)


def test_two_blocks_are_what_diffusers_makes_of_them(tmp_path):
    names = {name: layers for name, layers in blocks().items() if name.startswith("double")}
    pairs = fused_pairs(hunyuan_transformer(), names)
    file = write(tmp_path / "a.safetensors", spell(pairs, "transformer"))
    pipeline = hunyuan_pipeline()
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(TINY.loaded(file), TINY.run(pipeline.transformer), **CLOSE)


@torch.no_grad()
def test_full_changes_of_fused_layers_and_of_the_swapped_one(tmp_path):
    """`diff` and `diff_b`, cut like the matrices; shift and scale of the last norm change places."""
    transformer = hunyuan_transformer()
    weight, bias, norm = torch.randn(72, 24), torch.randn(168), torch.randn(48, 24)
    down, up = torch.randn(2, 24), torch.randn(48, 2)
    state = {
        "diffusion_model.double_blocks.1.txt_attn_qkv.diff": weight,
        "diffusion_model.single_blocks.0.linear1.diff_b": bias,
        "diffusion_model.double_blocks.0.img_attn_k_norm.diff": torch.full((12,), 0.5),
        "diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight": down,
        "diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight": up,
    }
    found = TINY.loaded(write(tmp_path / "a.safetensors", state))
    text = transformer.transformer_blocks[1].attn
    for layer, rows in zip((text.add_q_proj, text.add_k_proj, text.add_v_proj), weight.chunk(3), strict=True):
        layer.weight.add_(rows)
    single = transformer.single_transformer_blocks[0]
    layers = (single.attn.to_q, single.attn.to_k, single.attn.to_v, single.proj_mlp)
    for layer, rows in zip(layers, bias.split([24, 24, 24, 96]), strict=True):
        layer.bias.add_(rows)
    transformer.transformer_blocks[0].attn.norm_k.weight.add_(0.5)
    norm = up @ down
    transformer.norm_out.linear.weight.add_(torch.cat([norm[24:], norm[:24]]))
    torch.testing.assert_close(found, TINY.run(transformer), **CLOSE)


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_image_to_video_has_the_same_names(kind, tmp_path):
    names = blocks(1)
    pipeline = hunyuan_image_pipeline(kind)
    pairs = fused_pairs(pipeline.transformer, names)
    weight = pipeline.transformer.single_transformer_blocks[0].proj_mlp.weight.detach().clone()
    file = write(tmp_path / "a.safetensors", spell(pairs, "kohya"))
    (entry,) = load_loras(pipeline, [Lora(file)], mode="fused").report()
    assert (entry["pairs"], entry["left_out"], entry["rank"]) == (20, 0, 3)
    down, up = pairs["single_blocks.0.linear1"]
    found = pipeline.transformer.single_transformer_blocks[0].proj_mlp.weight - weight
    torch.testing.assert_close(found, (up @ down)[72:], **CLOSE)


def test_unmatched_keys_are_listed(tmp_path, caplog):
    names = blocks()
    pairs = fused_pairs(hunyuan_transformer(), names)
    stray = {
        "lora_unet_double_blocks_2_img_attn_qkv.lora_down.weight": torch.ones(3, 24),
        "lora_unet_single_blocks_0_linear3.alpha": torch.ones(()),
        "lora_te1_text_model.lora_down.weight": torch.ones(3, 24),
    }
    file = write(tmp_path / "a.safetensors", spell(pairs, "kohya") | stray)
    words = r"3 of 81 keys match nothing.*text_model.*double_blocks_2_img_attn_qkv.*single_blocks_0_linear3"
    with pytest.raises(ValueError, match=words):
        TINY.loaded(file)
    with caplog.at_level(logging.WARNING, "radial_attn"):
        torch.testing.assert_close(TINY.loaded(file, unmatched="warn"), TINY.expected(names, pairs), **CLOSE)
    assert "3 of 81 keys match nothing" in caplog.text


def test_reasons_and_misfits_of_fused_keys():
    parameters = {name: tuple(value.shape) for name, value in hunyuan_transformer().named_parameters()}
    stem = "double_blocks.0.img_attn_qkv"
    half = match_keys({f"{stem}.lora_A.weight": (3, 24), f"{stem}.alpha": ()}, parameters)
    assert half.unmatched == dict.fromkeys([f"{stem}.lora_A.weight", f"{stem}.alpha"], "half of a pair")
    one = {"transformer_blocks.0.attn.to_k.lora_A.weight": (3, 24), f"{stem}.lora_A.weight": (3, 24)}
    second = match_keys(dict(sorted(one.items(), reverse=True)), parameters).unmatched
    assert second[f"{stem}.lora_A.weight"].startswith("second to transformer_blocks.0.attn.to_k")
    narrow = {f"{stem}.lora_A.weight": (3, 24), f"{stem}.lora_B.weight": (24, 3)}
    assert match_keys(narrow, parameters).misfits["transformer_blocks.0.attn.to_v"] == (
        "24x3 times 3x24 for a weight of 72x24"
    )
    assert match_keys({f"{stem}.diff_b": (24,)}, parameters).misfits == {
        f"transformer_blocks.0.attn.to_{part}.bias": "24 for 72" for part in "qkv"
    }


def test_files_are_checked_against_models_on_the_hub_before_these_are_loaded(tmp_path):
    hub, stem = "hunyuanvideo-community/HunyuanVideo", "lora_unet_single_blocks_39_linear1"
    state = {f"{stem}.lora_down.weight": torch.ones(1, 3072), f"{stem}.lora_up.weight": torch.ones(21504, 1)}
    file = write(tmp_path / "a.safetensors", state)
    config = read_config("configs/hunyuan_t2v.yaml", [f"model.loras={file}"])
    (found,) = find_loras(config.model, hub)
    assert len(found.match.pairs) == 4
    file = write(
        tmp_path / "a.safetensors", state | {"lora_unet_single_blocks_40_linear2.alpha": torch.ones(())}
    )
    with pytest.raises(UsageError, match=r"1 of 3 keys match nothing.*single_blocks_40.*lora_unmatched=warn"):
        find_loras(config.model, hub)
