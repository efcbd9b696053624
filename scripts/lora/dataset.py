"""Finds videos with captions for training and reads each once; what is left out is counted and named."""

import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from radial_attn.models.lora.keys import listed
from scripts.lora.config import DataConfig
from scripts.lora.latent_shards import write_whole
from scripts.lora.videos import Video, probe
from scripts.run.errors import UsageError, one_line, reason_of
from scripts.run.files import is_blank, read_text, user_path
from scripts.run.image_files import BROKEN, is_image_name
from scripts.run.results import read_json
from scripts.run.schema import find_path
from scripts.run.tables import read_json_lines, read_table
from scripts.run.video_files import READER, SUFFIXES, is_video_name

SAME_RATE = 0.01  # share by which a rate may be missed: 24 includes films at 23.976
READINGS, LEFT_OUT = "readings.json", "left_out.txt"
SAVE_EVERY = 10.0  # seconds between two writes of the readings
NO_VIDEO = f"no video of a kind that is read ({', '.join(SUFFIXES)})"
READING = {"digest": str, "frames": int, "fps": float, "height": int, "width": int}
Reading = tuple[str, int, float, int, int]  # in this order
IN_FOLDER, IN_TABLE = "data.folder", "data.table"


@dataclass(frozen=True)
class Entry:
    """Holds a video's name and file, and its caption or the caption's file."""

    name: str
    path: Path
    caption: str | Path


@dataclass
class Dataset:
    """Holds the videos to train on, and what is left out.

    Attributes:
        count: how many videos with captions were found.
        bad: the reason for each that cannot be used, by its name.
        others: the reason for each other file that is not read, by its name.
    """

    videos: list[Video] = field(default_factory=list)
    count: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


class Readings:
    """Keeps what videos gave when they were read, by their paths, while size and time of change stay.

    A file of readings that is damaged counts as empty, and so does a damaged entry.
    """

    def __init__(self, file: Path) -> None:
        """Reads the file."""
        self.file = file
        content = read_json(file)
        kept = content.get("videos") if content.get("reader") == READER else None
        self.entries: dict[str, dict[str, Any]] = kept if isinstance(kept, dict) else {}

    def find(self, path: Path) -> Reading | Exception | None:
        """Returns the reading of a video as `probe` gives it, or its error; None without one."""
        try:
            entry = self.entries[str(path.absolute())]
            if entry["state"] != _state(path):
                return None
            if "error" in entry:
                return ValueError(str(entry["error"]))
            return tuple(kind(entry[name]) for name, kind in READING.items())
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def read(self, path: Path) -> Reading | Exception:
        """Reads a video, and keeps its reading or what is wrong with the file, but no error of the system."""
        try:
            state = _state(path)
            reading = probe(path)
        except BROKEN as error:
            if getattr(error, "errno", None) is None and "\0" not in str(path):
                self.entries[str(path.absolute())] = {"state": state, "error": one_line(error)}
            return error
        self.entries[str(path.absolute())] = {"state": state, **dict(zip(READING, reading, strict=True))}
        return reading

    def write(self) -> None:
        """Writes the file; UsageError, or DiskFullError, if that fails."""
        write_whole(
            self.file, json.dumps({"reader": READER, "videos": dict(self.entries)}, sort_keys=True).encode()
        )


def read_dataset(data: DataConfig, *, dry_run: bool = False) -> Dataset:
    """Reads all videos of `data.folder` or `data.table`, each to its end, unless it was read before.

    The readings are kept in `data.latents`, so that a second call decodes nothing. A dry run writes nothing.

    Raises:
        UsageError: there are no videos; a table cannot be read; a video has no caption or cannot be read,
            and `data.skip_bad` is false; frame rates differ without `data.fps`.
    """
    if (data.folder is None) == (data.table is None):
        got = f"data.folder: got {data.folder!r}, and data.table: got {data.table!r}"
        raise UsageError(f"{got}; set one of them, and the other to null")
    key = IN_FOLDER if data.table is None else IN_TABLE
    dataset = Dataset()
    entries = _in_table(data.table) if data.table is not None else _in_folder(data.folder, dataset)
    dataset.count = len(entries) + len(dataset.bad)
    captions = {}
    for entry in entries:
        try:
            captions[entry] = _caption(entry)
        except ValueError as error:
            dataset.bad[entry.name] = one_line(error)
    _refuse(key, data, dataset, dry_run=dry_run)  # soon: reading the videos takes long
    probes = _probe_all(list(captions), data, dry_run=dry_run)
    for entry, reading in probes.items():
        if isinstance(reading, Exception):
            dataset.bad[entry.name] = reason_of(reading)
        else:
            dataset.videos.append(Video(entry.name, entry.path, captions[entry], *reading))
    _refuse(key, data, dataset, dry_run=dry_run)
    _check_rates(dataset, data)
    if not dataset.videos:
        raise UsageError(f"{key}: none of {dataset.count} videos can be used: {listed(dataset.bad, 3)}")
    return dataset


