"""Finds the LoRAs of a run, checks their headers before any weight is loaded, loads and records them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from radial_attn.models.lora.files import Header, read_header
from radial_attn.models.lora.keys import Match, Shape
from radial_attn.models.lora.load import Lora, UnmatchedKeysError, load_loras, match_lora
from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.pipeline.load import is_local
from radial_attn.models.runtime.transformers import NAMES
from scripts.run.config import ROOT, ModelConfig, find_path
from scripts.run.errors import UsageError, one_line
from scripts.run.files import sha256
from scripts.run.hub_models import HUB_MODELS
from scripts.run.model_info import ModelInfo
from scripts.run.values import LoraConfig

MOST_NAMES = 5
WAN_CLASS = "WanTransformer3DModel"


@dataclass(frozen=True)
class FoundLora:
    """Holds an entry of `model.loras`, its file (None: not downloaded yet), and the content of its header."""

    entry: LoraConfig
    file: Path | None
    header: Header | None = None
    match: Match | None = None


def find_loras(options: ModelConfig, path: str, fetch: bool = True) -> list[FoundLora]:
    """Returns every LoRA of the run, checked against the model at `path` as far as the headers allow.

    Args:
        fetch: downloads files from the hub; without it a file that is not in the cache stays unchecked.

    Raises:
        UsageError: a file is missing, ambiguous, out of reach, broken, or made for another model.
    """
    if not options.loras:
        return []
    transformer, experts = meta_transformer(path, options.family), _experts(path, options)
    parameters: dict[str, Shape] | None = None
    if transformer is not None:
        parameters = {name: tuple(value.shape) for name, value in transformer.named_parameters()}
    loras = []
    for number, entry in enumerate(options.loras):
        key = f"model.loras[{number}]"
        if experts == 1 and entry.transformer == "2":
            got = f"{key}.transformer: got '2'"
            raise UsageError(f"{got}, but the model has one transformer; allowed: both, 1")
        file, header, match = find_file(key, entry, fetch), None, None
        try:
            if file is not None:
                header = read_header(file)
            if header is not None and parameters is not None:
                match = match_lora(file, header, parameters, options.lora_unmatched)
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(f"{key}: {_reason(error)}") from error
        loras.append(FoundLora(entry, file, header, match))
    return loras


def _reason(error: Exception) -> str:
    unmatched = isinstance(error, UnmatchedKeysError)
    hint = "; set model.lora_unmatched=warn to leave them out" if unmatched else ""
    return f"{one_line(error)}{hint}"


def find_file(key: str, entry: LoraConfig, fetch: bool = True) -> Path | None:
    """Returns the safetensors file of an entry; None if only the hub has it and it must not be fetched.

    `key`: the entry's key, for messages.
    """
    path, got = find_path(entry.path), f"{key}.weight_name: got {entry.weight_name!r}"
    if path.is_file():
        if entry.weight_name:
            remedy = "set it to null, or name a folder or hub id as path"
            raise UsageError(f"{got}, but {entry.path!r} is a file; {remedy}")
        return path
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        file = path / (entry.weight_name or _only(key, entry, names))
        if not file.is_file():
            raise UsageError(f"{got}, which {entry.path!r} does not hold; name one of its files{_few(names)}")
        return file
    if is_local(entry.path) or (ROOT / entry.path).parent.is_dir():
        raise UsageError(
            f"{key}.path: got {entry.path!r}, which is no file or folder here; name a safetensors file, a "
            "folder with one, or a hub id owner/name"
        )
    return _on_hub(key, entry, fetch)


def _only(key: str, entry: LoraConfig, files: Sequence[str]) -> str:
    names = [name for name in files if name.endswith(".safetensors")]
    if len(names) != 1:
        remedy = "several safetensors files; set weight_name to one" if names else "no safetensors file"
        raise UsageError(f"{key}.path: got {entry.path!r}, which holds {remedy}{_few(names)}")
    return names[0]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f": {', '.join(names[:MOST_NAMES])}{more}" if names else ""


def _on_hub(key: str, entry: LoraConfig, fetch: bool) -> Path | None:
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # the retries are many lines, the failure is one
    if not fetch and not entry.weight_name:
        return None
    try:
        name = entry.weight_name or _only(key, entry, sorted(huggingface_hub.list_repo_files(entry.path)))
        return Path(huggingface_hub.hf_hub_download(entry.path, name, local_files_only=not fetch))
    except UsageError:
        raise
    except Exception as error:  # connection errors have no common class
        if not fetch:
            return None
        named = f" with the file {entry.weight_name!r}" if entry.weight_name else ""
        raise UsageError(
            f"{key}.path: got {entry.path!r}, which is no file or folder here and cannot be read from the "
            f"Hugging Face hub{named} ({one_line(error.__cause__ or error)}); "
            "name a safetensors file, a folder with one, or a hub id within reach"
        ) from error


def meta_transformer(path: str, family: str) -> torch.nn.Module | None:
    """Returns the transformer without its weights; None if only loading can show its shapes."""
    import diffusers

    files = [Path(path) / name / "config.json" for name in NAMES]
    file = next((file for file in files if file.is_file()), files[0])
    named = {"_class_name": FAMILIES[family].transformer}
    if path in HUB_MODELS and family in ("wan", "skyreels_v2", "anyflow") and "T2V" in path:
        model = HUB_MODELS[path]
        sizes = {"num_attention_heads": model.heads, "attention_head_dim": model.head_dim}
        settings = named | {"num_layers": model.layers, "ffn_dim": model.ffn} | sizes
    elif path in HUB_MODELS and FAMILIES[family].transformer.startswith(
        ("Hunyuan", "Mochi", "LTXVideo", "MiniMax")
    ):
        settings = named  # their defaults have the shapes
    elif file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
    else:
        return None
    try:
        with torch.device("meta"):
            return getattr(diffusers, settings.get("_class_name", WAN_CLASS)).from_config(settings)
    except (AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError):
        return None  # loading the model reports the fault in its config.json


def _experts(path: str, options: ModelConfig) -> int | None:
    """Counts the transformers of the model's folder and files, or known hub id; None if unknown."""
    if path in HUB_MODELS:
        return 1 + ("transformer_2" in HUB_MODELS[path].parameters)
    if not Path(path).is_dir():
        return None
    return sum((Path(path) / name).is_dir() or getattr(options, name) is not None for name in NAMES)


