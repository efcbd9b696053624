"""Transformers of published sizes, and the arguments of their calls at a preset's size, on CUDA tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep
from torch import Tensor

from radial_attn import RadialConfig, TokenGrid
from scripts.run.config import read_config
from scripts.run.hub_models import HUB_MODELS
from tests.support.plans import plan_of

Arguments = dict[str, Any]
TEXT = 256  # tokens of HunyuanVideo and Mochi
SOUND = 207  # of each channel of MiniMax-H3's


def empty(*sizes: int) -> Tensor:
    """Returns a tensor on CUDA without values, in the default dtype."""
    return torch.empty(1, *sizes, device="cuda")


def mask(tokens: int, valid: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """Returns which text tokens are valid, `[1, T]` on CUDA, with values that are known."""
    return (torch.arange(tokens) < valid)[None].to("cuda", dtype)


def wan(grid: TokenGrid, time: Tensor, valid: int, channels: int = 16) -> Arguments:
    latents = empty(channels, grid.frames, 2 * grid.height, 2 * grid.width)
    return {"hidden_states": latents, "timestep": time, "encoder_hidden_states": empty(512, 4096)}


def of_image(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    return wan(grid, time, valid, channels=36) | {"encoder_hidden_states_image": empty(257, 1280)}


def anyflow(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    times = time.expand(1, grid.frames).float()
    latents = empty(grid.frames, 16, 2 * grid.height, 2 * grid.width)
    return wan(grid, times, valid) | {"hidden_states": latents, "r_timestep": times / 2}


def animate(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    pose = empty(16, grid.frames - 1, 2 * grid.height, 2 * grid.width)
    face = empty(3, 4 * (grid.frames - 2) + 1, 512, 512)
    return of_image(grid, time, valid) | {"pose_hidden_states": pose, "face_pixel_values": face}


def cosmos(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    size = grid.frames, 2 * grid.height, 2 * grid.width
    return {
        "hidden_states": empty(16, *size),
        "timestep": (time / 1000).reshape(1, 1, 1, 1, 1).expand(1, 1, grid.frames, 1, 1),
        "encoder_hidden_states": empty(512, 1024),
        "condition_mask": empty(1, *size),
        "fps": 16,
    }


def hunyuan(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    return wan(grid, time, valid) | {
        "encoder_hidden_states": empty(TEXT, 4096),
        "encoder_attention_mask": mask(TEXT, valid, torch.bfloat16),
        "pooled_projections": empty(768),
        "guidance": torch.empty(1, device="cuda"),
    }


def hunyuan15(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    """Takes no image: its embeddings are zeros."""
    return {
        "hidden_states": empty(65, grid.frames, grid.height, grid.width),
        "timestep": time,
        "encoder_hidden_states": empty(1000, 3584),
        "encoder_attention_mask": mask(1000, valid, torch.bfloat16),
        "encoder_hidden_states_2": empty(256, 1472),
        "encoder_attention_mask_2": mask(256, 0, torch.bfloat16),
        "image_embeds": torch.zeros(1, 729, 1152, device="cuda"),
    }


def motif(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    return wan(grid, time, valid, channels=33) | {"encoder_attention_mask": mask(512, valid)}


def mochi(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    given = {"encoder_hidden_states": empty(TEXT, 4096), "encoder_attention_mask": mask(TEXT, valid)}
    return wan(grid, time, valid, channels=12) | given


def ltx(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    return {
        "hidden_states": empty(grid.tokens, 128),
        "timestep": time,
        "encoder_hidden_states": empty(128, 4096),
        "encoder_attention_mask": mask(128, valid),
        "num_frames": grid.frames,
        "height": grid.height,
        "width": grid.width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def ltx2(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    sound = {"audio_hidden_states": empty(126, 128), "audio_num_frames": 126, "sigma": time}
    texts = {f"{of}encoder_hidden_states": empty(1024, 3840) for of in ("", "audio_")}
    masks = {f"{of}encoder_attention_mask": mask(1024, valid) for of in ("", "audio_")}
    given = ltx(grid, time, valid) | sound | texts | masks
    del given["rope_interpolation_scale"]
    return given


def kandinsky(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    sizes = grid.frames, grid.height, grid.width
    return {
        "hidden_states": empty(grid.frames, 2 * grid.height, 2 * grid.width, 33),
        "timestep": time,
        "encoder_hidden_states": empty(valid, 3584),
        "pooled_projections": empty(768),
        "visual_rope_pos": [torch.arange(size, device="cuda") for size in sizes],
        "text_rope_pos": torch.arange(valid, device="cuda"),
    }


def minimax_h3(grid: TokenGrid, time: Tensor, valid: int) -> Arguments:
    """Takes 124 frames of 768 x 1344 pixels, 5.2 seconds of sound in two channels, and no keyframe."""
    sizes, text = (grid.frames, 2 * grid.height, 2 * grid.width, SOUND), torch.ones(valid).long()
    packed = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        text, *sizes, (1, 2, 2), audio_channels=2, audio_tag=2, video_tag=0, keyframe_anchors=()
    )
    places, tags, video, audio, text = (x.to("cuda") for x in packed[:5])
    return {
        "hidden_states": empty(len(video), 96),
        "audio_hidden_states": empty(len(audio), 32),
        "encoder_hidden_states": empty(valid, 5120),
        "timestep": time.expand(2) / 1000,
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": places,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


@dataclass(frozen=True)
class Real:
    """Describes the calls of a published transformer: its row of `FULL_SIZE`, its preset, their arguments.

    `call` gets the grid, a timestep `[1]` and how many text tokens are valid; `few`: makes a model of two
    layers; `rises`: time goes from 0 up; `changes`: from the published model.
    """

    model: str
    preset: str
    call: Callable[[TokenGrid, Tensor, int], Arguments]
    few: dict[str, int] = field(default_factory=lambda: {"num_layers": 2})
    rises: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> tuple[TokenGrid, RadialConfig, int]:
        """Returns the grid and the mask of the preset, and the width of the feed-forward layers."""
        config = read_config(f"configs/{self.preset}.yaml", [])
        plan = plan_of(config, HUB_MODELS[config.model.path], "cuda")
        return plan.grid, plan.mask, plan.model.ffn

    def make(self, *, few: bool) -> torch.nn.Module:
        """Makes the transformer, or one with two of its layers."""
        name, changes = FULL_SIZE[self.model]
        changes = changes | self.changes | (self.few if few else {})
        return getattr(diffusers, f"{name}Transformer3DModel")(**changes)


SMALLER = {"num_attention_heads": 12, "num_layers": 30}
TI2V = {"num_attention_heads": 24, "num_layers": 30, "in_channels": 48, "out_channels": 48}
KANDINSKY_LITE = {"model_dim": 1792, "ff_dim": 7168, "visual_cond": True}
KANDINSKY_LITE |= {"in_visual_dim": 16, "out_visual_dim": 16}
KANDINSKY_PRO = {"model_dim": 4096, "num_visual_blocks": 60, "axes_dims": (32, 48, 48)}
BIG, OF_IMAGES = {"num_attention_heads": 40, "num_layers": 40}, {"in_channels": 36, "image_dim": 1280}
MOTIF = {"num_attention_heads": 12, "num_layers": 12, "num_single_layers": 24, "num_decoder_layers": 8}
COSMOS_2B = {"num_attention_heads": 16, "in_channels": 17}
COSMOS_14B = {"num_attention_heads": 40, "num_layers": 36}
FULL_SIZE = {
    "Wan2.1 T2V 14B": ("Wan", {}),
    "Wan2.1 T2V 1.3B": ("Wan", SMALLER),
    "Wan2.1 I2V 14B": ("Wan", OF_IMAGES),
    "Wan2.2 I2V A14B": ("Wan", {"in_channels": 36}),
    "Wan2.2 TI2V 5B": ("Wan", TI2V),
    "SkyReels-V2 14B": ("SkyReelsV2", BIG),
    "SkyReels-V2 DF 1.3B": ("SkyReelsV2", SMALLER | {"inject_sample_info": True}),
    "SkyReels-V2 I2V 14B": ("SkyReelsV2", BIG | OF_IMAGES),
    "SkyReels-V2 I2V 1.3B": ("SkyReelsV2", SMALLER | OF_IMAGES),
    "ChronoEdit 14B": ("ChronoEdit", OF_IMAGES),
    "AnyFlow 14B": ("AnyFlow", {}),
    "AnyFlow 1.3B": ("AnyFlow", SMALLER),
    "Wan-Animate 14B": ("WanAnimate", {}),
    "HunyuanVideo": ("HunyuanVideo", {}),
    "HunyuanVideo I2V": ("HunyuanVideo", {"image_condition_type": "token_replace"}),
    "HunyuanVideo 1.5": ("HunyuanVideo15", {}),
    "Mochi 1": ("Mochi", {}),
    "LTX-Video": ("LTXVideo", {}),
    "MotifVideo 2B": ("MotifVideo", MOTIF),
    "Cosmos 7B": ("Cosmos", {}),
    "Cosmos 14B": ("Cosmos", COSMOS_14B),
    "Cosmos Predict 2B": ("Cosmos", COSMOS_2B),
    "Cosmos Predict 14B": ("Cosmos", COSMOS_14B | {"in_channels": 17}),
    "LTX-2": ("LTX2Video", {}),
    "MiniMax-H3": ("MiniMaxH3", {}),
    "Kandinsky 5.0 Lite": ("Kandinsky5", KANDINSKY_LITE),
    "Kandinsky 5.0 Pro": ("Kandinsky5", KANDINSKY_PRO),
}
BOTH = {"num_layers": 1, "num_single_layers": 1}
NO_PADDING = {"concat_padding_mask": False}  # the mask of padded pixels, a channel that needs torchvision
FACE = {"num_layers": 2, "inject_face_latents_blocks": 2}
REAL = {
    "wan-1.3b": Real("Wan2.1 T2V 1.3B", "wan2.1_t2v_1.3b", wan),
    "wan-14b": Real("Wan2.1 T2V 14B", "wan2.1_t2v_14b", wan),
    "wan2.2-a14b": Real("Wan2.1 T2V 14B", "wan2.2_t2v_a14b", wan),
    "skyreels": Real("SkyReels-V2 14B", "skyreels_v2_t2v_14b", wan),
    "chronoedit": Real("ChronoEdit 14B", "chronoedit_14b", of_image),
    "anyflow": Real("AnyFlow 14B", "anyflow_t2v_14b", anyflow),
    "wan_animate": Real("Wan-Animate 14B", "wan2.2_animate_14b", animate, FACE),
    "hunyuan": Real("HunyuanVideo", "hunyuan_t2v", hunyuan, BOTH),
    "hunyuan15": Real("HunyuanVideo 1.5", "hunyuan15_t2v", hunyuan15),
    "mochi": Real("Mochi 1", "mochi_t2v", mochi, rises=True),
    "ltx": Real("LTX-Video", "ltx_t2v", ltx),
    "ltx2": Real("LTX-2", "ltx2_t2v", ltx2),
    "motif": Real(
        "MotifVideo 2B",
        "motif_t2v",
        motif,
        {"num_layers": 1, "num_single_layers": 2, "num_decoder_layers": 1},
    ),
    "minimax_h3": Real("MiniMax-H3", "minimax_h3", minimax_h3, rises=True),
    "cosmos": Real("Cosmos Predict 2B", "cosmos_predict2_2b", cosmos, changes=NO_PADDING),
    "kandinsky5": Real("Kandinsky 5.0 Lite", "kandinsky5_t2v_lite", kandinsky, {"num_visual_blocks": 2}),
}
