"""Reads LoRA files: their headers, and their tensors as low-rank pairs and full changes."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .keys import Match, Part, Shape, listed
from .names_mochi import peft_settings

METADATA_KEY = "lora_adapter_metadata"  # diffusers writes peft's configuration into the file's own header
TRAINED_KEY = "radial_attention"  # describes the training of an adapter of this project
MOCHI_KEY = "kwargs"  # settings of Mochi's fine-tuner
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Header:
    """Holds the header of a safetensors file: shapes by key, and the alpha of peft if it is known.

    `trained` describes the training of an adapter of this project; it is empty for other files.
    """

    shapes: dict[str, Shape]
    settings: dict[str, Any]
    trained: dict[str, Any] = field(default_factory=dict)


def read_header(file: str | Path) -> Header:
    """Returns keys, shapes and settings; reads no weights.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a whole safetensors file, holds whole numbers as weights, or its settings are
            not a JSON object.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"LoRA file {file} does not exist; give the path of a safetensors file")
    try:
        with safe_open(file, framework="pt") as stream:
            keys = sorted(stream.keys())
            shapes = {key: tuple(stream.get_slice(key).get_shape()) for key in keys}
            types = {key: stream.get_slice(key).get_dtype() for key in keys if math.prod(shapes[key]) > 1}
            metadata = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"LoRA file {file} is not a whole safetensors file ({error}); download or save it again"
        ) from error
    if coded := {key: name for key, name in types.items() if "F" not in name}:
        raise ValueError(
            f"LoRA {file.name} holds no floating point numbers in {listed(coded)}; use a file that is not "
            "quantised"
        )
    text, config_file = metadata.get(METADATA_KEY), file.with_name(PEFT_CONFIG)
    if text is None and file.name == PEFT_FILE and config_file.is_file():
        text = config_file.read_text(encoding="utf-8")
    if text is None and "_lora_alpha" in metadata.get(MOCHI_KEY, ""):
        return Header(shapes, peft_settings(_object(file, metadata[MOCHI_KEY])))
    content = _object(file, text or "{}")
    settings = {key.removeprefix("transformer."): value for key, value in content.items()}
    _check_settings(file, settings)
    return Header(shapes, settings, _object(file, metadata.get(TRAINED_KEY, "{}")))


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Raises ValueError unless the settings that scale a LoRA are numbers, and patterns of layers."""
    patterns = settings.get("alpha_pattern") or {}
    if isinstance(patterns, dict):
        alphas = [settings.get("lora_alpha", 1), *patterns.values()]
        numbers = all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas)
        with suppress(re.error):
            if numbers and all(re.compile(f"({pattern})") for pattern in patterns):
                return
    raise ValueError(
        f"LoRA {file.name} has broken settings of peft: `lora_alpha` must be a number, `alpha_pattern` "
        "a number for each pattern of layers; save it again"
    )


def _object(file: Path, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"LoRA file {file} has settings that are not a JSON object ({error}); save it again"
        ) from error


def read_weights(
    file: str | Path, header: Header, match: Match, parameters: Mapping[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns peft's state dict, scaled by alpha / rank, and the float32 changes to add, by parameter.

    If alpha / rank is not 1, both matrices of a pair get its root, so neither leaves its range.

    Raises:
        ValueError: some values are not finite.
    """
    from safetensors.torch import load_file

    tensors = load_file(file)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise ValueError(
            f"LoRA {Path(file).name} has values that are not finite: {listed(broken)}; use another file"
        )
    state: dict[str, torch.Tensor] = {}
    deltas = {
        name: _taken(tensors, part).float().view_as(parameters[name]) for name, part in match.deltas.items()
    }
    for layer, parts in match.pairs.items():
        pair = {kind: _taken(tensors, part) for kind, part in parts.items()}
        scaling = _scaling(header.settings, layer, pair)
        down, up = pair["down"], pair["up"]
        if parameters[f"{layer}.weight"].ndim == 2:
            if scaling != 1:
                root = math.sqrt(abs(scaling))
                down, up = (down.float() * root), (up.float() * math.copysign(root, scaling))
            state |= {f"{layer}.lora_A.weight": down.flatten(1), f"{layer}.lora_B.weight": up.flatten(1)}
        else:
            name = f"{layer}.weight"
            product = scaling * up.float().flatten(1) @ down.float().flatten(1)
            deltas[name] = deltas.get(name, 0) + product.reshape(parameters[name].shape)
        if "up_bias" in pair:
            name = f"{layer}.bias"
            deltas[name] = deltas.get(name, 0) + scaling * pair["up_bias"].float()
    return state, deltas


def _taken(tensors: Mapping[str, torch.Tensor], part: Part) -> torch.Tensor:
    """Returns a file's tensor, or the rows that belong to the layer; float32 if it has 8 bits."""
    tensor = tensors[part.key]
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    return torch.cat([tensor[start:end] for start, end in part.rows]) if part.rows else tensor


def _scaling(settings: Mapping[str, Any], layer: str, pair: Mapping[str, torch.Tensor]) -> float:
    """Returns alpha / rank, or alpha / sqrt(rank) if peft's settings say so; 1 if no alpha is known."""
    rank = pair["down"].shape[0]
    if "alpha" in pair:
        return pair["alpha"].item() / rank
    patterns = (settings.get("alpha_pattern") or {}).items()
    matching = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha = next(matching, settings.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
