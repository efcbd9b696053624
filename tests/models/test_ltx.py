"""What is LTX-Video's own: packed latents."""

import pytest
import torch

from radial_attn.models import apply_radial_attention
from tests.support.families import SPARSE, run
from tests.support.tiny_ltx import ltx_inputs, ltx_transformer


def coordinates(frames: int, height: int, width: int) -> torch.Tensor:
    """Returns `[1, 3, tokens]` in pixels, as LTXConditionPipeline passes them."""
    times = (torch.arange(frames) * 8 - 7).clamp(min=0) / 25
    axes = times, 32.0 * torch.arange(height), 32.0 * torch.arange(width)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)[None]


def test_grid_of_coordinates():
    inputs = ltx_inputs(5, 3, 7) | {"video_coords": coordinates(5, 3, 7)}
    del inputs["num_frames"], inputs["height"], inputs["width"]
    with apply_radial_attention(transformer := ltx_transformer(), SPARSE) as handle:
        run(transformer, inputs)
        assert handle.report()["grid"] == [5, 3, 7]


def test_tokens_beside_the_video_are_an_error():
    inputs = ltx_inputs(5, 3, 7) | {"num_frames": 4}
    with (
        apply_radial_attention(transformer := ltx_transformer(), SPARSE),
        pytest.raises(ValueError, match="needs the tokens of a video alone: got 105 for TokenGrid"),
    ):
        run(transformer, inputs)
