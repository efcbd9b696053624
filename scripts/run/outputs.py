"""Names the files of a run, writes them whole or not at all, and finds them when a run resumes."""

import hashlib
import json
import os
import re
import signal
import sys
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np

from scripts.run.config import Config
from scripts.run.errors import UsageError, cannot_write, reason_of
from scripts.run.files import remove_leftovers, sha256, temporary, user_path
from scripts.run.system import timed
from scripts.run.video_files import probe_video, sound_seconds

SLUG_LENGTH = 60
CRF = 10  # for libx264: visually lossless, small videos stay crisp
TO_BT709 = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=lanczos+accurate_rnd+full_chroma_int+full_chroma_inp,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
PROBE_BYTES = 2**20
SOUND_SLACK = 0.1  # seconds that AAC may add or leave out: a packet or two
FILES = ("image", "last_image", "video", "mask", "pose_video", "face_video", "reference_images")
INPUTS = tuple(f"generation.{name}" for name in FILES)  # their content counts, the name does not
MODEL = frozenset(("model.path", "model.transformer", "model.transformer_2"))
DEGREES = ("parallel.ulysses_degree", "parallel.ring_degree", "parallel.cfg_degree", "parallel.data_degree")
NO_FRAMES = (
    *("output.path", "output.overwrite", "generation.prompt_file", "generation.seeds"),
    *("attention.check", "attention.tune"),
    *INPUTS,
    *DEGREES,
)


def video_path(config: Config, prompt: str, number: int = 0) -> Path:
    """Returns `output.path` if it ends in .mp4, else `[<number>_]<prompt's words>_seed<seed>.mp4` in it.

    `number` is the line of the prompt file, 0 without one. Words beyond 60 characters become a hash.
    """
    path = user_path(config.output.path)
    if path.suffix == ".mp4":
        return path
    prefix = f"{number:04d}_" if number else ""
    return path / f"{prefix}{_slug(prompt)}_seed{config.generation.seed}.mp4"


def of_video(config: Config, prompt: str, seed: int) -> Config:
    """Returns the configuration of one of several videos: its own prompt and seed."""
    return replace(config, generation=replace(config.generation, prompt=prompt, seed=seed, seeds=[]))


def _slug(prompt: str) -> str:
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_") or "video"
    if len(slug.encode()) <= SLUG_LENGTH:
        return slug
    short = slug.encode()[:SLUG_LENGTH].decode(errors="ignore").rstrip("-_")
    return f"{short}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def resolved(config: Config, prompt: str) -> dict[str, Any]:
    """Returns the configuration as the JSON holds it: the one that makes this video alone."""
    content = asdict(config)
    content["generation"] |= {"prompt": prompt, "prompt_file": None}
    return content


@dataclass(frozen=True)
class Contents:
    """Holds digests of the files of a run.

    Attributes:
        inputs: images, video, mask: file names and sha256 like the record; only the sha256 counts.
        loras: sha256 of the files of `model.loras`; None: they do not count.
        model: digest of the model's files; None, or an older record without one: they do not count.
    """

    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    loras: Sequence[str] | None = None
    model: str | None = None


def finished(
    path: Path, config: Config, prompt: str, contents: Contents | None = None
) -> tuple[bool, list[str]]:
    """Returns whether `path` and its JSON were made with this configuration, and the keys that differ.

    Output path, name of the prompt file, check and processes do not count: they change no frame. A key that
    an older record lacks had its default.
    """
    record = path.with_suffix(".json")
    if not (path.is_file() and record.is_file()):
        return False, []
    changed = differing(record, config, prompt, contents or Contents())
    return not changed, changed


