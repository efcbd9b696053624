"""LoRA files: what their headers say, and their tensors as low-rank pairs and full changes."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .keys import Match, Part, Shape, listed
from .names_mochi import peft_settings

METADATA_KEY = "lora_adapter_metadata"  # diffusers writes peft's configuration into the file's own header
TRAINED_KEY = "radial_attention"  # what an adapter of this project was trained for
MOCHI_KEY = "kwargs"  # Mochi's fine-tuner: its own settings
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: shapes by key, and the alpha of peft where it is known.

    `trained`: what an adapter of this project was trained for, else empty.
    """

    shapes: dict[str, Shape]
    settings: dict[str, Any]
    trained: dict[str, Any] = field(default_factory=dict)


def read_header(file: str | Path) -> Header:
    """Keys, shapes and settings; reads no weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, or settings that are no JSON object.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"LoRA file {file} does not exist")
    try:
        with safe_open(file, framework="pt") as stream:
            keys = sorted(stream.keys())
            shapes = {key: tuple(stream.get_slice(key).get_shape()) for key in keys}
            metadata = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"LoRA file {file} is not a whole safetensors file: {error}") from error
    written, beside = metadata.get(METADATA_KEY), file.with_name(PEFT_CONFIG)
    if written is None and file.name == PEFT_FILE and beside.is_file():
        written = beside.read_text(encoding="utf-8")
    if written is None and "_lora_alpha" in metadata.get(MOCHI_KEY, ""):
        return Header(shapes, peft_settings(_object(file, metadata[MOCHI_KEY])))
    content = _object(file, written or "{}")
    settings = {key.removeprefix("transformer."): value for key, value in content.items()}
    return Header(shapes, settings, _object(file, metadata.get(TRAINED_KEY, "{}")))


def _object(file: Path, written: str) -> dict[str, Any]:
    try:
        return dict(json.loads(written))
    except (TypeError, ValueError) as error:
        raise ValueError(f"LoRA file {file} has settings that are no JSON object: {error}") from error


def read_weights(
    file: str | Path, header: Header, match: Match, parameters: Mapping[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(peft's state dict with alpha / rank worked in, what is added to parameters in float32).

    Raises:
        ValueError: values that are not finite.
    """
    from safetensors.torch import load_file

    tensors = load_file(file)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise ValueError(f"LoRA {Path(file).name} has values that are not finite: {listed(broken)}")
    state: dict[str, torch.Tensor] = {}
    deltas = {
        name: _taken(tensors, part).float().view_as(parameters[name]) for name, part in match.deltas.items()
    }
    for layer, parts in match.pairs.items():
        found = {kind: _taken(tensors, part) for kind, part in parts.items()}
        scaling = _scaling(header.settings, layer, found)
        down, up = found["down"], found["up"]
        if parameters[f"{layer}.weight"].ndim == 2:
            state |= _scaled(layer, down, up, scaling)
        else:
            name = f"{layer}.weight"
            product = scaling * up.float().flatten(1) @ down.float().flatten(1)
            deltas[name] = deltas.get(name, 0) + product.reshape(parameters[name].shape)
        if "up_bias" in found:
            name = f"{layer}.bias"
            deltas[name] = deltas.get(name, 0) + scaling * found["up_bias"].float()
    return state, deltas


def _taken(tensors: Mapping[str, torch.Tensor], part: Part) -> torch.Tensor:
    """A file's tensor, or the rows of it that are the layer's."""
    tensor = tensors[part.key]
    return torch.cat([tensor[start:end] for start, end in part.rows]) if part.rows else tensor


def _scaling(settings: Mapping[str, Any], layer: str, found: Mapping[str, torch.Tensor]) -> float:
    """alpha / rank, or alpha / sqrt(rank) where peft's settings say so; 1 where no alpha is known."""
    rank = found["down"].shape[0]
    if "alpha" in found:
        return found["alpha"].item() / rank
    alpha = next(patterned(settings.get("alpha_pattern"), layer), settings.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _scaled(layer: str, down: torch.Tensor, up: torch.Tensor, scaling: float) -> dict[str, torch.Tensor]:
    """Both matrices of a pair, each with the root of the scaling, so that neither leaves its range."""
    if scaling != 1:
        root = math.sqrt(abs(scaling))
        down, up = (down.float() * root), (up.float() * math.copysign(root, scaling))
    return {f"{layer}.lora_A.weight": down.flatten(1), f"{layer}.lora_B.weight": up.flatten(1)}


def patterned(patterns: Mapping[str, float] | None, layer: str) -> Iterator[float]:
    """Values of peft's `alpha_pattern` or `rank_pattern` that apply to a layer, the first one counts."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            yield value
