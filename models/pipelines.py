"""Families of pipelines and how one is loaded: safetensors only, fp32 VAE, UniPC on flow sigmas."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FAMILIES = {"wan": "WanPipeline"}


def load_pipeline(
    path: str, family: str, dtype: torch.dtype, device: str, flow_shift: float | None = None
) -> "DiffusionPipeline":
    """The pipeline at `path` (a folder in diffusers format or a hub id) on `device`.

    Weights come in `dtype`, those of the VAE in float32. The scheduler becomes UniPC on flow sigmas with
    `flow_shift`, or with the shift that the model's own scheduler names.

    Raises:
        FileNotFoundError: no such folder, hub model, model_index.json or component.
        ValueError: an unknown family, a model_index.json that is unreadable or of another family, a broken
            safetensors file. All of them are found before any weight is loaded.
    """
    import diffusers

    check_model(path, family)
    pipeline = getattr(diffusers, FAMILIES[family]).from_pretrained(
        path, dtype={"default": dtype, "vae": torch.float32}, use_safetensors=True
    )
    pipeline.scheduler = flow_scheduler(pipeline.scheduler, flow_shift)
    return pipeline.to(device)


def flow_scheduler(scheduler: object, flow_shift: float | None = None) -> object:
    """UniPC on flow sigmas with the settings of `scheduler`; its own `flow_shift` (or `shift`) where None."""
    from diffusers import UniPCMultistepScheduler

    settings = dict(scheduler.config)
    shift = settings.get("flow_shift", settings.get("shift", 1.0)) if flow_shift is None else flow_shift
    return UniPCMultistepScheduler.from_config(
        settings, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def check_model(path: str, family: str) -> None:
    """Raises what `load_pipeline` raises; reads no weights, only the index and the safetensors headers."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    folder = Path(path)
    local = is_local(path)
    index = _read_index(folder) if local else _fetch_index(path)
    found = index.get("_class_name")
    if found != FAMILIES[family]:
        raise ValueError(f"model {path} must hold a {FAMILIES[family]} (family {family!r}), got {found}")
    if local:
        _check_components(folder, index)


def is_local(path: str) -> bool:
    """Whether `path` means a folder here: it exists, its parent does, or it has not the form `owner/name`."""
    folder = Path(path)
    return folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or folder.parent.is_dir()


def _read_index(folder: Path) -> dict:
    file = folder / "model_index.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    if not file.is_file():
        raise FileNotFoundError(
            f"model folder {folder} has no model_index.json, so it is not in diffusers format"
        )
    try:
        index = dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} must hold a JSON object: {error}") from error
    return index


def _fetch_index(path: str) -> dict:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"model {path} is no folder here and not readable on the hub: {reason}"
        ) from error


def _check_components(folder: Path, index: dict) -> None:
    """Every component of the index has its folder, every safetensors file a header that fits its size."""
    from safetensors import SafetensorError, safe_open

    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None]
    for part in parts:
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"model folder {folder} lacks {part}/, which its model_index.json names")
    for file in sorted(file for part in parts for file in (folder / part).rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
