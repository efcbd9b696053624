"""Checks that the files of a pipeline hold every weight of its parts.

transformers gives weights that are missing random values, and diffusers fails with an error that names none.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

NAME = "diffusion_pytorch_model.safetensors"


def check_weights(folder: Path, index: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Raises an error if `parts` of a folder in diffusers format lack tensors; reads names and shapes only.

    Args:
        index: model_index.json, which names the library and class of each part.

    Raises:
        FileNotFoundError: a file of weights does not exist.
        ValueError: a part lacks tensors; the message names them.
    """
    import diffusers
    import transformers

    find = {"diffusers": _missing_in_diffusers, "transformers": _missing_in_transformers}
    for part in parts:
        library, name = index[part]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name or "", None)
        if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
            continue
        _shards(folder / part)
        missing = find[library](cls, folder / part)
        if missing:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            count = f"{len(missing)} tensors" if len(missing) > 1 else "1 tensor"
            raise ValueError(f"{folder / part} lacks {count} of {name}: {names}; download it again")


def _missing_in_transformers(cls: Any, folder: Path) -> list[str]:
    """Returns the tensors that transformers would make up, by its own report of a load without data."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        _, report = cls.from_pretrained(
            folder, device_map="meta", use_safetensors=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return sorted([*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])])


def _missing_in_diffusers(cls: Any, folder: Path) -> list[str]:
    """Returns the tensors of a model that its files do not hold."""
    with torch.device("meta"):
        model = cls.from_config(cls.load_config(folder))
    return sorted(model.state_dict().keys() - _tensors(folder))


def _tensors(folder: Path) -> set[str]:
    """Returns the names of all tensors in the file or the shards of a part."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in _shards(folder) or [folder / NAME]:
        with safe_open(file, framework="pt") as content:
            names.update(content.keys())
    return names


def _shards(folder: Path) -> list[Path]:
    """Returns the files that the index of a part names, [] without an index."""
    names: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        names.update(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(names):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; download it again")
    return [folder / name for name in sorted(names)]
