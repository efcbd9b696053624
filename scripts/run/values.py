"""Parses the values of keys that hold lists or words."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import yaml

from radial_attn.models.runtime.schedule import AboveSigma, read_dense_steps
from scripts.run.errors import UsageError, nearest_key
from scripts.run.schema import TextLoader, literal

LORAS = "model.loras"
LORA_FORM = (
    "a file, folder or hub id, or a list of {path: ..., weight_name: ..., scale: 1.0, transformer: both}"
)
EXPERTS = ("both", "1", "2")
NAMES_FORM = "a file, or a list of files as [a.png, b.png]"
NUMBERS_FORM = "whole numbers separated by commas"


@dataclass
class LoraConfig:
    """Holds one LoRA.

    Attributes:
        weight_name: the file in a folder or on the hub.
        transformer: which of the two transformers of Wan2.2 A14B.
    """

    path: str
    weight_name: str | None = None
    scale: float = 1.0
    transformer: str = "both"


def parse_loras(value: Any) -> list[dict[str, Any]]:
    """Returns the entries of `model.loras`: none, one path or mapping, a list of them, or these as text.

    Raises:
        UsageError: another form, an unknown key, a value that is not allowed.
    """
    return [
        _entry(f"{LORAS}[{number}]", entry) for number, entry in enumerate(_as_list(LORAS, value, LORA_FORM))
    ]


def parse_names(value: Any) -> list[str]:
    """Returns the file names of `generation.reference_images`: none, one, a list, or a list as text."""
    name = "generation.reference_images"
    names = _as_list(name, value, NAMES_FORM)
    if not all(isinstance(entry, str) and entry.strip() for entry in names):
        raise UsageError(f"{name}: got {names!r}, must be {NAMES_FORM}")
    return [literal(entry) for entry in names]


def _as_list(name: str, value: Any, form: str) -> list:
    """Returns a list, or the entries of text; one entry becomes a list, null and empty text an empty one.

    Text is YAML if it begins with a bracket, else a path. `name` and `form` are for the error.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = yaml.load(value, TextLoader)
        except yaml.YAMLError as error:
            raise UsageError(f"{name}: got {value!r}, must be {form}") from error
    elif isinstance(value, str) and value.strip() in ("", "null"):
        value = None
    return value if isinstance(value, list) else [] if value is None else [value]


def _entry(entry_key: str, entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping):
        raise UsageError(f"{entry_key}: got {entry!r}, must be {LORA_FORM}")
    known = [key.name for key in fields(LoraConfig)]
    for name in entry:
        if name not in known:
            nearest = nearest_key(f"{entry_key}.{name}", [f"{entry_key}.{key}" for key in known])
            raise UsageError(f"unknown key '{entry_key}.{name}'; did you mean {nearest!r}?")
    path, weight_name = entry.get("path"), entry.get("weight_name")
    if not isinstance(path, str) or not path.strip():
        raise UsageError(f"{entry_key}.path: got {path!r}, must be a file, a folder, or a hub id owner/name")
    if weight_name is not None and (not isinstance(weight_name, str) or not weight_name.strip()):
        raise UsageError(f"{entry_key}.weight_name: got {weight_name!r}, must be a file name, or null")
    expert = entry.get("transformer", "both")
    if isinstance(expert, bool) or str(expert) not in EXPERTS:
        raise UsageError(f"{entry_key}.transformer: got {expert!r}, allowed: {', '.join(EXPERTS)}")
    return {
        "path": literal(path),
        "weight_name": weight_name and literal(weight_name),
        "scale": _scale(f"{entry_key}.scale", entry.get("scale", 1.0)),
        "transformer": str(expert),
    }


def _scale(scale_key: str, value: Any) -> float:
    with suppress(TypeError, ValueError):
        if not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    raise UsageError(f"{scale_key}: got {value!r}, must be a number")


def numbers(key_name: str) -> Callable[[Any], list[int]]:
    """Makes a parser of whole numbers of at least 0, each once; the parser raises UsageError for others."""

    def parse(value: Any) -> list[int]:
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value).strip().strip("[]")
        parts = [part.strip() for part in text.split(",")] if text not in ("", "null", "None") else []
        if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
            raise UsageError(f"{key_name}: got {value!r}, must be {NUMBERS_FORM}, each once")
        return [int(part) for part in parts]

    return parse


def in_words(key_name: str, form: str, read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes a parser of a key with a number or words; `read` raises ValueError for what it does not take.

    Returns a number, None, or text that `read` takes again. The parser raises UsageError.
    """

    def parse(value: Any) -> int | float | str | None:
        try:
            result = read(None if value == "null" else value)
        except ValueError:
            with suppress(TypeError, ValueError):
                value = float(value) if "." in str(value) else int(value)
            raise UsageError(f"{key_name}: got {value!r}, must be {form}") from None
        match result:
            case AboveSigma():
                return str(result)
            case float() if read is read_dense_steps:
                return f"{100 * result:g}%"
            case (float(), float()):
                return "{{start: {:g}, end: {:g}}}".format(*result)
            case tuple():
                return str(list(result))
        return result

    return parse
