"""Gradients of a tiny transformer under LoRA, compared."""

import torch

from radial_attn import RadialConfig
from tests.support.tiny import wan_inputs

SPARSE = RadialConfig(decay_factor=0.25, block_size=16, decimation_width=64)


def gradients(transformer, **changes):
    """Gradient of the mean square output for every trainable parameter."""
    transformer.zero_grad()
    transformer(**(wan_inputs() | changes)).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
def video(transformer, steps=6, **changes):
    """Outputs of one denoising loop with guidance, as a pipeline would call."""
    timesteps = torch.linspace(1000, 100, steps)
    calls = [wan_inputs(timestep=float(t), seed=half, **changes) for t in timesteps for half in range(2)]
    return torch.stack([transformer(**inputs).sample for inputs in calls])


OPTIONS = {"dense_steps": 2, "dense_layers": 2, "dense_last_steps": 1, "num_steps": 6}
