"""Which step a call is, and what a schedule makes of it."""

import gc
import logging
import weakref

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.schedule import Schedule, StepCounter
from tests.support.auto_backend import AUTO
from tests.support.families import SPARSE
from tests.support.pipelines import generate
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
