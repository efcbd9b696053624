"""The LoRAs of a run: found, checked by their headers before any weight is loaded, put in, and recorded."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from radial_attn.models.lora.files import Header, read_header
from radial_attn.models.lora.keys import Match, Shape
from radial_attn.models.lora.load import Lora, load_loras, match_lora
from radial_attn.models.pipeline.load import is_local
from scripts.run.config import ROOT, LoraConfig, ModelConfig, find_path
from scripts.run.errors import UsageError, one_line
from scripts.run.hub_models import HUB_MODELS
from scripts.run.model_info import ModelInfo

MOST_NAMES = 5
# Of the hub ids in HUB_MODELS: the classes' defaults have the shapes of their parameters.
HUB_CLASSES = {
    "hunyuan_video": "HunyuanVideoTransformer3DModel",
    "hunyuan_video_i2v": "HunyuanVideoTransformer3DModel",
    "mochi": "MochiTransformer3DModel",
}


@dataclass(frozen=True)
class FoundLora:
    """An entry of `model.loras`, its file (None: on the hub, not here yet), and what its header says."""

    entry: LoraConfig
    file: Path | None
    header: Header | None = None
    match: Match | None = None


def find_loras(options: ModelConfig, path: str, fetch: bool = True) -> list[FoundLora]:
    """Every LoRA of the run, checked against the model at `path` as far as headers tell.

    Args:
        fetch: downloads what is on the hub; without it a file that is not in the cache stays unchecked.

    Raises:
        UsageError: a file that is missing, ambiguous, out of reach, broken, or made for another model.
    """
    if not options.loras:
        return []
    parameters, experts = _shapes(path, options.family), _experts(path)
    found = []
    for number, entry in enumerate(options.loras):
        place = f"model.loras[{number}]"
        if experts == 1 and entry.transformer == "2":
            raise UsageError(f"{place}.transformer: got '2', allowed: both, 1; the model has one transformer")
        file = find_file(place, entry, fetch)
        if file is None:
            found.append(FoundLora(entry, None))
            continue
        found.append(_check(place, entry, file, parameters, options.lora_unmatched))
    return found


def _check(
    place: str, entry: LoraConfig, file: Path, parameters: dict[str, Shape] | None, unmatched: str
) -> FoundLora:
    try:
        header = read_header(file)
        match = None if parameters is None else match_lora(file, header, parameters, unmatched)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"{place}: {_hinted(one_line(error), unmatched)}") from error
    return FoundLora(entry, file, header, match)


def _hinted(reason: str, unmatched: str) -> str:
    return f"{reason}; allowed with model.lora_unmatched=warn" if "match nothing" in reason else reason


def find_file(place: str, entry: LoraConfig, fetch: bool = True) -> Path | None:
    """The safetensors file of an entry; None where it is on the hub, not cached, and not to be fetched."""
    path = find_path(entry.path)
    if path.is_file():
        if entry.weight_name:
            raise UsageError(
                f"{place}.weight_name: got {entry.weight_name!r}, but {entry.path!r} is a file; "
                "allowed: null, or a folder or hub id as path"
            )
        return path
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        name = entry.weight_name or _only(place, entry, names)
        if not (path / name).is_file():
            raise UsageError(
                f"{place}.weight_name: got {name!r}, which {entry.path!r} does not hold{_few(names)}"
            )
        return path / name
    if is_local(entry.path) or (ROOT / entry.path).parent.is_dir():
        raise UsageError(
            f"{place}.path: got {entry.path!r}, which is no file or folder here; "
            "allowed: a safetensors file, a folder with one, or a hub id owner/name"
        )
    return _on_hub(place, entry, fetch)


def _only(place: str, entry: LoraConfig, names: Sequence[str]) -> str:
    if len(names) != 1:
        many = "several safetensors files, so weight_name must name one" if names else "no safetensors file"
        raise UsageError(f"{place}.path: got {entry.path!r}, which holds {many}{_few(names)}")
    return names[0]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f": {', '.join(names[:MOST_NAMES])}{more}" if names else ""


def _on_hub(place: str, entry: LoraConfig, fetch: bool) -> Path | None:
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # the retries are many lines, the failure is one
    if not fetch and not entry.weight_name:
        return None
    name = entry.weight_name or _only(place, entry, _names_on_hub(place, entry))
    try:
        return Path(huggingface_hub.hf_hub_download(entry.path, name, local_files_only=not fetch))
    except (OSError, ValueError) as error:
        if not fetch:
            return None
        raise UsageError(_unreachable(place, entry, error)) from error


def _names_on_hub(place: str, entry: LoraConfig) -> list[str]:
    import huggingface_hub

    try:
        names = huggingface_hub.list_repo_files(entry.path)
    except Exception as error:  # an error of the connection comes as the library below raises it
        raise UsageError(_unreachable(place, entry, error)) from error
    return sorted(name for name in names if name.endswith(".safetensors"))


def _unreachable(place: str, entry: LoraConfig, error: BaseException) -> str:
    named = f" with the file {entry.weight_name!r}" if entry.weight_name else ""
    return (
        f"{place}.path: got {entry.path!r}, which is no file or folder here and cannot be read from the "
        f"Hugging Face hub{named} ({one_line(error.__cause__ or error)}); "
        "allowed: a safetensors file, a folder with one, or a hub id within reach"
    )


def _shapes(path: str, family: str) -> dict[str, Shape] | None:
    """Shapes of the transformer's parameters by name; None where only loading will tell."""
    transformer = meta_transformer(path, family)
    if transformer is None:
        return None
    return {name: tuple(value.shape) for name, value in transformer.named_parameters()}


