"""Reads the keys of a LoRA file in every usual format: which parameter of a transformer each key changes.

Formats: diffusers and peft (`transformer.` or `base_model.model.` before the module's name), the authors'
names (`diffusion_model.blocks.0.self_attn.q`, with `diff`, `diff_b` and `diff_m` for changes without a rank)
and kohya (`lora_unet_blocks_0_self_attn_q`; Wan Fun writes `lora_unet__`), with `lora_A` and `lora_B` or
`lora_down` and `lora_up`. If the authors keep query, key and value in one matrix, as in HunyuanVideo and
Mochi, each layer takes its rows.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from . import names_hunyuan_video as hunyuan_video
from . import names_minimax_h3 as minimax_h3
from . import names_mochi as mochi
from . import names_wan_animate as wan_animate

Shape = tuple[int, ...]

PREFIXES = (
    "base_model.model.",
    "model.",
    "module.",
    "_orig_mod.",
    "diffusion_model.",
    "transformer.",
    "pipe.",
    "dit.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "Hunyuan_video_I2V_lora_",
)
# Endings of a key by its effect on the layer. In `lora_A.default.weight` the word in the middle is the
# adapter's name; Mochi's own fine-tuner stops at `lora_A`.
KINDS = {
    "down": r"\.(?:(?:lora_A|lora_down|lora\.down)(?:\.[^.]+)?\.weight|lora_A)",
    "up": r"\.(?:(?:lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight|lora_B)",
    "up_bias": r"\.lora_B(?:\.[^.]+)?\.bias",
    "alpha": r"\.alpha",
    "weight": r"\.(?:diff|w_norm)",
    "bias": r"\.(?:diff_b|b_norm)",
    "modulation": r"\.diff_m",
}
LOW_RANK = ("down", "up", "up_bias", "alpha")
HALF, RANKS, WHOLE = "half of a pair", "halves of two ranks", "a whole weight, no change of one"  # reasons
BY_ROWS = ("up", "up_bias", "weight", "bias")  # the other kinds serve all layers of a fused one
# Names in diffusers and in the original Wan, if they differ; `norm2` is a block's affine norm.
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
    (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    (r"(vace_blocks\.\d+)\.proj_in", r"\1.before_proj"),
    (r"(vace_blocks\.\d+)\.proj_out", r"\1.after_proj"),
    (r"((?:vace_)?blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"scale_shift_table", "head.modulation"),
    (r"proj_out", "head.head"),
    (r"((?:vace_)?blocks\.\d+)\.norm2", r"\1.norm3"),
    (r"((?:vace_)?blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    (r"((?:vace_)?blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
    (r"((?:vace_)?blocks\.\d+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
    (r"((?:vace_)?blocks\.\d+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
    (r"((?:vace_)?blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
    (r"((?:vace_)?blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
    (r"((?:vace_)?blocks\.\d+)\.attn2\.add_([kv])_proj", r"\1.cross_attn.\2_img"),
    (r"((?:vace_)?blocks\.\d+)\.attn2\.norm_added_k", r"\1.cross_attn.norm_k_img"),
    (r"((?:vace_)?blocks\.\d+)\.attn1\.(norm_[qk])", r"\1.self_attn.\2"),
    (r"((?:vace_)?blocks\.\d+)\.attn2\.(norm_[qk])", r"\1.cross_attn.\2"),
)
ORIGINAL_LTX = (  # LTX-Video, and LTX-2 with its sound
    (r"(audio_)?proj_in", r"\1patchify_proj"),
    (r"(audio_)?time_embed\.(.+)", r"\1adaln_single.\2"),
    (r"av_cross_attn_(\w+_scale_shift)\.(.+)", r"av_ca_\1_adaln_single.\2"),
    (r"av_cross_attn_(?:video|audio)_(\w+_gate)\.(.+)", r"av_ca_\1_adaln_single.\2"),
    (
        r"(transformer_blocks\.\d+)\.(video|audio)_a2v_cross_attn_scale_shift_table",
        r"\1.scale_shift_table_a2v_ca_\2",
    ),
    (r"(.+)\.norm_([qk])", r"\1.\2_norm"),
)
ORIGINAL_COSMOS = (  # Predict 2 and 2.5
    (r"time_embed\.t_embedder\.(.+)", r"t_embedder.1.\1"),
    (r"time_embed\.norm", "t_embedding_norm"),
    (r"patch_embed\.proj", "x_embedder.proj.1"),
    (r"norm_out\.linear_([12])", r"final_layer.adaln_modulation.\1"),
    (r"proj_out", "final_layer.linear"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear_([12])", r"blocks.\1.adaln_modulation_self_attn.\2"),
    (r"transformer_blocks\.(\d+)\.norm2\.linear_([12])", r"blocks.\1.adaln_modulation_cross_attn.\2"),
    (r"transformer_blocks\.(\d+)\.norm3\.linear_([12])", r"blocks.\1.adaln_modulation_mlp.\2"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.self_attn.\2_proj"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_([qkv])", r"blocks.\1.cross_attn.\2_proj"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.output_proj"),
    (r"transformer_blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.output_proj"),
    (r"transformer_blocks\.(\d+)\.attn1\.norm_([qk])", r"blocks.\1.self_attn.\2_norm"),
    (r"transformer_blocks\.(\d+)\.attn2\.norm_([qk])", r"blocks.\1.cross_attn.\2_norm"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"blocks.\1.mlp.layer1"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"blocks.\1.mlp.layer2"),
)
ORIGINAL = {  # a layer of diffusers' class -> the table of its authors' names
    "time_embed.emb.timestep_embedder.linear_1": ORIGINAL_LTX,
    "time_embed.t_embedder.linear_1": ORIGINAL_COSMOS,
    "face_adapter.0.to_q": (*wan_animate.NAMES, *ORIGINAL_WAN),
}


@dataclass(frozen=True)
class Part:
    """Selects the rows of a tensor that a layer takes: ranges in this order, or all rows if there are none.

    `layer`: its name in diffusers; `total`: rows that the tensor must have; `key`: its name in a file.
    """

    layer: str
    rows: tuple[tuple[int, int], ...] = ()
    total: int = 0
    key: str = ""

    def of(self, shape: Shape) -> Shape:
        """Returns the shape of the tensor from which a parameter of this shape takes its part."""
        return (self.total, *shape[1:]) if self.rows else shape


@dataclass
class Match:
    """Holds what the keys of a file mean to one transformer.

    Attributes:
        shapes, parameters: shapes of the file's tensors by key, and of the transformer's by name.
        pairs: parts by layer and kind, for the kinds in LOW_RANK.
        deltas: for each parameter the part that is added to it.
        unmatched: keys that no parameter takes, with the reason.
        misfits: layers of another shape, with both shapes.
    """

    shapes: Mapping[str, Shape]
    parameters: Mapping[str, Shape]
    pairs: dict[str, dict[str, Part]] = field(default_factory=dict)
    deltas: dict[str, Part] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    misfits: dict[str, str] = field(default_factory=dict)


def match_keys(shapes: Mapping[str, Shape], parameters: Mapping[str, Shape]) -> Match:
    """Matches the keys of a file, with their shapes, to the parameters of a transformer, with theirs."""
    match = Match(shapes, parameters)
    for layer, kinds in _by_layer(match).items():
        pair = {kind: kinds.pop(kind) for kind in LOW_RANK if kind in kinds}
        if {"down", "up"} <= pair.keys():
            _add_pair(match, layer, pair)
        else:
            match.unmatched |= {part.key: HALF for part in pair.values()}
        for kind, part in kinds.items():
            _add_delta(match, layer if layer in parameters else f"{layer}.{kind}", part)
    return match


def _by_layer(match: Match) -> dict[str, dict[str, Part]]:
    """Returns the parts by layer and kind; notes keys that no layer takes as unmatched."""
    known = layer_names(match.parameters)
    known = {name.replace(".", "_"): parts for name, parts in known.items()} | known  # kohya's spelling
    layers: dict[str, dict[str, Part]] = {}
    for key in match.shapes:
        stem, kind = split_key(key)
        stem += minimax_h3.BY_HEAD if re.fullmatch(minimax_h3.DIFFSYNTH, key) else ""
        parts = known.get(stem) or known.get(stem.replace(".", "_"), ())
        first = next((layers[part.layer][kind] for part in parts if kind in layers.get(part.layer, {})), None)
        if not kind or not parts:
            whole = re.sub(r"\.(weight|bias)$", "", stem) in known and not kind
            match.unmatched[key] = "no such layer" if kind else WHOLE if whole else "no LoRA key"
        elif first:
            match.unmatched[key] = f"second to {first.key}"
        else:
            for part in parts:
                taken = replace(part, key=key) if kind in BY_ROWS else Part(part.layer, key=key)
                layers.setdefault(part.layer, {})[kind] = taken
    return layers


def split_key(key: str) -> tuple[str, str]:
    """Returns the layer's name as the file spells it, and the kind; it is empty if the key is of no LoRA."""
    name = key
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    for kind, pattern in KINDS.items():
        if ending := re.fullmatch(f"(.+?){pattern}", name):
            return (f"{ending[1]}.modulation", "weight") if kind == "modulation" else (ending[1], kind)
    return name, ""