def with_loras(model: ModelInfo, loras: Sequence[FoundLora]) -> ModelInfo:
    """Returns the model with the weights of its LoRAs among its parts, if both are known."""
    headers = [lora.header for lora in loras if lora.header]
    if not headers or not model.parameters:
        return model
    elements = sum(math.prod(shape) for header in headers for shape in header.shapes.values())
    return replace(model, parameters=model.parameters | {"loras": elements})


def put_in(pipeline: Any, options: ModelConfig, loras: Sequence[FoundLora]) -> list[dict[str, Any]]:
    """Loads the LoRAs into the pipeline; returns a record of each, with size and sha256 of its file.

    Raises:
        UsageError: a fault that headers do not show, such as values that are not finite.
    """
    if not loras:
        return []
    wanted = [Lora(lora.file, lora.entry.scale, lora.entry.transformer) for lora in loras]
    how = {"mode": options.lora_mode, "unmatched": options.lora_unmatched}
    try:
        report = load_loras(pipeline, wanted, **how).report()
    except (ValueError, OSError) as error:
        raise UsageError(f"model.loras: {_reason(error)}") from error
    files = {str(x.file): {"bytes": x.file.stat().st_size, "sha256": sha256(x.file)} for x in loras}
    return [entry | files[entry["file"]] | {"mode": options.lora_mode} for entry in report]
