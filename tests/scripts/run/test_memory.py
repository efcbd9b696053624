"""The predicted peak of decoding against that of real VAEs, whole and in tiles."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from radial_attn import BlockMask, RadialConfig, TokenGrid
from radial_attn.kernels import flex
from radial_attn.models import apply_radial_attention
from scripts.run.config import ROOT, AttentionConfig, ModelConfig, VideoSize
from scripts.run.memory import FLEX_BYTES, GIB, covered, decoder_bytes, kept_bytes
from scripts.run.model_info import ModelInfo
from tests.support.families import run
from tests.support.plans import FOURTEEN, HUNYUAN, MOCHI
from tests.support.tiny import wan_inputs, wan_transformer, wan_vae
from tests.support.tiny_vaes import CLASSES, TILES, VAES, architecture

# Arguments of a VAE class of diffusers: blocks so narrow and few that a tile takes seconds, not minutes.
MEASURE = """
import sys, torch
from scripts.run.system import peak_memory
from tests.support.tiny_vaes import tiled

family, *sizes = sys.argv[1], *map(int, sys.argv[2:])
vae = tiled(family)
latents = torch.randn(1, vae.config.latent_channels, *sizes)
with torch.no_grad():
    vae.decode(latents[..., :8, :8])
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")  # resets the peak
    before = peak_memory("cpu")["host_bytes"]
    vae.decode(latents)
