"""The Wan fork against upstream, on tiny random transformers and pipelines."""

import pytest
import torch

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.models import apply_radial_attention
from tests.support.auto_backend import AUTO
from tests.support.tiny import wan_inputs, wan_pipeline, wan_transformer
from tests.support.wan_cases import DENSE, GRID, SPARSE, ReferenceProcessor, masked_upstream, run

FULL = RadialConfig(decay_factor=1e6, block_size=16, decimation_width=1)


def at(timestep, batch=1):
    return {"timestep": torch.full((batch,), float(timestep))}


def test_dense_pattern_is_upstream():
    transformer = wan_transformer()
    expected = run(transformer)
    with apply_radial_attention(transformer, DENSE) as handle:
        assert torch.equal(run(transformer), expected)
        assert handle.report()["calls"] == {"dense": 4}
        assert handle.report()["density"] == 1.0


@pytest.mark.parametrize("fused", [False, True])
def test_density_one_is_dense(fused):
    transformer = wan_transformer()
    if fused:
        transformer.fuse_qkv_projections()
    expected = run(transformer)
    with apply_radial_attention(transformer, FULL, backend="blocks") as handle:
        torch.testing.assert_close(run(transformer), expected, atol=1e-5, rtol=0)
        assert handle.report()["calls"] == {"blocks": 4}
        assert handle.report()["density"] == 1.0


@pytest.mark.parametrize("backend", ["reference", "blocks"])
@pytest.mark.parametrize(
    "frames, height, width, batch", [(6, 12, 16, 1), (7, 10, 6, 3), (5, 22, 14, 2), (1, 6, 6, 1)]
)
def test_sparse_is_upstream_under_the_token_mask(backend, frames, height, width, batch):
    """Also token counts that are no multiple of the block, and a batch."""
    transformer = wan_transformer()
    inputs = wan_inputs(frames, height, width, batch=batch)
    expected = masked_upstream(transformer, TokenGrid(frames, height // 2, width // 2), **inputs)
    with apply_radial_attention(transformer, SPARSE, backend=backend):
        torch.testing.assert_close(run(transformer, **inputs), expected, atol=1e-5, rtol=0)


def test_sparse_differs_from_dense_and_reports_it():
    transformer = wan_transformer()
    expected = run(transformer)
    with apply_radial_attention(transformer, SPARSE) as handle:
        assert handle.report() | {"calls": None, "dense_backend": None} == {
            "grid": None,
            "density": None,
            "grids": [],
            "videos": 0,
            "steps": 0,
            "dense_steps": 0,
            "layers": 4,
            "dense_layers": 0,
            "calls": None,
            "quantize": None,
            "dense_backend": None,
            "check": {"mode": "off"},
        }
        assert (run(transformer) - expected).abs().max() > 1e-3
        report = handle.report()
    assert report["grid"] == [6, 6, 8] and report["density"] == radial_mask(GRID, SPARSE).density < 0.9
    assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 1, 0)


def test_positional_arguments():
    transformer = wan_transformer()
    inputs = wan_inputs()
    with torch.no_grad(), apply_radial_attention(transformer, SPARSE):
        assert torch.equal(transformer(*inputs.values()).sample, run(transformer))


def test_bfloat16():
    transformer = wan_transformer().to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in wan_inputs().items()}
    expected = masked_upstream(transformer, GRID, **inputs)
    with apply_radial_attention(transformer, SPARSE):
        found = run(transformer, **inputs)
    assert found.dtype == torch.bfloat16
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 4 * torch.finfo(torch.bfloat16).eps


def test_remove_restores_objects_and_hooks():
    transformer = wan_transformer()
    processors = dict(transformer.attn_processors)
    expected = run(transformer)
    handle = apply_radial_attention(transformer, SPARSE)
    run(transformer)
    handle.remove()
    handle.remove()
    assert all(transformer.attn_processors[name] is processor for name, processor in processors.items())
    assert all(vars(processor) == {} for processor in processors.values())
    assert not transformer._forward_pre_hooks and not transformer.rope._forward_hooks
    assert torch.equal(run(transformer), expected)


def test_cross_attention_is_untouched():
    transformer = wan_transformer()
    before = [block.attn2.processor for block in transformer.blocks]
    with apply_radial_attention(transformer, SPARSE):
        assert all(block.attn2.processor is p for block, p in zip(transformer.blocks, before, strict=True))


