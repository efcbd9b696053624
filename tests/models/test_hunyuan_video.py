"""The forks of HunyuanVideo and HunyuanVideo 1.5 against upstream, on tiny random transformers."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoFramepackTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

from radial_attn import TokenGrid, radial_mask
from radial_attn.models import apply_radial_attention, hunyuan_video
from radial_attn.models.runtime import dense_backend as dense
from tests.support.auto_backend import AUTO
from tests.support.hunyuan_cases import DENSE, FULL, SPARSE, assert_near, families, run
from tests.support.tiny_hunyuan import FAMILIES, SHAPE, TEXT, Family, hunyuan_inputs, hunyuan_transformer


class MaskedProcessor(HunyuanVideoAttnProcessor2_0):
    """Upstream's own joint attention with a token mask; that of HunyuanVideo 1.5 differs in the mask only."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        keys = attention_mask.bool().flatten(1)
        keys = F.pad(keys, (len(self.mask) - keys.shape[1], 0), value=True)
        mask = self.mask & keys[:, None, None]
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


def masked_upstream(family: Family, transformer, size, inputs, layers=slice(None)):
    """Output with upstream's attention under the token mask of SPARSE in some layers."""
    token_mask = radial_mask(TokenGrid(*size, family.text), SPARSE).token_mask()
    attentions = family.fork.attention_layers(transformer)[layers]
    before = [attention.processor for attention in attentions]
    for attention in attentions:
        attention.set_processor(MaskedProcessor(token_mask))
    output = run(transformer, inputs)
    for attention, processor in zip(attentions, before, strict=True):
        attention.set_processor(processor)
    return output


@families
@pytest.mark.parametrize("lengths", [(TEXT,), (4,), (4, TEXT), (3, 1, 7)], ids=str)
def test_dense_is_upstream_and_density_one_is_dense(family, lengths):
    """Also with padded text, of another length in each sample."""
    transformer, inputs = family.transformer(), family.sized(lengths=lengths)
    expected = run(transformer, inputs)
    with apply_radial_attention(transformer, DENSE) as handle:
        assert torch.equal(run(transformer, inputs), expected)
        assert handle.report()["calls"] == {"dense": 4}
    for backend in ("blocks", "reference"):
        with apply_radial_attention(transformer, FULL, backend=backend) as handle:
            assert_near(run(transformer, inputs), expected)
            report = handle.report()
        assert (report["calls"], report["density"], report["grid"]) == ({backend: 4}, 1.0, [6, 6, 8])


@families
@pytest.mark.parametrize("backend", ["reference", "blocks"])
def test_sparse_is_upstream_under_the_token_mask(family, backend):
    """Sizes that follow one another, token counts that no block divides, padded text, and a batch."""
    transformer = family.transformer()
    sizes = [((6, 6, 8), (TEXT,)), ((7, 5, 3), (2, TEXT, 9)), ((5, 11, 7), (3,)), ((1, 3, 3), (5, 5))]
    calls = [(size, family.sized(*size, lengths=lengths)) for size, lengths in sizes]
    expected = [masked_upstream(family, transformer, size, inputs) for size, inputs in calls]
    with apply_radial_attention(transformer, SPARSE, backend=backend) as handle:
        for (_, inputs), output in zip(calls, expected, strict=True):
            assert_near(run(transformer, inputs), output)
        assert [entry["grid"] for entry in handle.report()["grids"]] == [list(size) for size, _ in sizes]
        assert handle.report()["grids"][0]["density"] < 0.6
    assert (expected[0] - run(transformer, calls[0][1])).abs().max() > 1e-3


@families
def test_padding_has_no_say(family):
    """A sample alone, without its padding, is what it is in a batch."""
    transformer, inputs = family.transformer(), family.sized(lengths=(4, 9))
    changed = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][0, 4:] = 100.0
    alone = {name: value[:1] for name, value in inputs.items()}
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        alone[name] = alone[name][:, :4]
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        found = run(transformer, inputs)
        assert_near(run(transformer, changed), found)
        assert_near(run(transformer, alone), found[:1])


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_image_conditions(kind):
    family = FAMILIES[0]
    channels = {"latent_concat": 9, "token_replace": 4}[kind]
    transformer = hunyuan_transformer(in_channels=channels, image_condition_type=kind)
    inputs = hunyuan_inputs(lengths=(4, 9), channels=channels)
    expected = run(transformer, inputs), masked_upstream(family, transformer, (6, 6, 8), inputs)
    for config, output in zip((FULL, SPARSE), expected, strict=True):
        with apply_radial_attention(transformer, config, backend="blocks"):
            assert_near(run(transformer, inputs), output)


