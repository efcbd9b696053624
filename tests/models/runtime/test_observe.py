"""Observing: every layer at every step, with the query, key and value of what the layer returned."""

import pytest
import torch

from radial_attn import radial_mask
from radial_attn.kernels import reference
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime import layer_attention
from tests.support.families import DENSE, SPARSE, families, run
from tests.support.pipelines import generate
from tests.support.tiny import wan_inputs, wan_pipeline, wan_transformer

LENGTHS = {"mochi": [5, 3], "hunyuan_video": [3, 1, 7], "hunyuan_video15": [9, 7, 13]}  # and 6 image, glyph
LENGTHS["motif_video"] = [6, 4, 10]  # and 3 image


def two_steps(family) -> list[dict]:
    """Returns a call of a batch for each of two steps."""
    times = (200.0, 900.0) if family.rises else (900.0, 200.0)
    return [family.sized(timestep=timestep, **family.samples[-1]) for timestep in times]


def recorded(monkeypatch) -> list[torch.Tensor]:
    """Records the outputs of the attention in their order."""
    outputs, attend = [], layer_attention._attend

    def record(*args, **options):
        outputs.append(attend(*args, **options))
        return outputs[-1]

    monkeypatch.setattr(layer_attention, "_attend", record)
    return outputs


@families
@pytest.mark.parametrize("dense", [{}, {"dense_steps": 1}, {"dense_layers": 1}, {"dense_steps": 2}], ids=str)
def test_every_layer_is_seen_at_every_step_and_nothing_changes(family, dense, monkeypatch):
    transformer, inputs, seen = family.transformer(), two_steps(family), []
    with apply_radial_attention(transformer, SPARSE, **dense):
        expected = [run(transformer, each) for each in inputs]
    outputs = recorded(monkeypatch)
    with apply_radial_attention(transformer, SPARSE, observe=seen.append, **dense) as handle:
        actual = [run(transformer, each) for each in inputs]
        layers = handle.report()["layers"]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    assert [(each.step, each.layer) for each in seen] == [(s, n) for s in range(2) for n in range(layers)]
    grid = family.grid()
    mask, everything = radial_mask(grid, SPARSE), radial_mask(grid, DENSE)
    for each, output in zip(seen, outputs, strict=True):
        assert each.mask is mask
        assert family.name not in LENGTHS or each.text_lengths.tolist() == LENGTHS[family.name]
        dense_layer = family.feeds[each.layer] < dense.get("dense_layers", 0)
        kept = everything if dense_layer or each.step < dense.get("dense_steps", 0) else mask
        options = {"text_lengths": each.text_lengths, "scale": each.query.shape[-1] ** -0.5}
        wanted = reference.attention(each.query, each.key, each.value, kept, **options)
        video = slice(grid.video_tokens)
        torch.testing.assert_close(output[:, video], wanted[:, video], atol=1e-5, rtol=0)


def test_both_experts_of_a_pipeline_are_seen_and_a_dense_pattern_has_its_mask():
    pipeline, seen = wan_pipeline(experts=2, num_layers=2), []
    with apply_radial_attention(pipeline, DENSE, observe=seen.append) as handle:
        generate(pipeline, guidance_scale=2.0)
        assert handle.report()["calls"] == {"dense": 12}
    assert [(each.step, each.layer) for each in seen] == [
        (s, n) for s in range(3) for _ in "ab" for n in (0, 1)
    ]
    assert all(each.mask.is_dense for each in seen)


def test_a_dense_run_observed_under_the_check_is_the_same():
    transformer, seen = wan_transformer(), []
    options = {"dense_steps": 1, "check": "nan", "observe": seen.append}
    with apply_radial_attention(transformer, SPARSE, **options):
        actual = run(transformer, wan_inputs())
    torch.testing.assert_close(actual, run(transformer, wan_inputs()), atol=1e-5, rtol=0)
    assert len(seen) == 4


def compiled_blocks(transformer):
    for block in transformer.blocks:
        block.forward = torch.compile(block.forward)
    return transformer


def repeated_blocks(transformer):
    transformer.compile_repeated_blocks()
    return transformer


@pytest.mark.parametrize("compiled", [compiled_blocks, repeated_blocks, torch.compile])
def test_a_compiled_transformer_is_refused(compiled):
    transformer = compiled(wan_transformer())
    with pytest.raises(ValueError, match=r"^observe .*compiled transformer; observe it before"):
        apply_radial_attention(transformer, SPARSE, observe=print)
    apply_radial_attention(transformer, SPARSE).remove()


def test_several_processes_are_refused():
    with pytest.raises(ValueError, match=r"^observe .*parallel=object; leave one"):
        apply_radial_attention(wan_transformer(), SPARSE, observe=print, parallel=object())