def layer_names(parameters: Mapping[str, Shape]) -> dict[str, tuple[Part, ...]]:
    """Returns the parts of each layer's name, in any spelling, given the shapes of all parameters."""
    names = {name: re.sub(r"\.(weight|bias)$", "", name) for name in parameters}
    rows = {layer: math.prod(parameters[name][:1]) for name, layer in names.items()}
    return _original(rows) | {layer: (Part(layer),) for layer in rows}


def _original(rows: Mapping[str, int]) -> dict[str, tuple[Part, ...]]:
    """Returns the parts of each of the authors' names, given the rows of each layer of a transformer."""
    if "context_embedder.proj_in" in rows and "single_transformer_blocks.0.proj_mlp" in rows:
        return _expand(hunyuan_video.NAMES, rows, hunyuan_video.SWAPPED, hunyuan_video.OTHERS)
    if "context_embedder_2.linear_1" in rows:
        return _expand(hunyuan_video.NEWER, rows, hunyuan_video.SWAPPED, hunyuan_video.OTHERS)
    if "time_embed.pooler.to_kv" in rows:
        last = _expand(mochi.LAST_BLOCK, rows)
        return _expand(mochi.NAMES, rows, mochi.SWAPPED) | last
    if "token_refiner.final_norm" in rows:
        return _minimax_h3(rows)
    names = next((ORIGINAL[layer] for layer in ORIGINAL if layer in rows), ORIGINAL_WAN)
    joined = _expand(wan_animate.JOINED, rows)
    return {original_name(layer, names): (Part(layer),) for layer in rows} | joined


