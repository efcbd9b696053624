"""Finds the files that replace the transformers of a run's model, checks and counts them by their headers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from radial_attn.models.pipeline.load import has_experts, read_index
from radial_attn.models.pipeline.single_file import SingleFile, find_single_file, match_file
from radial_attn.models.runtime.transformers import NAMES
from scripts.run.config import ModelConfig, find_path
from scripts.run.digest import file_digest
from scripts.run.errors import UsageError, one_line
from scripts.run.hub_models import HUB_MODELS
from scripts.run.loras import meta_transformer
from scripts.run.model_info import ModelInfo

PACKED = {  # key -> values that work with weights that stay quantised, and why others do not
    "quantization": (("none",), "its weights are quantised already"),
    "lora_mode": (("separate",), "LoRAs cannot be added to quantised weights"),
    "offload": (("none", "model", "group"), "moving a layer alone loses how its weights are packed"),
}


def single_files(options: ModelConfig) -> dict[str, Path]:
    """Returns the file of each transformer that has one.

    Raises UsageError for a name that means no file.
    """
    files = {name: find_path(given) for name in NAMES if (given := getattr(options, name)) is not None}
    for name, file in files.items():
        if not file.is_file():
            raise UsageError(
                f"model.{name}: got {getattr(options, name)!r}, which is no file here; name a safetensors or "
                f"GGUF file, or set model.{name}=null"
            )
    return files


def find_single_files(options: ModelConfig, path: str) -> dict[str, SingleFile]:
    """Returns the files of the transformers of the model at `path`, checked against its configuration.

    Raises UsageError for a file that is broken or of another model, and for keys that do not work with it.
    """
    found, files = {}, single_files(options)
    if NAMES[1] in files and not _has_experts(path):
        got = f"model.{NAMES[1]}: got {options.transformer_2!r}"
        raise UsageError(f"{got}, but the model has one transformer; set model.{NAMES[1]}=null")
    for name, file in files.items():
        known = meta_transformer(path, options.family)
        try:
            found[name] = find_single_file(file, path, name) if known is None else match_file(file, known)
        except (ValueError, OSError, ImportError) as error:
            raise UsageError(f"model.{name}: {one_line(error)}") from error
        if found[name].packed:
            _check_packed(options, f"model.{name}={getattr(options, name)}")
    return found


def _has_experts(path: str) -> bool:
    known = HUB_MODELS.get(path)
    return has_experts(read_index(path)) if known is None else NAMES[1] in known.parameters


def _check_packed(options: ModelConfig, given: str) -> None:
    """Raises UsageError for keys that need weights as numbers, which a quantised GGUF file does not hold."""
    for key, (fine, reason) in PACKED.items():
        got = getattr(options, key)
        if got not in fine and (key != "lora_mode" or options.loras):
            raise UsageError(
                f"model.{key}: got {got!r}, which does not work with {given}: {reason}; "
                f"allowed: {', '.join(fine)}"
            )


def with_files(model: ModelInfo, files: Mapping[str, SingleFile]) -> ModelInfo:
    """Returns the model with the weights of the files in place of those of its folder."""
    counts = {name: file.elements for name, file in files.items()}
    packed = {name: file.packed_bytes for name, file in files.items() if file.packed}
    return replace(model, parameters=model.parameters | counts, packed=packed)


def file_records(files: Mapping[str, SingleFile]) -> dict[str, dict[str, Any]]:
    """Returns name, size and digest of each file, for the record of a run."""
    return {
        name: {
            "file": str(found.file),
            "bytes": found.file.stat().st_size,
            "types": found.types,
            "sha256": file_digest(found.file),
        }
        for name, found in files.items()
    }
