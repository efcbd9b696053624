"""Reads ComfyUI's calls: which are self-attention of a video, over which grid, in which layer and step.

Nothing here imports ComfyUI. Its core calls an attention override as
`f(func, q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, transformer_options=...)`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radial_attn import TokenGrid
from radial_attn.models.published import ModelTraits

# names of ComfyUI's core
OVERRIDE = "optimized_attention_override"  # key of `transformer_options`
APPLY_MODEL = "apply_model"  # kind of wrapper
ON_CLEANUP = "on_cleanup"  # kind of callback


class NotServedError(Exception):
    """Tells why a model or a call stays dense."""


@dataclass(frozen=True)
class Family:
    """Says where a class of ComfyUI's core has what is read from a model.

    Attributes:
        name: of the family in `radial_attn.models`.
        transformer: the class of diffusers with the same weights.
        stacks: attributes that hold the blocks, in order of execution.
        width: attribute with the channels of a token, or path to an attention with `heads` and `head_dim`.
        text_first: whether text, conditions and sound come before the video.
    """

    name: str
    transformer: str
    stacks: tuple[str, ...]
    width: str
    text_first: bool = False


FAMILIES = {
    "WanModel": Family("wan", "WanTransformer3DModel", ("blocks",), "dim"),
    "HunyuanVideo": Family(
        "hunyuan_video", "HunyuanVideoTransformer3DModel", ("double_blocks", "single_blocks"), "hidden_size"
    ),
    "AsymmDiTJoint": Family("mochi", "MochiTransformer3DModel", ("blocks",), "hidden_size_x"),
    "LTXVModel": Family("ltx", "LTXVideoTransformer3DModel", ("transformer_blocks",), "inner_dim"),
    "MiniMaxH3Model": Family("minimax_h3", "MiniMaxH3Transformer3DModel", ("blocks",), "blocks.0.attn", True),
}


def family_of(model: Any) -> Family:
    """Returns the family of a diffusion model of ComfyUI; NotServedError if it is in none."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise NotServedError(
        f"{type(model).__name__} stays dense: this node serves Wan, HunyuanVideo, Mochi, LTX-Video and "
        "MiniMax-H3"
    )


def traits_of(model: Any) -> ModelTraits:
    """Reads what tells a model apart, to find its published settings."""
    family = family_of(model)
    name, layers = family.transformer, sum(len(getattr(model, stack)) for stack in family.stacks)
    if getattr(model, "byt5_in", None) is not None:
        name = "HunyuanVideo15Transformer3DModel"
    channels, made = (
        getattr(model, f"{side}_dim", getattr(model, f"{side}_channels", None)) for side in ("in", "out")
    )
    image = None not in (channels, made) and channels > made
    a14b = image and getattr(model, "img_emb", None) is None
    width = attrgetter(family.width)(model)
    width = width if isinstance(width, int) else width.heads * width.head_dim
    return ModelTraits(name, width, layers, image, a14b)


@dataclass(frozen=True)
class Layout:
    """Describes the tokens of a call of the diffusion model: `[text] [reference] video [context or text]`.

    Attributes:
        sizes: frames, height and width of the video in tokens, after patching.
        leading: tokens in front of the video: reference frames.
        trailing: tokens at the end of the latents that are not frames of the video: LTX's keyframes.
        most_others: the most tokens that may lie outside frames, None for no limit.
        text_first: the text comes first, as in MiniMax-H3 and newer versions of HunyuanVideo.
        context: tokens of the text; a call over exactly as many is over the text alone.
        batch: samples.
        layers: the layer of each self-attention call, in order; None if each layer makes one call.
    """

    sizes: tuple[int, int, int]
    leading: int
    trailing: int
    most_others: int | None
    text_first: bool
    context: int
    batch: int
    layers: tuple[int, ...] | None

    def grid(self, tokens: int, options: Mapping[str, Any]) -> TokenGrid | None:
        """Returns the grid of a call over `tokens` tokens; those outside frames count as text.

        A newer core has the sizes in `options`. Returns None if the call is not over the video.
        """
        frames, height, width = (int(size) for size in options.get("grid_sizes", self.sizes))
        frames += (self.leading - self.trailing) // (height * width)
        text = tokens - frames * height * width
        most = text if self.most_others is None else self.most_others
        if not 0 <= text <= most or frames < 1 or tokens == self.context:
            return None
        return TokenGrid(frames, height, width, text)


