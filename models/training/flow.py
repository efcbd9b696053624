"""Encodes videos and prompts for flow-matching training, and predicts the velocity, for each family.

A noisy latent is `(1 - sigma) video + sigma noise`, the velocity `noise - video`, sigma from 0 to 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Text = dict[str, Tensor]  # a prompt's tensors by argument of the pipeline, without a batch dimension
STEPS = 1000  # timesteps between noise and video


@torch.no_grad()
def encode_video(pipeline: Any, video: Tensor) -> Tensor:
    """Returns latents `[B, C, F, h, w]` of videos, scaled for the transformer.

    `video` is `[B, 3, frames, height, width]` with values in [-1, 1]. Latents are the mean of the posterior,
    so the same video always gives the same latents.
    """
    vae = pipeline.vae
    latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode()
    return scaled(latents.float(), vae.config)


@torch.no_grad()
def encode_text(pipeline: Any, family: str, prompt: str) -> Text:
    """Returns the text arguments of the pipeline's call for a prompt, without the batch dimension."""
    match family:
        case "wan":
            unguided = {"do_classifier_free_guidance": False, "max_sequence_length": 512}
            batch = {"prompt_embeds": pipeline.encode_prompt(prompt, **unguided)[0]}
        case "hunyuan_video":
            names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
            batch = dict(zip(names, pipeline.encode_prompt(prompt), strict=True))
        case "mochi":
            text, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
            batch = {"prompt_embeds": text, "prompt_attention_mask": mask}
    return {name: x[0] for name, x in batch.items()}


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
    words, times = text["prompt_embeds"], STEPS * sigma
    match family:
        case "wan":
            velocity = transformer(noisy, times, words, return_dict=False)[0]
        case "hunyuan_video":
            plain = getattr(transformer, "module", transformer)  # without DDP's wrapper
            given = torch.full_like(sigma, STEPS * guidance) if plain.config.guidance_embeds else None
            mask, pooled = text["prompt_attention_mask"], text["pooled_prompt_embeds"]
            velocity = transformer(noisy, times, words, mask, pooled, guidance=given, return_dict=False)[0]
        case "mochi":  # its velocity points to the video, and its timesteps rise towards it
            times, mask = STEPS * (1 - sigma), text["prompt_attention_mask"]
            velocity = -transformer(noisy, words, times, mask, return_dict=False)[0]
    return velocity


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
