"""The families of transformers that tests run through one body, and upstream under a token mask."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.models import ltx, mochi, wan_vace
from tests.support.tiny_ltx import ltx_inputs, ltx_transformer
from tests.support.tiny_mochi import mochi_inputs, mochi_transformer
from tests.support.tiny_wan import vace_inputs, vace_transformer

SPARSE = RadialConfig(decay_factor=0.25, block_size=16, decimation_width=64)
FULL = RadialConfig(decay_factor=1e6, block_size=16, decimation_width=1)
DENSE = RadialConfig(block_size=16, pattern="dense")


@dataclass(frozen=True)
class Family:
    """A tiny transformer, the arguments of its calls (`frames, height, width` of latents), and its fork.

    `layers`: of attention; `patch`: latents to a token in height and width; `text`: text tokens of a call.
    """

    name: str
    transformer: Callable[..., torch.nn.Module]
    inputs: Callable[..., dict]
    fork: ModuleType
    layers: int = 4
    patch: int = 2
    text: int = 0

    def grid(self, frames: int = 6, height: int = 6, width: int = 8) -> TokenGrid:
        return TokenGrid(frames, height, width, self.text)

    def sized(self, frames: int = 6, height: int = 6, width: int = 8, **more: object) -> dict:
        """Arguments of a call whose grid has these sizes."""
        return self.inputs(frames, height * self.patch, width * self.patch, **more)


FAMILIES = [
    Family("mochi", mochi_transformer, mochi_inputs, mochi, text=7),
    Family("wan_vace", vace_transformer, vace_inputs, wan_vace, layers=6),
    Family("ltx", ltx_transformer, ltx_inputs, ltx, patch=1),
]


class TokenMask(TorchFunctionMode):
    """torch's SDPA over a video, padded text left out, under the token mask of SPARSE."""

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__()
        self.grid, self.mask = grid, radial_mask(grid, SPARSE).token_mask()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            kwargs |= dict(zip(("query", "key", "value"), args, strict=False))
            queries, keys = kwargs["query"].shape[-2], kwargs["key"].shape[-2]
            if queries == keys >= self.grid.video_tokens:
                kwargs["attn_mask"] = self.mask[:keys, :keys]
            args = ()
        return func(*args, **kwargs)


@torch.no_grad()
def run(transformer: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """The output of a call."""
    return transformer(**inputs).sample


def masked_upstream(transformer: torch.nn.Module, grid: TokenGrid, inputs: dict) -> torch.Tensor:
    """Upstream's output with the token mask of SPARSE in every layer."""
    with TokenMask(grid):
        return run(transformer, inputs)