def test_an_image_of_zeros_is_none():
    """Upstream then leaves its tokens out, for the whole batch."""
    family = FAMILIES[1]
    transformer, inputs = family.transformer(), family.sized(lengths=(4, 9), image=False)
    expected = run(transformer, inputs)
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        assert_near(run(transformer, inputs), expected)
    assert family.fork.text_mask(inputs).sum(dim=1).tolist() == [3 + 4, 3 + 9]
    inputs["image_embeds"] = (
        family.sized(lengths=(4, 9))["image_embeds"] * torch.tensor([0, 1])[:, None, None]
    )
    assert family.fork.text_mask(inputs).sum(dim=1).tolist() == [3 + 3 + 4, 3 + 3 + 9]


@families
@pytest.mark.parametrize("layers", [1, 3])
def test_dense_steps_and_layers_in_the_output(family, layers):
    """Double blocks come first: of HunyuanVideo's two and two, three dense ones reach into the single."""
    transformer = family.transformer()
    first, second = (family.sized(lengths=(4,), timestep=timestep) for timestep in (999.0, 500.0))
    upstream = run(transformer, first)
    sparse = masked_upstream(family, transformer, (6, 6, 8), second, slice(layers, None))
    with apply_radial_attention(transformer, SPARSE, dense_steps=1, dense_layers=layers) as handle:
        assert torch.equal(run(transformer, first), upstream)
        assert_near(run(transformer, second), sparse)
        report = handle.report()
    assert report["calls"] == {"dense": 4 + layers, AUTO: 4 - layers}


def test_layers_are_numbered_in_the_order_of_their_call():
    transformer, called = hunyuan_transformer(), []
    attentions = hunyuan_video.attention_layers(transformer)
    for layer, attention in enumerate(attentions):
        attention.register_forward_pre_hook(lambda *_, layer=layer: called.append(layer))
    run(transformer, hunyuan_inputs())
    assert called == [0, 1, 2, 3]
    assert [attention.add_q_proj is None for attention in attentions] == [False, False, True, True]


@families
def test_bfloat16(family):
    transformer = family.transformer().to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in family.sized(lengths=(4, 9)).items()}
    expected = masked_upstream(family, transformer, (6, 6, 8), inputs)
    with apply_radial_attention(transformer, SPARSE):
        found = run(transformer, inputs)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() / expected.abs().max() < 4 * torch.finfo(torch.bfloat16).eps


@families
def test_remove_restores_objects_and_hooks(family):
    transformer, inputs = family.transformer(), family.sized(lengths=(4, 9))
    processors, expected = dict(transformer.attn_processors), run(transformer, inputs)
    handle = apply_radial_attention(transformer, SPARSE, check="nan")
    changed = {name for name, ours in transformer.attn_processors.items() if ours is not processors[name]}
    assert len(changed) == 4 and not any("token_refiner" in name for name in changed)
    run(transformer, inputs)
    handle.remove()
    handle.remove()
    assert all(transformer.attn_processors[name] is before for name, before in processors.items())
    assert all(vars(processor) == {} for processor in processors.values())
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks
    assert not transformer.rope._forward_hooks
    assert torch.equal(run(transformer, inputs), expected)


def test_text_is_read_once_for_each_prompt(monkeypatch):
    """In a loop with guidance; another prompt in the same place is another tensor."""
    transformer, reads = hunyuan_transformer(), []
    halves = [hunyuan_inputs(lengths=(length,), seed=length) for length in (4, 9)]
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(tensor) or cpu(tensor))
    with apply_radial_attention(transformer, SPARSE):
        for timestep in (900.0, 500.0, 100.0):
            for half in halves:
                run(transformer, half | {"timestep": torch.tensor([timestep])})
    assert len(reads) == 2


def test_text_that_does_not_come_first_is_an_error():
    transformer, inputs = hunyuan_transformer(), hunyuan_inputs(lengths=(4,))
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
    with (
        apply_radial_attention(transformer, SPARSE),
        pytest.raises(ValueError, match=r"valid text tokens must come first, got a mask \[\[0, "),
    ):
        run(transformer, inputs)


def test_framepack_is_refused_in_one_line():
    transformer = HunyuanVideoFramepackTransformer3DModel(**SHAPE, num_layers=1, num_single_layers=1)
    with pytest.raises(ValueError, match=r"must be one of .*, got HunyuanVideoFramepackTransformer3DModel$"):
        apply_radial_attention(transformer, SPARSE)


@families
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


def test_measure_gives_a_mask_where_one_will_come(monkeypatch):
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
