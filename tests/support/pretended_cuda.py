"""Tensors on the CPU that say they are on a GPU, so that code takes its branches for CUDA and computes.

`with pretended_cuda(monkeypatch): on_gpu(tensor)`. Tensors that are computed from these, or made for the
device "cuda", pretend too. Kernels that only a GPU has are replaced by plain torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from radial_attn.kernels import flex
from radial_attn.kernels.blocks import op as blocks
from radial_attn.models.runtime import output_check

GPU, CPU = torch.device("cuda"), torch.device("cpu")
OPERATORS = (blocks.block_attention, blocks.block_attention_backward, output_check.sampled_error)


class OnGpu(torch.Tensor):
    """Marks a tensor."""


def on_gpu(x: Tensor) -> Tensor:
    return x.as_subclass(OnGpu)


class PretendedCuda(TorchFunctionMode):
    """Answers for marked tensors that they are on a GPU, and hands the mark on; counts the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self._operators = {operator._opoverload: operator._init_fn for operator in OPERATORS}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = tree_flatten((args, kwargs))[0]
        marked = any(isinstance(x, OnGpu) for x in given)
        if func == Tensor.device.__get__ and marked:
            self.asked += 1
            return GPU
        if func == Tensor.is_cuda.__get__:
            return marked
        if func is torch.device:
            return func(*args, **kwargs)
        if func in self._operators:  # Python inside, which asks too
            with self, torch.no_grad():
                return self._operators[func](*args, **kwargs)
        devices = [_device(x) for x in given]
        made = next((x for x in devices if x is not None), GPU if marked else CPU).type == "cuda"
        if func == Tensor.cpu:
            made = False
        if func == Tensor.copy_:
            made = isinstance(args[0], OnGpu)
        kwargs.pop("pin_memory", None)
        args, kwargs = tree_map(lambda x: CPU if _device(x) == GPU else x, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            output = func(*args, **kwargs)
        change = on_gpu if made else lambda x: x.as_subclass(Tensor) if isinstance(x, OnGpu) else x
        return tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, output)


def _device(x: object) -> torch.device | None:
    if isinstance(x, torch.device):
        return torch.device(x.type)
    return torch.device(x) if isinstance(x, str) and x in {"cuda", "cpu"} else None


def _dense_cuda(query: Tensor, key: Tensor, value: Tensor, scale: float) -> list[Tensor]:
    """Computes what the CUDA kernels of SDPA return: output, and log-sum-exp `[B, H, S]`."""
    scores = query.float() @ key.float().mT * scale
    return [(scores.softmax(-1) @ value.float()).to(query.dtype), scores.logsumexp(-1)]


def _flex(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: float) -> Tensor:
    """Computes what compiled FlexAttention does, from the mask_mod alone."""
    batch, heads, tokens, _ = query.shape
    keep = create_mask(block_mask.mask_mod, batch, heads, tokens, tokens, device="cpu")
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=keep, scale=scale)


@contextmanager
def pretended_cuda(patch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    """Pretends that there is one GPU of compute capability 9.0."""
    generator = torch.Generator
    patch.setattr(torch, "Generator", lambda device=CPU: generator("cpu"))
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended GPU")
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    patch.setattr(blocks, "dense_cuda", _dense_cuda)
    patch.setattr(flex, "_compiled", lambda mask: _flex)
    patch.setattr(flex, "compiler_problem", lambda device: None)
    with PretendedCuda() as mode:
        yield mode
