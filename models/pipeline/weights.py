"""Checks that the files of a pipeline hold every weight of its parts, in the right shape.

transformers gives weights that are missing random values, and diffusers fails with an error that names none.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..lora.keys import listed

FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
AGAIN = "download it again"


class Stored(NamedTuple):
    """Holds a tensor's file and shape."""

    file: Path
    shape: tuple[int, ...]


def check_weights(folder: Path, index: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Raises an error unless `parts` of a folder in diffusers format are whole; reads names and shapes only.

    Of parts that were saved quantized the shapes are not checked: they are packed.

    Args:
        index: model_index.json, which names the library and class of each part.

    Raises:
        FileNotFoundError: a file of weights does not exist.
        ValueError: a file is broken, a part lacks tensors or has one of another shape; the message names
            part, file and tensors.
    """
    import diffusers
    import transformers

    for part in parts:
        library, name = index[part]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name or "", None)
        if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
            continue
        stored = {
            tensor: Stored(file, shape)
            for file in _weight_files(folder / part, FILES[library])
            for tensor, shape in read_shapes(file).items()
        }
        is_quantized = "quantization_config" in read_object(folder / part / "config.json")
        compare = _compare_diffusers if library == "diffusers" else _compare_transformers
        missing, shapes = compare(cls, folder / part, stored)
        if is_quantized:
            missing, shapes = [name for name in missing if not _is_packed(name, stored)], {}
        if missing:
            count = f"{len(missing)} tensors" if len(missing) > 1 else "1 tensor"
            raise ValueError(f"{folder / part} lacks {count} of {name}: {listed(missing, 3)}; {AGAIN}")
        for tensor, (here, wanted) in sorted(shapes.items()):
            file = stored[tensor].file if tensor in stored else folder / part
            raise ValueError(
                f"{file} has {tensor} of shape {list(here)}, but {name} by {part}/config.json needs "
                f"{list(wanted)}; {AGAIN}"
            )


Shapes = dict[str, tuple[Iterable[int], Iterable[int]]]  # by tensor: in the file, in the model


def _compare_transformers(cls: Any, folder: Path, stored: Mapping[str, Stored]) -> tuple[list[str], Shapes]:
    """Returns what transformers would make up, by its own report of a load without data."""
    from transformers.utils import logging

    config = cls.config_class.from_pretrained(folder)
    if hasattr(config, "quantization_config"):  # its library is not needed to compare names
        del config.quantization_config
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = {"device_map": "meta", "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        _, report = cls.from_pretrained(folder, config=config, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return sorted(report["missing_keys"]), {
        name: tuple(shapes) for name, *shapes in report["mismatched_keys"]
    }


def _compare_diffusers(cls: Any, folder: Path, stored: Mapping[str, Stored]) -> tuple[list[str], Shapes]:
    """Returns the tensors of a model that its files do not hold, and those of another shape."""
    with torch.device("meta"):
        model = cls.from_config(cls.load_config(folder)).state_dict()
    pairs = {name: (stored[name].shape, x.shape) for name, x in model.items() if name in stored}
    return sorted(model.keys() - stored.keys()), {n: pair for n, pair in pairs.items() if pair[0] != pair[1]}


def _is_packed(name: str, stored: Mapping[str, Stored]) -> bool:
    """Returns whether a quantized tensor is stored in parts, as `w._data`, `w_packed`, `qw` or `_w_qdata`."""
    module, _, leaf = name.rpartition(".")
    packed = re.compile(rf"{re.escape(module)}\.(q{leaf}$|_?{leaf}[._:])")
    return any(map(packed.match, stored))


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a safetensors file by tensor; ValueError if it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            names = content.keys()
            return {name: tuple(content.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); {AGAIN}") from error


def _weight_files(folder: Path, name: str) -> list[Path]:
    """Returns the file `name` of a part, or the shards that its index names."""
    single, index = folder / name, folder / f"{name}.index.json"
    if single.is_file() and (name == FILES["transformers"] or not index.is_file()):  # as each library chooses
        return [single]
    if not index.is_file():
        others = sorted(x.name for x in folder.glob("*") if x.suffix in (".bin", ".safetensors", ".gguf"))
        only = f", only {', '.join(others[:3])}, which is not read" if others else ""
        raise FileNotFoundError(f"{folder} has no {name}{only}; {AGAIN} with its {name}")
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} does not name the file of each tensor; {AGAIN}")
    files = [folder / shard for shard in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {file.name}; {AGAIN}")
    return files


def read_object(file: Path) -> dict[str, Any]:
    """Returns the content of a JSON file; ValueError if it is no object."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} must hold a JSON object ({error}); {AGAIN}") from error