def differing(record: Path, config: Config, prompt: str, contents: Contents) -> list[str]:
    """Returns the keys in which a record differs from a run; `config` if it cannot be read."""
    content = read_record(record)
    try:
        before = _comparable(content["config"], content.get("inputs", {}))
        files = [entry["sha256"] for entry in content.get("loras") or ()]
        model = content.get("model", {}).get("sha256")
    except (KeyError, TypeError, AttributeError):
        return ["config"]
    now = _comparable(resolved(config, prompt), contents.inputs)
    before = _comparable(asdict(Config()), {}) | before
    changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    if contents.loras is not None and list(contents.loras) != files and "model.loras" not in changed:
        changed.append("content of model.loras")
    if None not in (model, contents.model) and model != contents.model and not MODEL.intersection(changed):
        given = [key for key in sorted(MODEL) if now.get(key) is not None]
        changed.append(f"content of {' or '.join(given)}")
    return changed


def read_record(record: Path) -> dict[str, Any]:
    """Reads the JSON of a video; {} if it is missing or damaged."""
    try:
        content = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_whole(path: Path) -> bool:
    """Returns whether a video is as its record says; one with an older record must be readable to its end."""
    record = read_record(path.with_suffix(".json"))
    try:
        if (about := record.get("video")) is None:
            return bool(record) and probe_video(path).frames > 0
        return path.stat().st_size == about["bytes"] and sha256(path) == about["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _comparable(content: dict[str, dict], inputs: dict[str, dict]) -> dict[str, Any]:
    flat = {f"{group}.{key}": value for group, values in content.items() for key, value in values.items()}
    kept = {key: value for key, value in flat.items() if key not in NO_FRAMES}
    return kept | {f"generation.{name}": file["sha256"] for name, file in inputs.items()}


def refuse_other_settings(config: Config, changed: dict[Path, list[str]]) -> None:
    """Raises UsageError for videos made with other settings, by the keys that differ, if they are to stay.

    A video that `output.path` names must have a record, which tells its settings.
    """
    if config.output.overwrite or not changed:
        return
    (path, keys), *others = changed.items()
    more = f" (and {len(others)} more)" if others else ""
    had = f"was made with other settings ({', '.join(keys)})" if keys else "has no record of its settings"
    raise UsageError(
        f"output.path: {str(path)!r}{more} is there and {had}; name another output.path, or set "
        "output.overwrite=true"
    )


def check_target(config: Config) -> Path:
    """Returns the folder of the run's videos; UsageError if `output.path` cannot name it or the video."""
    target, got = user_path(config.output.path), f"output.path: got {config.output.path!r}"
    is_file = target.suffix == ".mp4"
    if is_file and (config.generation.prompt_file is not None or len(config.generation.all_seeds) > 1):
        raise UsageError(f"{got}, must be a folder with a prompt file or several seeds")
    try:
        target.with_suffix(".json").exists()  # its name is the longest
        if is_file and target.is_dir():
            raise UsageError(f"{got}, which is a folder; name a file ending in .mp4")
    except OSError as error:
        raise UsageError(f"{got}, which cannot be used ({error.strerror}); name another") from error
    return target.parent if is_file else target


@contextmanager
def writable_folder(config: Config) -> Iterator[Path]:
    """Makes the folder of the run's videos, tests that it can be written, and tidies up after dead runs.

    At the end, folders that were made here and are still empty are removed.

    Raises:
        UsageError: the folder cannot be made or written, or one file is named for several videos.
    """
    folder = check_target(config)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder, buffering=0) as probe:
                probe.write(b"x")
        except OSError as error:
            raise UsageError(
                f"output.path: got {config.output.path!r}, which cannot be written ({reason_of(error)}); "
                "name a folder you may write to"
            ) from error
        remove_leftovers(folder)
        yield folder
    finally:
        for parent in made:
            with suppress(OSError):  # not empty, or never made
                parent.rmdir()


def unwritable(path: Path, error: OSError) -> UsageError:
    """Returns the error for a video that cannot be written; it tells whether the disk is full."""
    return cannot_write(
        error,
        f"output.path: cannot write {str(path)!r} ({reason_of(error)}); name a folder with room for "
        "the video",
    )


