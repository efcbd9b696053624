"""VAEs of every family that decode by several processes, run in tests/support/sharing_worker.py."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo15, AutoencoderKLWan

from radial_attn.models.parallel.decoding import ParallelDecode
from tests.support.tiny import CHANNELS, seeded, wan_vae
from tests.support.tiny_hunyuan import hunyuan_vae
from tests.support.tiny_ltx import ltx_vae
from tests.support.tiny_minimax_h3 import minimax_h3_vae
from tests.support.tiny_mochi import mochi_vae

SIDE, STRIDE = 64, 48  # pixels of a tile, and from one to the next


def patched_wan_vae() -> AutoencoderKLWan:
    """Makes a random one that decodes patches of 2 x 2 pixels, as that of Wan2.2 TI2V-5B."""
    return wan_vae(in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16)


def hunyuan15_vae() -> AutoencoderKLHunyuanVideo15:
    """Makes a random one, 4 times smaller in space."""
    ratios = {"spatial_compression_ratio": 4, "temporal_compression_ratio": 2}
    blocks = {"block_out_channels": (32, 64, 64), "layers_per_block": 1}
    return seeded(0, AutoencoderKLHunyuanVideo15, latent_channels=32, **blocks, **ratios)


def whole_frames(make: Callable[[], Any]) -> Any:
    """Makes it decode all frames at once."""
    vae = make()
    vae.use_framewise_decoding = False
    return vae


def cases() -> Iterator[tuple[str, Any, tuple[int, ...], int | None]]:
    """Yields name, VAE, shape of the latents, and tiles if they are known."""
    yield "wan", tiled(wan_vae()), (1, CHANNELS, 3, 11, 13), 6
    yield "wan, two videos in slices", sliced(tiled(wan_vae())), (2, CHANNELS, 2, 6, 9), 4
    yield "wan, patches", tiled(patched_wan_vae()), (1, CHANNELS, 2, 5, 7), 6
    yield "wan, not tiled", wan_vae(), (1, CHANNELS, 2, 6, 9), 1
    yield "hunyuan_video", tiled(hunyuan_vae()), (1, CHANNELS, 5, 9, 4), 4
    yield "hunyuan_video, tiles in time only", hunyuan_vae(), (1, CHANNELS, 6, 4, 4), 2
    yield "mochi", tiled(mochi_vae()), (1, 12, 3, 9, 4), 2
    yield "mochi, all frames at once", tiled(whole_frames(mochi_vae)), (1, 12, 1, 9, 4), 2
    yield "mochi, not tiled", mochi_vae(), (1, 12, 3, 4, 4), 1
    yield "ltx", tiled(ltx_vae()), (1, 8, 3, 20, 17), 4
    yield "minimax_h3", minimax_tiles(), (1, CHANNELS, 12, 5, 7), 8
    yield "hunyuan_video15", small_tiles(hunyuan15_vae()), (1, 32, 2, 6, 4), 4


def tiled(vae: Any) -> Any:
    """Gives it tiles of `SIDE` pixels."""
    sides = ("height", "width")
    minimum = {f"tile_sample_min_{side}": SIDE for side in sides}
    vae.enable_tiling(**minimum, **{f"tile_sample_stride_{side}": STRIDE for side in sides})
    return vae


def small_tiles(vae: Any) -> Any:
    """Gives it tiles of 4 latents, if it names those of the video too."""
    vae.enable_tiling(16, 16, 4, 4, 0.25)
    return vae


def minimax_tiles() -> Any:
    """Makes a random MiniMax-H3's VAE with tiles of `SIDE` pixels, which overlap by 16 or more."""
    vae = minimax_h3_vae()
    vae.enable_tiling(SIDE, SIDE, SIDE - STRIDE, SIDE - STRIDE)
    return vae


def sliced(vae: Any) -> Any:
    """Makes it decode one video of a batch at a time."""
    vae.use_slicing = True
    return vae


@torch.no_grad()
def measure(group: torch.distributed.ProcessGroup) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields tiles by process and as expected, whether equal to one process's, whether left as it was."""
    for name, vae, shape, tiles in cases():
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        alone = vae.decode(latents).sample
        with ParallelDecode(vae, group) as shared:
            together = vae.decode(latents).sample
            as_tuple = vae.decode(latents, return_dict=False)[0]
        leads = torch.distributed.get_rank(group) == 0
        equal = not leads or (torch.equal(together, alone) and torch.equal(as_tuple, alone))
        restored = "decode" not in vars(vae) and "forward" not in vars(vae.decoder)
        after = restored and torch.equal(vae.decode(latents).sample, alone)
        results = {"owners": shared.owners, "tiles": tiles, "equal": equal, "after": after}
        yield f"decode: {name}", results
