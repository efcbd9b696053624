"""The runs that a report shows: JSON files of the evaluation commands, or generated videos."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.evaluation.report_forms import FORMS, HEAD, checked, number
from scripts.run.errors import UsageError, one_line
from scripts.run.outputs import NO_FRAMES

MADE_BY = {
    "evaluation": "evaluate.sh",
    "analysis": "analyse_attention.sh",
    "cost": "cost.sh",
    "ablation": "ablate.sh",
    "generation": "wan_t2v_inference.sh",
}


@dataclass(frozen=True)
class Run:
    """One JSON file: its kind, a short name, and what it holds in the form of its kind."""

    kind: str
    name: str
    file: Path
    content: dict[str, Any]


@dataclass
class Clip:
    """Videos of one prompt and seed, by the name of their setting.

    Attributes:
        files: mp4 of each setting, the reference first.
        reference: the setting that the others are compared with; None where there is nothing to compare.
        metrics: numbers of each setting against the reference.
    """

    prompt: str
    seed: int | None
    source: str
    files: dict[str, Path]
    reference: str | None = None
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)


def find_runs(places: list[Path]) -> list[Run]:
    """The runs at some folders or files, each file once, in the order given; names told apart.

    Raises:
        UsageError: a place that is not there or holds no run, or a file that is not what it should be.
    """
    files = dict.fromkeys(file.resolve() for place in places for file in _files(place))
    runs = [read_run(file) for file in files]
    again = Counter((run.kind, run.name) for run in runs)
    return [_told_apart(run) if again[run.kind, run.name] > 1 else run for run in runs]


def _files(place: Path) -> list[Path]:
    """JSON files of the runs at a place: those of the evaluation commands, else those beside videos."""
    if place.is_dir():
        named = [place / f"{kind}.json" for kind in MADE_BY if kind != "generation"]
        found = [file for file in named if file.is_file()]
        videos = sorted(place.glob("*.mp4"))
        found = found or [file for video in videos if (file := video.with_suffix(".json")).is_file()]
        if not found:
            raise UsageError(f"{place}: is no run: it holds neither {', '.join(f.name for f in named)} "
                             "nor an mp4 with its JSON")  # fmt: skip
        return found
    if not place.exists():
        raise UsageError(f"{place}: no such file or folder; allowed: output folders, or JSON files in them")
    return [place.with_suffix(".json") if place.suffix == ".mp4" else place]


def read_run(file: Path) -> Run:
    """Reads and checks one JSON file; UsageError where it is no run."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is no JSON ({one_line(error)})") from error
    kind = content.get("kind", "generation") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in FORMS:
        raise UsageError(f"{file}: is no run: its kind is {kind!r}, allowed: {', '.join(FORMS)}")
    if kind == "generation" and not {"prompt", "seed", "config"} <= content.keys():
        raise UsageError(f"{file}: is no run: it has no kind, and prompt, seed and config of a video neither")
    named = file.stem if kind == "generation" else file.parent.name
    return Run(kind, named or kind, file, checked(content, FORMS[kind] | HEAD, str(file)))


def _told_apart(run: Run) -> Run:
    """The run with its folder's parent, or its file's folder, in its name."""
    folder = run.file.parent if run.kind == "generation" else run.file.parent.parent
    return Run(run.kind, f"{folder.name}/{run.name}", run.file, run.content)


def clips(runs: list[Run]) -> list[Clip]:
    """The videos of evaluations, then those of plain runs: what differs in attention only stands together.

    Raises:
        UsageError: a video that a JSON names and that is not there.
    """
    found = [clip for run in runs if run.kind == "evaluation" for clip in _evaluated(run)]
    together: dict[str, list[Run]] = {}
    for run in runs:
        if run.kind == "generation":
            together.setdefault(_likeness(run), []).append(run)
    found += [_generated(group) for group in together.values()]
    for clip in found:
        for name, video in clip.files.items():
            if not video.is_file():
                raise UsageError(f"{video}: no such video, which is {name!r} of {clip.source}")
    return found


def _evaluated(run: Run) -> list[Clip]:
    reference, found = run.content["reference"], []
    for video in run.content["videos"] or []:
        files = {name: run.file.parent / path for name, path in video["files"].items()}
        if reference in files:
            files = {reference: files[reference]} | files
        against = reference if reference in files and len(files) > 1 else None
        metrics = {
            name: {key: number(value) for key, value in values.items()}
            for name, values in (video["metrics"] or {}).items()
        }
        found.append(Clip(video["prompt"], video["seed"], run.name, files, against, metrics))
    return found


def _likeness(run: Run) -> str:
    """Prompt, seed and configuration without attention and output; of input files their content counts."""
    content = run.content
    kept = {
        f"{group}.{key}": value
        for group, values in content["config"].items()
        if group not in ("attention", "output") and isinstance(values, dict)
        for key, value in values.items()
    }
    kept = {key: value for key, value in kept.items() if key not in NO_FRAMES}
    inputs = {name: file.get("sha256") for name, file in (content["inputs"] or {}).items()}
    return json.dumps([content["prompt"], content["seed"], kept, inputs], sort_keys=True)


def _generated(runs: list[Run]) -> Clip:
    """One clip of plain runs; the one with the dense pattern is the reference."""
    patterns = [_pattern(run) for run in runs]
    names = [
        pattern if patterns.count(pattern) == 1 else f"{pattern} ({run.file.parent.name}/{run.file.stem})"
        for pattern, run in zip(patterns, runs, strict=True)
    ]
    names = [
        name if names.count(name) == 1 else f"{name} {names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]
    files = {name: run.file.with_suffix(".mp4") for name, run in zip(names, runs, strict=True)}
    reference = "dense" if "dense" in files and len(files) > 1 else None
    if reference:
        files = {reference: files[reference]} | files
    first = runs[0]
    return Clip(first.content["prompt"], first.content["seed"], first.name, files, reference)


def _pattern(run: Run) -> str:
    attention = run.content["config"].get("attention")
    return str(attention.get("pattern", "video")) if isinstance(attention, dict) else "video"
