"""LoRAs under the names that authors, fine-tuners and ComfyUI give the layers of HunyuanVideo and Mochi."""

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_hunyuan_video_transformer_to_diffusers,
    convert_mochi_transformer_checkpoint_to_diffusers,
)

from radial_attn.models.lora.keys import match_keys
from radial_attn.models.lora.load import Lora, load_loras
from radial_attn.models.lora.names_hunyuan_video import NAMES as HUNYUAN_NAMES
from radial_attn.models.lora.names_mochi import LAST_BLOCK
from radial_attn.models.lora.names_mochi import NAMES as MOCHI_NAMES
from scripts.run.config import read_config
from scripts.run.errors import UsageError
from scripts.run.loras import find_loras
from tests.support.families import BY_NAME, run
from tests.support.tiny_hunyuan import hunyuan_image_pipeline, hunyuan_pipeline, hunyuan_transformer
from tests.support.tiny_lora import Pairs, add_fused, fused_pairs, write
from tests.support.tiny_mochi import mochi_transformer

CLOSE = {"atol": 5e-5, "rtol": 0}
Names = dict[str, tuple[str, ...]]  # the authors' name -> diffusers' layers whose rows it holds
DOUBLE = {  # of a block
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
QKV = {
    "attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
}
PROJ = {"attn.proj_x": ("attn1.to_out.0",), "attn.proj_y": ("attn1.to_add_out",)}
FORMATS = {  # prefix, names of the two matrices
    "diffusion_model": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
    "transformer": ("transformer.", "lora_A.weight", "lora_B.weight"),
    "none": ("", "lora_A.weight", "lora_B.weight"),
    "default": ("", "lora_A.default.weight", "lora_B.default.weight"),
    "down": ("diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "comfy": ("diffusion_model.", "lora_down.weight", "lora_up.weight"),
    "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight"),
    "authors' i2v": ("Hunyuan_video_I2V_lora_", "lora_down.weight", "lora_up.weight"),
    "short": ("", "lora_A", "lora_B"),
    "short diffusion_model": ("diffusion_model.", "lora_A", "lora_B"),
    "short transformer": ("transformer.", "lora_A", "lora_B"),
}


FLAT = ("kohya", "authors' i2v")  # with `_` for dots


def numbered(table: Names, theirs: str, ours: str, count: int) -> Names:
    """Returns the names of a table for `count` blocks."""
    return {
        f"{theirs}.{i}.{name}": tuple(f"{ours}.{i}.{layer}" for layer in layers)
        for i in range(count)
        for name, layers in table.items()
    }


def blocks(count: int = 2) -> Names:
    """Returns the names in the blocks of HunyuanVideo."""
    single = numbered(SINGLE, "single_blocks", "single_transformer_blocks", count)
    return numbered(DOUBLE, "double_blocks", "transformer_blocks", count) | single


def mochi_blocks(table: Names) -> Names:
    """Returns the names in the 4 blocks of Mochi; the last block has no proj_y."""
    names = numbered(table, "blocks", "transformer_blocks", 4)
    return {name: layers for name, layers in names.items() if name != "blocks.3.attn.proj_y"}


NAMES = {"hunyuan_video": blocks() | OUTSIDE, "mochi": mochi_blocks(QKV | PROJ)}
families = pytest.mark.parametrize("family", NAMES)


def output(transformer: torch.nn.Module | None = None, family: str = "hunyuan_video") -> torch.Tensor:
    """Runs a transformer, or a new one."""
    case = BY_NAME[family]
    return run(transformer or case.transformer(), case.inputs())


def loaded(file: Path, scale: float = 1.0, family: str = "hunyuan_video", **options: str) -> torch.Tensor:
    """Returns the output with a LoRA."""
    transformer = BY_NAME[family].transformer()
    load_loras(transformer, [Lora(file, scale)], **options)
    return output(transformer, family)


def added(names: Names, pairs: Pairs, scale: float = 1.0, family: str = "hunyuan_video") -> torch.Tensor:
    """Returns the output with the products added by hand, and checks that it differs from that without."""
    changed = output(add_fused(BY_NAME[family].transformer(), names, pairs, scale), family)
    assert (changed - output(family=family)).abs().max() > 1e-3
    return changed


def spell(pairs: Pairs, form: str, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """Names the pairs as a format does; kohya's has an alpha for each layer, by default its rank."""
    prefix, a, b = FORMATS[form]
    state = {}
    for name, (down, up) in pairs.items():
        stem = name
        for original, other in COMFY.items() if form == "comfy" else ():
            stem = stem.removesuffix(original) + other if stem.endswith(original) else stem
        stem = prefix + (stem.replace(".", "_") if form in FLAT else stem)
        state |= {f"{stem}.{a}": down.clone(), f"{stem}.{b}": up.clone()}
        if alpha is not None or form == "kohya":
            state[f"{stem}.alpha"] = torch.tensor(float(alpha or down.shape[0]))
    return state


@pytest.mark.parametrize(
    ("family", "tables", "convert", "whole"),
    [
        (
            "hunyuan_video",
            (HUNYUAN_NAMES,),
            convert_hunyuan_video_transformer_to_diffusers,
            {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 1, "num_single_layers": 1},
        ),
        (
            "mochi",
            (MOCHI_NAMES, LAST_BLOCK),
            convert_mochi_transformer_checkpoint_to_diffusers,
            {"num_layers": 48},
        ),
    ],
    ids=["hunyuan_video", "mochi"],
)
def test_the_names_and_rows_are_those_that_diffusers_converts(family, tables, convert, whole):
    """Checks each parameter at full width or depth, and its rows among those of the authors' file."""
    with torch.device("meta"):
        model = BY_NAME[family].transformer(**whole)
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    shapes, tags = {}, {"pos_frequencies": torch.zeros(1)} if family == "mochi" else {}
    for name, layers in (row for table in tables for row in table.items()):
        for i in range(whole["num_layers"] if "#" in name else 1):
            stem = name.replace("#", str(i))
            for kind, ending in (("weight", "diff"), ("bias", "diff_b")):
                cuts = [parameters.get(f"{layer.replace('#', str(i))}.{kind}") for layer in layers]
                if cuts[0]:
                    rows = sum(shape[0] for shape in cuts)
                    shapes[f"{stem}.{ending}"] = (rows, *cuts[0][1:])
                    tags[f"{stem}.{kind}"] = torch.arange(rows)
    match = match_keys(shapes, parameters)
    assert not match.unmatched and not match.misfits
    assert match.deltas.keys() == parameters.keys() - {"pos_frequencies"}
    theirs = convert(dict(tags))
    for name, part in match.deltas.items():
        tag = tags[part.key.replace(".diff_b", ".bias").replace(".diff", ".weight")]
        ours = torch.cat([tag[start:end] for start, end in part.rows]) if part.rows else tag
        assert torch.equal(ours, theirs[name]), name


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("hunyuan_video", form) for form in FORMATS),
        *(("mochi", form) for form in FORMATS if form not in ("comfy", *FLAT)),
    ],
)
def test_a_format_is_what_is_added_by_hand(family, form, tmp_path):
    names = NAMES[family]
    pairs = fused_pairs(BY_NAME[family].transformer(), names)
    file = write(tmp_path / "a.safetensors", spell(pairs, form), kwargs="of another program")
    torch.testing.assert_close(loaded(file, family=family), added(names, pairs, family=family), **CLOSE)


