"""The names inside a LoRA file: which parameter of a transformer each key changes, in every usual format.

Formats: diffusers and peft (`transformer.` or `base_model.model.` before the module's name), original Wan
(`diffusion_model.blocks.0.self_attn.q`, with `diff`, `diff_b` and `diff_m` for what has no rank) and kohya
(`lora_unet_blocks_0_self_attn_q`), with `lora_A` and `lora_B` or `lora_down` and `lora_up`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
)
# What a key does to its layer. A word between the two, as in `lora_A.default.weight`, is an adapter's name.
KINDS = {
    "down": r"\.(?:lora_A|lora_down|lora\.down)(?:\.[^.]+)?\.weight",
    "up": r"\.(?:lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight",
    "up_bias": r"\.lora_B(?:\.[^.]+)?\.bias",
    "alpha": r"\.alpha",
    "weight": r"\.diff",
    "bias": r"\.diff_b",
    "modulation": r"\.diff_m",
}
LOW_RANK = ("down", "up", "up_bias", "alpha")
# Names of diffusers and of the original Wan. Only names that differ; `norm2` is the affine one of a block.
ORIGINAL_WAN = (
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"scale_shift_table", "head.modulation"),
    (r"proj_out", "head.head"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    (r"(blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
    (r"(blocks\.\d+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
    (r"(blocks\.\d+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
    (r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
    (r"(blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
    (r"(blocks\.\d+)\.attn2\.add_([kv])_proj", r"\1.cross_attn.\2_img"),
    (r"(blocks\.\d+)\.attn2\.norm_added_k", r"\1.cross_attn.norm_k_img"),
    (r"(blocks\.\d+)\.attn1\.(norm_[qk])", r"\1.self_attn.\2"),
    (r"(blocks\.\d+)\.attn2\.(norm_[qk])", r"\1.cross_attn.\2"),
)


@dataclass
class Match:
    """What the keys of a file mean to one transformer.

    `pairs`: for each layer its keys by kind, those of LOW_RANK; `deltas`: for each parameter the key of what
    is added to it; `unmatched`: keys that mean nothing here, with the reason; `misfits`: layers of another
    shape.
    """

    pairs: dict[str, dict[str, str]] = field(default_factory=dict)
    deltas: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)


def match_keys(shapes: Mapping[str, Shape], parameters: Mapping[str, Shape]) -> Match:
    """The keys of a file, with their shapes, against the parameters of a transformer, with theirs."""
    layers, match = _by_layer(shapes, parameters)
    for layer, kinds in layers.items():
        low_rank = {kind: key for kind, key in kinds.items() if kind in LOW_RANK}
        if {"down", "up"} <= low_rank.keys():
            _add_pair(match, layer, low_rank, shapes, parameters)
        else:
            match.unmatched |= dict.fromkeys(low_rank.values(), "half of a pair")
        for kind in kinds.keys() - low_rank.keys():
            name = layer if layer in parameters else f"{layer}.{kind}"
            _add_delta(match, name, kinds[kind], shapes, parameters)
    return match


def _by_layer(
    shapes: Mapping[str, Shape], parameters: Mapping[str, Shape]
) -> tuple[dict[str, dict[str, str]], Match]:
    """Layer -> kind -> key, and a Match with the keys that no layer takes."""
    known, match = _spellings(parameters), Match()
    layers: dict[str, dict[str, str]] = {}
    for key in shapes:
        stem, kind = split_key(key)
        layer = known.get(stem)
        if not kind or layer is None:
            match.unmatched[key] = "no such layer" if kind else "no LoRA key"
        elif kind in layers.setdefault(layer, {}):
            match.unmatched[key] = f"second to {layers[layer][kind]}"
        else:
            layers[layer][kind] = key
    return layers, match


def split_key(key: str) -> tuple[str, str]:
    """(name of the layer as the file spells it, kind); the kind is empty where the key is of no LoRA."""
    name = key
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    for kind, pattern in KINDS.items():
        found = re.fullmatch(f"(.+?){pattern}", name)
        if found:
            return (f"{found[1]}.modulation", "weight") if kind == "modulation" else (found[1], kind)
    return name, ""


def _spellings(parameters: Iterable[str]) -> dict[str, str]:
    """Every spelling of a layer's name -> its name in diffusers."""
    known: dict[str, str] = {}
    for layer in dict.fromkeys(re.sub(r"\.(weight|bias)$", "", name) for name in parameters):
        for spelling in (layer, original_name(layer)):
            known |= {spelling: layer, spelling.replace(".", "_"): layer}
    return known


def original_name(layer: str) -> str:
    """What the original Wan calls a layer of diffusers' WanTransformer3DModel."""
    for pattern, replacement in ORIGINAL_WAN:
        if re.fullmatch(pattern, layer):
            return re.sub(pattern, replacement, layer)
    return layer


def _add_pair(
    match: Match,
    layer: str,
    keys: dict[str, str],
    shapes: Mapping[str, Shape],
    parameters: Mapping[str, Shape],
) -> None:
    weight = parameters.get(f"{layer}.weight", ())
    found = {kind: shapes[key] for kind, key in keys.items()}
    lost = [kind for kind in keys if kind == "up_bias" and f"{layer}.bias" not in parameters]
    if len(weight) < 2:
        match.unmatched |= dict.fromkeys(keys.values(), "not a layer with a matrix")
    elif not fits(found, weight):
        down, up = found["down"], found["up"]
        match.misfits[layer] = f"{_text(up)} times {_text(down)} for a weight of {_text(weight)}"
    else:
        match.unmatched |= {keys[kind]: "the layer has no bias" for kind in lost}
        match.pairs[layer] = {kind: key for kind, key in keys.items() if kind not in lost}


def fits(found: Mapping[str, Shape], weight: Shape) -> bool:
    """Whether `up @ down` has the weight's shape, with one rank and a single alpha."""
    down, up = found["down"], found["up"]
    return (
        min(len(down), len(up)) >= 2
        and (up[0], math.prod(down[1:])) == (weight[0], math.prod(weight[1:]))
        and down[0] == math.prod(up[1:]) > 0
        and math.prod(found.get("alpha", ())) == 1
        and found.get("up_bias", weight[:1]) == weight[:1]
    )


def _add_delta(
    match: Match, name: str, key: str, shapes: Mapping[str, Shape], parameters: Mapping[str, Shape]
) -> None:
    if name not in parameters:
        match.unmatched[key] = f"there is no {name}"
    elif _without_ones(shapes[key]) != _without_ones(parameters[name]):
        match.misfits[name] = f"{_text(shapes[key])} for {_text(parameters[name])}"
    else:
        match.deltas[name] = key


def _without_ones(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def _text(shape: Shape) -> str:
    return "x".join(str(size) for size in shape) or "a number"


def listed(names: Mapping[str, str] | Iterable[str], most: int = 4) -> str:
    """The first few of some names, each with its reason where it has one, and how many are left."""
    reasons = names if isinstance(names, Mapping) else dict.fromkeys(names, "")
    texts = [f"{name} ({reason})" if reason else name for name, reason in reasons.items()]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
