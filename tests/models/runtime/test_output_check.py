"""The output check: a kernel that is made to fail stops the run with one line, compiled or not."""

import itertools
import logging
from functools import partial

import pytest
import torch

from radial_attn import RadialConfig
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime import layer_attention
from radial_attn.models.runtime.output_check import CheckError, resolve_check
from tests.support.auto_backend import AUTO, automatic
from tests.support.failing_kernel import fail, one_nan, twice
from tests.support.families import (
    BY_NAME,
    SPARSE,
    assert_near,
    assert_same_gradients,
    families,
    gradients,
    run,
)
from tests.support.families import video as family_video
from tests.support.long import all_but
from tests.support.pipelines import generate
from tests.support.tiny import wan_inputs, wan_pipeline, wan_transformer

OPTIONS = {"dense_steps": 1, "dense_layers": 1, "dense_last_steps": 1, "num_steps": 4}
video = partial(family_video, BY_NAME["wan"], frames=4, height=4, width=6)
RADIAL_CALLS = 2 * 2  # in a radial step: two of three layers, two guidance halves


def compile_blocks(transformer, backend="aot_eager"):
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    return transformer


def compile_whole(transformer):
    torch._dynamo.reset()
    return torch.compile(transformer, backend="eager")


slow = pytest.param(compile_whole, marks=pytest.mark.long)
ways = pytest.mark.parametrize("prepare", [lambda x: x, compile_blocks, slow])


@ways
def test_the_first_output_that_is_not_finite_stops_the_call(prepare, monkeypatch):
    """The fault is in layer 2 of the second half of step 3; steps 1 and 4 and layer 0 are dense."""
    transformer = prepare(wan_transformer(num_layers=3))
    fail(monkeypatch, RADIAL_CALLS + 2 + 1, one_nan)
    message = f"non-finite attention output in layer 2 at step 3 of 4, float32, backend {AUTO}"
    with apply_radial_attention(transformer, SPARSE, check="nan", **OPTIONS) as handle:
        with pytest.raises(CheckError) as raised:
            video(transformer)
        assert str(raised.value).startswith(message) and "try another backend" in str(raised.value)
        assert handle.report()["steps"] == 3
        assert torch.isfinite(video(transformer)).all()  # the kernel fails once


@pytest.mark.parametrize("prepare", [lambda x: x, compile_whole])
def test_the_check_changes_nothing_and_leaves_no_trace(prepare):
    """Compiled blocks are in tests/models/training/test_training.py, which counts their graphs."""
    transformer, options = wan_transformer(num_layers=1), OPTIONS | {"dense_layers": 0}
    with apply_radial_attention(transformer, SPARSE, **options):
        expected = video(transformer)
    for check in ("nan", "reference"):
        with apply_radial_attention(transformer, SPARSE, check=check, **options):
            actual = video(prepare(transformer))
        assert_near(actual, expected)
        assert not transformer._forward_hooks and not transformer._forward_pre_hooks
        assert all(vars(block.attn1.processor) == {} for block in transformer.blocks)


@pytest.mark.parametrize(
    ("prepare", "dtype"),
    [
        (lambda x: x, torch.float32),
        (lambda x: x, torch.bfloat16),
        pytest.param(partial(compile_blocks, backend="eager"), torch.float32, marks=pytest.mark.long),
    ],
)
def test_reference_compares_each_layer_once_for_each_size(prepare, dtype, caplog):
    transformer = wan_transformer().to(dtype)
    caplog.set_level(logging.INFO, logger="radial_attn")
    sizes = ((6, 12, 16), (4, 8, 10))
    with apply_radial_attention(transformer, SPARSE, check="reference", dense_layers=1) as handle:
        assert handle.report()["check"] == {"mode": "reference"}
        prepared = prepare(transformer)
        for size in (*sizes, *sizes):
            run(prepared, {name: value.to(dtype) for name, value in wan_inputs(*size).items()})
        report = handle.report()["check"]
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("check")]
    backend = automatic(dtype)
    starts = [f"check layer {layer}: {backend} against reference: relative L2 " for layer in (1, 2, 3)]
    assert len(lines) == 6 and all(map(str.startswith, lines, 2 * starts)), lines
    assert report["mode"] == "reference" and report["compared"] == 6
    worst = report["worst"]
    assert worst["where"] in {"layer 1", "layer 2", "layer 3"}
    assert worst["relative_l2"] < 4 * torch.finfo(dtype).eps and worst["cosine"] > 0.9999


@ways
def test_reference_stops_at_a_wrong_output(prepare, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="radial_attn")
    transformer, inputs = prepare(wan_transformer(num_layers=3)), wan_inputs(4, 8, 12)
    fail(monkeypatch, 1, twice)
    message = (
        rf"wrong attention output in layer 1 at step 1, float32, backend {AUTO}: relative L2 1\.00e\+00, "
    )
    with apply_radial_attention(transformer, SPARSE, check="reference"):
        with pytest.raises(CheckError, match=message) as raised:
            run(transformer, inputs)
        assert "\n" not in str(raised.value) and "relative L2 0.2; try another backend" in str(raised.value)
    assert sum(record.getMessage().startswith("check layer") for record in caplog.records) == 3


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
@pytest.mark.parametrize("far_field", ["none", "mean", "linear"])
@pytest.mark.parametrize("selection", ["static", "dense_step"])
def test_reference_knows_the_far_field_and_the_mask_of_each_head(name, far_field, selection, monkeypatch):
    """The samples of a batch have masks of their own; an error of the first one is not lost."""
    family, attention = BY_NAME[name], layer_attention.radial_attention
    transformer = family.transformer()
    config = SPARSE if selection == "static" else RadialConfig(block_size=16, density=0.9)
    options = {"far_field": far_field, "selection": selection, "dense_steps": 1, "num_steps": 2}
    calls = [family.sized(timestep=time, **family.samples[-1]) for time in (900.0, 100.0)]
    with apply_radial_attention(transformer, config, check="reference", residual="int8", **options) as handle:
        [run(transformer, call) for call in calls]
        report = handle.report()
    assert report["check"]["compared"] == family.layers and report["calls"][AUTO] == family.layers
    assert report["check"]["worst"]["relative_l2"] < 4e-6
    counts = itertools.count()

    def wrong_once(*args: object, **kwargs: object) -> torch.Tensor:
        output = attention(*args, **kwargs)
        return 2 * output if next(counts) == 0 else output

    with (
        apply_radial_attention(transformer, config, check="reference", **options),
        pytest.raises(CheckError, match=f"in layer 0 at step 2 of 2, float32, backend {AUTO}: relative L2 1"),
    ):
        run(transformer, calls[0])
        monkeypatch.setattr(layer_attention, "radial_attention", wrong_once)
        run(transformer, calls[1])