class Sound(NamedTuple):
    """Holds the sound of a video: float32 `[channels, N]` in -1 .. 1, and its samples a second."""

    samples: np.ndarray
    rate: int

    def about(self) -> dict[str, Any]:
        """Returns what a record says of it."""
        channels, count = self.samples.shape
        return {"channels": channels, "rate": self.rate, "seconds": count / self.rate}

    def write(self, path: Path) -> None:
        """Writes it as a WAV file of 16 bits."""
        with wave.open(str(path), "wb") as file:
            file.setnchannels(len(self.samples))
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes((self.samples.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())


def write_pair(
    path: Path, frames: np.ndarray, fps: int, record: dict[str, Any], sound: Sound | None = None
) -> None:
    """Writes the video and its JSON under temporary names and renames both; after an error no new one exists.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        record: the content of the JSON; its `seconds` get the time of encoding as `write`, and its `video`
            size and sha256 of the file, and channels, rate and seconds of a sound.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    video, text = temporary(path, ".mp4"), temporary(path.with_suffix(".json"))
    for file in (path, path.with_suffix(".json")):
        remove_leftovers(path.parent, file.name)
    before = signal.getsignal(signal.SIGTERM)
    if before == signal.SIG_DFL:  # ends the process with the signal's exit code, but through every `finally`
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with timed(record["seconds"], "write"):
            encode(video, frames, fps, sound)
        record["video"] = {"bytes": video.stat().st_size, "sha256": sha256(video)}
        record["video"] |= {"sound": sound.about()} if sound else {}
        content = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        text.write_text(content, encoding="utf-8", errors="backslashreplace")  # as JSON escapes half a pair
        _publish(video, text, path)
    finally:
        video.unlink(missing_ok=True)
        text.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, before)


def _publish(video: Path, text: Path, path: Path) -> None:
    """Renames both. The old record goes first and the new one comes last, so no record has a wrong video."""
    record = path.with_suffix(".json")
    record.unlink(missing_ok=True)
    try:
        os.replace(video, path)
        os.replace(text, record)
    except BaseException:
        if not video.exists():
            path.unlink()
        raise


def encode(path: Path, frames: np.ndarray, fps: float, sound: Sound | None = None) -> None:
    """Writes uint8 `[T, H, W, 3]` as H.264 in mp4, BT.709 and marked so; OSError if that fails.

    Odd sizes are written without halving the colours; the sound becomes AAC. The file is read back, because
    imageio hides the encoder's exit status.
    """
    import imageio

    is_odd = frames.shape[1] % 2 or frames.shape[2] % 2
    codec = {"codec": "libx264", "pixelformat": "yuv444p" if is_odd else "yuv420p"}
    options = {"fps": fps, "quality": None, "macro_block_size": 1, "ffmpeg_log_level": "quiet"}
    options |= {"output_params": ["-crf", str(CRF), "-vf", TO_BT709]}
    written, heard, wav = -1, 0.0, path.with_suffix(".wav")
    options |= {"audio_path": str(wav), "audio_codec": "aac"} if sound else {}
    try:
        with suppress(OSError, RuntimeError, ValueError):
            if sound:
                sound.write(wav)
            with imageio.get_writer(path, format="FFMPEG", **codec, **options) as writer:
                for frame in frames:
                    writer.append_data(frame)
            written, heard = probe_video(path).frames, sound_seconds(path)
    finally:
        wav.unlink(missing_ok=True)
    whole = sound is None or abs(heard - sound.about()["seconds"]) < SOUND_SLACK
    if written != len(frames) or not whole:
        _raise_reason(path)


def _raise_reason(path: Path) -> None:
    """Writes more to the file, which raises the OSError that the encoder had; else raises one of its own."""
    with path.open("ab") as stream:
        stream.write(bytes(PROBE_BYTES))
        stream.flush()
        os.fsync(stream.fileno())
    raise OSError(f"ffmpeg could not encode {path.name}")