def _minimax_h3(rows: Mapping[str, int]) -> dict[str, tuple[Part, ...]]:
    """Adds to the parts of each name those of the other order of query, key and value."""
    known = _expand(minimax_h3.NAMES, rows, minimax_h3.SWAPPED)
    fused = {name: parts for name, parts in known.items() if name.endswith(minimax_h3.FUSED)}
    return known | {
        name + minimax_h3.BY_HEAD: tuple(
            replace(part, rows=minimax_h3.rows_by_head(i, rows, part.layer)) for i, part in enumerate(parts)
        )
        for name, parts in fused.items()
    }


def _expand(
    names: Mapping[str, Sequence[str]],
    rows: Mapping[str, int],
    swapped: Sequence[str] = (),
    others: Iterable[tuple[str, str]] = (),
) -> dict[str, tuple[Part, ...]]:
    """Expands a table with `#` for the number of a block to the blocks that a transformer has."""
    blocks = (re.search(r"(?:blocks|face_adapter)\.(\d+)\.", layer) for layer in rows)
    numbers = {"0", *(block[1] for block in blocks if block)}
    known: dict[str, tuple[Part, ...]] = {}
    for name, layers in names.items():
        spellings = {name, *(re.sub(pattern, other, name) for pattern, other in others)}
        for number in numbers:
            these = [layer.replace("#", number) for layer in layers]
            if rows.keys() >= set(these):
                parts = _parts(these, rows, name in swapped)
                known |= {spelling.replace("#", number): parts for spelling in spellings}
    return known


