"""Transformers from one file: each layout gives the weights of the folder; what does not fit is refused."""

import shutil
from functools import partial

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_cosmos_transformer_checkpoint_to_diffusers,
    convert_ltx2_transformer_to_diffusers,
    convert_ltx_transformer_checkpoint_to_diffusers,
    convert_minimax_h3_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)

from radial_attn.models.pipeline.load import load_pipeline
from radial_attn.models.pipeline.single_file import find_single_file
from tests.support.families import BY_NAME
from tests.support.pipelines import KINDS
from tests.support.single_files import (
    WIDE,
    assert_same,
    folder_of,
    in_eight_bits,
    original,
    save,
    with_weights,
    write_gguf,
)
from tests.support.tiny import quiet, wan_pipeline, wan_transformer

FAMILY = {
    "wan": "wan",
    "wan-a14b": "wan",
    "wan-i2v": "wan_i2v",
    "wan-flf2v": "wan_i2v",
    "wan-ti2v": "wan_i2v",
    "vace": "wan_vace",
    "hunyuan_video": "hunyuan_video",
    "hunyuan_video-i2v": "hunyuan_video_i2v",
    "mochi": "mochi",
}
MORE = (
    "wan_animate",
    "hunyuan_video15",
    "skyreels",
    "chronoedit",
    "ltx",
    "ltx2",
    "cosmos",
    "minimax_h3",
    "kandinsky5",
)
CONVERTERS = {
    "ltx": (convert_ltx_transformer_checkpoint_to_diffusers, "model.diffusion_model."),
    "ltx2": (convert_ltx2_transformer_to_diffusers, "model.diffusion_model."),
    "wan_animate": (convert_wan_transformer_to_diffusers, "model.diffusion_model."),
    "cosmos": (convert_cosmos_transformer_checkpoint_to_diffusers, "net."),
    "minimax_h3": (partial(convert_minimax_h3_transformer_checkpoint_to_diffusers, config={}), ""),
}
COSMOS2 = {"extra_pos_embed_type": None}


