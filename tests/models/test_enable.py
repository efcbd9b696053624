"""One line for a pipeline: it runs as with its settings spelled out, refuses with a reason, is taken back."""

import copy
import gc
import inspect
import pickle
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.models.apply import HANDLE, apply_radial_attention
from radial_attn.models.enable import disable, enable
from radial_attn.models.published import nearest_settings, traits_of
from radial_attn.models.runtime.schedule import Schedule
from tests.support.families import run
from tests.support.pipelines import KINDS, generate
from tests.support.tiny import quiet, wan_inputs, wan_pipeline
from tests.support.tiny_hunyuan import hunyuan15_inputs, hunyuan15_transformer
from tests.support.tiny_ltx import ltx_pipeline

SMALL = {"block_size": 16, "decimation_width": 64, "decay_factor": 0.25}
TWINS = {"wan-ti2v-image", "vace-a14b", "vace-reference", "hunyuan_video-i2v"}  # of others, to `enable`


@pytest.mark.parametrize("name", sorted(set(KINDS) - TWINS))
def test_equals_apply_with_the_same_settings_and_leaves_nothing(name):
    kind = KINDS[name]
    pipeline = kind.make()
    dense = kind.generate(pipeline)
    experts = getattr(pipeline, "transformer_2", None) is not None
    settings = nearest_settings(traits_of(pipeline.transformer, experts=experts))
    options = {"dense_steps": round(settings.dense_share * 3), "dense_layers": settings.dense_layers}
    with apply_radial_attention(pipeline, replace(settings.config, **SMALL), **options) as handle:
        expected, report = kind.generate(pipeline), handle.report()
    handle = enable(pipeline, quiet=True, **SMALL)
    assert torch.equal(kind.generate(pipeline), expected)
    assert handle.report() == report and report["density"] < 1
    assert (expected - dense).abs().max() > 1e-4
    assert disable(pipeline)
    assert torch.equal(kind.generate(pipeline), dense)
    assert not disable(pipeline)


@pytest.mark.parametrize("name", ["wan-a14b", "hunyuan_video", "mochi", "ltx"])
def test_dense_steps_follow_the_steps_of_each_run(name):
    """Uses 0.24, the paper's share (12 of 50); an int stays as it is."""
    kind = KINDS[name]
    pipeline = kind.make()
    with enable(pipeline, quiet=True, dense_steps=12 / 50, **SMALL) as handle:
        counts = []
        for steps in (4, 8, 13):
            kind.generate(pipeline, steps)
            counts.append(handle.report()["dense_steps"])
        assert np.diff(counts, prepend=0).tolist() == [1, 2, 3]
    with enable(pipeline, quiet=True, dense_steps=3, **SMALL) as handle:
        kind.generate(pipeline, 8)
        assert handle.report()["dense_steps"] == 3


def test_more_dense_steps_than_the_run_has(caplog):
    """As many are allowed, with a warning; a run that is dense by its pattern needs none."""
    pipeline = wan_pipeline()
    with enable(pipeline, quiet=True, dense_steps=12, **SMALL) as handle:
        with pytest.raises(ValueError, match="dense_steps must be at most 8, the steps of this run, got 12"):
            generate(pipeline, 8)
        assert not caplog.records and not handle.report()["calls"]
    for options, warned in (({"dense_steps": 2, "dense_last_steps": 1}, 1), ({"pattern": "dense"}, 0)):
        with enable(pipeline, quiet=True, **options, **SMALL):
            generate(pipeline, 3)
        assert sum("all 3 steps of this run are dense" in x.getMessage() for x in caplog.records) == warned
        caplog.clear()


def test_published_share_of_a_family_without_a_small_row():
    pipeline = ltx_pipeline()
    with enable(pipeline, quiet=True) as handle:
        KINDS["ltx"].generate(pipeline, 8)
        assert handle.report()["dense_steps"] == 2


def test_shares_in_a_schedule():
    schedule = Schedule(dense_steps=12 / 50, dense_last_steps=1)
    assert [schedule.leading_steps(steps) for steps in (1, 2, 3, 4, 8, 30, 50)] == [0, 0, 1, 1, 2, 7, 12]
    assert [schedule.is_dense(step, 8) for step in range(8)] == [True, True, *[False] * 5, True]
    assert Schedule(dense_steps=0.5, num_steps=6).leading_steps(50) == 3
    with pytest.raises(ValueError, match=r"dense_steps=0\.24 .*num_steps=None: give num_steps"):
        schedule.is_dense(0, None)


def test_a_transformer_alone():
    transformer, inputs = hunyuan15_transformer(), hunyuan15_inputs()
    expected = run(transformer, inputs)
    with enable(transformer, num_steps=4, quiet=True, dense_layers=0, **SMALL) as handle:
        assert torch.equal(run(transformer, inputs), expected)
        assert (run(transformer, hunyuan15_inputs(timestep=400.0)) - expected).abs().max() > 1e-3
        assert (handle.report()["steps"], handle.report()["dense_steps"]) == (2, 1)
    assert torch.equal(run(transformer, inputs), expected)


