"""What the JSON of each kind of run may hold, and a check of a file's content against it."""

import math
from typing import Any

from scripts.run.errors import UsageError

NUMBER = "a number or null"  # a form of its own: what was not measured is null
ANY = "anything"
NAMES = {str: "a text", int: "a whole number", dict: "an object"}

HEAD = {"command?": str, "made?": str, "hardware?": dict, "versions?": dict, "config?": dict}
SETTING = {
    "name": str,
    "words?": [str],
    "grid?": [int],
    "density?": NUMBER,
    "density_with_warmup?": NUMBER,
    "attention_flops?": NUMBER,
    "seconds_step?": NUMBER,
    "seconds_video?": NUMBER,
    "mask?": dict,
}
VIDEO = {"prompt": str, "seed?": NUMBER, "files": {str: str}, "metrics?": {str: dict}}
LEVELS = [[[NUMBER]]]
FORMS: dict[str, dict] = {
    "evaluation": {
        "reference?": str,
        "settings?": [SETTING],
        "videos?": [VIDEO],
        "attention?": {str: {"steps": [int], "recall?": LEVELS, "mse?": LEVELS}},
        "means?": {str: dict},
        "scores?": {str: {str: dict}},
    },
    "analysis": {
        "grid?": [int],
        "profiles?": {str: {"distance": [NUMBER], "mean": [NUMBER], "heads?": LEVELS}},
        "fits?": {str: {"a": NUMBER, "b": NUMBER, "r2": NUMBER}},
        "heads?": [[{"class": str, "fit?": ANY}]],
        "bands?": [{"frames": str, "mass": NUMBER, "kept": NUMBER}],
        "tail?": {"bound?": NUMBER, "l1?": NUMBER},
        "mask?": dict,
    },
    "cost": {
        "rows?": [
            {
                "model": str,
                "frames": int,
                "height": int,
                "width": int,
                "tokens?": NUMBER,
                "density?": NUMBER,
                "dense_flops?": NUMBER,
                "radial_flops?": NUMBER,
                "kept_blocks?": NUMBER,
                "n_log_n?": NUMBER,
                "seconds_dense?": NUMBER,
                "seconds_radial?": NUMBER,
            }
        ],
        "fits?": {str: dict},
        "rates?": dict,
        "paper?": [{"model": str, "frames": int, "paper": NUMBER, "ours": NUMBER}],
    },
    "ablation": {"tables?": [{"title": str, "note?": str, "columns": [str], "rows": [[ANY]]}]},
    "generation": {
        "prompt": str,
        "seed": int,
        "config": dict,
        "inputs?": {str: dict},
        "density?": NUMBER,
        "tokens?": NUMBER,
        "mask?": dict,
        "attention?": {"grid?": [int]},
        "step_seconds?": [NUMBER],
        "seconds?": dict,
    },
}


def checked(value: Any, form: Any, where: str) -> Any:
    """`value` in the given form: numbers that are not finite are None, keys that may be missing are there.

    A form is a type, NUMBER, ANY, `[form]`, `{str: form}` for any names, or a record of keys; a key that
    ends in `?` may be missing or null and is None then. Keys that the form does not name are left out.

    Raises:
        UsageError: names the place, what stands there and what is allowed.
    """
    match form:
        case [item]:
            _require(isinstance(value, list), value, "a list", where)
            return [checked(entry, item, f"{where}[{number}]") for number, entry in enumerate(value)]
        case dict() if str in form:
            _require(isinstance(value, dict), value, "an object", where)
            return {name: checked(entry, form[str], f"{where}.{name}") for name, entry in value.items()}
        case dict():
            return _record(value, form, where)
    if form is NUMBER:
        _require(value is None or _is_number(value), value, NUMBER, where)
        return number(value)
    if form is not ANY:
        right = isinstance(value, form) and not isinstance(value, bool)
        _require(right, value, NAMES[form], where)
    return value


def _record(value: Any, form: dict, where: str) -> dict[str, Any]:
    _require(isinstance(value, dict), value, "an object", where)
    found = {}
    for key, inner in form.items():
        name = key.removesuffix("?")
        if value.get(name) is None and key != name:
            found[name] = None
        elif name not in value:
            raise UsageError(f"{where}: has no {name!r}, which a run of this kind holds")
        else:
            found[name] = checked(value[name], inner, f"{where}.{name}")
    return found


def number(value: Any) -> float | None:
    """The value where it is a finite number."""
    return value if _is_number(value) and math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(right: bool, value: Any, allowed: str, where: str) -> None:
    if not right:
        text = repr(value)
        raise UsageError(f"{where}: got {text if len(text) <= 40 else text[:37] + '...'}, allowed: {allowed}")