print(peak_memory("cpu")["host_bytes"] - before)
"""


def decoding(model: ModelInfo, family: str, sizes: tuple[int, int, int], tiling: str) -> float:
    """Bytes predicted for a video of `sizes`: frames, height, width."""
    return decoder_bytes(model, VideoSize(*sizes), ModelConfig(family=family, vae_tiling=tiling))


@pytest.mark.parametrize("residual", ["none", "int8"])
@pytest.mark.parametrize("budget", ["head", "layer"])
def test_what_is_kept_of_a_dense_step_takes_what_was_predicted(budget, residual):
    """Counts the tensors that the layers of a tiny Wan hold after a sparse step, two calls a step."""
    config, options = RadialConfig(block_size=16, density=0.6), {"budget": budget, "residual": residual}
    options |= {"selection": "dense_step", "dense_layers": 1}
    transformer, inputs = wan_transformer(), [wan_inputs(timestep=time) for time in (900.0, 900.0, 1.0, 1.0)]
    with apply_radial_attention(transformer, config, **options, dense_steps=1, backend="cpp") as handle:
        [run(transformer, call) for call in inputs]
        states = [state for call in handle._context._choices._calls.values() for state in call.values()]
    assert len(states) == 2 * 3
    tensors = [x for state in states for x in (state.levels, state.masks[0].blocks)]
    tensors += [x for state in states for x in state.masks[0].blocks.__dict__["csr"]]
    residuals = sum(state.residual.bytes for state in states if state.residual is not None)
    attention = AttentionConfig(**options, block_size=16)
    model, grid = ModelInfo(layers=4, heads=2, head_dim=12, ffn=1), TokenGrid(6, 6, 8)
    numbers = {"dtype": "float32", "calls": 2, "density": config.density}
    predicted = kept_bytes(model, grid, attention, **numbers, device="cpu")
    assert predicted.device == pytest.approx(sum(x.nbytes for x in tensors) + residuals, rel=0.05)
    on_gpu = kept_bytes(model, grid, attention, **numbers, device="cuda")
    assert on_gpu.host == sum(state.levels.nbytes + state.masks[0].blocks.nbytes for state in states)


def test_flex_lists_all_pairs_of_blocks():
    mask = BlockMask(TokenGrid(6, 32, 32), 128, torch.rand(3, 48, 48) < 0.3)
    table = flex._build_block_mask(mask, torch.device("cpu"), 48)
    lists = [x for x in table.as_tuple() if isinstance(x, torch.Tensor)]
    total = sum(x.nbytes for x in [*lists, mask.blocks])
    assert total == pytest.approx(FLEX_BYTES * mask.blocks.numel(), rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is reset through /proc")
@pytest.mark.parametrize(
    ("family", "frames", "latents"),
    [
        pytest.param("hunyuan_video", 17, 5, marks=pytest.mark.long),
        ("mochi", 7, 2),
        pytest.param("ltx", 9, 2, marks=pytest.mark.long),
        pytest.param("ltx2", 17, 3, marks=pytest.mark.long),
        pytest.param("hunyuan_video15", 5, 2, marks=pytest.mark.long),
        pytest.param("minimax_h3", 22, 7, marks=pytest.mark.long),
    ],
)
def test_predicted_memory_of_a_tile_is_near_the_peak_of_decoding(family, frames, latents):
    """Decodes a video larger than a tile in its own process, whose freed tensors go back to the system."""
    model = architecture(family)
    side = model.vae_tile * 3 // 2
    arguments = [family, str(latents), *2 * [str(side // model.vae_pixels)]]
    given = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-P", "-c", MEASURE, *arguments]
    done = subprocess.run(
        command, check=True, cwd=ROOT, env=os.environ | given, capture_output=True, text=True
    )
    predicted = decoding(model, family, (frames, side, side), "always")
    assert int(done.stdout) == pytest.approx(predicted, rel=0.15)
    assert predicted < 0.6 * decoding(model, family, (frames, side, side), "never")


def test_a_tile_of_hunyuan_video_takes_what_was_measured():
    """That is 6.3 GiB for 17 frames of 256 x 256 in float32 on the CPU. A long video keeps its tiles too."""
    assert decoding(HUNYUAN, "hunyuan_video", (17, 256, 256), "auto") == pytest.approx(6.3 * GIB, rel=0.05)
    long = decoding(HUNYUAN, "hunyuan_video", (129, 720, 1280), "auto")
    video = 4 * 3 * 720 * 1280 * 129
    assert 6.3 * GIB + 1.2 * video < long < 6.3 * GIB + 2 * video
    assert long < decoding(HUNYUAN, "hunyuan_video", (129, 720, 1280), "never") / 8


def test_a_tile_of_mochi_has_all_frames():
    long, short = (decoding(MOCHI, "mochi", (frames, 480, 848), "auto") for frames in (163, 79))
    assert long / short == pytest.approx(168 / 84, rel=0.01)


def test_whole_frames_of_wan_need_no_more_for_more_of_them_but_the_video():
    long, short = (decoding(FOURTEEN, "wan", (frames, 480, 832), "auto") for frames in (81, 17))
    assert long - short == 2 * 4 * 3 * 480 * 832 * 64
    assert short == 240 * 96 * 480 * 832 + 2 * 4 * 3 * 480 * 832 * 17


def test_tiles_and_chunks_are_those_of_diffusers():
    """By default the prediction assumes tiles of 256 every 192 pixels, and chunks of 17 frames every 12."""
    models = {family: replace(architecture(family), vae_tile=2 * TILES[family]) for family in CLASSES}
    vaes = {family: CLASSES[family](**VAES[family]) for family in CLASSES} | {"wan": wan_vae()}
    for family, vae in vaes.items():
        model = models.get(family, ModelInfo(1, 1, 1, 1))
        assert vae.tile_sample_min_height == vae.tile_sample_min_width == model.vae_tile
        if family == "minimax_h3":
            step = model.vae_tile - vae.tile_sample_min_overlap_height
        else:
            overlap = getattr(vae, "tile_overlap_factor", None)
            step = model.vae_tile * (1 - overlap) if overlap else vae.tile_sample_stride_height
        assert step == model.vae_step
        assert getattr(vae, "use_framewise_decoding", False) == (family == "hunyuan_video")
    model, vae = architecture("hunyuan_video"), vaes["hunyuan_video"]
    assert model.vae_chunk == vae.tile_sample_min_num_frames + 1
    assert model.vae_stride == vae.tile_sample_stride_num_frames
    assert architecture("mochi").vae_chunk is None
    model, vae = architecture("minimax_h3"), vaes["minimax_h3"]
    latents = vae.tokens_chunk_size, vae.tokens_chunk_size + vae.token_overlap  # from chunk to chunk, at once
    assert model.vae_clip == (vae.config.clip_length, latents[0])
    assert model.vae_chunk == latents[1] * vae.temporal_compression_ratio


def test_pieces_that_overlap_cover_more_than_the_whole():
    assert covered(256, 256, 192) == (256 + 64) / 256
    assert covered(100, 256, 192) == 1
    assert covered(129, 17, 12) == (9 * 17 + 17 + 9) / 129