@pytest.mark.parametrize("mode", ["separate", "fused"])
@pytest.mark.parametrize("form", ["kohya", "none"])
def test_alpha_scale_and_mode(form, mode, tmp_path):
    names = blocks()
    pairs = fused_pairs(hunyuan_transformer(), names)
    file = write(tmp_path / "a.safetensors", spell(pairs, form, 1.0))
    torch.testing.assert_close(loaded(file, 0.6, mode=mode), added(names, pairs, 0.6 / 3), **CLOSE)


@pytest.mark.parametrize("name", ["single_blocks.1.linear1", *OUTSIDE])
def test_a_file_of_one_layer(name, tmp_path):
    """diffusers converts only files with img_attn_qkv; other layers' names end in some of these."""
    names = (blocks() | OUTSIDE)[name]
    pairs = fused_pairs(hunyuan_transformer(), {name: names})
    file = write(tmp_path / "a.safetensors", spell(pairs, "diffusion_model"))
    transformer = hunyuan_transformer()
    handle = load_loras(transformer, [Lora(file)])
    wanted = added({name: names}, pairs)
    torch.testing.assert_close(output(transformer), wanted, **CLOSE)
    handle.remove()
    assert torch.equal(output(transformer), output())


def test_ranks_differ_where_a_name_ends_others(tmp_path):
    wide = {name: layers for name, layers in blocks().items() if name.endswith("linear2")}
    narrow = {"final_layer.linear": ("proj_out",)}
    pairs = fused_pairs(hunyuan_transformer(), wide)
    pairs |= fused_pairs(hunyuan_transformer(), narrow, rank=2, seed=1)
    for part in (pairs, dict(reversed(pairs.items()))):
        file = write(tmp_path / "a.safetensors", spell(part, "none"))
        torch.testing.assert_close(loaded(file), added(wide | narrow, pairs), **CLOSE)


