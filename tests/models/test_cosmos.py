"""Cosmos: steps of its pipelines, whose calls get noise levels, and what Cosmos Transfer adds."""

import pytest
import torch
from diffusers import CosmosControlNetModel

from radial_attn.models import apply_radial_attention
from tests.support.families import FULL, SPARSE, assert_near, run
from tests.support.tiny import TEXT_DIM
from tests.support.tiny_cosmos import (
    TRANSFER,
    controlled_inputs,
    cosmos25_pipeline,
    cosmos_pipeline,
    cosmos_transformer,
)

VIDEO = {"num_frames": 9, "height": 32, "width": 32, "output_type": "latent", "num_inference_steps": 40}
PIPELINES = [
    pytest.param(cosmos_pipeline, {"image": torch.zeros(1, 3, 32, 32)}, id="predict2"),
    pytest.param(cosmos25_pipeline, {"video": torch.zeros(1, 3, 5, 32, 32)}, id="predict2.5"),
]


@pytest.mark.parametrize(("make", "given"), PIPELINES)
def test_steps_are_those_of_the_scheduler(make, given):
    """The noise levels of two steps can be equal in bfloat16, or below that of the given frames."""
    pipeline = make(num_layers=1, extra_pos_embed_type=None)
    pipeline.transformer.to(torch.bfloat16)
    width = pipeline.transformer.config.crossattn_proj_in_channels
    width = width if pipeline.transformer.config.use_crossattn_projection else TEXT_DIM
    texts = {name: torch.ones(1, 7, width).bfloat16() for name in ("prompt_embeds", "negative_prompt_embeds")}
    for dense_steps in (0.25, "sigma>0.9"):
        with apply_radial_attention(pipeline, SPARSE, dense_steps=dense_steps) as handle:
            for _ in range(2):
                pipeline(**given, **texts, **VIDEO)
            report = handle.report()
        levels = pipeline.scheduler.sigmas[:40]
        levels = levels / (1 + levels) if levels[0] > 1 else levels
        dense = 10 if dense_steps == 0.25 else int((levels > 0.9).sum())
        assert (report["videos"], report["steps"], report["dense_steps"]) == (2, 80, 2 * dense)
        assert report["calls"]["dense"] == 2 * 2 * dense and sum(report["calls"].values()) == 2 * 2 * 40


def test_cosmos_transfer_at_full_density_is_upstream():
    """The image context and residuals of the control net go past self-attention."""
    transformer, inputs = cosmos_transformer(**TRANSFER), controlled_inputs()
    expected = run(transformer, inputs)
    assert not torch.equal(expected, run(transformer, inputs | {"block_controlnet_hidden_states": None}))
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        assert_near(run(transformer, inputs), expected)
    with apply_radial_attention(transformer, SPARSE):
        assert not torch.equal(run(transformer, inputs), expected)


def test_the_control_net_stays_dense():
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"must be one of .*CosmosT.*, got CosmosControlNet"),
    ):
        apply_radial_attention(CosmosControlNetModel(), SPARSE)
