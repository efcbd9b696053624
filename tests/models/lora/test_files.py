"""LoRA files: the meaning of their keys, and what is refused, in one line and before the model changes."""

import logging
import re

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_minimax_h3_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from radial_attn.models.lora.keys import layer_names, match_keys, original_name, split_key
from radial_attn.models.lora.load import Lora, load_loras
from radial_attn.models.lora.names_minimax_h3 import BY_HEAD
from tests.support.families import run
from tests.support.tiny import randoms, wan_transformer
from tests.support.tiny_lora import changed, loaded, original_names, product, random_pairs, spell, write
from tests.support.tiny_minimax_h3 import minimax_h3_transformer
from tests.support.tiny_wan import vace_transformer

CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture
def pairs():
    return random_pairs(wan_transformer())


def test_names_of_the_original_are_those_that_diffusers_converts():
    """Checks every parameter, also those that only image-to-video and VACE models have."""
    image = {"image_dim": 16, "added_kv_proj_dim": 24}
    parameters = dict(wan_transformer(**image).named_parameters()) | dict(
        vace_transformer().named_parameters()
    )
    names = list(parameters)
    layers = [re.sub(r"\.(weight|bias)$", "", name) for name in names]
    theirs = [original_name(layer) + name[len(layer) :] for layer, name in zip(layers, names, strict=True)]
    state = {name: torch.tensor(number) for number, name in enumerate(theirs)}
    back = {int(number): name for name, number in convert_wan_transformer_to_diffusers(state).items()}
    assert [back[number] for number in range(len(names))] == names


@pytest.mark.parametrize(
    ("key", "layer", "kind"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "blocks.0.attn1.to_q", "down"),
        ("diffusion_model.blocks.3.cross_attn.k.lora_down.weight", "blocks.3.attn2.to_k", "down"),
        ("diffusion_model.blocks.0.cross_attn.norm_k.diff", "blocks.0.attn2.norm_k", "weight"),
        ("diffusion_model.blocks.0.norm3.diff_b", "blocks.0.norm2", "bias"),
        ("diffusion_model.blocks.0.diff_m", "blocks.0.scale_shift_table", "weight"),
        ("diffusion_model.blocks.0.modulation.diff", "blocks.0.scale_shift_table", "weight"),
        ("diffusion_model.head.head.diff", "proj_out", "weight"),
        ("diffusion_model.time_projection.1.diff_b", "condition_embedder.time_proj", "bias"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "blocks.0.attn1.to_q", "down"),
        ("lora_unet_blocks_3_ffn_2.alpha", "blocks.3.ffn.net.2", "alpha"),
        ("blocks.0.self_attn.o.lora_B.default.weight", "blocks.0.attn1.to_out.0", "up"),
        ("base_model.model.blocks.0.attn1.to_out.0.lora_B.weight", "blocks.0.attn1.to_out.0", "up"),
        ("transformer.blocks.0.attn2.to_v.lora.up.weight", "blocks.0.attn2.to_v", "up"),
        ("diffusion_model.img_emb.emb_pos.diff", "condition_embedder.image_embedder.pos_embed", "weight"),
        ("lora_unet_blocks_0_norm3.w_norm", "blocks.0.norm2", "weight"),
        ("diffusion_model.vace_blocks.1.self_attn.q.lora_A.weight", "vace_blocks.1.attn1.to_q", "down"),
        ("diffusion_model.vace_blocks.0.before_proj.diff_b", "vace_blocks.0.proj_in", "bias"),
    ],
)
def test_real_keys(key, layer, kind):
    stem, actual = split_key(key)
    names = {original_name(layer), original_name(layer).replace(".", "_"), layer}
    assert stem in names and actual == kind


def test_an_image_to_video_lora_needs_the_option_on_a_text_to_video_model(pairs, tmp_path, caplog):
    strays = "blocks.0.cross_attn.k_img.lora_down.weight", "img_emb.proj.0.diff"
    state = spell(pairs, "original down") | {f"diffusion_model.{key}": torch.ones(3, 24) for key in strays}
    lora, transformer = Lora(write(tmp_path / "a.safetensors", state)), wan_transformer()
    message = (
        r"LoRA a.safetensors: 2 of 82 keys match nothing.*k_img.lora_down.weight \(no such layer\), .*img_emb"
    )
    with pytest.raises(ValueError, match=message):
        load_loras(transformer, [lora])
    with caplog.at_level(logging.WARNING, "radial_attn"):
        handle = load_loras(transformer, [lora], unmatched="warn")
    assert re.search(message, caplog.text) and handle.report()[0]["left_out"] == 2
    torch.testing.assert_close(run(transformer), changed(product(pairs)), **CLOSE)