@pytest.mark.parametrize("kind", FAMILY)
def test_a_file_in_the_authors_layout_is_the_folder(kind, tmp_path):
    made = folder_of(KINDS[kind].make(), tmp_path / "m", torch.bfloat16)
    prefixes = {"transformer": "model.diffusion_model.", "transformer_2": ""}
    files = {
        name: save(tmp_path / f"{name}.safetensors", original(part), prefixes[name])
        for name, part in made.items()
    }
    options = {"family": FAMILY[kind], "dtype": torch.bfloat16, "device": "cpu"}
    pipeline = load_pipeline(str(tmp_path / "m"), files=files, **options)
    expected = load_pipeline(with_weights(tmp_path / "m"), **options)
    for name in files:
        assert_same(getattr(pipeline, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_video_of_a_file_is_that_of_the_folder(dtype, tmp_path):
    made = folder_of(wan_pipeline(), tmp_path / "m", dtype)
    state = original(made["transformer"])
    assert convert_wan_transformer_to_diffusers(dict(state)).keys() == made["transformer"].state_dict().keys()
    file = save(tmp_path / "a.safetensors", state, "diffusion_model.")
    videos = [
        KINDS["wan"].generate(quiet(load_pipeline(path, "wan", torch.float32, "cpu", files=files)))
        for path, files in (
            (str(tmp_path / "m"), {"transformer": file}),
            (with_weights(tmp_path / "m"), None),
        )
    ]
    assert torch.equal(*videos)


@pytest.mark.parametrize("comfy", [False, True], ids=["authors", "ComfyUI"])
@pytest.mark.parametrize("family", ["wan", "wan_vace", "hunyuan_video", "mochi", *MORE])
def test_every_spelling_of_a_family(family, comfy, tmp_path):
    transformer = BY_NAME[family].transformer()
    transformer.save_config(tmp_path / "transformer")
    prefix = "model.model." if comfy else ""
    other = {"vae.encoder.conv1.weight": torch.ones(2)} if comfy else {}
    other |= {f"{prefix}audio_embeddings_connector.a": torch.ones(2)} if family == "ltx2" else {}
    state = {prefix + name: value for name, value in original(transformer, comfy).items()}
    for number, content in enumerate((state | other, transformer.state_dict())):
        file = save(tmp_path / f"{number}.safetensors", content)
        found = find_single_file(file, str(tmp_path), "transformer")
        assert found.elements == sum(value.numel() for value in transformer.parameters())
        assert_same(found.load(str(tmp_path), "transformer", torch.float32), transformer)


@pytest.mark.parametrize("family", CONVERTERS)
def test_the_authors_names_are_those_that_diffusers_reads(family):
    """Converts what the tests write by diffusers' own tables."""
    convert, prefix = CONVERTERS[family]
    transformer = BY_NAME[family].transformer(**COSMOS2 if family == "cosmos" else {})
    own, state = transformer.state_dict(), original(transformer)
    converted = convert({prefix + name: value for name, value in state.items()})
    assert converted.keys() == own.keys() and all(torch.equal(converted[name], own[name]) for name in own)
    assert sum(name not in own for name in state) > 20


@pytest.mark.parametrize("rows", [False, True], ids=["a matrix", "a row"])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_scales_of_8_bit_weights_are_applied(family, spelling, rows, tmp_path):
    """Each weight is within half a step of E4M3, 2^-4 of it, or of its smallest step, of what it was."""
    transformer = BY_NAME[family].transformer()
    transformer.save_config(tmp_path / "transformer")
    whole = original(transformer)
    state, meant = in_eight_bits(whole, spelling, rows)
    file = save(tmp_path / "a.safetensors", state, "model.diffusion_model.")
    model = find_single_file(file, str(tmp_path), "transformer").load(
        str(tmp_path), "transformer", torch.float32
    )
    loaded = original(model)
    for name, value in meant.items():
        assert torch.equal(loaded[name], value), name
        step = whole[name].abs() / 16 + whole[name].abs().max() / 448 / 1024
        assert ((loaded[name] - whole[name]).abs() <= step).all(), name
    assert any(not torch.equal(loaded[name], value) for name, value in whole.items())


def test_weights_cast_to_8_bits_have_no_scales(tmp_path):
    transformer = wan_transformer()
    transformer.save_config(tmp_path / "transformer")
    state = {name: x.to(torch.float8_e5m2) for name, x in original(transformer).items()}
    found = find_single_file(save(tmp_path / "a.sft", state), str(tmp_path), "transformer")
    loaded = original(found.load(str(tmp_path), "transformer", torch.float16))
    assert found.types == ["F8_E5M2"]
    assert all(torch.equal(loaded[name].float(), x.float()) for name, x in state.items())


def test_a_pruned_file_is_named(tmp_path):
    transformer = BY_NAME["minimax_h3"].transformer()
    transformer.save_config(tmp_path / "transformer")
    state = {name: x for name, x in original(transformer).items() if "time_embedder" not in name}
    file = save(tmp_path / "a.safetensors", state | {"adaln_t_table": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"a\.safetensors is pruned: .* take the whole file"):
        find_single_file(file, str(tmp_path), "transformer")


def cut(state):
    del state["blocks.1.ffn.0.weight"]


def added(state):
    state["blocks.0.self_attn.k_proj.weight"] = torch.ones(2, 2)


def reshaped(state):
    state["blocks.1.ffn.0.weight"] = state["blocks.1.ffn.0.weight"][:-1]


def packed(state):
    state["blocks.1.ffn.0.weight"] = state["blocks.1.ffn.0.weight"].to(torch.int8)


def described(state):
    about = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    state["blocks.1.ffn.0.comfy_quant"] = about


def half_scaled(state):
    state |= in_eight_bits(dict(state), "scale_weight")[0]
    del state["blocks.1.ffn.0.scale_weight"]


def scaled_by_blocks(state):
    state |= in_eight_bits(dict(state), "weight_scale")[0]
    state["blocks.1.ffn.0.weight_scale"] = torch.ones(3, 2)


def scaled_whole(state):
    state["blocks.1.ffn.0.scale_weight"] = torch.ones(())


LAYER = r"blocks\.1\.ffn\.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            cut,
            r"lacks 1 tensor of WanT\w+, in diffusers' names: blocks\.1\.ffn\.net\.0\.proj\.weight; download",
        ),
        (added, r"holds blocks\.0\.self_attn\.k_proj\.weight, but WanT\w+ has no place for it; name a file"),
        (reshaped, rf"has {LAYER}\.weight of shape \[31, 24\], but WanT\w+ needs \[32, 24\]; name a file"),
        (packed, rf"has {LAYER}\.weight as I8, which is not read; use a file in fp16"),
        (described, rf"has {LAYER}\.weight as nvfp4, which is not read; use a file in fp16"),
        (half_scaled, rf"lacks {LAYER}\.scale_weight, the scale of its 8-bit weight; download it again"),
        (scaled_by_blocks, rf"has {LAYER}\.weight_scale of shape \[3, 2\] .*, which is not read; use a file"),
        (scaled_whole, rf"has {LAYER}\.scale_weight of shape \[\] .* in F32, which is not read; use a file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_any_weight_is_read(change, message, tmp_path):
    made = folder_of(wan_pipeline(), tmp_path / "m")
    state = original(made["transformer"])
    change(state)
    file = save(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match=rf"a\.safetensors {message}"):
        load_pipeline(str(tmp_path / "m"), "wan", torch.float32, "cpu", files={"transformer": file})


@pytest.mark.parametrize("other", ["hunyuan_video", "mochi", "ltx"])
def test_a_file_of_another_model_is_refused(other, tmp_path):
    folder_of(wan_pipeline(), tmp_path / "m")
    file = save(tmp_path / "a.safetensors", original(BY_NAME[other].transformer()))
    with pytest.raises(
        ValueError, match=r"a\.safetensors is of another model: [^(]* of WanT\w+; name a file of"
    ):
        find_single_file(file, str(tmp_path / "m"), "transformer")
    BY_NAME["motif_video"].transformer().save_config(tmp_path / "m/transformer")
    with pytest.raises(ValueError, match=r"a MotifVideoTransformer3DModel are read from its folder only"):
        find_single_file(file, str(tmp_path / "m"), "transformer")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"GGUF", -99, 40, 4000])
@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_a_damaged_file_is_refused(ending, content, tmp_path):
    wan_transformer().save_config(tmp_path / "transformer")
    state, file = original(wan_transformer()), tmp_path / f"a.{ending}"
    save(file, state) if ending == "safetensors" else write_gguf(file, state, "Q8_0")
    file.write_bytes(content if isinstance(content, bytes) else file.read_bytes()[:content])
    with pytest.raises(ValueError, match=rf"a\.{ending} is (not|neither) .*; download it again"):
        find_single_file(file, str(tmp_path), "transformer")


def test_gguf_of_a_kind_that_is_not_known_is_refused(tmp_path):
    import gguf

    wan_transformer(**WIDE).save_config(tmp_path / "transformer")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "wan")
    for name, value in original(wan_transformer(**WIDE)).items():
        data, kind = value.numpy(), None
        if data.ndim == 2 and data.shape[1] == 256:
            kind = gguf.GGMLQuantizationType.TQ1_0
            data = gguf.quantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(
        ValueError, match=r"a\.gguf has blocks\.\d\.ffn\.2\.weight as TQ1_0, which is not read"
    ):
        find_single_file(tmp_path / "a.gguf", str(tmp_path), "transformer")


def test_files_of_experts(tmp_path):
    """The second expert needs no folder, and a model of one expert takes no file for a second."""
    made = folder_of(wan_pipeline(experts=2), tmp_path / "m")
    state = original(made["transformer_2"])
    file = save(tmp_path / "b.safetensors", state)
    shutil.rmtree(tmp_path / "m/transformer_2")
    path = with_weights(tmp_path / "m", "transformer")
    pipeline = load_pipeline(path, "wan", torch.float32, "cpu", files={"transformer_2": file})
    assert_same(pipeline.transformer_2, made["transformer_2"])
    assert pipeline.config.boundary_ratio == 0.8
    alone = load_pipeline(path, "wan", torch.float32, "cpu", files={"transformer": file})
    assert alone.transformer_2 is None and alone.config.boundary_ratio is None
    assert_same(alone.transformer, made["transformer_2"])
    wan_pipeline().save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="one has one transformer, so no file can be its transformer_2"):
        load_pipeline(str(tmp_path / "one"), "wan", torch.float32, "cpu", files={"transformer_2": file})
