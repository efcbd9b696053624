"""`model.loras`: one LoRA or several, from YAML or the command line, as clean entries."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import yaml

from scripts.run.errors import UsageError, nearest_key

LORAS = "model.loras"
FORM = "a file, folder or hub id, or a list of {path: ..., weight_name: ..., scale: 1.0, transformer: both}"
EXPERTS = ("both", "1", "2")


@dataclass
class LoraConfig:
    """`weight_name`: the file in a folder or on the hub; `transformer`: which of two, for Wan2.2 A14B."""

    path: str
    weight_name: str | None = None
    scale: float = 1.0
    transformer: str = "both"


def parse_loras(value: Any) -> list[dict[str, Any]]:
    """The entries of `model.loras`: nothing, one path or mapping, or a list of them, or one of these as text.

    Raises:
        UsageError: no such form, an unknown key, a value that is not allowed.
    """
    if isinstance(value, str):
        value = _from_text(value)
    value = [] if value is None else value
    entries = value if isinstance(value, list) else [value]
    return [_entry(f"{LORAS}[{number}]", entry) for number, entry in enumerate(entries)]


def _from_text(text: str) -> Any:
    """YAML where it begins with a bracket, else a path as it stands."""
    if text.strip() in ("", "null"):
        return None
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{LORAS}: got {text!r}, allowed: {FORM}") from error


def _entry(place: str, entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping):
        raise UsageError(f"{place}: got {entry!r}, allowed: {FORM}")
    known = [key.name for key in fields(LoraConfig)]
    for name in entry:
        if name not in known:
            nearest = nearest_key(f"{place}.{name}", [f"{place}.{key}" for key in known])
            raise UsageError(f"unknown key '{place}.{name}'; did you mean {nearest!r}?")
    path, weight_name = entry.get("path"), entry.get("weight_name")
    if not isinstance(path, str) or not path.strip():
        raise UsageError(f"{place}.path: got {path!r}, allowed: a file, a folder, or a hub id owner/name")
    if weight_name is not None and (not isinstance(weight_name, str) or not weight_name.strip()):
        raise UsageError(f"{place}.weight_name: got {weight_name!r}, allowed: a file name, or null")
    return {
        "path": _literal(path),
        "weight_name": weight_name and _literal(weight_name),
        "scale": _scale(f"{place}.scale", entry.get("scale", 1.0)),
        "transformer": _expert(f"{place}.transformer", entry.get("transformer", "both")),
    }


def _literal(text: str) -> str:
    """No interpolation in a file's name."""
    return text.replace("${", "\\${")


def _scale(place: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{place}: got {value!r}, allowed: a number")
    return number


def _expert(place: str, value: Any) -> str:
    if isinstance(value, bool) or str(value) not in EXPERTS:
        raise UsageError(f"{place}: got {value!r}, allowed: {', '.join(EXPERTS)}")
    return str(value)
