"""What is special in the models that diffusers copied from Wan, and which classes are refused."""

import diffusers
import pytest
import torch

from radial_attn.models import apply_radial_attention
from radial_attn.models.apply import REFUSED
from radial_attn.models.enable import enable
from tests.support.families import BY_NAME, SPARSE, assert_near, masked_upstream, run, video
from tests.support.tiny import assemble, wan_transformer

SKYREELS, CHRONOEDIT = BY_NAME["skyreels"], BY_NAME["chronoedit"]


def frame_times(*times: float) -> dict[str, torch.Tensor]:
    """Returns the arguments of a call of diffusion forcing with these timesteps of frames."""
    inputs = SKYREELS.sized(len(times))
    return inputs | {"timestep": torch.tensor([times]), "enable_diffusion_forcing": True}


def test_the_noisiest_frame_of_diffusion_forcing_counts():
    """The first two frames are given, then all but the last are ahead of it; later frames begin later."""
    transformer = SKYREELS.transformer()
    calls = [frame_times(20, 20, *rest) for rest in ([999] * 4, [900, 900, 999, 999], [700, 700, 800, 800])]
    expected = [
        *(run(transformer, call) for call in calls[:2]),
        masked_upstream(SKYREELS, transformer, calls[2]),
    ]
    with apply_radial_attention(transformer, SPARSE, dense_steps=1) as handle:
        for inputs, output in zip(calls, expected, strict=True):
            assert_near(run(transformer, inputs), output)
        report = handle.report()
    assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 2, 1)


@pytest.mark.parametrize(("more", "videos"), [({}, 1), ({"num_frames": 33, "overlap_history": 5}, 2)])
def test_diffusion_forcing_follows_the_steps_of_its_pipeline(more, videos):
    """A long video is made in windows, each of which goes through all steps."""
    pipeline = assemble(diffusers.SkyReelsV2DiffusionForcingPipeline, 0, transformer=SKYREELS.transformer())
    options = {"num_frames": 21, "base_num_frames": 21, "num_inference_steps": 4, "output_type": "latent"}
    with apply_radial_attention(pipeline, SPARSE, dense_steps=1, dense_last_steps=1) as handle:
        pipeline("a cat", height=48, width=64, **options | more)
        report = handle.report()
    assert (report["videos"], report["steps"], report["dense_steps"]) == (videos, 4 * videos, 2 * videos)
    assert report["calls"]["dense"] == 16 * videos


@pytest.mark.parametrize("options", [{}, {"dense_steps": 1}])
def test_causal_blocks_are_refused_before_anything_runs(options):
    transformer, ran = SKYREELS.transformer(), []
    transformer.patch_embedding.register_forward_hook(lambda *_: ran.append(True))
    with apply_radial_attention(transformer, SPARSE, **options):
        transformer._set_ar_attention(3)
        with pytest.raises(ValueError, match="causal blocks of 3 frames; pass causal_block_size=1 to its"):
            run(transformer, SKYREELS.sized())
        assert not ran
        transformer._set_ar_attention(1)
        run(transformer, SKYREELS.sized())


def test_a_video_that_shrinks_to_its_ends_chooses_its_blocks_again():
    """ChronoEdit's frames of reasoning go after a few steps; the last frame keeps its position."""
    transformer = CHRONOEDIT.transformer()
    shrunk = CHRONOEDIT.sized(2, timestep=400.0)
    expected = masked_upstream(CHRONOEDIT, transformer, shrunk, (2, 6, 8))
    with apply_radial_attention(transformer, SPARSE) as handle:
        video(CHRONOEDIT, transformer)
        assert_near(run(transformer, shrunk), expected)
        assert [entry["grid"] for entry in handle.report()["grids"]] == [[6, 6, 8], [2, 6, 8]]
    dense = run(transformer, shrunk)
    with apply_radial_attention(transformer, SPARSE, selection="dense_step", dense_steps=1) as handle:
        run(transformer, CHRONOEDIT.sized(timestep=900.0))
        run(transformer, CHRONOEDIT.sized(timestep=600.0))
        assert torch.equal(run(transformer, shrunk), dense)
        assert handle.report()["dense_steps"] == 2


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("turn_on", [enable, lambda model: apply_radial_attention(model, SPARSE)])
def test_other_attention_is_refused_with_its_reason(name, turn_on):
    """Every name is a class of diffusers; a relative of it is refused, even one of a class that is served."""
    assert hasattr(diffusers, name)
    transformer = wan_transformer()
    transformer.__class__ = type("Mine", (type(name, (type(transformer),), {}),), {})
    with pytest.raises(ValueError, match=rf"^radial attention cannot serve {name}: its "):
        turn_on(transformer)
    assert not transformer._forward_pre_hooks