def meta_transformer(path: str, family: str) -> torch.nn.Module | None:
    """The transformer without its weights; None where only loading will tell what it is."""
    settings = Path(path) / "transformer" / "config.json"
    if path in HUB_MODELS and family == "wan" and "T2V" in path:
        build = _wan(HUB_MODELS[path])
    elif path in HUB_MODELS and family in HUB_CLASSES:
        build = _from_settings({"_class_name": HUB_CLASSES[family]})
    elif settings.is_file():
        build = _from_settings(json.loads(settings.read_text(encoding="utf-8")))
    else:
        return None
    try:
        with torch.device("meta"):
            return build()
    except (
        AttributeError,
        TypeError,
        ValueError,
    ):  # loading the model says what is wrong with its config.json
        return None


def _wan(model: ModelInfo) -> Callable[[], torch.nn.Module]:
    from diffusers import WanTransformer3DModel

    return lambda: WanTransformer3DModel(
        num_layers=model.layers,
        num_attention_heads=model.heads,
        attention_head_dim=model.head_dim,
        ffn_dim=model.ffn,
    )


def _from_settings(settings: dict[str, Any]) -> Callable[[], torch.nn.Module]:
    import diffusers

    return lambda: getattr(diffusers, settings.get("_class_name", "WanTransformer3DModel")).from_config(
        settings
    )


def _experts(path: str) -> int | None:
    """Transformers of the model's folder or known hub id, None where unknown."""
    if path in HUB_MODELS:
        return 1 + ("transformer_2" in HUB_MODELS[path].parameters)
    return 1 + (Path(path) / "transformer_2").is_dir() if Path(path).is_dir() else None


def with_loras(model: ModelInfo, loras: Sequence[FoundLora]) -> ModelInfo:
    """The model with the weights of its LoRAs among its parts, where both are known."""
    headers = [lora.header for lora in loras if lora.header]
    if not headers or not model.parameters:
        return model
    elements = sum(math.prod(shape) for header in headers for shape in header.shapes.values())
    return replace(model, parameters=model.parameters | {"loras": elements})


def put_in(pipeline: Any, options: ModelConfig, loras: Sequence[FoundLora]) -> list[dict[str, Any]]:
    """Loads the LoRAs into the pipeline; what the record says of each, with size and sha256 of its file.

    Raises:
        UsageError: what the headers could not tell, such as values that are not finite.
    """
    if not loras:
        return []
    wanted = [Lora(lora.file, lora.entry.scale, lora.entry.transformer) for lora in loras]
    how = {"mode": options.lora_mode, "unmatched": options.lora_unmatched}
    try:
        report = load_loras(pipeline, wanted, **how).report()
    except (ValueError, OSError) as error:
        raise UsageError(f"model.loras: {_hinted(one_line(error), options.lora_unmatched)}") from error
    files = {str(lora.file): _identity(lora.file) for lora in loras}
    return [entry | files[entry["file"]] | {"mode": options.lora_mode} for entry in report]


def _identity(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
