"""Adapters to VBench and VisionReward: prompt lists in, videos under the expected names, scores back.

Forms as of github.com/Vchitect/VBench 0.1.5 (vbench/__init__.py, prompts/README.md): the full information is
a JSON list of `{"prompt_en": ..., "dimension": [...]}`, a video is `<prompt>-<index>.mp4`, five a prompt, and
a score file holds `{dimension: [mean, [{"video_path": ..., "video_results": ...}, ...]]}`. VisionReward only
prints its scores; here a file of them is JSON `{video: score}`, or CSV lines `video,score`.
"""

import csv
import json
import math
import os
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

from scripts.run.errors import UsageError, one_line

PROMPTS = "evaluate.prompts"
LONGEST = 255  # bytes of a file's name
CUSTOM = (  # dimensions that VBench scores without its own prompts
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
INSTALL = (
    "no VBench here: pip install vbench into an environment of its own (it pins old libraries), there vbench "
    "evaluate --videos_path FOLDER --dimension NAME, then evaluate.scores='NAME: FILE'"
)


def listed_prompts(file: str, dimensions: str | None) -> list[str]:
    """The prompts of a text file, one a line, or of VBench's JSON, each once, in their order.

    Raises UsageError for a file that cannot be read, has no prompts, or none of these dimensions.
    """
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
        entries = json.loads(text) if text.lstrip()[:1] == "[" else text.splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{PROMPTS}: got {file!r}, which cannot be read ({_reason(error)})") from error
    wanted = {name.strip() for name in (dimensions or "").split(",") if name.strip()}
    if wanted:
        _check_dimensions(file, entries, wanted)
        entries = [entry for entry in entries if wanted & set(entry["dimension"])]
    prompts = [entry.get("prompt_en") if isinstance(entry, dict) else entry for entry in entries]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(
            f"{PROMPTS}: {file!r} has entries without prompt_en; allowed: VBench's JSON, or text"
        )
    prompts = list(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
    if not prompts:
        raise UsageError(f"{PROMPTS}: got {file!r}, which has no prompts; allowed: one a line, VBench's JSON")
    return prompts


def _check_dimensions(file: str, entries: list[Any], wanted: set[str]) -> None:
    lists = [entry.get("dimension") if isinstance(entry, dict) else None for entry in entries]
    if not all(isinstance(names, list) for names in lists):
        raise UsageError(f"evaluate.dimensions: {file!r} has no dimensions; allowed with it: null")
    known = {name for names in lists for name in names}
    if wanted - known:
        unknown = sorted(wanted - known)[0]
        raise UsageError(f"evaluate.dimensions: got {unknown!r}, allowed: {', '.join(sorted(known))}")


def video_name(prompt: str, index: int) -> str:
    """What VBench calls a prompt's video; UsageError where no file can be called so."""
    name = f"{prompt}-{index}.mp4"
    if "/" in name or "\0" in name or len(name.encode()) > LONGEST:
        raise UsageError(f"evaluate.vbench: {prompt[:40]!r} ... cannot be a file's name; allowed: off")
    return name


def place(video: Path, folder: Path, name: str) -> None:
    """The video under another name in `folder`: a hard link, or a copy where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{os.getpid()}.mp4"
    draft.unlink(missing_ok=True)
    try:
        os.link(video, draft)
    except OSError:
        shutil.copyfile(video, draft)
    draft.replace(folder / name)
    draft.unlink(missing_ok=True)  # which a rename to a link of the same file leaves


def run_vbench(
    videos: Path, name: str, prompts: str | None, dimensions: str | None, device: str
) -> Path | None:
    """VBench's score file of a folder of videos; None where the library is missing.

    With VBench's JSON as `prompts` its own suite is scored, else the dimensions that take any prompt.

    Raises UsageError where VBench fails.
    """
    try:
        from vbench import VBench
    except ImportError:
        return None
    suite = prompts is not None and prompts.endswith(".json")
    chosen = [part.strip() for part in (dimensions or "").split(",") if part.strip()]
    try:
        judge = VBench(device, prompts if suite else "", str(videos.parent))
        chosen = chosen or (None if suite else list(CUSTOM))
        mode = "vbench_standard" if suite else "custom_input"
        judge.evaluate(videos_path=str(videos), name=name, dimension_list=chosen, mode=mode)
    except Exception as error:  # whatever its models raise
        raise UsageError(f"evaluate.vbench: VBench failed on {videos}: {one_line(error)}") from error
    return videos.parent / f"{name}_eval_results.json"


def read_scores(file: str) -> dict[str, dict[str, float]]:
    """`{"vbench": {dimension: score}}` or `{"visionreward": {"mean": score}}` of a score file.

    Raises UsageError for a file that cannot be read, or of another form.
    """
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
        content = json.loads(text) if text.lstrip()[:1] == "{" else dict(csv.reader(text.splitlines()))
    except (OSError, ValueError) as error:
        raise UsageError(f"evaluate.scores: got {file!r}, which cannot be read ({_reason(error)})") from error
    lists = [isinstance(value, list) for value in content.values()]
    try:
        if lists and all(lists):
            return {"vbench": {name: _number(value[0]) for name, value in content.items()}}
        if content.get("video", "") == "score":  # the head of a table
            del content["video"]
        return {"visionreward": {"mean": mean([_number(value) for value in content.values()])}}
    except (ValueError, TypeError, IndexError) as error:
        form = "VBench's eval_results.json, or videos with a score each, as JSON or CSV"
        raise UsageError(f"evaluate.scores: got {file!r} ({one_line(error)}), allowed: {form}") from error


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no number")
    return number


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)