def test_every_option_of_apply_and_of_the_mask_is_a_keyword():
    options = {*inspect.signature(apply_radial_attention).parameters} - {"model", "config", "density_range"}
    options |= {field.name for field in fields(RadialConfig)}
    extra = {"model", "quiet", "unknown"}
    assert {*inspect.signature(enable).parameters} == options | extra


def test_options_arrive():
    pipeline, seen = wan_pipeline(), []
    options = {"density": 0.5833, "backend": "reference", "quantize": "int8", "check": "nan"}
    options |= {"dense_last_steps": 1, "dense_layers": 2, "observe": seen.append}
    with enable(pipeline, quiet=True, **options) as handle:
        generate(pipeline, 2)
        report = handle.report()
    assert report["density"] == pytest.approx(0.5833, rel=0.02) and report["quantize"] == "int8"
    assert report["dense_steps"] == 1 and report["dense_layers"] == 2 and report["check"]["mode"] == "nan"
    assert set(report["calls"]) == {"dense", "reference"} and seen


def test_the_mask_of_another_program(capsys):
    """The decay factor of the authors' programs depends on the model; the others have one of their own."""
    pipeline, size = wan_pipeline(), {"height": 64, "width": 128}
    for name, decay_factor in (("authors-2025-06", 0.5), ("woct0rdho", 0.2)):
        with enable(pipeline, compat=name, block_size=64, dense_steps=0) as handle:
            generate(pipeline, 1, **size)
            (grid,) = handle.report()["grids"]
        config = RadialConfig(decay_factor, 64, compat=name)
        assert grid["density"] == radial_mask(TokenGrid(*grid["grid"]), config).density
        line = capsys.readouterr().out.splitlines()[0]
        assert f"decay_factor={decay_factor}, block_size=64, compat={name}, backend=auto" in line


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"blok_size": 16}, TypeError, "enable has no option 'blok_size'; did you mean 'block_size'?"),
        ({"zzz": 1}, TypeError, "enable has no option 'zzz'; allowed: density, decay_factor, "),
        ({"density": 0.3, "decay_factor": 1.0}, ValueError, "density and decay_factor exclude each other"),
        (
            {"density": 1.5},
            ValueError,
            "density must be a number above 0 up to 1, or {start: 0.4, end: 0.15}, got 1.5",
        ),
        ({"decay_factor": -1}, ValueError, "decay_factor must be a finite number above 0, got -1"),
        ({"block_size": 100}, ValueError, "block_size must be one of"),
        ({"neighbour": "quarter"}, ValueError, "neighbour must be one of"),
        ({"pattern": "spiral"}, ValueError, "pattern must be one of"),
        (
            {"dense_steps": -1},
            ValueError,
            "dense_steps must be a number of first steps, a share such as 20%,",
        ),
        (
            {"dense_steps": "sigma>2"},
            ValueError,
            "or a list of steps from 0 such as [0, 1, 10], got 'sigma>2'",
        ),
        ({"density": {"start": 0.4}}, ValueError, "or {start: 0.4, end: 0.15}, got {'start': 0.4}"),
        (
            {"selection": "auto"},
            ValueError,
            "selection must be one of static, dense_step, profile, got 'auto'",
        ),
        ({"dense_layers": 5}, ValueError, "dense_layers must be at most 4"),
        ({"num_steps": 2.5}, ValueError, "num_steps must be a whole number of at least 0, got 2.5"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, "),
        ({"quantize": "int4"}, ValueError, "quantize must be one of (None, 'int8', 'fp8'), got 'int4'"),
        ({"check": "yes"}, ValueError, "check must be one of auto, off, nan, reference, got 'yes'"),
        ({"compat": "theirs"}, ValueError, "compat must be one of ('none', 'authors-2025-06', "),
        ({"compat": "kijai", "sink": True}, ValueError, "sink must be left out with compat='kijai'"),
        (
            {"compat": "kijai", "density": {"start": 0.4, "end": 0.2}},
            ValueError,
            "density must be left out with compat='kijai', got (0.4, 0.2)",
        ),
    ],
)
def test_wrong_options_change_nothing(options, error, message, capsys):
    pipeline = wan_pipeline()
    with pytest.raises(error) as caught:
        enable(pipeline, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == "" and not disable(pipeline)
    assert not pipeline.transformer._forward_pre_hooks and HANDLE not in vars(pipeline.transformer)


@pytest.mark.parametrize("model", ["Wan-AI/Wan2.1-T2V-14B-Diffusers", None, 3, {"transformer": 1}])
def test_what_is_no_model(model):
    for call in (enable, disable):
        with pytest.raises(ValueError, match="expected a transformer, or a pipeline that has one, got"):
            call(model)


def test_unsupported_families():
    flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2)
    for model in (flux, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=rf"must be one of Wan.*, got {type(model).__name__}"):
            enable(model)