def test_applying_twice_is_an_error_until_removed():
    transformer = wan_transformer()
    handle = apply_radial_attention(transformer, SPARSE)
    with pytest.raises(
        ValueError, match=r"already applied to this WanTransformer3DModel; call remove\(\) first"
    ):
        apply_radial_attention(transformer, DENSE)
    handle.remove()
    apply_radial_attention(transformer, DENSE).remove()


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
    "change, message",
    [
        ({"backend": "flash"}, "backend must be one of auto, .*got 'flash'"),
        ({"dense_steps": -1}, "dense_steps must be a whole number of at least 0, got -1"),
        ({"dense_layers": 1.5}, "dense_layers must be a whole number of at least 0, got 1.5"),
        ({"dense_layers": 5}, "dense_layers must be at most 4, .*got 5"),
        ({"quantize": "int4"}, "quantize must be one of .*'int8', 'fp8'.*, got 'int4'"),
        ({"check": "all"}, "check must be one of auto, off, nan, reference, got 'all'"),
        ({"dense_last_steps": 1}, "dense_last_steps=1 needs the number of steps"),
    ],
)
def test_bad_arguments(change, message):
    transformer = wan_transformer()
    with pytest.raises(ValueError, match=message):
        apply_radial_attention(transformer, SPARSE, **change)
    assert not transformer._forward_pre_hooks


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match=r"transformer must be one of WanTransformer3DModel, .*got Linear"):
        apply_radial_attention(torch.nn.Linear(2, 2), SPARSE)
    with pytest.raises(ValueError, match="expected a transformer, or a pipeline that has one, got dict"):
        apply_radial_attention({}, SPARSE)


def test_config_must_be_a_config():
    with pytest.raises(ValueError, match="config must be a RadialConfig, got str"):
        apply_radial_attention(wan_transformer(), "radial")


def test_foreign_processor_is_an_error():
    transformer = wan_transformer()
    transformer.blocks[1].attn1.set_processor(ReferenceProcessor(torch.ones(1, 1, dtype=torch.bool)))
    with pytest.raises(
        ValueError, match="must be WanAttnProcessor, got ReferenceProcessor, WanAttnProcessor"
    ):
        apply_radial_attention(transformer, SPARSE)


def test_attention_backend_governs_the_dense_path_and_outlives_the_fork():
    transformer = wan_transformer()
    with apply_radial_attention(transformer, DENSE):
        transformer.set_attention_backend("flex")
        backends = {processor._attention_backend.value for processor in transformer.attn_processors.values()}
        assert backends == {"flex"}
        transformer.set_attention_backend("_native_math")
        inside = run(transformer)
    assert {processor._attention_backend.value for processor in transformer.attn_processors.values()} == {
        "_native_math"
    }
    assert torch.equal(run(transformer), inside)


def test_schedule_of_a_bare_transformer():
    """Falling timesteps are steps, an equal one the other guidance half, a higher one a new video."""
    transformer = wan_transformer()
    options = {"dense_steps": 1, "dense_last_steps": 1, "num_steps": 4}
    calls = [
        (1000, "dense"),
        (1000, "dense"),
        (900, "sparse"),
        (900, "sparse"),
        (500, "sparse"),
        (100, "dense"),
    ]
    dense = {timestep: run(transformer, **at(timestep)) for timestep, _ in calls}
    sparse = {timestep: masked_upstream(transformer, GRID, **at(timestep)) for timestep, _ in calls}
    with apply_radial_attention(transformer, SPARSE, **options) as handle:
        for timestep, kind in 2 * calls:
            expected = {"dense": dense, "sparse": sparse}[kind][timestep]
            torch.testing.assert_close(run(transformer, **at(timestep)), expected, atol=1e-5, rtol=0)
        report = handle.report()
    assert (report["videos"], report["steps"], report["dense_steps"]) == (2, 8, 4)
    assert report["calls"] == {"dense": 2 * 4 * 3, AUTO: 2 * 4 * 3}


def test_dense_steps_and_layers_in_the_output():
    transformer = wan_transformer()
    dense, sparse = run(transformer, **at(999)), masked_upstream(transformer, GRID, slice(1, None), **at(500))
    with apply_radial_attention(transformer, SPARSE, dense_steps=1, dense_layers=1) as handle:
        assert torch.equal(run(transformer, **at(999)), dense)
        torch.testing.assert_close(run(transformer, **at(500)), sparse, atol=1e-5, rtol=0)
        report = handle.report()
    assert report["dense_layers"] == 1 and report["calls"] == {"dense": 4 + 1, AUTO: 3}


def test_all_layers_dense_is_upstream():
    transformer = wan_transformer()
    expected = run(transformer)
    with apply_radial_attention(transformer, SPARSE, dense_layers=4) as handle:
        assert torch.equal(run(transformer), expected)
        assert handle.report()["calls"] == {"dense": 4}


def test_one_timestep_per_token():
    """Wan2.2 TI2V-5B: the first frame is clean (0), the rest at the step's time."""
    transformer = wan_transformer()
    tokens = torch.full((1, GRID.tokens), 700.0)
    tokens[:, : GRID.tokens_per_frame] = 0
    expected = masked_upstream(transformer, GRID, timestep=tokens)
    with apply_radial_attention(transformer, SPARSE, dense_steps=1) as handle:
        run(transformer, timestep=tokens + 200)
        torch.testing.assert_close(run(transformer, timestep=tokens), expected, atol=1e-5, rtol=0)
        assert handle.report()["steps"] == 2
