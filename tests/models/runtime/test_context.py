"""Which step a call is, and what a schedule makes of it."""

import gc
import logging
import math
import weakref

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.models import apply_radial_attention
from radial_attn.models.pipeline.load import noise_levels
from radial_attn.models.runtime import layer_attention
from radial_attn.models.runtime.schedule import Schedule, StepCounter, read_density
from tests.support.auto_backend import AUTO
from tests.support.families import SPARSE
from tests.support.pipelines import KINDS, generate
from tests.support.tiny import wan_inputs, wan_pipeline


def plan(pipeline, *timesteps):
    """Gives the pipeline a scheduler with exactly these timesteps."""
    pipeline.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline.scheduler.set_timesteps(sigmas=np.array(timesteps) / 1000)
    assert pipeline.scheduler.timesteps.tolist() == list(timesteps)


def steps_of(counter, *timesteps):
    return [counter.advance(torch.tensor([float(timestep)]))[0] for timestep in timesteps]


def test_order_of_timesteps_without_a_pipeline():
    counter = StepCounter()
    assert steps_of(counter, 1000, 1000, 900, 900, 100, 1000, 400, 500) == [0, 0, 1, 1, 2, 0, 1, 0]
    assert (counter.videos_begun, counter.steps_begun, counter.planned_steps) == (3, 6, None)


def test_steps_are_places_in_the_scheduler():
    pipeline = wan_pipeline()
    plan(pipeline, 900, 400)
    counter = StepCounter(pipeline)
    assert steps_of(counter, 900, 900, 400) == [0, 0, 1]
    plan(pipeline, 400)  # the next video begins at the last timestep of this one
    assert steps_of(counter, 400) == [0]
    plan(pipeline, 400)  # the same video of one step again
    assert steps_of(counter, 400) == [0]
    assert (counter.videos_begun, counter.steps_begun, counter.planned_steps) == (3, 4, 1)


def test_rounded_and_repeated_timesteps_follow_the_scheduler():
    pipeline = wan_pipeline()
    plan(pipeline, 998, 997, 997, 500)
    counter = StepCounter(pipeline)
    steps = []
    for timestep in pipeline.scheduler.timesteps:
        steps += [counter.advance(timestep.to(torch.bfloat16)[None])[0] for _ in range(2)]
        pipeline.scheduler.step(torch.zeros(1, 2), timestep, torch.zeros(1, 2))
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]


def test_timesteps_outside_the_plan_fall_back_to_their_order():
    pipeline = wan_pipeline()
    plan(pipeline, 900, 400)
    assert steps_of(StepCounter(pipeline), 800, 800, 700, 600, 850) == [0, 0, 1, 2, 0]


def test_a_scheduler_without_set_timesteps_plans_nothing():
    pipeline = wan_pipeline()
    assert len(pipeline.scheduler.timesteps) == 1000
    counter = StepCounter(pipeline)
    assert steps_of(counter, 500, 400) == [0, 1] and counter.planned_steps is None


def test_schedule():
    schedule = Schedule(dense_steps=1, dense_last_steps=2, num_steps=6)
    assert [schedule.is_dense(step, None) for step in range(6)] == [True, False, False, False, True, True]
    assert Schedule(dense_last_steps=1).is_dense(3, 4) and not Schedule(dense_last_steps=1).is_dense(3, 5)
    assert not any(Schedule().is_dense(step, None) for step in range(3))
    assert all(Schedule(dense_steps=9, dense_last_steps=9).is_dense(step, 4) for step in range(4))


@pytest.mark.parametrize(
    ("value", "dense"),
    [
        (2, [0, 1]),
        ("2", [0, 1]),
        (0.4, [0, 1]),
        ("40%", [0, 1]),
        ("sigma>0.5", [0, 1, 2]),
        ("sigma > 0.75", [0, 1]),
        ([0, 3], [0, 3]),
        ("[3, 0]", [0, 3]),
        (0, []),
    ],
)
def test_forms_of_dense_steps(value, dense):
    sigmas = [1.0, 0.8, 0.75, 0.5, 0.2]
    schedule = Schedule(value)
    assert [step for step in range(5) if schedule.is_dense(step, 5, sigmas)] == dense
    sparse = [step for step in range(4) if step + 1 not in dense]
    assert [step for step in range(5) if schedule.precedes_sparse(step, 5, sigmas)] == sparse


@pytest.mark.parametrize(
    "value",
    [
        -1,
        1.0,
        0.0,
        "0%",
        "100%",
        "",
        "soon",
        "sigma>",
        "sigma>1",
        "sigma<0.5",
        [],
        [0, 0],
        [1.5],
        [-1],
        True,
        None,
    ],
)
def test_other_forms_of_dense_steps(value):
    with pytest.raises(ValueError, match=r"dense_steps must be a number of first steps, .* got "):
        Schedule(value)


def test_dense_steps_that_the_run_does_not_have():
    with pytest.raises(ValueError, match="dense_steps must be 0 to 4, the steps of this run, got 5"):
        Schedule([0, 5]).check_run(5)
    with pytest.raises(ValueError, match=r"dense_steps='sigma>0.9' needs the noise levels"):
        Schedule("sigma>0.9").is_dense(0, 5)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (0.25, 0.25),
        ("0.25", 0.25),
        (1, 1.0),
        (None, None),
        ({"start": 0.4, "end": 0.15}, (0.4, 0.15)),
        ("{start: 0.4, end: 0.15}", (0.4, 0.15)),
        ("{'end': 0.15, 'start': 0.4}", (0.4, 0.15)),
    ],
)
def test_forms_of_density(value, read):
    assert read_density(value) == read


