"""One short generation through a tiny pipeline."""

import torch


def generate(pipeline, steps=3, *, frames=13, size=(64, 96), guidance=1.0, prompt="a red dot", **more):
    return pipeline(
        prompt,
        height=size[0],
        width=size[1],
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=16,
        output_type="latent",
        **({"generator": torch.Generator().manual_seed(0)} | more),
    ).frames