def test_what_keys_are_unmatched_for():
    parameters = {name: tuple(value.shape) for name, value in wan_transformer().named_parameters()}
    stem = "diffusion_model.blocks.0.self_attn.q"
    reasons = {
        f"{stem}.lora_down.weight": "half of a pair",
        f"{stem}.lora_C.weight": "no LoRA key",
        f"{stem}.weight": "a whole weight, no change of one",
        "diffusion_model.blocks.0.self_attn.norm_q.diff_b": "there is no blocks.0.attn1.norm_q.bias",
        "diffusion_model.blocks.9.self_attn.q.lora_down.weight": "no such layer",
        "text_encoder.layers.0.lora_A.weight": "no such layer",
        "diffusion_model.blocks.0.norm3.lora_down.weight": "not a layer with a matrix",
        "diffusion_model.blocks.0.norm3.lora_up.weight": "not a layer with a matrix",
    }
    assert match_keys(dict.fromkeys(reasons, (3, 24)), parameters).unmatched == reasons
    twice = {f"{stem}.diff_b": (24,), "lora_unet_blocks_0_self_attn_q.diff_b": (24,)}
    assert match_keys(twice, parameters).unmatched == {
        "lora_unet_blocks_0_self_attn_q.diff_b": f"second to {stem}.diff_b"
    }


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (lambda whole: None, FileNotFoundError, "does not exist"),
        (lambda whole: whole[:-100], ValueError, "not a whole safetensors file"),
        (lambda whole: b"PK\x03\x04" + bytes(200), ValueError, "not a whole safetensors file"),
        (lambda whole: b"", ValueError, "not a whole safetensors file"),
    ],
)
def test_broken_files(content, error, message, pairs, tmp_path):
    file = write(tmp_path / "a.safetensors", spell(pairs, "original"))
    left = content(file.read_bytes())
    file.unlink() if left is None else file.write_bytes(left)
    with pytest.raises(error, match=f"a.safetensors.*{message}") as raised:
        load_loras(wan_transformer(), [Lora(file)])
    assert "\n" not in str(raised.value)


STEM = "diffusion_model.blocks.0.self_attn"


@pytest.mark.parametrize(
    ("heads", "change", "message"),
    [
        (24, {}, r"40 layers do not fit: blocks.0.attn2.to_k \(48x3 times 3x48 for a weight of 24x24\)"),
        (
            12,
            {f"{STEM}.q.lora_A.weight": torch.ones(5, 24)},
            rf"a.safetensors is not whole: the halves differ in rank of {STEM}.q.lora_A.weight, .*lora_B",
        ),
        (
            12,
            {f"{STEM}.norm_q.diff": torch.ones(25)},
            r"1 layers do not fit: blocks.0.attn1.norm_q.weight \(25 for 24\)",
        ),
        (None, {f"{STEM}.q.weight": torch.ones(24, 24)}, "holds whole weights, no changes for this model"),
        (None, {"encoder.weight": torch.ones(2)}, r"holds nothing .*encoder\.weight; use a LoRA for this"),
    ],
)
def test_loras_of_other_models(heads, change, message, tmp_path):
    state = heads and spell(random_pairs(wan_transformer(attention_head_dim=heads)), "original")
    transformer = wan_transformer()
    with pytest.raises(ValueError, match=message):
        load_loras(transformer, [Lora(write(tmp_path / "a.safetensors", (state or {}) | change))])
    assert not hasattr(transformer, "peft_config")


def test_with_the_option_a_shape_that_does_not_fit_is_left_out_but_not_most_of_them(pairs, tmp_path):
    """Loads an image-to-video LoRA, whose patch embedding does not fit, into a text-to-video model."""
    stray = {"diffusion_model.patch_embedding.diff": torch.ones(24, 9, 1, 2, 2)}
    file = write(tmp_path / "a.safetensors", spell(pairs, "original") | stray)
    transformer = wan_transformer()
    assert load_loras(transformer, [Lora(file)], unmatched="warn").report()[0]["left_out"] == 1
    torch.testing.assert_close(run(transformer), changed(product(pairs)), **CLOSE)
    wide = random_pairs(wan_transformer(attention_head_dim=24))
    file = write(tmp_path / "b.safetensors", spell(wide, "original") | {"proj_out.diff_b": torch.ones(16)})
    with pytest.raises(ValueError, match="40 layers do not fit"):
        load_loras(wan_transformer(), [Lora(file)], unmatched="warn")


@pytest.mark.parametrize("unmatched", ["error", "warn"])
@pytest.mark.parametrize("lost", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_a_file_that_is_not_whole_is_refused_with_either_option(lost, unmatched, pairs, tmp_path):
    state = spell(pairs, "kohya", 6.0)
    del state[f"lora_unet_blocks_1_ffn_0.{lost}"]
    message = r"LoRA a.safetensors is not whole: .*lora_unet_blocks_1_ffn_0\.(?!.*warn)"
    with pytest.raises(ValueError, match=message):
        load_loras(wan_transformer(), [Lora(write(tmp_path / "a.safetensors", state))], unmatched=unmatched)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64])