def test_reference_stops_at_an_output_that_is_not_finite_in_any_step(monkeypatch):
    transformer = wan_transformer(num_layers=3)
    fail(monkeypatch, RADIAL_CALLS + 1, one_nan)
    message = "non-finite attention output in layer 2 at step 3 of 4"
    with (
        apply_radial_attention(transformer, SPARSE, check="reference", **OPTIONS),
        pytest.raises(CheckError, match=message),
    ):
        video(transformer)


def test_off_lets_everything_pass(monkeypatch):
    fail(monkeypatch, 0, one_nan)
    with apply_radial_attention(wan_transformer(), SPARSE, check="auto") as handle:
        assert handle.report()["check"] == {"mode": "off"}
    transformer = wan_transformer()
    with apply_radial_attention(transformer, SPARSE):
        assert not torch.isfinite(run(transformer)).all()


def test_auto_watches_over_quantised_kernels():
    assert resolve_check("auto", None, "blocks", "auto") == "off"
    assert resolve_check("auto", "int8", "auto", "auto") == resolve_check("auto", None, "sage") == "nan"
    assert resolve_check("auto", None, "blocks", "sage") == "nan"
    assert resolve_check("off", "fp8", "sage") == "off"


@pytest.mark.parametrize("check", ["off", "nan", "reference"])
@pytest.mark.parametrize("compiled", all_but([False], [False, True]))
def test_gradients_under_the_check(check, compiled):
    transformer = wan_transformer(num_layers=2).train()
    with apply_radial_attention(transformer, SPARSE):
        expected = gradients(transformer)
    if compiled:
        compile_blocks(transformer)
    for checkpointing in (False, True):
        with apply_radial_attention(transformer, SPARSE, check=check):
            if checkpointing:
                transformer.enable_gradient_checkpointing()
            assert_same_gradients(gradients(transformer), expected)


def test_inference_mode_leaves_notes_that_training_can_use():
    transformer = wan_transformer()
    with apply_radial_attention(transformer, SPARSE, check="reference"):
        with torch.inference_mode():
            run(transformer)
        assert gradients(transformer)


def test_the_second_transformer_is_named(monkeypatch):
    pipeline = wan_pipeline(experts=2)
    fail(monkeypatch, 5 * 4 + 1, one_nan)
    message = f"in layer 1 of transformer_2 at step 6 of 6, float32, backend {AUTO}"
    with apply_radial_attention(pipeline, SPARSE, check="nan"), pytest.raises(CheckError, match=message):
        generate(pipeline, steps=6)


def spoil(module):
    """Makes one weight of a module NaN."""
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = torch.nan


@families
@pytest.mark.parametrize("dense_steps", [0, 9])
def test_the_place_is_named(family, dense_steps):
    """Faults before the second layer, in it, behind it and after the last one, in radial and dense steps."""
    attention = "non-finite attention output in {} at step 1, float32, backend "
    projection = "non-finite values after the output projection of {} at"
    messages = {
        "before": "non-finite values before the attention of {} at step 1, float32; check the weights",
        "value": attention + ("dense" if dense_steps else AUTO),
        "projection": attention + "dense" if dense_steps else projection,
        "last": "non-finite values after the last layer at step 1",
    }
    for place, message in messages.items():
        transformer = family.transformer()
        first = family.fork.stacks(transformer)[0][0]
        layer = family.fork.attention_layers(transformer)[1]
        parent, names = {
            "before": (first, ("ffn", "ff", "feed_forward")),
            "value": (layer, ("to_v", "to_value")),
            "projection": (layer, ("to_out", "out_layer")),
            "last": (transformer, ("proj_out", "out_layer")),
        }[place]
        spoil(next(getattr(parent, name) for name in names if hasattr(parent, name)))
        name = "control layer 1" if family.name == "wan_vace" else "layer 1"
        with (
            apply_radial_attention(transformer, SPARSE, check="nan", dense_steps=dense_steps),
            pytest.raises(CheckError, match=message.format(name)),
        ):
            run(transformer, family.sized())


@families
@pytest.mark.parametrize("name", ["hidden_states", "encoder_hidden_states"])
def test_an_input_that_is_not_finite_is_named(family, name):
    inputs, transformer = family.sized(), family.transformer()
    inputs[name] = inputs[name].clone(memory_format=torch.contiguous_format)
    inputs[name].view(-1)[0] = torch.inf
    message = (
        f"non-finite values in {name}, an input of the transformer, at step 1, float32; check what makes it"
    )
    with apply_radial_attention(transformer, SPARSE, check="nan"):
        with pytest.raises(CheckError, match=message):
            run(transformer, inputs)
        run(transformer, family.sized())
