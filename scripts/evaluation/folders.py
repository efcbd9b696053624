"""Finished videos against those of the same name in another folder."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.evaluation.files import write_json
from scripts.evaluation.metrics import compare, no_lpips
from scripts.evaluation.tables import means
from scripts.evaluation.videos import finite, read_video
from scripts.run.errors import UsageError

SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif")
READINGS = "readings.json"
NOTHING = (
    "grid",
    "density",
    "density_with_warmup",
    "attention_flops",
    "seconds_step",
    "seconds_video",
    "mask",
)


def scored(words: list[str], work: Path) -> dict[str, Any]:
    """What evaluation.json holds of the folders `NAME=DIR`, the first of which is the reference.

    Readings are kept in `work`, and those of files that have not changed since are not taken again.

    Raises:
        UsageError: fewer than two folders, other videos in one than in the reference, videos of another size
            or length, files that cannot be read.
    """
    places = _folders(words)
    reference, *others = places
    listed = {name: videos_in(name, folder) for name, folder in places.items()}
    for name in others:
        _check_names(name, listed[name], reference, listed[reference])
    file = work / READINGS
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    videos = []
    with tqdm(total=len(others) * len(listed[reference]), unit="video") as bar:
        for stem, path in listed[reference].items():
            metrics = {}
            for name in others:
                key = json.dumps([_state(path), _state(listed[name][stem]), no_lpips() is None])
                if key not in kept:
                    kept[key] = _metrics(path, listed[name][stem])
                    write_json(file, kept)
                metrics[name] = kept[key]
                bar.update()
            files = {name: str(paths[stem].resolve()) for name, paths in listed.items()}
            videos.append({"prompt": stem, "seed": None, "files": files, "metrics": metrics})
    unknown = dict.fromkeys(NOTHING)
    return {
        "reference": reference,
        "settings": [{"name": name, "words": []} | unknown for name in places],
        "videos": videos,
        "attention": {},
        "means": {
            name: means(video["metrics"][name] for video in videos) | {"recall": None, "mse": None}
            for name in others
        },
    }


def videos_in(name: str, folder: Path) -> dict[str, Path]:
    """The videos of a folder by their names without suffix, sorted; UsageError where there are none."""
    if not folder.is_dir():
        raise UsageError(f"--folders: {name} is {str(folder)!r}, which is no folder; allowed: NAME=DIR")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UsageError(f"--folders: {name} is {str(folder)!r}, which has no videos ({', '.join(SUFFIXES)})")
    found = {path.stem: path for path in files}
    if len(found) < len(files):
        raise UsageError(f"--folders: {str(folder)!r} has videos that differ in their suffix only")
    return found


def _folders(words: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or name in found:
            raise UsageError(f"--folders: got {word!r}, allowed: NAME=DIR, names that differ")
        found[name] = Path(folder).expanduser()
    if len(found) < 2:
        raise UsageError("--folders: got one, allowed: two or more, the first is the reference")
    return found


def _check_names(name: str, own: dict[str, Path], reference: str, theirs: dict[str, Path]) -> None:
    for here, there, stems in (
        (name, reference, own.keys() - theirs),
        (reference, name, theirs.keys() - own),
    ):
        if stems:
            more = f" and {len(stems) - 1} others" if len(stems) > 1 else ""
            raise UsageError(f"--folders: {here} has {sorted(stems)[0]!r}{more}, which {there} has not")


def _metrics(reference: Path, path: Path) -> dict[str, float | None]:
    videos = read_video(path), read_video(reference)
    own, theirs = (list(video.shape[:3]) for video in videos)
    if own != theirs:
        raise UsageError(f"--folders: {path} has frames, height, width {own}, {reference} has {theirs}")
    try:
        return finite(compare(*videos))
    except ValueError as error:
        raise UsageError(f"--folders: {path}: {error}") from error


def _state(path: Path) -> list[Any]:
    """What tells whether a file is the same as before."""
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns]
