"""Reads and checks the prompts, image, video and mask of a run before any weight is loaded."""

import hashlib
from collections import deque
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
from scripts.run.model_info import ModelInfo
from scripts.run.video_files import read_video

IMAGE = "a JPEG, PNG, WebP or AVIF file of 8 bits a channel"
LAST = 5  # frames of a video that Cosmos Predict 2.5 goes on from
VIDEO = "a video, or a folder of images (JPEG, PNG, WebP or AVIF)"


@dataclass(frozen=True)
class Inputs:
    """Holds the inputs of the pipeline besides the prompt.

    Attributes:
        arguments: `image` and `last_image`, or lists `video`, `mask` and `pose_video`, as Pillow images of
            `generation.height` x `width`. In sizes of their own: `reference_images`, `face_video`, and the
            image of a pipeline that fits it.
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
    generation: GenerationConfig, family: str, dry_run: bool = False, model: ModelInfo | None = None
) -> Inputs:
    """Reads the files that the configuration names; a dry run may leave out those that a run needs.

    `model`: of the run; None for one that needs no last image and makes videos of any size.

    Raises:
        UsageError: a file is missing, broken or of another kind; the model needs an image or a video; a mask
            has no video; a video has too few frames, or not as many as another; the image makes a video of
            another size.
    """
    _check_files(generation, family, dry_run, model)
    kind = FAMILIES[family]
    arguments: dict[str, Any] = {}
    for name in ("image", "last_image"):
        if (file := getattr(generation, name)) is not None:
            image = open_image(f"generation.{name}", file)
            if kind.sized_by_image and model is not None:
                _check_image_size(image, generation, model)
            whole = kind.sized_by_image or "pose_video" in kind.takes
            arguments[name] = image if whole else fit(image, generation.height, generation.width)
    arguments |= _read_videos(generation, family)
    files = {name: getattr(generation, name) for name in arguments}
    references = {f"reference_images[{i}]": name for i, name in enumerate(generation.reference_images)}
    if references:
        images = [open_image(f"generation.{key}", name, "white") for key, name in references.items()]
        arguments["reference_images"] = images
    if kind.alone and goes_on(family) and "image" in arguments:  # for which it would need torchvision
        arguments = {"video": [arguments["image"]], "num_latent_conditional_frames": 1}
    if "pose_video" in kind.takes and "video" in arguments:
        names = {"background_video": "video", "mask_video": "mask"}
        arguments |= {"mode": "replace"} | {name: arguments.pop(ours) for name, ours in names.items()}
    return Inputs(arguments, {key: _identity(name) for key, name in (files | references).items()})


def _check_files(generation: GenerationConfig, family: str, dry_run: bool, model: ModelInfo | None) -> None:
    """Raises UsageError if a file is not named that the run, or another file, needs."""
    takes = () if dry_run or FAMILIES[family].alone else FAMILIES[family].takes
    other = goes_on(family) and generation.video
    for name, wanted in {"image": IMAGE, "pose_video": VIDEO, "face_video": VIDEO}.items():
        if name in takes and getattr(generation, name) is None and not (name == "image" and other):
            needed = "an image" if name == "image" else "one"
            needed += ", or generation.video" if goes_on(family) else ""
            got = f"generation.{name}: got null"
            raise UsageError(f"{got}, but family {family} needs {needed}; name {wanted}")
    if other and FAMILIES[family].alone and generation.num_frames <= LAST:
        got = f"generation.num_frames: got {generation.num_frames}"
        raise UsageError(
            f"{got}, must be more than the {LAST} frames of generation.video that it begins with"
        )
    if other and generation.image:
        raise UsageError(
            f"generation.video: got {generation.video!r} beside generation.image, but family {family} goes "
            "on from one of them; set generation.image=null, or generation.video=null"
        )
    if generation.last_image is None and model is not None and model.last_image == "needed" and not dry_run:
        raise UsageError(
            f"generation.last_image: got null, but this model needs a first and a last image; name {IMAGE}"
        )
    if generation.mask is not None and generation.video is None:
        raise UsageError(
            f"generation.mask: got {generation.mask!r} without generation.video; set generation.video, or "
            "generation.mask=null"
        )
    if generation.video is not None and generation.mask is None and "pose_video" in FAMILIES[family].takes:
        raise UsageError(
            f"generation.mask: got null, but family {family} replaces what a mask marks in generation.video; "
            f"name {VIDEO}, or set generation.video=null"
        )


def _check_image_size(image: Image.Image, generation: GenerationConfig, model: ModelInfo) -> None:
    """Raises UsageError unless the pipeline, which derives a size from the image, makes the one given."""
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    processor = HunyuanVideo15ImageProcessor(vae_scale_factor=model.vae_pixels)
    height, width = processor.calculate_default_height_width(image.height, image.width, model.target_size)
    if (generation.height, generation.width) != (height, width):
        raise UsageError(
            f"generation.image: got {generation.image!r}, {image.height}x{image.width}, of which this model "
            f"makes {height}x{width}, not {generation.height}x{generation.width}; set generation.height="
            f"{height} generation.width={width}, or crop the image"
        )


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


def goes_on(family: str) -> bool:
    """Returns whether a video is only the start of the new one, which may start from an image, too."""
    takes = FAMILIES[family].takes
    return {"image", "video"} <= set(takes) and "pose_video" not in takes


def _read_videos(generation: GenerationConfig, family: str) -> dict[str, list[Image.Image]]:
    """Returns the videos that are named; the mask is white from half brightness on."""
    videos, first, last = {}, None, LAST if FAMILIES[family].alone else None
    begins = {"starts": goes_on(family), "last": last}
    for key in ("pose_video", "face_video", "video", "mask"):
        if (name := getattr(generation, key)) is not None:
            videos[key], count = _fitted_frames(f"generation.{key}", name, generation, first, **begins)
            first = first or (f"generation.{key}", count)
    if "mask" in videos:
        videos["mask"] = [frame.convert("L").point(lambda v: 255 * (v > 127)) for frame in videos["mask"]]
    return videos


def _fitted_frames(
    key: str,
    name: str,
    generation: GenerationConfig,
    first: tuple[str, int] | None,
    *,
    starts: bool,
    last: int | None,
) -> tuple[list[Image.Image], int]:
    """Returns the first `num_frames` frames, fitted, or square for faces, and the number of all frames.

    Args:
        first: the key of another video, and its number of frames, which this one must have.
        starts: whether the new video begins with this one.
        last: how many frames at the end of this one the new video begins with, in place of all.
    """
    frames, count = deque(maxlen=last), 0
    for count, frame in enumerate(read_frames(key, name), 1):
        if last:
            frames.append(frame)
        elif count <= generation.num_frames:
            square = 2 * (min(frame.size),)
            size = square if key.endswith("face_video") else (generation.height, generation.width)
            frames.append(fit(frame, *size))
    wanted = None
    if first is not None and first[1] != count:
        wanted = f"{first[1]}, as many as {first[0]}"
    elif last:
        wanted = None if count >= last else f"{last} or more: the new video begins with the last {last}"
        frames = [fit(frame, generation.height, generation.width) for frame in frames]
    elif starts and count >= generation.num_frames:
        wanted = f"fewer than {generation.num_frames} (generation.num_frames), which begin with them"
    elif count < generation.num_frames and not starts:
        wanted = f"at least {generation.num_frames} (generation.num_frames)"
    if wanted:
        raise UsageError(f"{key}: got {name!r} with {count} frames, must have {wanted}")
    return list(frames), count


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