def test_values_of_other_types(dtype, pairs, tmp_path):
    rounded = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in pairs.items()}
    expected = product({name: (down.float(), up.float()) for name, (down, up) in rounded.items()})
    file = write(tmp_path / "a.safetensors", spell(rounded, "original"))
    torch.testing.assert_close(loaded(file), changed(expected), **CLOSE)


def test_whole_numbers_are_no_weights(pairs, tmp_path):
    state = spell(pairs, "original")
    state["diffusion_model.blocks.0.ffn.0.lora_A.weight"] = torch.ones(3, 24, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"no floating point numbers in .*ffn.0.lora_A.weight \(I8\)"):
        load_loras(wan_transformer(), [Lora(write(tmp_path / "a.safetensors", state))])


def test_a_failure_leaves_the_model_as_it_was(pairs, tmp_path):
    transformer = wan_transformer()
    plain = run(transformer)
    good = Lora(write(tmp_path / "good.safetensors", spell(pairs, "original")))
    state = spell(pairs, "original")
    state["diffusion_model.blocks.1.ffn.0.lora_A.weight"][0, 0] = torch.nan
    bad = Lora(write(tmp_path / "bad.safetensors", state))
    with pytest.raises(
        ValueError, match=r"LoRA bad.safetensors has values that are not finite: .*blocks.1.ffn.0"
    ):
        load_loras(transformer, [good, bad])
    assert torch.equal(run(transformer), plain) and not hasattr(transformer, "peft_config")
    assert all(value.requires_grad for value in transformer.parameters())
    load_loras(transformer, [good])
    with pytest.raises(ValueError, match=r"has LoRAs \(lora_0\); remove them by their handle first"):
        load_loras(transformer, [good])


@pytest.mark.parametrize(
    ("options", "lora", "message"),
    [
        ({"mode": "merged"}, {}, "mode must be one of separate, fused, got 'merged'"),
        ({"unmatched": "ignore"}, {}, "unmatched must be one of error, warn, got 'ignore'"),
        ({}, {"transformer": "3"}, "transformer must be one of both, 1, 2, got '3'"),
        ({}, {"transformer": "2"}, "a.safetensors is for transformer 2, but the model has only one"),
    ],
)
def test_bad_options(options, lora, message, pairs, tmp_path):
    file = write(tmp_path / "a.safetensors", spell(pairs, "original"))
    with pytest.raises(ValueError, match=message):
        load_loras(wan_transformer(), [Lora(file, **lora)], **options)


def test_the_names_of_the_test_files_are_those_of_the_original():
    assert {layer: original_name(layer) for layer in original_names()} == original_names()


FORMATS = {  # prefix, names of the two matrices
    "diffusion_model": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
    "none": ("", "lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight"),
    "peft": ("", "lora_A.default.weight", "lora_B.default.weight"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_loras_of_minimax_h3_are_those_that_diffusers_converts(form, tmp_path):
    """With peft's names, as of DiffSynth-Studio, each head has its query, key and value together."""
    heads = {"attention_head_dim": 128, "num_layers": 2}  # which diffusers takes every head to have
    transformer, state = minimax_h3_transformer(**heads), {}
    own = {name: value.clone() for name, value in transformer.state_dict().items()}
    names = layer_names({name: tuple(value.shape) for name, value in own.items()})
    make, (prefix, down, up) = randoms(0), FORMATS[form]
    for name, parts in names.items():
        weight = own.get(f"{parts[0].layer}.weight")
        if name == parts[0].layer or name.endswith(BY_HEAD) or weight is None or weight.ndim < 2:
            continue
        stem, rows = prefix + (name.replace(".", "_") if form == "kohya" else name), parts[0].total
        state[f"{stem}.{down}"] = make(3, weight.shape[1])
        state[f"{stem}.{up}"] = make(rows or len(weight), 3)
        state |= {f"{stem}.alpha": torch.tensor(1.5)} if form == "kohya" else {}
    load_loras(transformer, [Lora(write(tmp_path / "a.safetensors", state), 0.5)], mode="fused")
    theirs = _convert_non_diffusers_minimax_h3_lora_to_diffusers(dict(state))
    layers = {name.rpartition(".lora_")[0].removeprefix("transformer.") for name in theirs}
    assert len(layers) == 8 + 2 * 7 + 6
    for layer in layers:
        pair = (theirs[f"transformer.{layer}.lora_{x}.weight"] for x in "BA")
        expected = own[f"{layer}.weight"] + 0.5 * torch.mm(*pair)
        torch.testing.assert_close(transformer.state_dict()[f"{layer}.weight"], expected, atol=5e-5, rtol=0)