def layout_of(model: Any, latents: Any, arguments: Mapping[str, Any]) -> Layout:
    """Reads the layout of a call.

    Args:
        model: the diffusion model.
        latents: `[B, C, frames, height, width]`, or packed with others as `latent_shapes` among the arguments
            says, the video first.
        arguments: of the call; `c_crossattn` is the text.

    Raises:
        NotServedError: the model or its latents are not of video, or references have another size.
    """
    family = family_of(model)
    shape = (arguments.get("latent_shapes") or [getattr(latents, "shape", ())])[0]
    patch = getattr(model, "patch_size", 1)
    patch = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
    if len(shape) != 5 or len(patch) != 3:
        raise NotServedError(f"{type(model).__name__} stays dense: its latents are no video")
    sizes = _tokens(shape, patch)
    frame, text = sizes[1] * sizes[2], arguments.get("c_crossattn")
    leading = _references(model, arguments, patch, frame)
    keyframes = arguments.get("keyframe_idxs")
    trailing = 0 if keyframes is None else keyframes.shape[2]
    if leading % frame or trailing % frame:
        raise NotServedError(
            f"{type(model).__name__} stays dense: {leading + trailing} tokens of references or keyframes are "
            f"not whole frames of {frame}; give these images the size of the video"
        )
    double = getattr(model, "double_blocks", None)
    return Layout(
        sizes,
        leading,
        trailing,
        most_others=trailing if family.name == "ltx" else None,
        text_first=family.text_first
        or (double is not None and not getattr(double[0], "flipped_img_txt", False)),
        context=0 if text is None else text.shape[1],
        batch=len(latents),
        layers=_layer_order(model, arguments),
    )