def printable(path: Path | str) -> str:
    """Returns a path as text that every file can hold; bytes that are not UTF-8 become `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def write_left_out(data: DataConfig, reasons: dict[str, str]) -> Path:
    """Writes names and reasons to a file in `data.latents`, a line each, and returns its path."""
    file = user_path(data.latents) / LEFT_OUT
    if reasons:
        lines = [f"{name}\t{reason}".replace("\n", " ") for name, reason in reasons.items()]
        write_whole(file, "\n".join([*lines, ""]).encode(errors="backslashreplace"))
    elif file.is_file():
        file.unlink()
    return file


def _refuse(key: str, data: DataConfig, dataset: Dataset, *, dry_run: bool) -> None:
    """Raises UsageError if videos are bad and `data.skip_bad` is false; writes, or prints, the whole list."""
    if not dataset.bad or data.skip_bad:
        return
    listing = "all are listed above"
    if dry_run:
        print("\n".join(f"{name}: {reason}" for name, reason in dataset.bad.items()), flush=True)
    else:
        listing = f"all are listed in {write_left_out(data, dataset.bad | dataset.others)}"
    raise UsageError(
        f"{key}: {len(dataset.bad)} of {dataset.count} videos cannot be used: {listed(dataset.bad, 3)}; "
        f"mend or remove them, or set data.skip_bad=true to go on without them; {listing}"
    )


def _in_folder(name: str, dataset: Dataset) -> list[Entry]:
    """Lists the videos of a folder and all folders in it; adds to `dataset` what is left out."""
    folder = find_path(name)
    if not folder.is_dir():
        raise UsageError(f"data.folder: got {name!r}, which is no folder; name a folder of videos")
    files = sorted(_walk(folder, dataset))
    videos = {file.with_suffix("") for file in files if is_video_name(file)}
    images = {file.with_suffix("") for file in files if is_image_name(file)}
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    entries = []
    for file in files:
        stem, label = file.with_suffix(""), printable(file.relative_to(folder))
        if is_video_name(file):
            entries.append(Entry(label, file, captions.get(stem, stem.with_name(f"{stem.name}.txt"))))
        elif file.suffix.lower() == ".txt":
            if stem not in videos | images:
                dataset.others[label] = "a caption without a video"
            elif captions[stem] != file:
                dataset.others[label] = f"a second caption, {captions[stem].name} is taken"
        elif is_image_name(file):
            if stem in captions and stem not in videos:
                entries.append(Entry(label, file, captions[stem]))
            else:
                dataset.others[label] = (
                    f"an image {'beside its video' if stem in videos else 'without a caption'}"
                )
        elif stem in captions and stem not in videos:
            dataset.bad[label] = f"it has a caption, but is {NO_VIDEO}"
        elif file.suffix.lower() != ".json" or stem not in videos:  # else it is the video's record
            dataset.others[label] = NO_VIDEO
    if not entries and not dataset.bad:
        raise UsageError(
            f"data.folder: got {name!r}, which has no videos; name a folder of videos ({', '.join(SUFFIXES)})"
        )
    return entries


def _walk(folder: Path, dataset: Dataset) -> list[Path]:
    """Lists the files in a folder and its folders, but no hidden ones; follows links, but in no circle.

    Adds hidden folders, broken links and folders that cannot be read to `dataset`.
    """
    files: list[Path] = []
    links: list[Path] = []
    waiting, seen = [folder], set()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)  # links come last: a folder keeps its own name
        label = printable(here.relative_to(folder)) + "/"
        real = here.resolve()
        if real in seen or real in folder.resolve().parents:
            dataset.others[label] = "a link to a folder that is read already, or holds this one"
            continue
        seen.add(real)
        try:
            children = sorted(here.iterdir())
        except OSError as error:
            dataset.bad[label] = f"a folder that cannot be read: {error.strerror}"
            continue
        for child in children:
            label = printable(child.relative_to(folder))
            if child.name.startswith("."):
                if child.is_dir():
                    dataset.others[label + "/"] = "a hidden folder"
            elif child.is_dir():
                (links if child.is_symlink() else waiting).append(child)
            elif child.is_file():
                files.append(child)
            else:
                dataset.bad[label] = "a broken link" if child.is_symlink() else "no file"
    return files


def _in_table(name: str) -> list[Entry]:
    """Lists the videos of a table; UsageError names the line that cannot be read as it was written."""
    path = find_path(name)
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv"):
        raise UsageError(f"data.table: got {name!r}, must be a file ending in .jsonl or .csv")
    lines: dict[str, int] = {}
    entries = []
    try:
        rows = read_json_lines(path) if kind == ".jsonl" else read_table(path)
        for number, row in rows.items():
            video, caption = _columns(number, row)
            if kind == ".csv" and _holds_a_row(caption):
                raise ValueError(f"line {number} has a quoted cell that goes on over the rows below it")
            file = path.parent / user_path(video)
            before = lines.setdefault(os.path.abspath(file), number)
            if before != number:
                raise ValueError(f"line {number} has the video of line {before}, {video!r}; give each once")
            entries.append(Entry(video, file, caption))
    except (OSError, ValueError) as error:
        raise UsageError(f"data.table: got {name!r}, which cannot be read: {reason_of(error)}") from error
    if not entries:
        below = " below a header" if kind == ".csv" and path.stat().st_size else ""
        empty = "names no videos" if below else "is empty"
        raise UsageError(f"data.table: got {name!r}, which {empty}; write a line for each video{below}")
    return entries


def _columns(number: int, row: Any) -> tuple[str, str]:
    """Returns video and caption of a row; ValueError if it has no text for one of them."""
    if not isinstance(row, dict):
        raise ValueError(f'line {number} is no object; write {{"video": ..., "caption": ...}} on each line')
    for name in ("video", "caption"):
        if name not in row:
            names = ", ".join(map(repr, row)) or "none"
            raise ValueError(f"line {number} has no `{name}`, only {names}; name them `video` and `caption`")
        if not isinstance(row[name], str):
            raise ValueError(f"line {number} has a `{name}` that is no text: {row[name]!r:.40}")
    if not row["video"].strip():
        raise ValueError(f"line {number} has an empty `video`")
    return row["video"], row["caption"]


def _holds_a_row(caption: str) -> bool:
    """Returns whether a line of the caption, but not its first, has a cell that names a video or an image."""
    cells = (Path(cell.strip('" \r')) for line in caption.split("\n")[1:] for cell in line.split(","))
    return any(is_video_name(cell) or is_image_name(cell) for cell in cells)


def _caption(entry: Entry) -> str:
    """Returns the caption; ValueError says why it cannot be used."""
    caption = entry.caption
    try:
        text = caption if isinstance(caption, str) else read_text(caption)
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(caption.name)}: {reason_of(error)}") from error
    if is_blank(text):
        raise ValueError("its caption is empty")
    return text.strip()


def _probe_all(entries: list[Entry], data: DataConfig, *, dry_run: bool) -> dict[Entry, Reading | Exception]:
    """Returns the reading of each video, or the error; reads those whose readings were not kept."""
    readings = Readings(user_path(data.latents) / READINGS)
    results = {entry: readings.find(entry.path) for entry in entries}
    missing = [entry for entry, result in results.items() if result is None]
    if not missing:
        return results
    written = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        probed = pool.map(lambda entry: readings.read(entry.path), missing)
        try:
            bar = tqdm(probed, total=len(missing), desc="checking", unit="video", disable=None)
            for entry, result in zip(missing, bar, strict=True):
                results[entry] = result
                if not dry_run and time.monotonic() - written > SAVE_EVERY:
                    readings.write()
                    written = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
            if not dry_run:
                readings.write()
    return results


def _state(path: Path) -> list[int]:
    """Returns what changes if a file does."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _check_rates(dataset: Dataset, data: DataConfig) -> None:
    """Raises UsageError if rates differ without `data.fps`, or are below it and `data.skip_bad` is false."""
    fps, videos = data.fps, dataset.videos
    moving = [video for video in videos if video.frames > 1]
    rates = Counter(round(video.fps, 2) for video in moving)
    if fps is None and len(rates) > 1:
        first = {round(video.fps, 2): video.name for video in reversed(moving)}
        texts = [f"{rate:g} ({count}, as {first[rate]})" for rate, count in sorted(rates.items())]
        raise UsageError(
            f"data.fps: got null, but the videos' rates are {', '.join(texts)} frames a second; set data.fps "
            f"to a number up to {min(rates):g}, or use videos of one rate"
        )
    least = 0.0 if fps is None else fps * (1 - SAME_RATE)
    slow = {video.name: f"{video.fps:g} frames a second" for video in moving if video.fps < least}
    if slow and not data.skip_bad:
        raise UsageError(
            f"data.fps: got {fps:g}, but {len(slow)} of {len(videos)} videos have fewer frames a second: "
            f"{listed(slow, 3)}; set it to at most {min(rates):g}, or set "
            "data.skip_bad=true to go on without them"
        )
    dataset.bad |= slow
    dataset.videos = [video for video in videos if video.name not in slow]
