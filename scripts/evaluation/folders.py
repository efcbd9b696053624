"""Compares finished videos with those of the same name in another folder."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.evaluation.frame_sheet import read_video
from scripts.evaluation.metrics import compare, no_lpips
from scripts.evaluation.tables import COSTS, means
from scripts.run.errors import UsageError
from scripts.run.files import user_path
from scripts.run.results import read_json, write_json
from scripts.run.video_files import READER, SUFFIXES, is_video_name

READINGS = "readings.json"
UNKNOWN = ("grid", "mask", *COSTS)


def scored(words: list[str], work: Path) -> dict[str, Any]:
    """Returns the content of evaluation.json for folders `NAME=DIR`; the first is the reference.

    Metrics are kept in `work`, and computed again if a file has changed.

    Raises UsageError for fewer than two folders, for a folder with other videos than the reference, and for
    videos of another size or length, or that cannot be read.
    """
    listed = {name: videos_in(name, folder) for name, folder in _folders(words).items()}
    reference, *others = listed
    for name in others:
        _check_names(listed, name, reference)
    file = work / READINGS
    kept = read_json(file)
    videos = []
    with tqdm(total=len(others) * len(listed[reference]), unit="video") as bar:
        for stem, path in listed[reference].items():
            metrics = {}
            for name in others:
                key = json.dumps([_state(path), _state(listed[name][stem]), no_lpips() is None, READER])
                if key not in kept:
                    kept[key] = _metrics(path, listed[name][stem])
                    write_json(file, kept)
                metrics[name] = kept[key]
                bar.update()
            files = {name: str(paths[stem].resolve()) for name, paths in listed.items()}
            videos.append({"prompt": stem, "seed": None, "files": files, "metrics": metrics})
    return {
        "reference": reference,
        "settings": [{"name": name, "words": []} | dict.fromkeys(UNKNOWN) for name in listed],
        "videos": videos,
        "attention": {},
        "means": {
            name: means(video["metrics"][name] for video in videos) | {"recall": None, "mse": None}
            for name in others
        },
    }


def videos_in(name: str, folder: Path) -> dict[str, Path]:
    """Returns the videos of a folder by name without suffix, sorted; UsageError if there are none."""
    if not folder.is_dir():
        raise UsageError(f"--folders: {name} is {str(folder)!r}, which is no folder; name a folder of videos")
    listed = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    files = [path for path in listed if is_video_name(path) and path.is_file()]
    if left := [path.name for path in listed if path not in files]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        print(f"note: {name}: {left[0]}{more} left out, a hidden or half-written file", flush=True)
    if not files:
        raise UsageError(f"--folders: {name} is {str(folder)!r}, which has no videos ({', '.join(SUFFIXES)})")
    by_name = {path.stem: path for path in files}
    if len(by_name) < len(files):
        raise UsageError(f"--folders: {str(folder)!r} has videos that differ only in suffix; rename them")
    return by_name


def _folders(words: list[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not (name and folder) or name in folders:
            raise UsageError(f"--folders: got {word!r}, must be NAME=DIR, each name once")
        folders[name] = user_path(folder)
    if len(folders) < 2:
        raise UsageError("--folders: got one; name two or more, the first is the reference")
    return folders


def _check_names(listed: dict[str, dict[str, Path]], name: str, reference: str) -> None:
    for here, there in ((name, reference), (reference, name)):
        if stems := sorted(listed[here].keys() - listed[there]):
            more = f" and {len(stems) - 1} others" if len(stems) > 1 else ""
            raise UsageError(f"--folders: {here} has {stems[0]!r}{more}, which {there} has not")


def _metrics(reference: Path, path: Path) -> dict[str, float | None]:
    videos = read_video(path), read_video(reference)
    size, wanted = (list(video.shape[:3]) for video in videos)
    if size != wanted:
        raise UsageError(f"--folders: {path} has frames, height, width {size}, {reference} has {wanted}")
    try:
        return compare(*videos)
    except ValueError as error:
        raise UsageError(f"--folders: {path}: {error}") from error


def _state(path: Path) -> list[Any]:
    """Returns what changes if the file does."""
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns]