def _tokens(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    return tuple(-(-size // part) for size, part in zip(shape[-3:], patch, strict=True))


def _references(model: Any, arguments: Mapping[str, Any], patch: Sequence[int], frame: int) -> int:
    """Counts the tokens that a model puts in front of the video."""
    if getattr(model, "ref_conv", None) is not None and arguments.get("reference_latent") is not None:
        return frame
    latents = arguments.get("ref_latent")
    return 0 if latents is None else math.prod(_tokens(latents.shape, patch))


def _layer_order(model: Any, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the layers of Wan-VACE's self-attention calls; a control layer counts as the one it feeds."""
    control, mapping = arguments.get("vace_context"), getattr(model, "vace_layers_mapping", None)
    if control is None or mapping is None:
        return None
    counts = (1 + (control.shape[1] if layer in mapping else 0) for layer in range(len(model.blocks)))
    return tuple(layer for layer, count in enumerate(counts) for _ in range(count))


class Layer(NamedTuple):
    """Identifies a self-attention call of a forward pass; serves `radial_attn.models` as a processor.

    Attributes:
        index: number of the layer, single blocks after double ones.
        turn: how many calls of this layer came before: Wan-VACE has control layers.
    """

    index: int
    turn: int = 0
    dense: bool = False
    layer_check: None = None


@dataclass
class LayerCounter:
    """Numbers the self-attention calls of one forward pass.

    Attributes:
        layout: of the pass.
        double: number of double blocks, which come before the single ones.
    """

    layout: Layout
    double: int
    calls: int = 0
    turns: Counter[int] = field(default_factory=Counter)

    def next(self, options: Mapping[str, Any]) -> Layer:
        """Returns the layer of the next call; a newer core has its number in `options`."""
        index, order = options.get("block_index"), self.layout.layers
        if index is None:
            index = self.calls if order is None else order[min(self.calls, len(order) - 1)]
        elif options.get("block_type") == "single":
            index += self.double
        self.calls += 1
        self.turns[index] += 1
        return Layer(index, self.turns[index] - 1)


def to_heads(tensor: Tensor, heads: int, skip_reshape: bool) -> Tensor:
    """Returns `[B, S, H, D]` of `[B, S, H * D]`, or of `[B, H, S, D]` if the reshape is skipped."""
    return tensor.transpose(1, 2) if skip_reshape else tensor.unflatten(2, (heads, -1))


def from_heads(tensor: Tensor, skip_output_reshape: bool) -> Tensor:
    """Returns `[B, S, H, D]` as `[B, S, H * D]`, or as `[B, H, S, D]` if the reshape is skipped."""
    return tensor.transpose(1, 2) if skip_output_reshape else tensor.flatten(2)


def text_lengths(
    mask: Tensor | None, grid: TokenGrid, batch: int, *, text_first: bool = False
) -> Tensor | None:
    """Counts the valid text tokens of each sample, int64 `[B]` on the CPU; None without a mask.

    Args:
        mask: of keys, bool or a bias of 0 and about minus infinity, `[S]` with dimensions of size 1 or `B` in
            front.
        text_first: the text comes before the video.

    Raises:
        NotServedError: the mask is not of keys alone, weighs them, or hides others than the last of the text.
    """
    if mask is None:
        return None
    if mask.shape[-1] != grid.tokens or mask.numel() not in {grid.tokens, batch * grid.tokens}:
        raise NotServedError(f"a mask of shape {list(mask.shape)} is not one of keys; such calls stay dense")
    keys = mask.reshape(-1, grid.tokens).expand(batch, -1).cpu().roll(-grid.text if text_first else 0, 1)
    valid = keys if keys.dtype == torch.bool else keys == 0
    hidden = ~valid if keys.dtype == torch.bool else keys < -1e4
    lengths = valid.sum(1) - grid.video_tokens
    first = torch.arange(grid.tokens) < grid.video_tokens + lengths[:, None]
    if not bool((valid | hidden).all()) or not torch.equal(valid, first) or bool((lengths < 0).any()):
        raise NotServedError("a mask weighs keys, or hides keys other than the last; such calls stay dense")
    return lengths


def halves_of(options: Mapping[str, Any], batch: int) -> list[tuple[Any, slice]]:
    """Returns a key for each condition of a batch, and its rows: halves of guidance may come as one batch.

    A window of a longer video is a condition of its own.
    """
    names = list(options.get("uuids") or options.get("cond_or_uncond") or [0])
    names = names if batch % len(names) == 0 else [0]
    rows, window = batch // len(names), getattr(options.get("context_window"), "index_list", None)
    frames = None if window is None else tuple(window)
    return [
        ((name, names[:index].count(name), frames), slice(index * rows, (index + 1) * rows))
        for index, name in enumerate(names)
    ]


def step_of(sigma: float, planned: Sequence[float]) -> int:
    """Returns the step (from 0) of a call at noise level `sigma`.

    `planned` has the noise level of each step, falling. A call between two steps belongs to the first.
    """
    return max(0, sum(level >= sigma - 1e-6 * abs(sigma) for level in planned) - 1)


def read_blocks(text: str) -> frozenset[int]:
    """Reads numbers of blocks from text such as "0, 1, 38-39"; ValueError for anything else."""
    blocks: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        is_range = first.isdecimal() and (last if dash else first).isdecimal()
        if not is_range or int(last or first) < int(first):
            raise ValueError(f"dense_blocks must be numbers and ranges such as '0, 1, 38-39', got {text!r}")
        blocks.update(range(int(first), int(last or first) + 1))
    return frozenset(blocks)
