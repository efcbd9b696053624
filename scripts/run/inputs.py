"""Reads and checks the prompts, image, video and mask of a run before any weight is loaded."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from radial_attn.models.pipeline.families import FAMILIES
from scripts.run.config import GenerationConfig, find_path
from scripts.run.errors import UsageError, reason_of
from scripts.run.files import is_blank, read_lines, sha256
from scripts.run.image_files import BROKEN, is_image_name, read_image
from scripts.run.video_files import read_video

IMAGE = "a JPEG, PNG, WebP or AVIF file of 8 bits a channel"
VIDEO = "a video, or a folder of images (JPEG, PNG, WebP or AVIF)"


@dataclass(frozen=True)
class Inputs:
    """Holds the inputs of the pipeline besides the prompt.

    Attributes:
        arguments: `image` and `last_image`, or lists `video` and `mask`, as Pillow images of
            `generation.height` x `width`; `reference_images` in their own sizes.
        files: file name and sha256 by key, for the record; `reference_images` are numbered.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)


def read_prompts(generation: GenerationConfig) -> dict[int, str]:
    """Reads the prompts by number: `{0: prompt}`, or those of the prompt file by line, from 1.

    Blank lines, and lines that begin with `#`, are no prompts; `\\#` stands for `#` there.
    """
    name = generation.prompt_file
    if name is None:
        if is_blank(generation.prompt):
            raise UsageError("generation.prompt: got '', must be text that is not empty")
        return {0: generation.prompt}
    if not name.strip():
        raise UsageError(f"generation.prompt_file: got {name!r}, must be a text file, or null")
    try:
        prompts = prompt_lines(read_lines(find_path(name)))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"generation.prompt_file: got {name!r}, which cannot be read ({reason_of(error)})"
        ) from error
    if not prompts:
        raise UsageError(f"generation.prompt_file: got {name!r}, which is empty; write one prompt a line")
    return prompts


def prompt_lines(lines: dict[int, str]) -> dict[int, str]:
    """Returns the prompts among the lines of a file: without comments, `\\#` at the start made `#`."""
    stripped = {number: line.strip() for number, line in lines.items()}
    return {
        n: line.removeprefix("\\") if line.startswith("\\#") else line
        for n, line in stripped.items()
        if not line.startswith("#")
    }


def read_inputs(
    generation: GenerationConfig, family: str, dry_run: bool = False, needs_last: bool = False
) -> Inputs:
    """Reads the files that the configuration names; a dry run may leave out the images that a run needs.

    `needs_last`: whether the model needs a last image.

    Raises:
        UsageError: a file is missing, broken or of another kind; the model needs an image; a mask has no
            video, or more or fewer frames than its video; a video has too few frames, or too many to go on.
    """
    takes = FAMILIES[family].takes
    goes_on = {"image", "video"} <= set(takes)  # from an image, or a video
    given = generation.image if generation.image is not None or not goes_on else generation.video
    if "image" in takes and given is None and not dry_run:
        needed = "an image, or generation.video" if goes_on else "an image"
        raise UsageError(f"generation.image: got null, but family {family} needs {needed}; name {IMAGE}")
    if goes_on and None not in (generation.image, generation.video):
        raise UsageError(
            f"generation.video: got {generation.video!r} beside generation.image, but family {family} goes "
            "on from one of them; set generation.image=null, or generation.video=null"
        )
    if generation.last_image is None and needs_last and not dry_run:
        raise UsageError(
            f"generation.last_image: got null, but this model needs a first and a last image; name {IMAGE}"
        )
    if generation.mask is not None and generation.video is None:
        raise UsageError(
            f"generation.mask: got {generation.mask!r} without generation.video; set generation.video, or "
            "generation.mask=null"
        )
    arguments: dict[str, Any] = {}
    for name in ("image", "last_image"):
        if (file := getattr(generation, name)) is not None:
            image = open_image(f"generation.{name}", file)
            arguments[name] = fit(image, generation.height, generation.width)
    if generation.video is not None:
        arguments |= _read_video(generation, goes_on)
    files = {name: getattr(generation, name) for name in arguments}
    references = {f"reference_images[{i}]": name for i, name in enumerate(generation.reference_images)}
    if references:
        images = [open_image(f"generation.{key}", name, "white") for key, name in references.items()]
        arguments["reference_images"] = images
    return Inputs(arguments, {key: _identity(name) for key, name in (files | references).items()})


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes an image (Lanczos) to just cover height x width, and crops it at the centre."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def open_image(key: str, name: str, ground: str = "black") -> Image.Image:
    """Reads a file as 8-bit RGB, upright, in sRGB and composited on `ground`; else raises UsageError."""
    path = _existing(key, name, IMAGE)
    if path.is_dir():
        raise UsageError(f"{key}: got {name!r}, which is a folder; name {IMAGE}")
    try:
        return read_image(path, ground)
    except BROKEN as error:
        raise _unreadable(key, name, error, IMAGE) from error