def test_two_blocks_are_what_diffusers_makes_of_them(tmp_path):
    names = {name: layers for name, layers in blocks().items() if name.startswith("double")}
    pairs = fused_pairs(hunyuan_transformer(), names)
    file = write(tmp_path / "a.safetensors", spell(pairs, "transformer"))
    pipeline = hunyuan_pipeline()
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(loaded(file), output(pipeline.transformer), **CLOSE)


@torch.no_grad()
def test_full_changes_of_fused_layers_and_of_the_swapped_one(tmp_path):
    """Cuts `diff` and `diff_b` like the matrices; shift and scale of the last norm change places."""
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
    actual = loaded(write(tmp_path / "a.safetensors", state))
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
    torch.testing.assert_close(actual, output(transformer), **CLOSE)


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
    actual = pipeline.transformer.single_transformer_blocks[0].proj_mlp.weight - weight
    torch.testing.assert_close(actual, (up @ down)[72:], **CLOSE)


STRAYS = {
    "hunyuan_video": (
        "kohya",
        "lora_te1_text_model.lora_down.weight",
        "lora_unet_double_blocks_2_img_attn_qkv.lora_down.weight",
        "lora_unet_single_blocks_0_linear3.alpha",
    ),
    "mochi": ("short", "blocks.0.attn.qkv_z.lora_B", "blocks.3.attn.proj_y.lora_A"),
}


@families
def test_unmatched_keys_are_listed_or_left_out(family, tmp_path, caplog):
    names, (form, *strays) = NAMES[family], STRAYS[family]
    pairs = fused_pairs(BY_NAME[family].transformer(), names)
    state = spell(pairs, form) | {key: torch.ones(3, 24) for key in strays}
    file = write(tmp_path / "a.safetensors", state)
    message = f"{len(strays)} of {len(state)} keys match nothing"
    with pytest.raises(ValueError, match=".*".join([message, *strays])):
        loaded(file, family=family)
    with caplog.at_level(logging.WARNING, "radial_attn"):
        actual = loaded(file, family=family, unmatched="warn")
    torch.testing.assert_close(actual, added(names, pairs, family=family), **CLOSE)
    assert message in caplog.text


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
    (actual,) = find_loras(config.model, hub)
    assert len(actual.match.pairs) == 4
    file = write(
        tmp_path / "a.safetensors", state | {"lora_unet_single_blocks_40_linear2.alpha": torch.ones(())}
    )
    with pytest.raises(UsageError, match=r"1 of 3 keys match nothing.*single_blocks_40.*lora_unmatched=warn"):
        find_loras(config.model, hub)


@pytest.mark.parametrize("mode", ["separate", "fused"])
def test_a_file_of_the_fine_tuner(mode, tmp_path):
    """Reads keys that end at lora_A; the settings hold an alpha for query, key, value, one for the output."""
    settings = {"qkv_proj_lora_rank": 3, "qkv_proj_lora_alpha": 6, "qkv_proj_lora_dropout": 0.0}
    settings |= {"out_proj_lora_rank": 3, "out_proj_lora_alpha": 1, "out_proj_lora_dropout": 0.0}
    qkv, proj = mochi_blocks(QKV), mochi_blocks(PROJ)
    pairs = fused_pairs(mochi_transformer(), qkv | proj)
    file = write(tmp_path / "model_2000.lora.safetensors", spell(pairs, "short"), kwargs=json.dumps(settings))
    changed = add_fused(mochi_transformer(), qkv, {name: pairs[name] for name in qkv}, 0.7 * 6 / 3)
    changed = add_fused(changed, proj, {name: pairs[name] for name in proj}, 0.7 * 1 / 3)
    assert (output(changed, "mochi") - output(family="mochi")).abs().max() > 1e-2
    torch.testing.assert_close(loaded(file, 0.7, "mochi", mode=mode), output(changed, "mochi"), **CLOSE)


def test_settings_of_the_fine_tuner_must_be_json(tmp_path):
    state = spell(fused_pairs(mochi_transformer(), NAMES["mochi"]), "short")
    file = write(tmp_path / "b.safetensors", state, kwargs="{'qkv_proj_lora_alpha': 6}")
    with pytest.raises(ValueError, match="settings that are not a JSON object"):
        loaded(file, family="mochi")


@torch.no_grad()
def test_halves_of_the_gated_layer_change_places(tmp_path):
    transformer = mochi_transformer()
    down, up = torch.randn(2, 24), torch.randn(128, 2)
    pairs = {"blocks.1.mlp_x.w1": (down, up)}
    actual = loaded(write(tmp_path / "a.safetensors", spell(pairs, "short")), family="mochi")
    change = up @ down
    transformer.transformer_blocks[1].ff.net[0].proj.weight.add_(torch.cat([change[64:], change[:64]]))
    torch.testing.assert_close(actual, output(transformer, "mochi"), **CLOSE)
