"""Reads prompt lists and score files of VBench, and score files of VisionReward; names files for VBench.

Forms as of github.com/Vchitect/VBench 0.1.5: the prompts are a JSON list of `{"prompt_en": ..., "dimension":
[...]}`, a video is `<prompt>-<index>.mp4`, and a score file holds `{dimension: [mean, [...]]}`. VisionReward
prints its scores; a file of them is JSON `{video: score}`, or CSV lines `video,score`.
"""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from radial_attn.files import LONGEST
from scripts.run.config import find_path
from scripts.run.errors import UsageError, one_line, reason_of
from scripts.run.files import read_lines, read_text, replacing
from scripts.run.inputs import prompt_lines
from scripts.run.tables import parse_json, read_csv


def listed_prompts(file: str, dimensions: str | None) -> list[str]:
    """Returns the prompts of a text file, one a line, or of VBench's JSON, each once, in their order.

    Raises UsageError for a file that cannot be read, has no prompts, or none of these dimensions.
    """
    entries = _read("evaluate.prompts", file, "[", lambda path: list(prompt_lines(read_lines(path)).values()))
    wanted = {name.strip() for name in (dimensions or "").split(",") if name.strip()}
    if wanted:
        lists = [entry.get("dimension") if isinstance(entry, dict) else None for entry in entries]
        if not all(isinstance(x, list) and all(isinstance(name, str) for name in x) for x in lists):
            raise UsageError(f"evaluate.dimensions: {file!r} has no dimensions; set evaluate.dimensions=null")
        known = {name for names in lists for name in names}
        if wanted - known:
            unknown = sorted(wanted - known)[0]
            raise UsageError(f"evaluate.dimensions: got {unknown!r}, allowed: {', '.join(sorted(known))}")
        entries = [entry for entry in entries if wanted & set(entry["dimension"])]
    prompts = [entry.get("prompt_en") if isinstance(entry, dict) else entry for entry in entries]
    prompts = [prompt.strip() if isinstance(prompt, str) else None for prompt in prompts]
    if None in prompts or not any(prompts):
        lack = "entries without prompt_en" if None in prompts else "no prompts"
        raise UsageError(f"evaluate.prompts: {file!r} has {lack}; write one a line, or use VBench's JSON")
    return list(dict.fromkeys(filter(None, prompts)))


def video_name(prompt: str, index: int) -> str:
    """Returns VBench's name of a prompt's video; UsageError if no file can have it."""
    name = f"{prompt}-{index}.mp4"
    if "/" in name or "\0" in name or len(name.encode()) > LONGEST:
        raise UsageError(f"evaluate.vbench: {prompt[:40]!r} ... cannot name a file; set evaluate.vbench=off")
    return name


def place(video: Path, folder: Path, name: str) -> None:
    """Puts the video into `folder` under another name: a hard link, or a copy if that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / name, ".mp4") as part:
        part.unlink(missing_ok=True)  # of a killed process with the same number
        try:
            os.link(video, part)
        except OSError:
            shutil.copyfile(video, part)


def read_scores(file: str) -> dict[str, dict[str, float]]:
    """Returns `{"vbench": {dimension: score}}` or `{"visionreward": {"mean": score}}` of a score file.

    Raises UsageError for a file that cannot be read, or of another form.
    """
    content = _read("evaluate.scores", file, "{", _score_rows)
    try:
        if content and all(isinstance(value, list) for value in content.values()):
            return {"vbench": {name: _number(value[0]) for name, value in content.items()}}
        if content.get("video", "") == "score":  # the head of a table
            del content["video"]
        return {"visionreward": {"mean": mean([_number(value) for value in content.values()])}}
    except (ValueError, TypeError, IndexError) as error:
        form = "VBench's eval_results.json, or videos with a score each, as JSON or CSV"
        raise UsageError(f"evaluate.scores: got {file!r} ({one_line(error)}), must be {form}") from error


def _read(key: str, file: str, start: str, otherwise: Callable[[Path], Any]) -> Any:
    """Reads a file: as JSON if it begins with `start`, else by `otherwise`."""
    try:
        path = find_path(file)
        text = read_text(path)
        return parse_json(text) if text.lstrip()[:1] == start else otherwise(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{key}: got {file!r}, which cannot be read ({reason_of(error)})") from error


def _score_rows(path: Path) -> dict[str, str]:
    """Reads the rows `video,score` of a CSV file; ValueError for others, or a video that is given twice."""
    scores: dict[str, str] = {}
    for line, cells in read_csv(path).items():
        if len(cells) != 2:
            raise ValueError(f"line {line} has {len(cells)} cells, must have a video and its score")
        if cells[0] in scores:
            raise ValueError(f"line {line} gives {cells[0]!r} a second time")
        scores[cells[0]] = cells[1]
    return scores


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    return number
