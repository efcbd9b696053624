"""Runs of tiny HunyuanVideo transformers, compared with upstream."""

import pytest
import torch

from radial_attn import RadialConfig
from tests.support.tiny_hunyuan import FAMILIES

SPARSE = RadialConfig(decay_factor=0.25, block_size=16, decimation_width=64)


FULL = RadialConfig(decay_factor=1e6, block_size=16, decimation_width=1)


DENSE = RadialConfig(block_size=16, pattern="dense")


families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@torch.no_grad()
def run(transformer, inputs):
    return transformer(**inputs).sample


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
