"""Checks that the files of a pipeline hold each weight of its parts, in the right shape, and no more layers.

transformers gives weights that are missing random values, and diffusers fails with an error that names none.
Both leave out weights that the configuration has no place for, and take integers for numbers.
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
INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")


class Stored(NamedTuple):
    """Holds a tensor's file, shape, and type as safetensors names it, as `BF16`."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Compared(NamedTuple):
    """Holds how a part's files differ from its model.

    Attributes:
        model: the model's tensors by name, without data.
        missing: names that the files lack.
        unused: names that the model lacks.
        shapes: those of another shape: in the file, in the model.
    """

    model: Mapping[str, torch.Tensor]
    missing: list[str]
    unused: list[str]
    shapes: dict[str, tuple[Iterable[int], Iterable[int]]]


def check_weights(folder: Path, index: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Raises an error unless `parts` of a folder in diffusers format are whole; reads names and shapes only.

    Of parts that were saved quantized only the names are checked: their weights are packed.

    Args:
        index: model_index.json, which names the library and class of each part.

    Raises:
        FileNotFoundError: a file of weights does not exist.
        ValueError: a file is broken; a part lacks tensors, has one of another shape, integers in place of
            numbers, scales that are not applied, or layers that its configuration leaves out; the message
            names part, file and tensors.
    """
    import diffusers
    import transformers

    for part in parts:
        library, name = index[part]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name or "", None)
        if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
            continue
        stored: dict[str, Stored] = {}
        for file in _weight_files(folder / part, FILES[library]):
            stored |= read_tensors(file)
        is_quantized = "quantization_config" in read_object(folder / part / "config.json")
        compare = _compare_diffusers if library == "diffusers" else _compare_transformers
        compared = compare(cls, folder / part, stored)
        missing = [name for name in compared.missing if not (is_quantized and _is_packed(name, stored))]
        if missing:
            count = f"{len(missing)} tensors" if len(missing) > 1 else "1 tensor"
            raise ValueError(f"{folder / part} lacks {count} of {name}: {listed(missing, 3)}; {AGAIN}")
        if not is_quantized:
            _check_fit(folder / part, name, stored, compared)


def _check_fit(folder: Path, name: str, stored: Mapping[str, Stored], compared: Compared) -> None:
    """Raises ValueError for tensors of another shape or type, layers too many, and scales."""
    needs = f"but {name} by {folder.name}/config.json"
    for tensor, (here, wanted) in sorted(compared.shapes.items()):
        file = stored[tensor].file if tensor in stored else folder
        raise ValueError(f"{file} has {tensor} of shape {list(here)}, {needs} needs {list(wanted)}; {AGAIN}")
    for tensor, (file, _, dtype) in sorted(stored.items()):
        if tensor in compared.model and compared.model[tensor].is_floating_point() and dtype in INTEGERS:
            raise ValueError(f"{file} has {tensor} as integers ({dtype}), {needs} needs numbers; {AGAIN}")
    layers = {re.sub(r"\d+", "0", tensor) for tensor in compared.model}
    if more := [tensor for tensor in compared.unused if re.sub(r"\d+", "0", tensor) in layers]:
        raise ValueError(f"{folder} holds {listed(more, 3)}, {needs} has no place for them; {AGAIN}")
    if scales := [tensor for tensor in compared.unused if _is_scale(tensor, stored)]:
        raise ValueError(
            f"{folder} holds {listed(scales, 3)}, scales of 8-bit weights that are not applied here; take "
            "the model in 16 bits"
        )


def _is_scale(tensor: str, stored: Mapping[str, Stored]) -> bool:
    """Returns whether a tensor scales weights of 8 bits beside it, as `scale_weight` of ComfyUI's files."""
    weight = stored.get(f"{tensor.rpartition('.')[0]}.weight")
    return weight is not None and weight.dtype.startswith("F8") and "scale" in tensor.rpartition(".")[2]


def _compare_transformers(cls: Any, folder: Path, stored: Mapping[str, Stored]) -> Compared:
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
        model, report = cls.from_pretrained(folder, config=config, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    shapes = {name: tuple(shapes) for name, *shapes in report["mismatched_keys"]}
    return Compared(
        model.state_dict(), sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), shapes
    )


def _compare_diffusers(cls: Any, folder: Path, stored: Mapping[str, Stored]) -> Compared:
    """Compares the names and shapes of a model's tensors with those of its files."""
    with torch.device("meta"):
        model = cls.from_config(cls.load_config(folder)).state_dict()
    pairs = {name: (stored[name].shape, x.shape) for name, x in model.items() if name in stored}
    shapes = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return Compared(model, sorted(model.keys() - stored.keys()), sorted(stored.keys() - model.keys()), shapes)


def _is_packed(name: str, stored: Mapping[str, Stored]) -> bool:
    """Returns whether a quantized tensor is stored in parts, as `w._data`, `w_packed`, `qw` or `_w_qdata`."""
    module, _, leaf = name.rpartition(".")
    packed = re.compile(rf"{re.escape(module)}\.(q{leaf}$|_?{leaf}[._:])")
    return any(map(packed.match, stored))


def read_tensors(file: Path) -> dict[str, Stored]:
    """Returns the tensors of a safetensors file by name; ValueError if it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            names = content.keys()
            slices = {name: content.get_slice(name) for name in names}
            return {
                name: Stored(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
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
