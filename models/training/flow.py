"""Flow matching of each family as training sees it: videos and prompts encoded, and the velocity predicted.

A noisy latent is `(1 - sigma) video + sigma noise`, the velocity `noise - video`, sigma from 0 to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Text = dict[str, Tensor]  # one prompt's, under the names of the pipeline's arguments, without a batch
STEPS = 1000  # of a timestep between noise and video


@dataclass(frozen=True)
class Flow:
    """One family that can be trained.

    Attributes:
        encode_prompt: pipeline and prompt to the text arguments of its call, of a batch of one.
        predict: `(transformer, noisy latents, sigma, text, guidance)` to the velocity.
    """

    encode_prompt: Callable[[Any, str], Text]
    predict: Callable[[torch.nn.Module, Tensor, Tensor, Text, float], Tensor]


@torch.no_grad()
def encode_video(pipeline: Any, video: Tensor) -> Tensor:
    """Latents `[B, C, F, h, w]`, scaled for the transformer, of videos `[B, 3, frames, height, width]`.

    Values of a video are in [-1, 1]. The mean of the posterior is taken, so that the same video always gives
    the same latents.
    """
    vae = pipeline.vae
    latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode()
    return scaled(latents.float(), vae.config)


@torch.no_grad()
def encode_text(pipeline: Any, family: str, prompt: str) -> Text:
    """What the pipeline's call takes for a prompt, without the dimension of the batch."""
    return {name: x[0] for name, x in FLOWS[family].encode_prompt(pipeline, prompt).items()}


def stack_text(texts: Sequence[Text]) -> Text:
    """The prompts of a batch, as the pipeline's call takes them."""
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
    """The transformer's velocity, as `noisy` `[B, C, F, h, w]`, at noise levels `[B]`.

    `guidance`: what a transformer with guidance distilled into it (HunyuanVideo) is told; others ignore it.
    """
    return FLOWS[family].predict(transformer, noisy, sigma, text, guidance)


def scaled(latents: Tensor, config: Any) -> Tensor:
    """Latents as a transformer takes them: by mean and deviation of each channel, by the VAE's factor."""
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
    """Mochi's timesteps rise towards the video, and its velocity points to it."""
    times, mask = STEPS * (1 - sigma), text["prompt_attention_mask"]
    return -transformer(noisy, text["prompt_embeds"], times, mask, return_dict=False)[0]


FLOWS = {
    "wan": Flow(_wan_text, _wan),
    "hunyuan_video": Flow(_hunyuan_text, _hunyuan),
    "mochi": Flow(_mochi_text, _mochi),
}