def _parts(layers: Sequence[str], rows: Mapping[str, int], swapped: bool) -> tuple[Part, ...]:
    """Returns the part of each layer in a tensor that holds them one after another, or one in two halves."""
    ends = [0, *accumulate(rows[layer] for layer in layers)]
    total, half = ends[-1], ends[-1] // 2
    if swapped:
        return (Part(layers[0], ((half, total), (0, half)), total),)
    if len(layers) == 1:
        return (Part(layers[0]),)
    return tuple(Part(layer, (span,), total) for layer, span in zip(layers, pairwise(ends), strict=True))


def original_name(layer: str, names: Sequence[tuple[str, str]] = ORIGINAL_WAN) -> str:
    """Returns the authors' name of a layer, by default of Wan's, from diffusers'."""
    for pattern, replacement in names:
        if re.fullmatch(pattern, layer):
            return re.sub(pattern, replacement, layer)
    return layer


def _add_pair(match: Match, layer: str, parts: dict[str, Part]) -> None:
    weight = parts["up"].of(match.parameters.get(f"{layer}.weight", ()))
    pair = {kind: match.shapes[part.key] for kind, part in parts.items()}
    if len(weight) < 2:
        match.unmatched |= {part.key: "not a layer with a matrix" for part in parts.values()}
    elif pair["down"][:1] != (math.prod(pair["up"][1:]),):
        match.unmatched |= {parts[kind].key: RANKS for kind in ("down", "up")}
    elif not fits(pair, weight):
        down, up = pair["down"], pair["up"]
        match.misfits[layer] = f"{_text(up)} times {_text(down)} for a weight of {_text(weight)}"
    else:
        if "up_bias" in parts and f"{layer}.bias" not in match.parameters:
            match.unmatched[parts.pop("up_bias").key] = "the layer has no bias"
        match.pairs[layer] = parts


def fits(pair: Mapping[str, Shape], weight: Shape) -> bool:
    """Returns whether `up @ down` has the weight's shape, with one rank and a single alpha."""
    down, up = pair["down"], pair["up"]
    return (
        min(len(down), len(up)) >= 2
        and (up[0], math.prod(down[1:])) == (weight[0], math.prod(weight[1:]))
        and down[0] == math.prod(up[1:]) > 0
        and math.prod(pair.get("alpha", ())) == 1
        and pair.get("up_bias", weight[:1]) == weight[:1]
    )


def _add_delta(match: Match, name: str, part: Part) -> None:
    if name not in match.parameters:
        match.unmatched[part.key] = f"there is no {name}"
        return
    shape, wanted = match.shapes[part.key], part.of(match.parameters[name])
    if [size for size in shape if size != 1] != [size for size in wanted if size != 1]:
        match.misfits[name] = f"{_text(shape)} for {_text(wanted)}"
    else:
        match.deltas[name] = part


def _text(shape: Shape) -> str:
    return "x".join(str(size) for size in shape) or "a number"


def listed(names: Mapping[str, str] | Iterable[str], most: int = 4) -> str:
    """Lists the first few names, each with its reason if it has one, and how many more there are."""
    reasons = names if isinstance(names, Mapping) else dict.fromkeys(names, "")
    texts = [f"{name} ({reason})" if reason else name for name, reason in reasons.items()]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
