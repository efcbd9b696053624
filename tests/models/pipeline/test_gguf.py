"""Transformers from GGUF files: what they mean, and LoRAs, offload, caches and radial attention on top."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

from radial_attn.models import apply_radial_attention
from radial_attn.models.lora.load import Lora, load_loras
from radial_attn.models.pipeline.caches import cached
from radial_attn.models.pipeline.efficiency import economize
from radial_attn.models.pipeline.load import load_pipeline
from radial_attn.models.pipeline.single_file import find_single_file
from tests.support.families import BY_NAME, SPARSE, run
from tests.support.pipelines import KINDS
from tests.support.single_files import (
    WIDE,
    assert_same,
    folder_of,
    original,
    save,
    write_gguf,
)
from tests.support.tiny import quiet, wan_pipeline, wan_transformer
from tests.support.tiny_lora import random_pairs, spell, write


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("Q8_0", np.float32),
        ("Q5_1", np.float16),
        ("Q4_0", np.float16),
        ("Q4_K", np.float32),
        ("BF16", np.float32),
        ("F16", np.float16),
    ],
)
def test_gguf_means_what_its_own_reader_says(kind, rest, tmp_path):
    """diffusers unpacks in float16: within 2^-9 of each value, or of the largest of its block."""
    transformer = wan_transformer(**WIDE)
    transformer.save_config(tmp_path / "transformer")
    file, meant = write_gguf(tmp_path / "a.gguf", original(transformer), kind, rest)
    found = find_single_file(file, str(tmp_path), "transformer")
    model = found.load(str(tmp_path), "transformer", torch.float32)
    packed = {name for name, x in model.named_parameters() if isinstance(x, GGUFParameter)}
    assert packed == found.packed and bool(packed) == (kind.startswith("Q"))
    assert all("time_embedder" not in name for name in packed)  # diffusers keeps it in float32
    size = sum(x.numel() * x.element_size() for name, x in model.named_parameters())
    assert size == 4 * found.elements + found.packed_bytes
    expected = wan_transformer(**WIDE)
    loaded = {name: dequantize_gguf_tensor(x).detach().float() for name, x in model.named_parameters()}
    expected.load_state_dict(loaded)
    for name, value in original(expected).items():
        limit = 2**-9 * meant[name].abs().max()
        torch.testing.assert_close(value, meant[name], atol=float(limit), rtol=0, msg=name)
    torch.testing.assert_close(run(model), run(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["hunyuan_video", "mochi"])
def test_gguf_of_joined_layers(family, kind, tmp_path):
    """Rows of query, key and value, and halves that change places, are taken from packed rows."""
    changes = {
        "hunyuan_video": {"attention_head_dim": 32, "rope_axes_dim": (8, 12, 12)},
        "mochi": {"attention_head_dim": 16},
    }
    transformer = BY_NAME[family].transformer(**changes[family])
    transformer.save_config(tmp_path / "transformer")
    file, meant = write_gguf(tmp_path / "a.gguf", original(transformer), kind)
    found = find_single_file(file, str(tmp_path), "transformer")
    assert any("to_q" in name for name in found.packed)
    model = found.load(str(tmp_path), "transformer", torch.float32)
    loaded = {name: dequantize_gguf_tensor(x).detach().float() for name, x in model.named_parameters()}
    transformer.load_state_dict(loaded)
    for name, value in original(transformer).items():
        limit = 2**-9 * meant[name].abs().max()
        torch.testing.assert_close(value, meant[name], atol=float(limit), rtol=0, msg=name)
    inputs = BY_NAME[family].inputs()
    torch.testing.assert_close(run(model, inputs), run(transformer, inputs), atol=2e-5, rtol=0)


def test_gguf_remembers_the_shape_of_a_tensor_that_was_flattened(tmp_path):
    from gguf import GGUFWriter

    transformer = wan_transformer()
    transformer.save_config(tmp_path / "transformer")
    writer = GGUFWriter(tmp_path / "a.gguf", "wan")
    for name, value in original(transformer).items():
        writer.add_tensor(name, value.numpy().ravel() if value.ndim > 4 else value.numpy())
        if value.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    found = find_single_file(tmp_path / "a.gguf", str(tmp_path), "transformer")
    assert_same(found.load(str(tmp_path), "transformer", torch.float32), transformer)


def pipeline_of_gguf(tmp_path: Path, kind: str = "Q8_0"):
    """Loads a tiny Wan from GGUF, and returns the one with the values that it unpacks."""
    made = folder_of(wan_pipeline(**WIDE), tmp_path / "m")
    file, _ = write_gguf(tmp_path / "a.gguf", original(made["transformer"]), kind)
    pipeline = quiet(
        load_pipeline(str(tmp_path / "m"), "wan", torch.float32, "cpu", files={"transformer": file})
    )
    plain = wan_pipeline(**WIDE)
    own = pipeline.transformer.named_parameters()
    plain.transformer.load_state_dict({name: dequantize_gguf_tensor(x).detach().float() for name, x in own})
    return pipeline, plain


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_loras_on_top_of_gguf(kind, tmp_path):
    pipeline, plain = pipeline_of_gguf(tmp_path, kind)
    before = KINDS["wan"].generate(pipeline)
    file = write(tmp_path / "lora.safetensors", spell(random_pairs(plain.transformer), "original"))
    for each in (pipeline, plain):
        load_loras(each, [Lora(file)])
    actual = KINDS["wan"].generate(pipeline)
    torch.testing.assert_close(actual, KINDS["wan"].generate(plain), atol=1e-4, rtol=0)
    assert (actual - before).abs().max() > 1e-3


def test_what_loras_cannot_change_in_gguf(tmp_path):
    pipeline, plain = pipeline_of_gguf(tmp_path)
    file = write(tmp_path / "lora.safetensors", spell(random_pairs(plain.transformer), "original"))
    with pytest.raises(ValueError, match="cannot be added to weights that GGUF holds quantised"):
        load_loras(pipeline, [Lora(file)], mode="fused")
    file = save(tmp_path / "whole.safetensors", {"blocks.0.self_attn.q.diff": torch.zeros(32, 32)})
    message = r"whole\.safetensors changes blocks\.0\.attn1\.to_q\.weight, which GGUF holds quantised"
    with pytest.raises(ValueError, match=message):
        load_loras(pipeline, [Lora(file)])


@pytest.mark.parametrize(
    "options",
    [{}, {"selection": "dense_step", "residual": "mean"}, {"far_field": "linear"}],
    ids=["radial", "adaptive", "far field"],
)
def test_radial_attention_on_top_of_gguf(options, tmp_path):
    videos = []
    for each in pipeline_of_gguf(tmp_path):
        with apply_radial_attention(each, config=SPARSE, dense_steps=1, **options) as handle:
            videos.append(KINDS["wan"].generate(each))
        assert handle.report()["calls"]
    torch.testing.assert_close(*videos, atol=1e-4, rtol=0)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offload_on_top_of_gguf(offload, tmp_path):
    """The CPU stands for the GPU."""
    videos = []
    for each in pipeline_of_gguf(tmp_path):
        economize(each, "cpu", torch.float32, offload=offload)
        with apply_radial_attention(each, config=SPARSE, dense_steps=1):
            videos.append(KINDS["wan"].generate(each))
    torch.testing.assert_close(*videos, atol=1e-4, rtol=0)


@pytest.mark.long
def test_compiled_blocks_on_top_of_gguf(tmp_path):
    """Compiled, weights are unpacked with other roundings: 4e-4 of latents up to 5."""
    videos = []
    for each in pipeline_of_gguf(tmp_path):
        with apply_radial_attention(each, config=SPARSE, dense_steps=1):
            economize(each, "cpu", torch.float32, compile="blocks")
            videos.append(KINDS["wan"].generate(each))
    torch.testing.assert_close(*videos, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["first_block", "taylorseer"])
def test_caches_on_top_of_gguf(kind, tmp_path):
    videos = []
    for each in pipeline_of_gguf(tmp_path):
        with cached(each, kind=kind, steps=3, dense_steps=1, threshold=0.05):
            videos.append(KINDS["wan"].generate(each))
    torch.testing.assert_close(*videos, atol=1e-4, rtol=0)
