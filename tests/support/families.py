"""The families of transformers that tests run through one body, and what their outputs are compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.models import (
    anyflow,
    chronoedit,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    mochi,
    skyreels,
    wan,
    wan_animate,
    wan_vace,
)
from tests.support.tiny import wan_inputs, wan_transformer
from tests.support.tiny_hunyuan import (
    GLYPHS,
    IMAGE,
    TEXT,
    hunyuan15_inputs,
    hunyuan15_transformer,
    hunyuan_inputs,
    hunyuan_transformer,
)
from tests.support.tiny_kandinsky import kandinsky5_inputs, kandinsky5_transformer
from tests.support.tiny_ltx import ltx_inputs, ltx_transformer
from tests.support.tiny_mochi import mochi_inputs, mochi_transformer
from tests.support.tiny_wan import vace_inputs, vace_transformer
from tests.support.tiny_wan_relatives import (
    animate_inputs,
    animate_transformer,
    anyflow_inputs,
    anyflow_transformer,
    chronoedit_transformer,
    skyreels_transformer,
)

SPARSE = RadialConfig(decay_factor=0.25, block_size=16, decimation_width=64)
FULL = RadialConfig(decay_factor=1e6, block_size=16, decimation_width=1)
DENSE = RadialConfig(block_size=16, pattern="dense")
SIZE = (6, 6, 8)  # frames, height, width in tokens, unless a test says otherwise
PADDED = ({}, {"lengths": (4,)}, {"lengths": (4, TEXT)}, {"lengths": (3, 1, 7)})


@dataclass(frozen=True)
class Family:
    """Holds a tiny transformer, the arguments of its calls (`frames, height, width` of latents), its fork.

    `samples`: batches and valid text tokens that calls are made with, a padded batch last; `feeds`: the layer
    as which each attention layer counts; `patch`: latents to a token in height and width; `text`: text tokens
    of a call; `fewest`: frames of the shortest video.
    """

    name: str
    transformer: Callable[..., torch.nn.Module]
    inputs: Callable[..., dict]
    fork: ModuleType
    samples: tuple[dict, ...] = ({}, {"batch": 3})
    feeds: tuple[int, ...] = (0, 1, 2, 3)
    patch: int = 2
    text: int = 0
    fewest: int = 1

    @property
    def layers(self) -> int:
        return len(self.feeds)

    def sized(self, frames: int = 6, height: int = 6, width: int = 8, **more: object) -> dict:
        """Returns the arguments of a call whose grid has these sizes."""
        return self.inputs(frames, height * self.patch, width * self.patch, **more)

    def grid(self, *size: int) -> TokenGrid:
        return TokenGrid(*(size or SIZE), self.text)


LENGTHS = (5, 0), (1, 7), (7, 3), (7, 7), (5, 3)
FAMILIES = [
    Family("wan", wan_transformer, wan_inputs, wan),
    Family("wan_vace", vace_transformer, vace_inputs, wan_vace, feeds=(0, 2, 0, 1, 2, 3)),
    Family("skyreels", skyreels_transformer, wan_inputs, skyreels),
    Family("chronoedit", chronoedit_transformer, wan_inputs, chronoedit),
    Family("anyflow", anyflow_transformer, anyflow_inputs, anyflow),
    Family("wan_animate", animate_transformer, animate_inputs, wan_animate, fewest=2),
    Family("hunyuan_video", hunyuan_transformer, hunyuan_inputs, hunyuan_video, PADDED, text=TEXT),
    Family(
        "hunyuan_video15",
        hunyuan15_transformer,
        hunyuan15_inputs,
        hunyuan_video15,
        PADDED,
        patch=1,
        text=IMAGE + GLYPHS + TEXT,
    ),
    Family(
        "mochi",
        mochi_transformer,
        mochi_inputs,
        mochi,
        ({}, *({"lengths": lengths} for lengths in LENGTHS)),
        text=7,
    ),
    Family("ltx", ltx_transformer, ltx_inputs, ltx, patch=1),
    Family("kandinsky5", kandinsky5_transformer, kandinsky5_inputs, kandinsky5),
]
BY_NAME = {family.name: family for family in FAMILIES}
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
with_text = pytest.mark.parametrize("family", [x for x in FAMILIES if x.text], ids=lambda family: family.name)


class TokenMask(TorchFunctionMode):
    """Puts torch's SDPA under a token mask `[S, S]` while `on`; upstream may have cut padded text off."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask, self.on = mask, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            kwargs |= dict(zip(("query", "key", "value"), args, strict=False))
            if self.on:
                keys, padding = kwargs["key"].shape[-2], kwargs.get("attn_mask")
                mask = self.mask[:keys, :keys]
                kwargs["attn_mask"] = mask if padding is None else mask & padding
            args = ()
        return func(*args, **kwargs)


def masked_upstream(
    family: Family,
    transformer: torch.nn.Module,
    inputs: dict,
    size: tuple[int, ...] = SIZE,
    dense_layers: int = 0,
    *,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns upstream's output under a token mask, that of SPARSE by default, from `dense_layers` on."""
    mask = radial_mask(family.grid(*size), SPARSE).token_mask() if mask is None else mask
    mode, hooks = TokenMask(mask), []
    for number, attention in zip(family.feeds, family.fork.attention_layers(transformer), strict=True):
        on = number >= dense_layers
        hooks.append(attention.register_forward_pre_hook(lambda *_, on=on: setattr(mode, "on", on)))
        hooks.append(attention.register_forward_hook(lambda *_: setattr(mode, "on", False)))
    with mode:
        output = run(transformer, inputs)
    for hook in hooks:
        hook.remove()
    return output


@torch.no_grad()
def run(transformer: torch.nn.Module, inputs: dict | None = None) -> torch.Tensor:
    """Runs a transformer, with Wan's arguments by default."""
    return transformer(**(wan_inputs() if inputs is None else inputs)).sample


def video(
    family: Family, transformer: torch.nn.Module, steps: int = 4, halves: int = 2, **more: object
) -> torch.Tensor:
    """Runs a denoising loop of guidance halves, whose texts differ in length; that of the last is full."""
    times = torch.linspace(100, 1000, steps) if family.name == "mochi" else torch.linspace(1000, 100, steps)
    texts = [{"lengths": (4,)}, {}] if family.text else [{}, {}]
    calls = [
        family.sized(timestep=float(time), seed=half, **texts[half - halves], **more)
        for time in times
        for half in range(halves)
    ]
    return torch.stack([run(transformer, inputs) for inputs in calls])


def gradients(transformer: torch.nn.Module, *calls: dict) -> dict[str, torch.Tensor]:
    """Returns the gradients of all trainable parameters for the sum of the calls' mean square outputs."""
    transformer.zero_grad()
    sum(transformer(**inputs).sample.square().mean() for inputs in calls or [wan_inputs()]).backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