def _read_video(generation: GenerationConfig, goes_on: bool) -> dict[str, list[Image.Image]]:
    """Returns `video`, and `mask` if there is one: white from half brightness on.

    `goes_on`: whether the video is only the start of the new one.
    """
    video, count = _fitted_frames("generation.video", generation.video, generation, goes_on=goes_on)
    if generation.mask is None:
        return {"video": video}
    mask, _ = _fitted_frames("generation.mask", generation.mask, generation, video_frames=count)
    return {"video": video, "mask": [frame.convert("L").point(lambda v: 255 * (v > 127)) for frame in mask]}


def _fitted_frames(
    key: str,
    name: str,
    generation: GenerationConfig,
    video_frames: int | None = None,
    goes_on: bool = False,
) -> tuple[list[Image.Image], int]:
    """Returns the first `num_frames` frames, fitted, and the number of all frames."""
    frames, count = [], 0
    for count, frame in enumerate(read_frames(key, name), 1):
        if count <= generation.num_frames:
            frames.append(fit(frame, generation.height, generation.width))
    wanted = None
    if video_frames not in (None, count):
        wanted = f"{video_frames}, as many as the video"
    elif goes_on and count >= generation.num_frames:
        wanted = f"fewer than {generation.num_frames} (generation.num_frames), which begin with them"
    elif count < generation.num_frames and not goes_on:
        wanted = f"at least {generation.num_frames} (generation.num_frames)"
    if wanted:
        raise UsageError(f"{key}: got {name!r} with {count} frames, must have {wanted}")
    return frames, count


def read_frames(key: str, name: str) -> Iterator[Image.Image]:
    """Yields the frames, 8-bit RGB, of a video file, or of a folder of images in order of their names."""
    path = _existing(key, name, VIDEO)
    if path.is_dir():
        for file in _images_in(key, path):
            yield open_image(key, str(file))
        return
    try:
        yield from read_video(path)
    except BROKEN as error:
        raise _unreadable(key, name, error, VIDEO) from error


def _existing(key: str, name: str, wanted: str) -> Path:
    try:
        path = find_path(name)
        if name.strip() and (path.is_file() or path.is_dir()):
            return path
    except BROKEN as error:
        raise _unreadable(key, name, error, wanted) from error
    raise UsageError(f"{key}: got {name!r}, which is no file or folder; name {wanted}")


def _images_in(key: str, folder: Path) -> list[Path]:
    try:
        files = sorted(file for file in folder.iterdir() if is_image_name(file))
    except OSError as error:
        raise _unreadable(key, str(folder), error, VIDEO) from error
    if not files:
        raise UsageError(f"{key}: got {str(folder)!r}, a folder without images; name {VIDEO}")
    return files


def _unreadable(key: str, name: str, error: BaseException, wanted: str) -> UsageError:
    return UsageError(f"{key}: got {name!r}, which cannot be read ({reason_of(error)}); name {wanted}")


def _identity(name: str) -> dict[str, str]:
    """Returns file name and sha256; for a folder, the sha256 of its images' digests, ordered by name."""
    path = find_path(name)
    if path.is_dir():
        digests = bytes.fromhex("".join(map(sha256, _images_in(name, path))))
        return {"file": path.name, "sha256": hashlib.sha256(digests).hexdigest()}
    return {"file": path.name, "sha256": sha256(path)}
