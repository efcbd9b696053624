"""The runs that a page shows: JSON files of the evaluation commands, or those beside generated videos."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from scripts.run.errors import UsageError, one_line

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
COSTS = ("density", "density_with_warmup", "attention_flops", "seconds_step", "seconds_video")
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
    """One JSON file: its kind, a name that no other run of the page has, and what it holds."""

    kind: str
    name: str
    file: Path
    content: dict[str, Any]


def find_runs(paths: list[Path]) -> list[Run]:
    """The runs at some folders or files, each file once, by kind in the order of MADE_BY.

    Raises:
        UsageError: a path that is missing or holds no run, or a file that is not what it should be.
    """
    files = list(dict.fromkeys(file.resolve() for path in paths for file in _files(path)))
    common = os.path.commonpath([file.parent.parent for file in files])
    runs = [_read(file, str(file.relative_to(common).with_suffix(""))) for file in files]
    return sorted(runs, key=lambda run: list(MADE_BY).index(run.kind))


def _files(path: Path) -> list[Path]:
    """JSON files of the runs at a path: those of the evaluation commands, else those beside videos."""
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; name output folders, or JSON files in them")
    if not path.is_dir():
        return [path.with_suffix(".json") if path.suffix == ".mp4" else path]
    names = [f"{kind}.json" for kind in MADE_BY if kind != "generation"]
    files = [path / name for name in names if (path / name).is_file()]
    records = [video.with_suffix(".json") for video in sorted(path.glob("*.mp4"))]
    files = files or [record for record in records if record.is_file()]
    if not files:
        raise UsageError(
            f"{path}: has neither {', '.join(names)} nor an mp4 with its JSON; name a run's folder"
        )
    return files


def _read(file: Path, name: str) -> Run:
    """Reads and checks one JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is no JSON ({one_line(error)}); name a run's JSON file") from error
    kind = content.get("kind", "generation") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in FORMS:
        raise UsageError(f"{file}: is no run: its kind is {kind!r}, allowed: {', '.join(FORMS)}")
    check(content, HEAD, str(file))
    check(content, FORMS[kind], str(file))
    return Run(kind, name, file, content)


def check(value: Any, form: Any, where: str) -> None:
    """Compares JSON with its form: a type, `[form]`, `{str: form}` of any names, or a form for each key.

    Raises:
        UsageError: names the key, what stands there and what is allowed.
    """
    kinds, allowed = TYPES[form if isinstance(form, type) else type(form)]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UsageError(f"{where}: got {value!r:.40}, allowed: {allowed}")
    if isinstance(form, list):
        for index, item in enumerate(value):
            check(item, form[0], f"{where}[{index}]")
    elif isinstance(form, dict) and str in form:
        for name, item in value.items():
            check(item, form[str], f"{where}.{name}")
    elif isinstance(form, dict):
        for name, inner in form.items():
            key = name.removesuffix("?")
            if key == name and key not in value:
                raise UsageError(f"{where}: has no {key!r}, which a run of this kind holds; run it again")
            if key == name or value.get(key) is not None:
                check(value[key], inner, f"{where}.{key}")
