"""What is MiniMax-H3's own: the order of its rows, conditions, timesteps of several kinds, dtypes."""

import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3Ref2VACoreDenoiseStep

from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime import layer_attention
from tests.support.families import DENSE, FULL, SPARSE, assert_near, run
from tests.support.tiny_minimax_h3 import OTHERS, minimax_h3_inputs, minimax_h3_transformer

ANCHORS = [(), ("first",), ("first", "last")]


@pytest.mark.parametrize("anchors", ANCHORS, ids=str)
def test_rows_in_the_order_of_the_pipeline(anchors):
    """Text, keyframes and audio before the video give what they give after it; keyframes count as text."""
    transformer, options = minimax_h3_transformer(), {"batch": 2, "anchors": anchors}
    inputs, moved = (minimax_h3_inputs(**options, video_first=first) for first in (False, True))
    dense = run(transformer, inputs)
    for config, expected in ((DENSE, dense), (FULL, dense), (SPARSE, None)):
        with apply_radial_attention(transformer, config) as handle:
            actual = run(transformer, inputs)
            assert_near(actual, run(transformer, moved) if expected is None else expected)
            report = handle.report()
    assert report["grid"] == [6, 6, 8] and report["density"] < 0.9 and (actual - dense).abs().max() > 1e-3
    assert torch.equal(run(transformer, inputs), dense)


def test_all_outputs_and_every_row_that_is_not_video(monkeypatch):
    """Text, keyframes and audio attend to all rows and are seen by all: the grid has them as text."""
    transformer, inputs, seen = minimax_h3_transformer(), minimax_h3_inputs(anchors=("last",)), []
    attend = layer_attention.radial_attention

    def record(query, key, value, mask, **options):
        seen.append(mask)
        return attend(query, key, value, mask, **options)

    monkeypatch.setattr(layer_attention, "radial_attention", record)
    with torch.no_grad():
        expected = transformer(**inputs).audio_sample
        with apply_radial_attention(transformer, FULL):
            assert_near(transformer(**inputs).audio_sample, expected)
        with apply_radial_attention(transformer, SPARSE):
            assert transformer(**inputs).audio_sample.shape == expected.shape
    tokens = seen[-1].token_mask()
    assert tokens[288:].all() and tokens[:, 288:].all() and not tokens.all()
    assert len(tokens) == 288 + OTHERS + 48


def test_places_that_are_no_grid_are_one_frame():
    transformer, inputs = minimax_h3_transformer(), minimax_h3_inputs(2, 4, 4)
    inputs["position_ids"][0, 0] -= 0.5
    expected = run(transformer, inputs)
    with apply_radial_attention(transformer, SPARSE) as handle:
        assert_near(run(transformer, inputs), expected)
        report = handle.report()
    assert (report["grid"], report["density"]) == ([1, 1, 8], 1.0)


def test_fused_projections_and_blocks_of_another_dtype():
    """Latents in float32 go to blocks in bfloat16, as in the published model."""
    transformer, inputs, seen = minimax_h3_transformer(), minimax_h3_inputs(), []
    with apply_radial_attention(transformer, SPARSE, observe=seen.append) as handle:
        expected = run(transformer, inputs)
        transformer.fuse_qkv_projections()
        assert_near(run(transformer, inputs), expected)
        for part in (transformer.transformer_blocks, transformer.context_embedder, transformer.token_refiner):
            part.to(torch.bfloat16)
        rounded = run(transformer, inputs)
        assert handle._context._dtype == seen[-1].query.dtype == torch.bfloat16
    assert rounded.dtype == torch.float32 and (rounded - expected).norm() < 0.05 * expected.norm()


def test_the_time_of_the_video_decides():
    """Audio is ahead of the video, and keyframes stay at one level."""
    transformer = minimax_h3_transformer()
    with apply_radial_attention(transformer, SPARSE, dense_steps=1) as handle:
        for time in (0.0, 100.0, 950.0):
            run(transformer, minimax_h3_inputs(timestep=time, anchors=("first",)))
        report = handle.report()
    assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 3, 1)


def test_the_transformer_of_references():
    """A pipeline for references names its transformer otherwise."""
    pipeline, transformer = MiniMaxH3Ref2VACoreDenoiseStep().init_pipeline(), minimax_h3_transformer()
    pipeline.update_components(transformer_ref=transformer)
    inputs = minimax_h3_inputs()
    expected = run(transformer, inputs)
    with apply_radial_attention(pipeline, SPARSE, num_steps=1) as handle:
        assert (run(transformer, inputs) - expected).abs().max() > 1e-3
        assert handle.report()["layers"] == 4
    assert torch.equal(run(transformer, inputs), expected)
