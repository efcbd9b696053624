"""What is LTX-2's own: its two versions, perturbed attention, times a token, coordinates."""

import pytest
import torch

from radial_attn.models import apply_radial_attention
from tests.support.families import BY_NAME, DENSE, FULL, SPARSE, assert_near, masked_upstream, run
from tests.support.tiny_ltx2 import ltx2_inputs, ltx2_transformer

OLDER = {  # LTX-2
    "perturbed_attn": False,
    "gated_attn": False,
    "audio_gated_attn": False,
    "cross_attn_mod": False,
    "audio_cross_attn_mod": False,
}
FIRST_GIVEN = torch.cat([torch.zeros(1, 48), torch.full((1, 240), 500.0)], dim=1)


@pytest.mark.parametrize(
    "changes", [OLDER, OLDER | {"rope_type": "interleaved"}, {"rope_type": "interleaved"}]
)
def test_other_versions(changes):
    transformer, inputs = ltx2_transformer(**changes), ltx2_inputs(batch=2)
    dense, expected = run(transformer, inputs), masked_upstream(BY_NAME["ltx2"], transformer, inputs)
    for config, output in ((DENSE, dense), (FULL, dense), (SPARSE, expected)):
        with apply_radial_attention(transformer, config):
            assert_near(run(transformer, inputs), output)
    assert torch.equal(run(transformer, inputs), dense)


@pytest.mark.parametrize(
    "more",
    [
        {"spatio_temporal_guidance_blocks": [1, 2]},
        {"spatio_temporal_guidance_blocks": [1, 2], "perturbation_mask": torch.tensor([0.0, 1.0])},
        {"isolate_modalities": True},
        {"timestep": FIRST_GIVEN.expand(2, -1), "audio_timestep": torch.full((2,), 500.0)},
        {"use_cross_timestep": True},
    ],
    ids=", ".join,
)
def test_other_calls(more):
    """Perturbed layers (STG) skip attention for all samples or one; times a token come from an image."""
    transformer, inputs = ltx2_transformer(), ltx2_inputs(batch=2) | more
    expected = masked_upstream(BY_NAME["ltx2"], transformer, inputs)
    with apply_radial_attention(transformer, SPARSE):
        assert_near(run(transformer, inputs), expected)


def test_the_audio_follows_the_video():
    transformer, inputs = ltx2_transformer(), ltx2_inputs()
    with torch.no_grad():
        expected = transformer(**inputs).audio_sample
        with apply_radial_attention(transformer, FULL):
            assert_near(transformer(**inputs).audio_sample, expected)
        with apply_radial_attention(transformer, SPARSE):
            assert (transformer(**inputs).audio_sample - expected).abs().max() > 1e-4


def test_grid_of_coordinates():
    """Pipelines pass the bounds of patches, `[B, 3, S, 2]`."""
    transformer, inputs = ltx2_transformer(), ltx2_inputs(5, 3, 7)
    bounds = transformer.rope.prepare_video_coords(1, 5, 3, 7, "cpu", fps=25.0)
    with apply_radial_attention(transformer, SPARSE) as handle:
        run(transformer, inputs | {"video_coords": bounds, "num_frames": None, "height": None, "width": None})
        assert handle.report()["grid"] == [5, 3, 7]


def test_what_is_refused():
    transformer, inputs = ltx2_transformer(), ltx2_inputs(5, 3, 7)
    keyframe = {"video_coords": transformer.rope.prepare_video_coords(1, 5, 3, 7, "cpu")}
    keyframe["video_coords"] = torch.cat([keyframe["video_coords"], keyframe["video_coords"][:, :, :21]], 2)
    keyframe["hidden_states"] = torch.cat([inputs["hidden_states"], inputs["hidden_states"][:, :21]], 1)
    strength = {"video_self_attention_mask": torch.ones(1, 105, 105)}
    messages = "needs the tokens of a video alone: got 126 for TokenGrid", "takes no attention_mask"
    with apply_radial_attention(transformer, SPARSE):
        for more, message in zip((keyframe, strength), messages, strict=True):
            with pytest.raises(ValueError, match=message):
                run(transformer, inputs | more)
