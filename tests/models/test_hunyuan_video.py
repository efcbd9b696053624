"""What is HunyuanVideo's own: images as conditions, the order of its layers, its text and masks."""

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel

from radial_attn.models import apply_radial_attention, hunyuan_video
from radial_attn.models.runtime import layer_attention
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
@pytest.mark.parametrize("lengths", [(4,), (3, 1, 7), (4, 4)], ids=str)
def test_dense_calls_slice_padded_text_off(family, lengths, monkeypatch):
    """As on a GPU, where flash kernels take no mask; a CPU masks, bit by bit as upstream."""
    transformer, inputs = family.transformer(), family.sized(lengths=lengths)
    expected, seen = run(transformer, inputs), []
    dispatch = layer_attention.dispatch_attention_fn

    def watched(query, key, value, attn_mask=None, backend=None):
        seen.append((len(key), query.shape[1] - key.shape[1], attn_mask))
        return dispatch(query, key, value, backend=backend)

    monkeypatch.setattr(layer_attention, "dispatch_attention_fn", watched)
    with apply_radial_attention(transformer, DENSE):
        assert torch.equal(run(transformer, inputs), expected) and not seen
        monkeypatch.setattr(layer_attention, "SLICED_DEVICES", ("cpu",))
        assert_near(run(transformer, inputs), expected)
    padding = (family.fork.text_mask(inputs) == 0).sum(1).tolist()
    calls = [(len(padding), padding[0], None)] if len(set(padding)) == 1 else [(1, n, None) for n in padding]
    assert seen == calls * family.layers
