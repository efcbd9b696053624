"""What is HunyuanVideo's own: images as conditions, the order of its layers, its text and masks."""

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName

from radial_attn import radial_mask
from radial_attn.models import apply_radial_attention, hunyuan_video
from radial_attn.models.runtime import dense_backend as dense
from tests.support.families import BY_NAME, DENSE, FULL, SPARSE, assert_near, masked_upstream, run
from tests.support.tiny_hunyuan import SHAPE, hunyuan_inputs, hunyuan_transformer

HUNYUAN, HUNYUAN15 = BY_NAME["hunyuan_video"], BY_NAME["hunyuan_video15"]


@pytest.mark.parametrize(("kind", "channels"), [("latent_concat", 9), ("token_replace", 4)])
def test_image_conditions(kind, channels):
    transformer = hunyuan_transformer(in_channels=channels, image_condition_type=kind)
    inputs = hunyuan_inputs(lengths=(4, 9), channels=channels)
    expected = run(transformer, inputs), masked_upstream(HUNYUAN, transformer, inputs)
    for config, output in zip((FULL, SPARSE), expected, strict=True):
        with apply_radial_attention(transformer, config, backend="blocks"):
            assert_near(run(transformer, inputs), output)


def test_an_image_of_zeros_is_none():
    """Upstream then leaves its tokens out, for the whole batch."""
    transformer, inputs = HUNYUAN15.transformer(), HUNYUAN15.sized(lengths=(4, 9), image=False)
    expected = run(transformer, inputs)
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        assert_near(run(transformer, inputs), expected)
    assert HUNYUAN15.fork.text_mask(inputs).sum(dim=1).tolist() == [3 + 4, 3 + 9]
    images = HUNYUAN15.sized(lengths=(4, 9))["image_embeds"]
    inputs["image_embeds"] = images * torch.tensor([0, 1])[:, None, None]
    assert HUNYUAN15.fork.text_mask(inputs).sum(dim=1).tolist() == [3 + 3 + 4, 3 + 3 + 9]


def test_layers_are_numbered_in_the_order_of_their_call():
    transformer, called = hunyuan_transformer(), []
    attentions = hunyuan_video.attention_layers(transformer)
    for layer, attention in enumerate(attentions):
        attention.register_forward_pre_hook(lambda *_, layer=layer: called.append(layer))
    run(transformer, hunyuan_inputs())
    assert called == [0, 1, 2, 3]
    assert [attention.add_q_proj is None for attention in attentions] == [False, False, True, True]


def test_text_is_read_once_for_each_prompt(monkeypatch):
    """Runs a loop with guidance; another prompt at the same index is another tensor."""
    transformer, reads = hunyuan_transformer(), []
    halves = [hunyuan_inputs(lengths=(length,), seed=length) for length in (4, 9)]
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(tensor) or cpu(tensor))
    with apply_radial_attention(transformer, SPARSE):
        for timestep in (900.0, 500.0, 100.0):
            for half in halves:
                run(transformer, half | {"timestep": torch.tensor([timestep])})
    assert len(reads) == 2


def test_framepack_is_refused_in_one_line():
    transformer = HunyuanVideoFramepackTransformer3DModel(**SHAPE, num_layers=1, num_single_layers=1)
    with pytest.raises(ValueError, match=r"must be one of .*, got HunyuanVideoFramepackTransformer3DModel$"):
        apply_radial_attention(transformer, SPARSE)


@pytest.mark.parametrize("family", [HUNYUAN, HUNYUAN15], ids=["1.0", "1.5"])
def test_auto_looks_for_a_dense_backend_that_takes_the_mask(family, monkeypatch):
    """Flash kernels take none, and would stop upstream's processor."""
    transformer, inputs, asked = family.transformer(), family.sized(lengths=(4,)), []
    monkeypatch.setattr(dense, "TIMED_DEVICES", ("cpu",))
    monkeypatch.setattr(dense, "measure", lambda names, *given: asked.append(given) or {"_native_math": 1e-3})
    radial_mask.cache_clear()
    expected = run(transformer, inputs)
    with apply_radial_attention(transformer, DENSE):
        assert_near(run(transformer, inputs), expected)
    assert [given[-1] for given in asked] == [True]


def test_measure_gives_a_mask_if_the_calls_will(monkeypatch):
    masks = []
    monkeypatch.setattr(
        "diffusers.models.attention_dispatch.dispatch_attention_fn",
        lambda *tensors, attn_mask, backend: masks.append((attn_mask, backend)),
    )
    call = ["native"], (2, 6, 1, 8), torch.float32, torch.device("cpu")
    for masked in (False, True):
        assert dense.measure(*call, masked)["native"] >= 0
    assert {backend for _, backend in masks} == {AttentionBackendName.NATIVE}
    (without, given) = masks[0][0], masks[-1][0]
    assert without is None and given.shape == (2, 1, 1, 6) and given.all()