def test_a_transformer_alone_needs_its_steps():
    transformer = hunyuan15_transformer()
    with pytest.raises(ValueError, match=r"dense_steps=0\.24 .*num_steps=None: give num_steps"):
        enable(transformer)
    with enable(transformer, dense_steps=2, quiet=True), pytest.raises(ValueError, match="already applied"):
        enable(transformer, dense_steps=2)


def test_the_second_enable_is_refused_until_the_first_is_taken_back():
    pipeline = wan_pipeline(experts=2)
    first = enable(pipeline, quiet=True)
    with pytest.raises(ValueError, match=r"already applied to this WanTransformer3DModel; call remove\(\)"):
        enable(pipeline, quiet=True)
    first.remove()
    assert not disable(pipeline) and HANDLE not in vars(pipeline.transformer_2)
    second = enable(pipeline, quiet=True)
    first.remove()  # the first handle has nothing to do with the second
    assert vars(pipeline.transformer)[HANDLE] is second
    assert disable(pipeline)


def test_disable_finds_what_was_enabled_by_another_way():
    """Enables by transformer, by pipeline, by apply_radial_attention, and the two experts one by one."""
    pipeline = wan_pipeline(experts=2)
    experts = pipeline.transformer, pipeline.transformer_2
    enable(pipeline, quiet=True)
    assert disable(pipeline.transformer) and not disable(pipeline)
    for expert in experts:
        enable(expert, num_steps=4, quiet=True)
    assert disable(pipeline)
    apply_radial_attention(pipeline, RadialConfig(block_size=16))
    assert disable(pipeline)
    assert all(not expert._forward_pre_hooks and HANDLE not in vars(expert) for expert in experts)


def test_disable_after_compiling():
    pipeline = wan_pipeline()
    transformer, inputs = pipeline.transformer, wan_inputs()
    expected = run(transformer, inputs)
    enable(pipeline, quiet=True)
    pipeline.transformer = torch.compile(transformer, backend="eager")
    assert disable(pipeline)
    assert torch.equal(run(transformer, inputs), expected)
    pipeline.transformer = torch.compile(transformer, backend="eager")
    enable(pipeline, quiet=True)
    assert disable(transformer)


def test_an_enabled_pipeline_is_freed_at_once():
    """Turns off the garbage collector, which may run too late for the memory of a GPU."""
    pipeline = wan_pipeline()
    weak = weakref.ref(pipeline.transformer)
    enable(pipeline, quiet=True)
    gc.collect()
    gc.disable()
    try:
        del pipeline
        assert weak() is None
    finally:
        gc.enable()


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, copy.deepcopy) for name in ("wan-a14b", "hunyuan_video", "mochi", "ltx")),
        *(
            (name, pickled) for name in ("wan-a14b", "mochi", "ltx")
        ),  # hooks of a CLIP encoder are not pickled
    ],
)
def test_a_copy_has_a_handle_of_its_own(name, way):
    """The copy counts its own steps, before and after the original is taken back."""
    kind = KINDS[name]
    pipeline = kind.make()
    dense = kind.generate(pipeline)
    handle = enable(pipeline, quiet=True, check="nan", dense_steps=0.25, **SMALL)
    expected = kind.generate(pipeline, 4)
    copied = way(pipeline)
    assert torch.equal(kind.generate(copied, 4), expected)
    assert disable(pipeline)
    assert torch.equal(kind.generate(pipeline), dense)
    assert torch.equal(kind.generate(copied, 4), expected)
    assert vars(copied.transformer)[HANDLE].report()["steps"] == 12 and handle.report()["steps"] == 4
    assert disable(copied)
    assert torch.equal(kind.generate(copied), dense)


def test_a_copied_transformer_follows_another_scheduler():
    pipeline = wan_pipeline()
    enable(pipeline, quiet=True, dense_steps=0.25, **SMALL)
    generate(pipeline, steps=4)
    pipeline = copy.deepcopy(pipeline)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=7.0)
    with pytest.raises(ValueError, match="needs the number of steps"):
        generate(pipeline, steps=5)


def test_saving_knows_nothing_of_it(tmp_path):
    pipeline = wan_pipeline()
    expected = pipeline.transformer.state_dict().keys()
    with enable(pipeline, quiet=True):
        assert pipeline.transformer.state_dict().keys() == expected
        pipeline.save_pretrained(tmp_path)
    loaded = quiet(type(pipeline).from_pretrained(tmp_path))
    torch.testing.assert_close(generate(loaded), generate(pipeline), atol=1e-5, rtol=0)
    assert not disable(loaded)
