"""Serves vLLM-Omni as a kernel of its entry point `vllm_omni.sparse_attn`; imports nothing of it.

Written against pull request 4493 of vllm-project/vllm-omni (commit ef4a8b5; a later revision passes the
same), which was open then. This has not run in vLLM-Omni: tests/support/vllm_omni.py has the tested contract.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radial_attn import TokenGrid, radial_attention, radial_mask

from .published import WAN_14B
from .runtime.schedule import Schedule

MASK_OPTIONS = (
    *("decay_factor", "block_size", "sink", "neighbour", "decimation_width", "pattern"),
    *("density", "compat"),
)
SCHEDULE_OPTIONS = ("dense_steps", "dense_last_steps", "num_steps")


@torch.compiler.disable(recursive=True)
def attention(  # noqa: PLR0917 (the plugin's contract)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any],
    is_causal: bool,
    softmax_scale: float,
) -> Tensor:
    """Computes radial self-attention of a video, as vLLM-Omni calls its plugins.

    Dense attention serves dense steps and, with a warning, calls of which the framework does not say what the
    mask or the schedule needs. Which layer calls it does not say either, so none stays dense at every step.

    Args:
        query, key, value: `[B, S, H, D]`, video tokens frame by frame.
        params: options of `radial_attn.enable` by name: those of the mask, `dense_steps`, `dense_last_steps`,
            `num_steps`, `backend`; where left out, as published for Wan2.1 T2V 14B. From the framework
            `total_latent_frames`, `patches_per_frame`, `denoise_step_idx` and `total_denoise_steps`, numbers
            or tensors `[B]`. Others are ignored.
        softmax_scale: factor on the scores.

    Returns:
        `[B, S, H, D]`.

    Raises:
        ValueError: causal attention, an option with a wrong value, `dense_layers`, or samples that differ in
            step or size.
    """
    if is_causal:
        raise ValueError("is_causal must be False: radial attention looks both ways in time")
    if "dense_layers" in params:
        raise ValueError("dense_layers must be left out: vLLM-Omni does not say which layer calls")
    config = WAN_14B.mask({name: params[name] for name in MASK_OPTIONS if name in params})
    plan = {"dense_steps": WAN_14B.dense_share}
    plan |= {name: params[name] for name in SCHEDULE_OPTIONS if name in params}
    schedule = Schedule(**plan)
    step, total = _number(params, "denoise_step_idx"), _number(params, "total_denoise_steps")
    frames, patches = _number(params, "total_latent_frames"), _number(params, "patches_per_frame")
    unknown = None
    if frames is None or patches is None or not query.shape[1] == key.shape[1] == frames * patches:
        unknown = f"it is not total_latent_frames={frames} times patches_per_frame={patches}"
    elif step is None and (schedule.dense_steps or schedule.dense_last_steps):
        unknown = "denoise_step_idx is not known; set dense_steps=0 dense_last_steps=0"
    if unknown is not None:
        warnings.warn(f"dense attention for a sequence of {query.shape[1]} tokens: {unknown}", stacklevel=2)
    if unknown is not None or (step is not None and schedule.is_dense(step, total)):
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*tensors, scale=softmax_scale).transpose(1, 2)
    mask = radial_mask(TokenGrid(frames, 1, patches), config)
    return radial_attention(
        query, key, value, mask, backend=params.get("backend", "auto"), scale=softmax_scale
    )


def _number(params: Mapping[str, Any], name: str) -> int | None:
    """Reads a number that may be a tensor with an entry for each sample; ValueError if samples differ."""
    if params.get(name) is None:
        return None
    numbers = set(torch.as_tensor(params[name]).flatten().tolist())
    if len(numbers) != 1:
        raise ValueError(f"{name} must be the same for all samples of a batch, got {sorted(numbers)}")
    return int(numbers.pop())
