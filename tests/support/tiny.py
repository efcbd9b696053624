"""Tiny random models with all parts, built offline in under a second: for tests of any file."""

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

TEXT_DIM = 16
CHANNELS = 4
HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
WAN = {
    **HEADS,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 64,
}
T5 = {"vocab_size": 32, "d_model": TEXT_DIM, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def seeded(seed: int, make: Callable[..., Any], *args: object, **settings: object) -> Any:
    """Makes a random model in eval mode, the same for each seed."""
    torch.manual_seed(seed)
    return make(*args, **settings).eval()


def randoms(seed: int) -> Callable[..., torch.Tensor]:
    """Returns a function that makes normal tensors, the same for each seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def first(lengths: Sequence[int], tokens: int) -> torch.Tensor:
    """Marks the first tokens of each sample: bool `[B, tokens]`."""
    return torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Hides the progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wan_transformer(seed: int = 0, **changes: object) -> WanTransformer3DModel:
    """Makes a random Wan transformer in eval mode: 4 layers, 2 heads of 12, patch (1, 2, 2) by default."""
    return seeded(seed, WanTransformer3DModel, **{**WAN, "patch_size": (1, 2, 2)} | changes)


def wan_inputs(
    frames: int = 6,
    height: int = 12,
    width: int = 16,
    *,
    batch: int = 1,
    timestep: float = 500.0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Returns arguments of a call: latents `[batch, 4, frames, height, width]`, 7 text tokens."""
    make = randoms(seed)
    return {
        "hidden_states": make(batch, CHANNELS, frames, height, width),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": make(batch, 7, TEXT_DIM),
    }


def wan_tokenizer() -> T5Tokenizer:
    """Makes a T5 tokenizer of single letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)


def wan_text_encoder(seed: int = 0) -> UMT5EncoderModel:
    """Makes a random one-layer UMT5 encoder of width 16 in eval mode."""
    return seeded(seed, UMT5EncoderModel, UMT5Config(**T5))


def t5_pipeline(cls: type[DiffusionPipeline], seed: int, **parts: object) -> DiffusionPipeline:
    """Makes a pipeline of the class with a random one-layer T5 encoder, as Mochi and LTX-Video have."""
    encoder = seeded(seed, T5EncoderModel, T5Config(**T5))
    return quiet(cls(tokenizer=wan_tokenizer(), text_encoder=encoder, **parts))


def wan_vae(seed: int = 0, **changes: object) -> AutoencoderKLWan:
    """Makes a random Wan VAE in eval mode: 4 latent channels, 8 times smaller in space, 4 times in time."""
    latents = {"z_dim": CHANNELS, "latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    return seeded(seed, AutoencoderKLWan, **{"base_dim": 4, "num_res_blocks": 1, **latents} | changes)


def assemble(cls: type[DiffusionPipeline], seed: int, **parts: object) -> DiffusionPipeline:
    """Makes a pipeline of the class with Wan's text encoder, VAE and scheduler."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    parts |= {"tokenizer": wan_tokenizer(), "text_encoder": wan_text_encoder(seed), "vae": wan_vae(seed)}
    return quiet(cls(scheduler=UniPCMultistepScheduler(**flow), **parts))


def wan_pipeline(seed: int = 0, experts: int = 1, **changes: object) -> WanPipeline:
    """Makes a random WanPipeline; `experts=2` as Wan2.2 A14B; `changes` go to its transformers."""
    two = {"transformer_2": wan_transformer(seed + 1, **changes), "boundary_ratio": 0.8}
    parts = two if experts == 2 else {"transformer_2": None}
    return assemble(WanPipeline, seed, transformer=wan_transformer(seed, **changes), **parts)
