"""Stands for ComfyUI's core: calls attention as it does, with an override, in its layouts.

The classes have the names and attributes by which the node pack knows a model; their layers are random
projections with attention over the same sequences as in the real ones.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.tiny import randoms

HEADS, WIDTH, PATCH = 2, 8, (1, 2, 2)
OVERRIDE = "optimized_attention_override"


def core_attention(  # noqa: PLR0917 (as ComfyUI's)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **options: Any,
) -> Tensor:
    """Computes dense attention; `[B, S, H * D]`, or `[B, H, S, D]` where a reshape is skipped."""
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    bias = mask if mask is None or mask.ndim == 4 else mask.unsqueeze(1)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """Computes attention by the override in `transformer_options`, else by the core."""
    override = kwargs["transformer_options"].get(OVERRIDE)
    if override is None:
        return core_attention(*args, **kwargs)
    return override(core_attention, *args, **kwargs, _inside_attn_wrapper=True)


class Projections:
    """Holds query, key and value of each layer of a model: random matrices of width `HEADS * WIDTH`."""

    def __init__(self, layers: int) -> None:
        make = randoms(1)
        self.layers = [[make(HEADS * WIDTH, HEADS * WIDTH) / 4 for _ in range(3)] for _ in range(layers)]

    def of(self, layer: int, tokens: Tensor, context: Tensor | None = None) -> list[Tensor]:
        context = tokens if context is None else context
        query, key, value = self.layers[layer]
        return [tokens @ query, context @ key, context @ value]


def to_tokens(latents: Tensor) -> Tensor:
    """Cuts latents `[B, 4, F, H, W]` into tokens `[B, F * H/2 * W/2, 16]`."""
    patches = latents.unfold(3, 2, 2).unfold(4, 2, 2)
    return patches.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(1, 3)


class WanModel:
    """Self-attention over the video, then cross-attention, in layout `[B, S, H * D]`."""

    patch_size, in_dim, out_dim, dim, num_heads = PATCH, 4, 4, HEADS * WIDTH, HEADS
    ref_conv = None
    modern = False  # a newer core tells sizes and the number of the block

    def __init__(self, layers: int = 3) -> None:
        self.blocks, self.projections = range(layers), Projections(layers)

    def __call__(self, latents: Tensor, options: dict[str, Any], context: Tensor, **arguments: Any) -> Tensor:
        x, kwargs = to_tokens(latents), {"heads": HEADS, "transformer_options": options}
        if self.modern:
            options["grid_sizes"] = tuple(
                size // patch for size, patch in zip(latents.shape[2:], PATCH, strict=True)
            )
        reference = arguments.get("reference_latent")
        if reference is not None:
            x = torch.cat([to_tokens(reference.unsqueeze(2)), x], 1)
        for layer in self.blocks:
            if self.modern:
                options["block_index"] = layer
            x = x + attention(*self.projections.of(layer, x), **kwargs)
            x = x + attention(*self.projections.of(layer, x, context), **kwargs)
        return x


class HunyuanVideo:
    """Joint attention over video and text in layout `[B, H, S, D]`, after a refiner over the text."""

    patch_size, in_channels, out_channels, hidden_size, num_heads = list(PATCH), 4, 4, HEADS * WIDTH, HEADS
    modern = False  # a newer core puts the text first

    def __init__(self, double: int = 2, single: int = 2) -> None:
        self.double_blocks = [SimpleNamespace(flipped_img_txt=not self.modern) for _ in range(double)]
        self.single_blocks, self.projections = range(single), Projections(double + single)

    def __call__(self, latents: Tensor, options: dict[str, Any], context: Tensor, **arguments: Any) -> Tensor:
        kwargs = {"skip_reshape": True, "transformer_options": options}

        def heads(layer: int, x: Tensor) -> list[Tensor]:
            return [part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.projections.of(layer, x)]

        video, mask = to_tokens(latents), arguments.get("attention_mask")
        refiner = None if mask is None else mask[:, None].expand(-1, mask.shape[1], -1)
        text = context + attention(*heads(0, context), HEADS, mask=refiner, **kwargs)
        x, bias = torch.cat([text, video] if self.modern else [video, text], 1), None
        if mask is not None:
            parts = [mask.new_zeros(len(mask), video.shape[1]), mask]
            bias = torch.cat(parts[::-1] if self.modern else parts, 1)[:, None]
        for layer in range(len(self.projections.layers)):
            x = x + attention(*heads(layer, x), HEADS, mask=bias, **kwargs)
        return x[:, text.shape[1] :] if self.modern else x[:, : video.shape[1]]


class NewHunyuanVideo(HunyuanVideo):
    """Joint attention with the text first."""

    modern = True


class Flux:
    """Makes images."""

    def __call__(self, latents: Tensor, options: dict[str, Any], context: Tensor, **arguments: Any) -> Tensor:
        x = to_tokens(latents)
        return attention(x, x, x, HEADS, transformer_options=options)


class Base:
    """Stands for the object that owns a diffusion model; calls it through the wrappers."""

    model_sampling = SimpleNamespace(percent_to_sigma=lambda percent: 1 - percent)

    def __init__(self, model: Any) -> None:
        self.diffusion_model = model

    def apply_model(
        self, wrapper: Callable[..., Any] | None, x: Tensor, t: Tensor, **arguments: Any
    ) -> Tensor:
        """Calls the model, within the wrapper if there is one."""

        def call(x: Tensor, t: Tensor, *given: Any, **more: Any) -> Tensor:
            _, context, _, options = given
            return self.diffusion_model(x, dict(options), context, **more)  # newer cores pass a copy

        call.class_obj = self
        names = ("c_concat", "c_crossattn", "control", "transformer_options")
        given = [arguments.pop(name, None) for name in names]
        return (
            call(x, t, *given, **arguments) if wrapper is None else wrapper(call, x, t, *given, **arguments)
        )


class Patcher:
    """Stands for a model patcher: clones, wrappers, callbacks and attachments."""

    def __init__(self, model: Any) -> None:
        self.model, self.wrappers, self.callbacks, self.attachments = model, {}, {}, {}

    def clone(self) -> "Patcher":
        other = Patcher(self.model)
        for name in ("wrappers", "callbacks"):
            setattr(other, name, {key: list(value) for key, value in getattr(self, name).items()})
        other.attachments = dict(self.attachments)
        return other

    def get_model_object(self, name: str) -> Any:
        return self.model

    def set_attachments(self, key: str, value: Any) -> None:
        self.attachments[key] = value

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault((kind, key), []).append(wrapper)

    def add_callback_with_key(self, kind: str, key: str, callback: Callable[..., Any]) -> None:
        self.callbacks.setdefault((kind, key), []).append(callback)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.pop((kind, key), None)

    def remove_callbacks_with_key(self, kind: str, key: str) -> None:
        self.callbacks.pop((kind, key), None)