@pytest.mark.parametrize(
    "value",
    [0, 1.1, True, "", "half", {"start": 0.4}, {"start": 0, "end": 1}, "{start: 0.4, stop: 0.2}", [0.4]],
)
def test_other_forms_of_density(value):
    with pytest.raises(ValueError, match=r"density must be a number above 0 up to 1, or \{start.* got "):
        read_density(value)


def test_density_changes_over_the_sparse_steps():
    schedule = Schedule([0, 3], density_range=(0.5, 0.2))
    assert schedule.densities(6) == pytest.approx({1: 0.5, 2: 0.4, 4: 0.3, 5: 0.2})
    many = Schedule(2, density_range=(0.2, 0.9)).densities(50)
    assert list(many) == list(range(2, 50)) and many[2] == 0.2 and many[49] == pytest.approx(0.9)
    assert len(set(many.values())) == 8 and sorted(many.values()) == list(many.values())
    assert Schedule(0, density_range=(0.5, 0.2)).densities(1) == {0: 0.5}


def test_noise_levels_are_those_of_the_scheduler(tmp_path):
    """Compares the levels of a run with those that are planned from the scheduler's file alone."""
    for kind in ("wan", "mochi", "hunyuan_video", "ltx"):
        pipeline = KINDS[kind].make()
        counter = StepCounter(pipeline, rising=kind == "mochi")
        KINDS[kind].generate(pipeline, 4)
        pipeline.scheduler.save_pretrained(tmp_path / kind / "scheduler")
        counter.advance(pipeline.scheduler.timesteps[:1])
        assert counter.sigmas[0] > 0.9 and sorted(counter.sigmas, reverse=True) == counter.sigmas
        planned = noise_levels(str(tmp_path / kind), kind, 4, None, math.prod(KINDS[kind].grid))
        assert planned == pytest.approx(counter.sigmas, abs=1e-6)
        with apply_radial_attention(pipeline, SPARSE, dense_steps=f"sigma>{counter.sigmas[2]}") as handle:
            KINDS[kind].generate(pipeline, 4)
            assert handle.report()["dense_steps"] == 2


@pytest.mark.parametrize("selection", ["static", "dense_step"])
def test_a_range_of_densities(selection, monkeypatch):
    """Gives every sparse step the density of the range; the report has the latest."""
    pipeline, seen = wan_pipeline(), []
    config = RadialConfig(block_size=16)
    attention = layer_attention.radial_attention

    def noted(*args, **options):
        seen.append(args[3].density)
        return attention(*args, **options)

    monkeypatch.setattr(layer_attention, "radial_attention", noted)
    options = {"dense_steps": [0, 2], "density_range": (0.9, 0.6), "selection": selection}
    with apply_radial_attention(pipeline, config, **options) as handle:
        generate(pipeline, steps=5)
        assert handle.report()["density"] == pytest.approx(sum(seen[-4:]) / 4)
    assert len(seen) == 3 * 4
    for step, wanted in enumerate((0.9, 0.75, 0.6)):
        for density in seen[4 * step : 4 * step + 4]:
            assert density == pytest.approx(wanted, abs=0.08 if selection == "static" else 0.03)


def test_last_steps_without_a_plan_are_an_error():
    pipeline = wan_pipeline()
    with apply_radial_attention(pipeline, SPARSE, dense_last_steps=1):
        with pytest.raises(ValueError, match=r"dense_last_steps=1 .*num_steps=None: give num_steps"):
            pipeline.transformer(**wan_inputs())
        generate(pipeline, steps=1)


def test_the_fork_does_not_keep_its_pipeline_alive():
    pipeline = wan_pipeline()
    transformer, alive = pipeline.transformer, weakref.ref(pipeline)
    handle = apply_radial_attention(pipeline, SPARSE)
    del pipeline
    gc.collect()
    assert alive() is None
    transformer(**wan_inputs())
    assert handle.report()["steps"] == 1


def test_the_blocks_get_the_backend_that_the_report_names(caplog):
    """The backend is chosen once a call, outside compiled code, and logged once for each size."""
    transformer, carried = wan_pipeline().transformer, []
    config = RadialConfig(decay_factor=0.3, block_size=16)  # of no other test: a mask says its backend once

    def note(block, args):
        carried.append(args[3][2] and args[3][2][:2])

    for block in transformer.blocks:
        block.register_forward_pre_hook(note)
    caplog.set_level(logging.INFO, logger="radial_attn")
    with torch.no_grad(), apply_radial_attention(transformer, config, dense_steps=1) as handle:
        for timestep in (900, 500, 400):
            transformer(**wan_inputs(timestep=timestep))
    mask = radial_mask(TokenGrid(6, 6, 8), config)
    assert carried == 4 * [None] + 8 * [(mask, AUTO)]
    assert handle.report()["calls"] == {"dense": 4, AUTO: 8}
    assert [record.getMessage() for record in caplog.records] == [
        f"backend {AUTO} for [1, 4, 6, 12, 16] torch.float32 on cpu, density {mask.density:.3f}"
    ]
