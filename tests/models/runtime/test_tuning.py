"""Backends that a model measures at its first sparse call, and the report about dense calls."""

import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from radial_attn import RadialConfig, radial_mask
from radial_attn.kernels import reference
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime import choices
from tests.support.auto_backend import AUTO
from tests.support.families import BY_NAME, DENSE, FULL, SPARSE, assert_near, families, run, with_text
from tests.support.pipelines import generate
from tests.support.timed_backends import Costs
from tests.support.tiny import wan_inputs, wan_pipeline, wan_transformer

MASKS = RadialConfig(block_size=16, density=0.9)


@pytest.fixture(autouse=True)
def costs(monkeypatch):
    """Makes `reference` the fastest, which "auto" never takes unmeasured."""
    for masks in (radial_mask, choices.least_mask):
        masks.cache_clear()  # a mask caches the choices of its shapes
    costs = Costs(monkeypatch, {"reference": 1e-3, "cpp": 2e-3, "blocks": 3e-3, "dense": 4e-3})
    costs.charge_models(monkeypatch)
    return costs


def calls(handle) -> dict[str, int]:
    return handle.report()["calls"]


def test_the_first_sparse_call_measures_and_the_next_ones_follow(costs, caplog):
    caplog.set_level(logging.INFO, logger="radial_attn")
    transformer = wan_transformer()
    inputs = [wan_inputs(timestep=time) for time in (900.0, 500.0, 100.0)]
    options = {"dense_steps": 1, "dense_layers": 1, "check": "reference"}
    with apply_radial_attention(transformer, SPARSE, **options) as handle:
        expected = [run(transformer, call) for call in inputs]
        assert handle.report()["tuning"] == []
    costs.calls = dict.fromkeys(costs.calls, 0)
    with apply_radial_attention(transformer, SPARSE, **options, tune="always") as handle:
        for call, output in zip(inputs, expected, strict=True):
            assert_near(run(transformer, call), output)
        report = handle.report()
    assert report["calls"] == {"dense": 4 + 2, "reference": 6}
    assert report["stayed_dense"] == {
        "dense_step": 4,
        "dense_layer": 2,
        "too_short": 0,
        "mask": 0,
        "cross_attention": 12,
    }
    assert report["check"]["compared"] == 3 and report["dense_steps"] == 1
    (tuned,) = report["tuning"]
    assert tuned["backend"] == "reference" and tuned["shape"] == [1, 288, 2, 12] and not tuned["refused"]
    assert tuned["seconds"] == pytest.approx({name: costs.seconds[name] for name in tuned["seconds"]})
    assert costs.calls["reference"] == 4 + 6 and costs.calls["blocks"] == costs.calls["dense"] == 4
    lines = [line for line in caplog.messages if line.startswith("backend")]
    assert (
        lines[0].startswith(f"backend {AUTO} ")
        and lines[1].startswith("backend reference ")
        and len(lines) == 2
    )


@families
def test_a_short_sequence_stays_dense(family, costs):
    """Every later call is upstream's; the first ends dense, and is compared with nothing."""
    costs.seconds["dense"] = 1e-4
    transformer, inputs = family.transformer(), family.sized(**family.samples[-1])
    expected = run(transformer, inputs)
    with apply_radial_attention(transformer, SPARSE, tune="always", check="reference") as handle:
        for _ in range(2):
            assert_near(run(transformer, inputs), expected)
        report = handle.report()
    assert report["calls"] == {"dense": 2 * family.layers} and report["dense_steps"] == 1
    assert report["stayed_dense"]["too_short"] == 2 * family.layers and "compared" not in report["check"]


@pytest.mark.parametrize("options", [{}, {"residual": "int8"}, {"far_field": "linear"}], ids=str)
def test_a_short_sequence_whose_heads_would_choose_stays_dense(options, costs):
    costs.seconds["dense"] = 1e-4
    pipeline = wan_pipeline()
    expected = generate(pipeline, steps=4)
    options |= {"selection": "dense_step", "dense_steps": 1, "tune": "always"}
    for _ in range(2):
        with apply_radial_attention(pipeline, MASKS, **options) as handle:
            torch.testing.assert_close(generate(pipeline, steps=4), expected, rtol=1e-4, atol=1e-4)
            report = handle.report()
        assert report["calls"].keys() == {"dense"} and report["dense_steps"] == 4
        assert report["stayed_dense"]["too_short"] == 3 * report["stayed_dense"]["dense_step"]


