"""What is Wan's own, and what an application refuses, on tiny random transformers."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from radial_attn import radial_mask
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.counts import REASONS
from tests.support.families import BY_NAME, DENSE, FULL, SPARSE, assert_near, masked_upstream, run
from tests.support.tiny import wan_inputs, wan_pipeline, wan_transformer
from tests.support.tiny_wan import vace_transformer

WAN = BY_NAME["wan"]


def test_fused_projections():
    transformer = wan_transformer()
    transformer.fuse_qkv_projections()
    expected = run(transformer)
    with apply_radial_attention(transformer, FULL, backend="blocks") as handle:
        assert_near(run(transformer), expected)
        assert handle.report()["calls"] == {"blocks": 4}


def test_report_before_and_after_the_first_call():
    transformer = wan_transformer()
    with apply_radial_attention(transformer, SPARSE) as handle:
        report = handle.report()
        run(transformer)
        after = handle.report()
    nothing = {"grid": None, "density": None, "grids": [], "videos": 0, "steps": 0, "dense_steps": 0}
    options = {"layers": 4, "dense_layers": 0, "quantize": None, "check": {"mode": "off"}}
    options |= {"tuning": [], "calls": {}, "stayed_dense": dict.fromkeys(REASONS, 0)}
    assert report == nothing | options | {name: report[name] for name in ("adaptive", "dense_backend")}
    assert after["stayed_dense"] == dict.fromkeys(REASONS, 0) | {"cross_attention": 4}
    assert (after["grid"], after["density"]) == ([6, 6, 8], radial_mask(WAN.grid(), SPARSE).density)
    assert (after["videos"], after["steps"], after["dense_steps"]) == (1, 1, 0)


def test_positional_arguments():
    transformer, inputs = wan_transformer(), wan_inputs()
    with torch.no_grad(), apply_radial_attention(transformer, SPARSE):
        assert torch.equal(transformer(*inputs.values()).sample, run(transformer, inputs))


def test_failed_application_changes_nothing():
    pipeline = wan_pipeline(experts=2)
    handle = apply_radial_attention(pipeline.transformer_2, SPARSE)
    before = dict(pipeline.transformer.attn_processors)
    with pytest.raises(ValueError, match="already applied"):
        apply_radial_attention(pipeline, SPARSE)
    assert dict(pipeline.transformer.attn_processors) == before
    assert not pipeline.transformer._forward_pre_hooks
    handle.remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_layers": 1.5}, "dense_layers must be a whole number of at least 0, got 1.5"),
        ({"dense_last_steps": 1}, "dense_last_steps=1 needs the number of steps"),
        ({"config": "radial"}, "config must be a RadialConfig, got str"),
        ({"model": vace_transformer(), "dense_layers": 5}, r"dense_layers must be at most 4, .*got 5"),
        ({"model": torch.nn.Linear(2, 2)}, "transformer must be one of WanTransformer3DModel, .*got Linear"),
        ({"model": {}}, "expected a transformer, or a pipeline that has one, got dict"),
    ],
)
def test_refusals(options, message):
    """Checks what test_enable.py does not: models, and options that only `apply_radial_attention` checks."""
    transformer = wan_transformer()
    with pytest.raises(ValueError, match=message):
        apply_radial_attention(**{"model": transformer, "config": SPARSE} | options)
    assert not transformer._forward_pre_hooks


def test_foreign_processor_is_an_error():
    class Other(WanAttnProcessor):
        pass

    transformer = wan_transformer()
    transformer.blocks[1].attn1.set_processor(Other())
    with pytest.raises(ValueError, match="must be WanAttnProcessor, got Other, WanAttnProcessor"):
        apply_radial_attention(transformer, SPARSE)


def test_attention_backend_governs_the_dense_path_and_outlives_the_fork():
    transformer = wan_transformer()

    def backends() -> set[str]:
        return {processor._attention_backend.value for processor in transformer.attn_processors.values()}

    with apply_radial_attention(transformer, DENSE):
        transformer.set_attention_backend("flex")
        assert backends() == {"flex"}
        transformer.set_attention_backend("_native_math")
        inside = run(transformer)
    assert backends() == {"_native_math"}
    assert torch.equal(run(transformer), inside)


def test_one_timestep_per_token():
    """Wan2.2 TI2V-5B: the first frame is clean (0), the rest at the step's time."""
    transformer, grid = wan_transformer(), WAN.grid()
    tokens = torch.full((1, grid.tokens), 700.0)
    tokens[:, : grid.tokens_per_frame] = 0
    inputs = wan_inputs() | {"timestep": tokens}
    expected = masked_upstream(WAN, transformer, inputs)
    with apply_radial_attention(transformer, SPARSE, dense_steps=1) as handle:
        run(transformer, inputs | {"timestep": tokens + 200})
        assert_near(run(transformer, inputs), expected)
        assert handle.report()["steps"] == 2


def test_control_layers_are_dense_with_the_layer_that_they_feed():
    transformer, dense = vace_transformer(), {}
    for count in range(5):
        with apply_radial_attention(transformer, SPARSE, dense_layers=count) as handle:
            processors = [
                [b.attn1.processor.dense for b in x] for x in (transformer.vace_blocks, transformer.blocks)
            ]
            dense[count] = tuple(map(sum, processors))
            assert handle.report()["dense_layers"] == sum(dense[count])
    assert dense == {0: (0, 0), 1: (1, 1), 2: (1, 2), 3: (2, 3), 4: (2, 4)}
