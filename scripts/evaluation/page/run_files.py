"""Finds and checks the runs that a page shows: JSON files of the evaluation commands, or of videos."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from scripts.evaluation.tables import COSTS
from scripts.run.errors import UsageError, one_line, reason_of

MADE_BY = {
    "evaluation": "evaluate.sh",
    "generation": "wan_t2v_inference.sh",
    "analysis": "analyse_attention.sh",
    "cost": "cost.sh",
    "ablation": "ablate.sh",
}
TYPES = {
    str: (str, "a text"),
    int: (int, "a whole number"),
    float: ((int, float, NoneType), "a number or null"),
    dict: (dict, "an object"),
    list: (list, "a list"),
}
NUMBERS = {str: float}  # by name
SETTING = {"name": str, "words": [str], "grid?": [int], "mask?": dict} | {f"{name}?": float for name in COSTS}
SIZES = {"num_frames": int, "height": int, "width": int, "steps": int}
COST = {"model": str, "frames": int, "height": int, "width": int, "tokens": int, "density": float}
HEAD = {"command?": str, "made?": str, "hardware?": dict, "versions?": dict, "config?": dict}
FORMS: dict[str, dict] = {  # a key that ends in `?` may be missing or null
    "evaluation": {
        "reference": str,
        "settings": [SETTING],
        "videos": [{"prompt": str, "seed?": float, "files": {str: str}, "metrics": {str: NUMBERS}}],
        "means": {str: NUMBERS},
        "scores?": {str: {str: NUMBERS}},
    },
    "generation": {
        "prompt": str,
        "seed": int,
        "config": {"attention": {"pattern": str}, "generation": SIZES},
        "inputs?": {str: dict},
        "density?": float,
        "dense_steps?": [int],
        "step_seconds?": [float],
        "seconds?": NUMBERS,
    },
    "analysis": {
        "profiles": {str: {"distance": [float], "mean": [float], "heads": [[[float]]]}},
        "fits": {str: NUMBERS},
        "bands": [{"frames": str, "mass": float, "kept": float}],
    },
    "cost": {"rows": [COST | {"dense_flops": float, "radial_flops": float}]},
    "ablation": {"tables": [{"title": str, "note": str, "columns": [str], "rows": [list]}]},
}


@dataclass(frozen=True)
class Run:
    """Holds the kind, the content and a name, unique on the page, of one JSON file."""

    kind: str
    name: str
    file: Path
    content: dict[str, Any]


def find_runs(paths: list[Path]) -> list[Run]:
    """Returns the runs at some folders or files, each file once, by kind in the order of MADE_BY.

    Raises UsageError if a path is missing or has no run, or a file does not have the form of its kind.
    """
    files = list(dict.fromkeys(file.resolve() for path in paths for file in _files(path)))
    common = os.path.commonpath([file.parent.parent for file in files])
    runs = [_read(file, str(file.relative_to(common).with_suffix(""))) for file in files]
    return sorted(runs, key=lambda run: list(MADE_BY).index(run.kind))


def _files(path: Path) -> list[Path]:
    """Returns the JSON files of the runs at a path: of the evaluation commands, else of videos."""
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; name output folders, or JSON files in them")
    if not path.is_dir():
        return [path.with_suffix(".json") if path.suffix == ".mp4" else path]
    names = [f"{kind}.json" for kind in MADE_BY if kind != "generation"]
    files = [path / name for name in names if (path / name).is_file()]
    records = [video.with_suffix(".json") for video in sorted(path.glob("[!.]*.mp4"))]
    files = files or [record for record in records if record.is_file()]
    if not files:
        raise UsageError(f"{path}: has no {', '.join(names)}, nor an mp4 with its JSON; name a run's folder")
    return files


def _read(file: Path, name: str) -> Run:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({reason_of(error)})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is no JSON ({one_line(error)}); name a run's JSON file") from error
    kind = content.get("kind", "generation") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in FORMS:
        raise UsageError(f"{file}: is no run: its kind is {kind!r}; allowed: {', '.join(FORMS)}")
    check(content, HEAD, str(file))
    check(content, FORMS[kind], str(file))
    return Run(kind, name, file, content)


def check(value: Any, form: Any, where: str) -> None:
    """Compares JSON with its form: a type, `[form]`, `{str: form}` of any names, or a form for each key.

    Raises UsageError with the key, its value and what it must be.
    """
    kinds, wanted = TYPES[form if isinstance(form, type) else type(form)]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UsageError(f"{where}: got {value!r:.40}, must be {wanted}; run it again")
    if isinstance(form, list):
        for index, item in enumerate(value):
            check(item, form[0], f"{where}[{index}]")
    elif isinstance(form, dict):
        for name, inner in (dict.fromkeys(value, form[str]) if str in form else form).items():
            key = name if str in form else name.removesuffix("?")
            if key not in value and key == name:
                raise UsageError(f"{where}: has no {key!r}, which every run of this kind has; run it again")
            if key == name or value.get(key) is not None:
                check(value[key], inner, f"{where}.{key}")
