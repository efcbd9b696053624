"""The forks of Mochi, Wan-VACE and LTX-Video against upstream, on tiny random transformers."""

import pytest
import torch

from radial_attn import radial_mask
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.output_check import CheckError
from tests.support.auto_backend import AUTO
from tests.support.failing_kernel import fail, one_nan
from tests.support.families import DENSE, FAMILIES, FULL, SPARSE, masked_upstream, run

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
SIZES = [(6, 6, 8, 1), (7, 5, 3, 3), (5, 11, 7, 2), (1, 3, 3, 1)]


@families
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_is_upstream(family, batch):
    transformer, inputs = family.transformer(), family.sized(batch=batch)
    expected = run(transformer, inputs)
    for options in (
        {"config": DENSE},
        {"config": SPARSE, "dense_steps": 1},
        {"config": SPARSE, "dense_layers": 4},
    ):
        with apply_radial_attention(transformer, **options) as handle:
            assert torch.equal(run(transformer, inputs), expected)
            assert handle.report()["calls"] == {"dense": family.layers}


@families
@pytest.mark.parametrize("batch", [1, 3])
def test_density_one_is_dense(family, batch):
    transformer, inputs = family.transformer(), family.sized(batch=batch)
    expected = run(transformer, inputs)
    with apply_radial_attention(transformer, FULL, backend="blocks") as handle:
        torch.testing.assert_close(run(transformer, inputs), expected, atol=1e-5, rtol=0)
        assert handle.report()["calls"] == {"blocks": family.layers}
        assert handle.report()["density"] == 1.0


@families
@pytest.mark.parametrize("backend", ["reference", "blocks"])
def test_sparse_is_upstream_under_the_token_mask(family, backend):
    """Sizes that follow one another in one process, token counts that no block divides, a batch."""
    transformer = family.transformer()
    expected = [
        masked_upstream(transformer, family.grid(*size), family.sized(*size, batch=batch))
        for *size, batch in SIZES
    ]
    with apply_radial_attention(transformer, SPARSE, backend=backend) as handle:
        for (*size, batch), output in zip(SIZES, expected, strict=True):
            torch.testing.assert_close(
                run(transformer, family.sized(*size, batch=batch)), output, atol=1e-5, rtol=0
            )
        assert [entry["grid"] for entry in handle.report()["grids"]] == [size for *size, _ in SIZES]


@families
def test_sparse_differs_from_dense_and_reports_it(family):
    transformer, inputs = family.transformer(), family.sized()
    expected = run(transformer, inputs)
    with apply_radial_attention(transformer, SPARSE) as handle:
        assert (run(transformer, inputs) - expected).abs().max() > 1e-3
        report = handle.report()
    assert report["grid"] == [6, 6, 8] and report["layers"] == family.layers
    assert report["density"] == radial_mask(family.grid(), SPARSE).density < 0.9


@families
def test_bfloat16(family):
    transformer = family.transformer().to(torch.bfloat16)
    inputs = {
        name: value.to(torch.bfloat16) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in family.sized().items()
    }
    expected = masked_upstream(transformer, family.grid(), inputs)
    with apply_radial_attention(transformer, SPARSE):
        found = run(transformer, inputs)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() / expected.abs().max() < 4 * torch.finfo(torch.bfloat16).eps


@families
def test_autocast(family):
    transformer, inputs = family.transformer(), family.sized(batch=2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = masked_upstream(transformer, family.grid(), inputs)
        with apply_radial_attention(transformer, SPARSE):
            found = run(transformer, inputs)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() / expected.abs().max() < 4 * torch.finfo(torch.bfloat16).eps


@families
def test_remove_restores_objects_and_hooks(family):
    transformer, inputs = family.transformer(), family.sized()
    before = [attention.processor for attention in family.fork.attention_layers(transformer)]
    expected = run(transformer, inputs)
    handle = apply_radial_attention(transformer, SPARSE, check="nan")
    run(transformer, inputs)
    handle.remove()
    handle.remove()
    after = [attention.processor for attention in family.fork.attention_layers(transformer)]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert all(vars(processor) == {} for processor in after)
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks
    assert not transformer.rope._forward_hooks
    assert torch.equal(run(transformer, inputs), expected)


@families
def test_applying_twice_is_an_error(family):
    transformer = family.transformer()
    with apply_radial_attention(transformer, SPARSE), pytest.raises(ValueError, match="already applied"):
        apply_radial_attention(transformer, SPARSE)


@families
def test_guidance_and_steps(family):
    """An equal timestep is the other guidance half; Mochi's timesteps rise."""
    transformer = family.transformer()
    timesteps = [0, 0, 100, 500] if family.name == "mochi" else [1000, 1000, 900, 500]
    with apply_radial_attention(
        transformer, SPARSE, dense_steps=1, dense_last_steps=1, num_steps=3
    ) as handle:
        for timestep in 2 * timesteps:
            run(transformer, family.sized(2, 2, 2, timestep=float(timestep)))
        report = handle.report()
    assert (report["videos"], report["steps"], report["dense_steps"]) == (2, 6, 4)


@families
@pytest.mark.parametrize("batch", [1, 2])
def test_reference_check_finds_no_error(family, batch):
    transformer = family.transformer()
    with apply_radial_attention(transformer, SPARSE, check="reference", dense_layers=1) as handle:
        for size in ((6, 6, 8), (5, 3, 7), (6, 6, 8)):
            run(transformer, family.sized(*size, batch=batch))
        report = handle.report()
    assert report["check"]["compared"] == 2 * (report["layers"] - report["dense_layers"])
    assert report["check"]["worst"]["relative_l2"] < 1e-6


@families
def test_the_guard_names_the_layer(family, monkeypatch):
    transformer = family.transformer()
    fail(monkeypatch, 3, one_nan)
    names = {"wan_vace": "layer 1", "mochi": "layer 3", "ltx": "layer 3"}
    message = rf"non-finite attention output in {names[family.name]} at step 1, float32, backend {AUTO}"
    with apply_radial_attention(transformer, SPARSE, check="nan"), pytest.raises(CheckError, match=message):
        run(transformer, family.sized())