@pytest.mark.parametrize("far_field", ["none", "mean"])
def test_heads_that_choose_are_measured_with_their_masks(far_field, costs):
    pipeline = wan_pipeline()
    options = {"selection": "dense_step", "dense_steps": 1, "far_field": far_field}
    with apply_radial_attention(pipeline, MASKS, **options):
        expected = generate(pipeline, steps=3)
    with apply_radial_attention(pipeline, MASKS, **options, tune="always") as handle:
        torch.testing.assert_close(generate(pipeline, steps=3), expected, rtol=1e-4, atol=1e-4)
        report = handle.report()
    assert report["tuning"][0]["density"] == pytest.approx(0.9, abs=0.03)
    assert report["calls"].keys() == {"dense", report["tuning"][0]["backend"]}


@pytest.mark.parametrize("options", [{}, {"selection": "dense_step", "dense_steps": 1}], ids=str)
def test_a_range_of_densities_is_measured_once(options, costs):
    pipeline = wan_pipeline()
    options |= {"tune": "always", "density_range": (0.95, 0.8), "num_steps": 4}
    with apply_radial_attention(pipeline, RadialConfig(block_size=16), **options) as handle:
        generate(pipeline, steps=4)
        tuned = handle.report()["tuning"]
    assert costs.calls["blocks"] == 4  # a first call, and three that are timed
    assert [x["measured_at"] for x in tuned] == [None, *[tuned[0]["density"]] * 2]


@with_text
def test_padded_text_is_measured_too(family, costs):
    transformer, inputs = family.transformer(), family.sized(**family.samples[-1])
    with apply_radial_attention(transformer, SPARSE):
        expected = run(transformer, inputs)
    with apply_radial_attention(transformer, SPARSE, tune="always") as handle:
        assert_near(run(transformer, inputs), expected)
        assert calls(handle) == {"reference": family.layers}


def test_compiled_blocks_are_measured_before_their_first_call(costs):
    torch._dynamo.reset()
    transformer, counter = wan_transformer(num_layers=2), CompileCounter()
    with apply_radial_attention(transformer, SPARSE, backend="blocks"):
        expected = run(transformer)
    costs.seconds["blocks"] = 1e-4
    transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    with apply_radial_attention(transformer, SPARSE, tune="always") as handle:
        for _ in range(2):
            assert_near(run(transformer), expected)
        assert calls(handle) == {"blocks": 4}
    assert counter.frame_count == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_measures_both_passes_before_the_call(checkpointing, costs):
    transformer = wan_transformer(num_layers=2).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    with apply_radial_attention(transformer, SPARSE, tune="always") as handle:
        transformer(**wan_inputs()).sample.square().mean().backward()
        (tuned,) = handle.report()["tuning"]
    assert tuned["backend"] == "reference" and not tuned["refused"]
    assert costs.calls["reference"] == 4 + (4 if checkpointing else 2)
    assert all(x.grad is not None for x in transformer.blocks[0].attn1.parameters())


@pytest.mark.parametrize(
    "options",
    [{"tune": "off"}, {}, {"tune": "always", "backend": AUTO}, {"tune": "always", "residual": "output"}],
    ids=str,
)
def test_what_is_not_measured(options, costs):
    pipeline = wan_pipeline()
    with apply_radial_attention(pipeline, SPARSE, dense_steps=1, **options) as handle:
        generate(pipeline, steps=2)
        assert handle.report()["tuning"] == [] and set(calls(handle)) == {"dense", AUTO}


def test_a_mask_that_keeps_everything_is_a_reason(costs):
    transformer = wan_transformer()
    for config, name in ((DENSE, "dense"), (FULL, "blocks")):
        with apply_radial_attention(transformer, config, tune="always", dense_layers=1) as handle:
            run(transformer)
            report = handle.report()
        assert report["calls"] == ({"dense": 4} if name == "dense" else {"dense": 1, "blocks": 3})
        assert report["stayed_dense"]["mask"] == report["calls"][name] and not report["tuning"]


def test_every_size_has_its_own_choice(costs):
    family = BY_NAME["wan"]
    transformer = family.transformer()
    with apply_radial_attention(transformer, SPARSE, tune="always") as handle:
        run(transformer)
        costs.seconds["blocks"] = 1e-4
        for size in ((5, 4, 6), (6, 6, 8)):
            run(transformer, family.sized(*size))
        assert calls(handle) == {"reference": 8, "blocks": 4} and len(handle.report()["tuning"]) == 2


def test_the_definition_is_the_only_one_that_a_test_may_spoil(costs):
    """A wrong backend is refused although it is the fastest."""
    costs.spoil["reference"] = lambda output: 2 * output
    transformer = wan_transformer()
    with apply_radial_attention(transformer, SPARSE, tune="always", check="reference") as handle:
        run(transformer)
        (tuned,) = handle.report()["tuning"]
    assert tuned["backend"] == AUTO and tuned["refused"]["reference"].startswith("relative L2 error 1")
    assert reference.NEEDS.exact
