"""The forks of every family against upstream, on tiny random transformers."""

import itertools

import pytest
import torch

from radial_attn import radial_mask
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.output_check import CheckError
from tests.support.auto_backend import AUTO
from tests.support.failing_kernel import fail, one_nan, twice
from tests.support.families import (
    BY_NAME,
    DENSE,
    FAMILIES,
    FULL,
    SPARSE,
    assert_near,
    families,
    masked_upstream,
    run,
    with_text,
)

SIZES = [(6, 6, 8), (7, 5, 3), (5, 11, 7), (1, 3, 3)]
CASES = [(family, samples) for family in FAMILIES for samples in family.samples]


@pytest.mark.parametrize(("family", "samples"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_dense_is_upstream_and_density_one_is_dense(family, samples):
    """Includes batches, and padded text whose length differs between samples."""
    transformer, inputs = family.transformer(), family.sized(**samples)
    expected = run(transformer, inputs)
    for options in (
        {"config": DENSE},
        {"config": SPARSE, "dense_steps": 1},
        {"config": SPARSE, "dense_layers": 4},
    ):
        with apply_radial_attention(transformer, **options) as handle:
            assert torch.equal(run(transformer, inputs), expected)
            report = handle.report()
        assert report["calls"] == {"dense": family.layers}
        assert (report["density"] == 1.0) is (options["config"] is DENSE)
    for backend in ("blocks", "reference"):
        with apply_radial_attention(transformer, FULL, backend=backend) as handle:
            assert_near(run(transformer, inputs), expected)
            report = handle.report()
        assert (report["density"], report["grid"]) == (1.0, [6, 6, 8])
        assert report["calls"] == {backend: family.layers}


@families
@pytest.mark.parametrize("backend", ["reference", "blocks"])
def test_sparse_is_upstream_under_the_token_mask(family, backend):
    """Changes the size between calls; includes token counts that no block divides, batches, padded text."""
    transformer, samples = family.transformer(), itertools.cycle(family.samples)
    sizes = [(max(family.fewest, frames), *others) for frames, *others in SIZES]
    calls = [(size, family.sized(*size, **next(samples))) for size in sizes]
    expected = [masked_upstream(family, transformer, inputs, size) for size, inputs in calls]
    dense = run(transformer, calls[0][1])
    with apply_radial_attention(transformer, SPARSE, backend=backend, check="reference") as handle:
        for (_, inputs), output in zip(calls, expected, strict=True):
            assert_near(run(transformer, inputs), output)
        report = handle.report()
    assert [entry["grid"] for entry in report["grids"]] == [list(size) for size in sizes]
    assert report["grids"][0]["density"] == radial_mask(family.grid(), SPARSE).density < 0.9
    assert report["layers"] == family.layers and (expected[0] - dense).abs().max() > 1e-3


@with_text
def test_padding_changes_nothing(family):
    """A sample alone, without its padding, is what it is in a batch."""
    transformer, inputs = family.transformer(), family.sized(lengths=(4, 6))
    changed = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    for sample, length in enumerate((4, 6)):
        changed["encoder_hidden_states"][sample, length:] = 100.0
    alone = {name: value[:1] for name, value in inputs.items()}
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        alone[name] = alone[name][:, :4]
    for config in (FULL, SPARSE):
        with apply_radial_attention(transformer, config, backend="blocks"):
            actual = run(transformer, inputs)
            assert torch.equal(run(transformer, changed), actual)
            if config is FULL:  # text that is shorter moves the blocks of a mask
                assert_near(run(transformer, alone), actual[:1])


@pytest.mark.parametrize("name", ["hunyuan_video", "mochi"])
def test_text_that_does_not_come_first_is_an_error(name):
    """HunyuanVideo 1.5 sorts its text."""
    family = BY_NAME[name]
    transformer, inputs = family.transformer(), family.sized(lengths=(4,))
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
    with (
        apply_radial_attention(transformer, SPARSE),
        pytest.raises(ValueError, match=r"valid text tokens must come first, got a mask \["),
    ):
        run(transformer, inputs)


@families
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(family, autocast):
    transformer, inputs = family.transformer(), family.sized(**family.samples[-1])
    if not autocast:
        transformer.to(torch.bfloat16)
        for name, module in transformer.named_modules():  # as `from_pretrained` loads them
            if set(name.split(".")) & set(transformer._keep_in_fp32_modules or ()):
                module.float()
        floats = {name: x for name, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()}
        inputs |= {name: x.to(torch.bfloat16) for name, x in floats.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = masked_upstream(family, transformer, inputs)
        with apply_radial_attention(transformer, SPARSE):
            actual = run(transformer, inputs)
    kept = "proj_out" in (transformer._keep_in_fp32_modules or ())  # MiniMax-H3 ends in float32
    assert actual.dtype == expected.dtype
    assert autocast or actual.dtype == (torch.float32 if kept else torch.bfloat16)
    assert (actual - expected).abs().max() / expected.abs().max() < 4 * torch.finfo(torch.bfloat16).eps


@families
@pytest.mark.parametrize("option", ["check", "observe"])
def test_remove_restores_objects_and_hooks(family, option):
    """Cross-attention and the refiner of text are never touched; a second application is refused."""
    transformer, inputs, seen = family.transformer(), family.sized(**family.samples[-1]), []
    ours = family.fork.attention_layers(transformer)

    def processors() -> dict:
        return {layer: layer.processor for layer in transformer.modules() if hasattr(layer, "processor")}

    before, expected = processors(), run(transformer, inputs)
    options = {"check": {"check": "nan"}, "observe": {"observe": seen.append}}[option]
    handle = apply_radial_attention(transformer, SPARSE, **options)
    changed = {layer for layer, processor in processors().items() if processor is not before[layer]}
    assert changed == set(ours) and len(ours) == family.layers
    run(transformer, inputs)
    count = len(seen)
    with pytest.raises(ValueError, match=r"already applied to this \w+; call remove\(\) first"):
        apply_radial_attention(transformer, DENSE)
    handle.remove()
    handle.remove()
    assert torch.equal(run(transformer, inputs), expected)
    assert len(seen) == count and (count > 0) == (option == "observe")
    assert processors() == before and all(vars(layer.processor) == {} for layer in ours)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
    apply_radial_attention(transformer, DENSE).remove()


@families
@pytest.mark.parametrize("dense_layers", [1, 3])
def test_schedule_in_the_outputs(family, dense_layers):
    """A later timestep is the next step, an equal one the other guidance half, an earlier one a new video."""
    transformer, times = family.transformer(), [1000, 1000, 900, 900, 500, 100]
    if family.rises:
        times = [0, 0, 100, 100, 500, 900]
    text = {"lengths": (4,)} if family.padded else {}
    calls = [family.sized(timestep=float(time), **text) for time in times]
    expected = [masked_upstream(family, transformer, inputs, dense_layers=dense_layers) for inputs in calls]
    for step in (0, 1, -1):
        expected[step] = run(transformer, calls[step])
    options = {"dense_steps": 1, "dense_last_steps": 1, "num_steps": 4, "dense_layers": dense_layers}
    with apply_radial_attention(transformer, SPARSE, **options) as handle:
        for inputs, output in zip(2 * calls, 2 * expected, strict=True):
            assert_near(run(transformer, inputs), output)
        report = handle.report()
    dense = sum(number < dense_layers for number in family.feeds)
    sparse = family.layers - dense
    assert (report["videos"], report["steps"], report["dense_steps"]) == (2, 8, 4)
    assert report["dense_layers"] == dense
    assert report["calls"] == {"dense": 2 * 3 * (family.layers + dense), AUTO: 2 * 3 * sparse}


@families
def test_reference_check_finds_no_error(family):
    """Rows of padded text are zeros in the definition too."""
    transformer, (first, *_, last) = family.transformer(), family.samples
    with apply_radial_attention(transformer, SPARSE, check="reference", dense_layers=1) as handle:
        for size, samples in (((6, 6, 8), last), ((5, 3, 7), first), ((6, 6, 8), first)):
            run(transformer, family.sized(*size, **samples))
        report = handle.report()
    assert report["check"]["compared"] == 2 * (report["layers"] - report["dense_layers"])
    assert report["check"]["worst"]["relative_l2"] < 1e-6


@families
@pytest.mark.parametrize(
    ("check", "how", "fault", "dense_layers"),
    [("nan", one_nan, "non-finite", 0), ("reference", twice, "wrong", 1)],
)
def test_the_check_names_each_layer(family, check, how, fault, dense_layers):
    """Control layers run first, and the single blocks follow the double ones; dense layers count too."""
    control = family.layers - 4
    layers = [f"control layer {number}" for number in range(control)] + [f"layer {n}" for n in range(4)]
    names = [name for name, feeds in zip(layers, family.feeds, strict=True) if feeds >= dense_layers]
    transformer, inputs = family.transformer(), family.sized(**family.samples[-1])
    options = {"check": check, "dense_layers": dense_layers}
    for call, name in enumerate(names):
        message = f"^{fault} attention output in {name} at step 1, float32, backend {AUTO}"
        with pytest.MonkeyPatch.context() as patch, apply_radial_attention(transformer, SPARSE, **options):
            fail(patch, call, how)
            with pytest.raises(CheckError, match=message):
                run(transformer, inputs)
