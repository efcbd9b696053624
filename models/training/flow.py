"""Serves flow-matching training of each family: encodes videos and prompts, and predicts the velocity.

A noisy latent is `(1 - sigma) video + sigma noise`, the velocity `noise - video`, sigma from 0 to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Text = dict[str, Tensor]  # a prompt's tensors by argument of the pipeline, without a batch dimension
STEPS = 1000  # timesteps between noise and video


@dataclass(frozen=True)
class Flow:
    """Describes one family that can be trained.

    Attributes:
        encode_prompt: from pipeline and prompt to the text arguments of its call, a batch of one.
        predict: from `(transformer, noisy latents, sigma, text, guidance)` to the velocity.
    """

    encode_prompt: Callable[[Any, str], Text]
    predict: Callable[[torch.nn.Module, Tensor, Tensor, Text, float], Tensor]


@torch.no_grad()
def encode_video(pipeline: Any, video: Tensor) -> Tensor:
    """Returns latents `[B, C, F, h, w]` of videos, scaled for the transformer.

    `video` is `[B, 3, frames, height, width]` with values in [-1, 1]. The mean of the posterior is taken: the
    same video always gives the same latents.
    """
    vae = pipeline.vae
    latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode()
    return scaled(latents.float(), vae.config)


@torch.no_grad()
def encode_text(pipeline: Any, family: str, prompt: str) -> Text:
    """Returns the text arguments of the pipeline's call for a prompt, without the batch dimension."""
    return {name: x[0] for name, x in FLOWS[family].encode_prompt(pipeline, prompt).items()}


def stack_text(texts: Sequence[Text]) -> Text:
    """Returns the prompts of a batch, as the pipeline's call takes them."""
    return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}


def predict_velocity(
    transformer: torch.nn.Module,
    family: str,
    noisy: Tensor,
    sigma: Tensor,
    text: Text,
    *,
    guidance: float = 1.0,
) -> Tensor:
    """Returns the transformer's velocity, as `noisy` `[B, C, F, h, w]`, at noise levels `sigma` `[B]`.

    `guidance` is passed to a transformer with guidance distilled into it (HunyuanVideo); others ignore it.
    """
    return FLOWS[family].predict(transformer, noisy, sigma, text, guidance)


def scaled(latents: Tensor, config: Any) -> Tensor:
    """Scales latents for a transformer: by mean and deviation of each channel, and by the VAE's factor."""
    factor = getattr(config, "scaling_factor", None) or 1.0
    if getattr(config, "latents_mean", None) is None:
        return latents * factor
    mean, deviation = (
        torch.tensor(values, device=latents.device).view(-1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return (latents - mean) / deviation * factor


def _wan_text(pipeline: Any, prompt: str) -> Text:
    text, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    return {"prompt_embeds": text}


def _hunyuan_text(pipeline: Any, prompt: str) -> Text:
    names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    return dict(zip(names, pipeline.encode_prompt(prompt), strict=True))


def _mochi_text(pipeline: Any, prompt: str) -> Text:
    text, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return {"prompt_embeds": text, "prompt_attention_mask": mask}


def _wan(transformer: torch.nn.Module, noisy: Tensor, sigma: Tensor, text: Text, guidance: float) -> Tensor:
    return transformer(noisy, STEPS * sigma, text["prompt_embeds"], return_dict=False)[0]


def _hunyuan(
    transformer: torch.nn.Module, noisy: Tensor, sigma: Tensor, text: Text, guidance: float
) -> Tensor:
    distilled = getattr(transformer, "module", transformer).config.guidance_embeds  # without DDP's wrapper
    return transformer(
        noisy,
        STEPS * sigma,
        text["prompt_embeds"],
        text["prompt_attention_mask"],
        text["pooled_prompt_embeds"],
        guidance=torch.full_like(sigma, STEPS * guidance) if distilled else None,
        return_dict=False,
    )[0]


def _mochi(transformer: torch.nn.Module, noisy: Tensor, sigma: Tensor, text: Text, guidance: float) -> Tensor:
    """Negates Mochi's velocity, which points to the video, as its timesteps rise towards it."""
    times, mask = STEPS * (1 - sigma), text["prompt_attention_mask"]
    return -transformer(noisy, text["prompt_embeds"], times, mask, return_dict=False)[0]


FLOWS = {
    "wan": Flow(_wan_text, _wan),
    "hunyuan_video": Flow(_hunyuan_text, _hunyuan),
    "mochi": Flow(_mochi_text, _mochi),
}
