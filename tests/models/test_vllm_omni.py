"""The plugin for vLLM-Omni keeps to the contract of its sparse attention."""

import inspect
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.models.published import WAN
from tests.support.tiny import randoms
from tests.support.vllm_omni import forward, plugin

GRID = TokenGrid(6, 4, 8)
STATIC = {"block_size": 16, "decimation_width": 32}
SHAPE = {"total_latent_frames": 6, "patches_per_frame": 32}
KERNEL = plugin("radial_attn")


@pytest.fixture
def tensors():
    return randoms(0)(3, 2, GRID.tokens, 2, 16).unbind(0)


def dense(tensors):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)


def at_step(step, total=10, **more):
    """What the framework publishes: tensors with an entry for each sample."""
    state = {"denoise_step_idx": step, "total_denoise_steps": total, **SHAPE, **more}
    return {name: torch.tensor([x] * 2) for name, x in state.items() if x is not None}


def test_the_entry_point_is_a_function_of_the_contract():
    names = ["query", "key", "value", "params", "is_causal", "softmax_scale"]
    assert list(inspect.signature(KERNEL).parameters) == names
    assert not [name for name in sys.modules if name.split(".")[0] in ("vllm", "vllm_omni")]


@pytest.mark.parametrize(("step", "is_dense"), [(0, True), (1, True), (2, False), (9, False)])
def test_the_published_share_of_the_steps_is_dense(step, is_dense, tensors):
    expected = dense(tensors)
    if not is_dense:
        expected = radial_attention(*tensors, radial_mask(GRID, RadialConfig(0.2, 16, True, "half", 32)))
    actual = forward(KERNEL, tensors, static=STATIC, per_forward=at_step(step))
    torch.testing.assert_close(actual, expected)
    assert (WAN.decay_factor, WAN.neighbour) == (0.2, "half")


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"decay_factor": 0.5, "sink": False}, RadialConfig(0.5, 16, False, "half", 32)),
        ({"density": 0.5}, RadialConfig(0.2, 16, True, "half", 32, density=0.5)),
        ({"backend": "reference"}, RadialConfig(0.2, 16, True, "half", 32)),
    ],
)
def test_options_are_those_of_the_mask_and_of_the_schedule(options, config, tensors):
    """What the framework passes on besides is ignored, and later tiers win."""
    static = STATIC | {"dense_steps": 0, "dense_last_steps": 1, "sink": True} | options
    expected = radial_attention(*tensors, radial_mask(GRID, config))
    for shape in (at_step(8), {"denoise_step_idx": 8, "total_denoise_steps": 10, **SHAPE}):
        actual = forward(KERNEL, tensors, static=static, per_forward=shape, extra={"kv_cache_dtype": "fp8"})
        torch.testing.assert_close(actual, expected)
    assert torch.equal(forward(KERNEL, tensors, static=static, per_forward=at_step(9)), dense(tensors))
    number = {"extra": {"dense_last_steps": 0}, "per_forward": SHAPE}
    torch.testing.assert_close(forward(KERNEL, tensors, static=static, **number), expected)


def test_the_mask_of_another_program(tensors):
    static = {"compat": "authors-2025-06", "block_size": 64, "dense_steps": 0}
    config = RadialConfig(0.2, 64, compat="authors-2025-06")
    actual = forward(KERNEL, tensors, static=static, per_forward=SHAPE)
    torch.testing.assert_close(actual, radial_attention(*tensors, radial_mask(GRID, config)))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, "total_latent_frames=None"),
        ({"total_latent_frames": 5, "patches_per_frame": 32}, "5 times patches_per_frame=32"),
        (SHAPE, "denoise_step_idx is not known; set dense_steps=0"),
    ],
)
def test_what_is_not_published_is_dense_with_a_warning(state, reason, tensors):
    with pytest.warns(UserWarning, match=f"dense attention for a sequence of 192 tokens: .*{reason}"):
        assert torch.equal(forward(KERNEL, tensors, static=STATIC, per_forward=state), dense(tensors))


def test_a_sparse_call_warns_of_nothing(tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(KERNEL, tensors, static=STATIC, per_forward=at_step(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"causal": True}, "is_causal must be False"),
        ({"attn_mask": torch.ones(2, 192)}, "does not advertise supports_attention_mask"),
        ({"static": {"dense_layers": 1}}, "dense_layers must be left out: vLLM-Omni does not say"),
        ({"static": {"block_size": 100}}, "block_size must be one of"),
        ({"static": {"dense_steps": "soon"}}, "dense_steps must be a number of first steps"),
        ({"per_forward": at_step(3, total=None)}, "num_steps=None: give num_steps"),
        (
            {"per_forward": SHAPE | {"denoise_step_idx": torch.tensor([1, 2])}},
            r"denoise_step_idx must be the same for all samples of a batch, got \[1, 2\]",
        ),
    ],
)
def test_what_the_plugin_refuses(arguments, message, tensors):
    with pytest.raises(ValueError, match=message):
        forward(KERNEL, tensors, **arguments)
