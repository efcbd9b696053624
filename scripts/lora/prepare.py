"""Encodes videos and captions as latents and text embeddings, the input of LoRA training."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from radial_attn.models.lora.keys import listed
from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.pipeline.load import check_model, is_local, read_index
from radial_attn.models.pipeline.weights import check_weights
from radial_attn.models.training.flow import encode_text, encode_video
from scripts.lora.config import LoraTrainConfig
from scripts.lora.dataset import Dataset, read_dataset, write_left_out
from scripts.lora.fingerprint import fingerprint, parts, parts_folder
from scripts.lora.latent_shards import LatentShards, locked
from scripts.lora.latents import text_key
from scripts.lora.plan import check_data_sizes
from scripts.lora.videos import Clip, is_enlarged, plan_clips, read_clips, taken_frames, too_short
from scripts.run.errors import GenerationError, UsageError, one_line
from scripts.run.files import user_path
from scripts.run.hub_models import find_model, hub_unreachable, read_model_info
from scripts.run.image_files import is_image_name
from scripts.run.machine_checks import find_device, is_out_of_memory
from scripts.run.prompt_notes import prompt_notes
from scripts.run.sampler import quiet_libraries

MIB = 2**20


@dataclass(frozen=True)
class Job:
    """Holds a checked configuration, the model's folder or hub id, device, and the clips to encode."""

    config: LoraTrainConfig
    path: str
    device: str
    clips: list[Clip]

    @property
    def folder(self) -> Path:
        return user_path(self.config.data.latents)

    @property
    def captions(self) -> dict[str, str]:
        """Maps keys to captions, each once, the empty prompt first."""
        texts = ["", *(clip.video.caption for clip in self.clips)]
        return {text_key(caption): caption for caption in texts}

    def shards(self) -> LatentShards:
        """Opens the shards that are there."""
        return LatentShards(self.folder, self.config.model.dtype, self.config.data.shard_mb * MIB)

    def load(self, *, text: bool) -> Any:
        """Loads the pipeline with only its text encoders, or only its VAE."""
        import diffusers

        quiet_libraries()
        model, folder = self.config.model, parts_folder(self.path)
        dtype = {"default": getattr(torch, model.dtype), "vae": torch.float32}
        kept = ("text_encoder", "tokenizer", "scheduler") if text else ("vae", "scheduler")
        without = dict.fromkeys(name for name in parts(folder) if not name.startswith(kept))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations of one library in another
            try:
                kept_parts = [name for name in parts(folder) if name not in without]
                check_weights(folder, read_index(str(folder)), kept_parts)
                pipeline = getattr(diffusers, FAMILIES[model.family].pipeline).from_pretrained(
                    folder, dtype=dtype, use_safetensors=True, **without
                )
            except Exception as error:  # the libraries share no class for a folder that they cannot load
                if is_out_of_memory(error):
                    raise
                raise UsageError(
                    f"model.path: got {model.path!r}, which cannot be loaded: {one_line(error)}"
                ) from error
        if not text and FAMILIES[model.family].tiled_vae:
            pipeline.vae.enable_tiling()
        return pipeline.to(self.device)


def prepare_latents(config: LoraTrainConfig, *, dry_run: bool = False) -> None:
    """Checks the videos of a configuration, prints a summary, and encodes what is missing.

    Raises:
        UsageError: a model, video or caption cannot be used.
        GenerationError: a clip or caption cannot be encoded.
    """
    if not config.data.latents.strip():
        raise UsageError(f"data.latents: got {config.data.latents!r}, must be a folder")
    device, path = find_device(config.model.device), find_model(config.model)
    check_data_sizes(config.data, read_model_info(path))
    dataset = read_dataset(config.data, dry_run=dry_run)
    videos = dataset.videos
    job = Job(config, path, device, plan_clips(videos, config.data))
    if not job.clips:
        most, rate = max(len(taken_frames(video, config.data.fps)) for video in videos), config.data.fps
        at = "" if rate is None else f" at data.fps={rate:g}"
        raise UsageError(
            f"data.sizes: none of {len(videos)} videos has enough frames for any size; add a size of at most "
            f"{most} frames, as many as the longest video has{at}"
        )
    print("\n".join(summary(dataset, job)), flush=True)
    left_out = dataset.bad | dataset.others | too_short(videos, config.data)
    if dry_run:
        for name, reason in left_out.items():
            print(f"left out   {name}: {reason}")
        return
    file = write_left_out(config.data, left_out)
    if left_out:
        print(f"left out   {len(left_out)}, listed with reasons in {file}", flush=True)
    if failed := prepare(job):
        write_left_out(config.data, left_out | failed)
        print(f"left out   {len(failed)} more, which could not be read: {listed(failed, 3)}", flush=True)


def summary(dataset: Dataset, job: Job) -> list[str]:
    """Describes the videos and their clips: how many, left out, enlarged, and encoded already."""
    data, clips, videos = job.config.data, job.clips, dataset.videos
    rates = sorted({f"{video.fps:g}" for video in videos if video.frames > 1}, key=float)
    taken = "" if data.fps is None else f", taken at {data.fps:g}"
    moving = f", {', '.join(rates)} frames a second{taken}" if rates else ""
    stills = sum(is_image_name(video.path) for video in videos)
    shapes = Counter(clip.shape for clip in clips)
    counts = (f"{shape} {shapes[shape]}" for shape in ("x".join(map(str, size)) for size in data.sizes))
    lines = [
        f"videos     {len(videos)} with captions{moving}{f'; {stills} are images' if stills else ''}",
        f"clips      {len(clips)}: {', '.join(counts)}",
    ]
    if dataset.bad:
        lines.append(f"skipped    {len(dataset.bad)} of {dataset.count} videos: {listed(dataset.bad, 3)}")
    if dataset.others:
        kinds = Counter(Path(name).suffix or name for name in dataset.others)
        counts = (f"{count} {kind}" for kind, count in sorted(kinds.items()))
        lines.append(f"not read   {len(dataset.others)} other files: {', '.join(counts)}")
    if short := too_short(videos, data):
        least = min(frames for frames, _, _ in data.sizes)
        lines.append(f"dropped    {len(short)} of under {least} frames: {listed(short, 3)}")
    if small := [clip.name for clip in clips if is_enlarged(clip.video, clip.height, clip.width)]:
        lines.append(f"note: {len(small)} clips are enlarged: {listed(small, 3)}")
    read = {f"the caption of {clip.video.name}": clip.video.caption for clip in clips}
    lines += (f"note: {note}" for note in prompt_notes(job.path, job.config.model.family, read))
    shards, keys, captions = job.shards(), {clip.key for clip in clips}, job.captions
    if shards.lost:
        lines.append(f"note: {len(shards.lost)} files are made again: {listed(shards.lost, 3)}")
    done, texts = len(keys & shards.latents.keys()), len(captions.keys() & shards.texts.keys())
    lines.append(
        f"latents    {job.folder}: {done} of {len(keys)} clips and {texts} of {len(captions)} texts are there"
    )
    return lines


def prepare(job: Job) -> dict[str, str]:
    """Encodes what is missing: first captions, with only the text encoders loaded, then videos.

    Returns the videos that changed since they were checked and cannot be read, with the reasons; UsageError
    for one unless `data.skip_bad` is true.
    """
    failed: dict[str, str] = {}
    if not is_local(job.path):
        _check_hub(job)
    mark = fingerprint(job.path, job.config.model.family)
    with locked(job.folder), torch.no_grad():
        shards = job.shards()
        shards.begin(mark, [clip.entry() for clip in job.clips])
        captions = {key: text for key, text in job.captions.items() if key not in shards.texts}
        if captions:
            with closing(_texts(job, captions)) as texts:
                shards.add_texts(texts)
        clips = list({clip.key: clip for clip in job.clips if clip.key not in shards.latents}.values())
        if clips:
            with closing(_latents(job, clips, failed)) as latents:
                shards.add_latents(latents)
        if failed:
            shards.begin(mark, [clip.entry() for clip in job.clips if clip.video.name not in failed])
    files = sorted(job.folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / MIB
    print(f"done       {job.folder}: {len(files)} files, {size:.1f} MiB")
    return failed


def _check_hub(job: Job) -> None:
    """Raises UsageError for a hub id that is out of reach or of another family."""
    quiet_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check_model(job.path, job.config.model.family)
        except FileNotFoundError as error:
            raise UsageError(hub_unreachable(job.path, error)) from error
        except ValueError as error:
            raise UsageError(f"model.path: got {job.path!r}: {one_line(error)}") from error


def _texts(job: Job, captions: dict[str, str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    pipeline = job.load(text=True)
    for key, caption in tqdm(captions.items(), desc="texts", unit="text", dynamic_ncols=True):
        with _reporting(f"caption {caption[:40]!r}"):
            text = encode_text(pipeline, job.config.model.family, caption)
        yield key, text


def _latents(job: Job, clips: list[Clip], failed: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    pipeline = job.load(text=False)
    dtype = torch.float32 if job.config.model.dtype == "float32" else torch.bfloat16
    for clip, frames in tqdm(
        _decoded(job, clips, failed), total=len(clips), desc="clips", unit="clip", dynamic_ncols=True
    ):
        with _reporting(f"{clip.name} as {clip.shape}"):
            pixels = frames.to(job.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            latents = encode_video(pipeline, pixels)[0]
        if not torch.isfinite(latents).all():
            raise GenerationError(f"the VAE gives values that are not finite for {clip.name}")
        yield clip.key, latents.to(dtype)


def _decoded(job: Job, clips: list[Clip], failed: dict[str, str]) -> Iterator[tuple[Clip, Tensor]]:
    """Yields clips with their frames; if bad videos are to be skipped, adds their names to `failed`."""
    for video, group in groupby(clips, key=lambda clip: clip.video):
        try:
            yield from read_clips(video, list(group))
        except UsageError as error:
            if not job.config.data.skip_bad:
                raise
            failed[video.name] = one_line(error.__cause__ or error)


@contextmanager
def _reporting(what: str) -> Iterator[None]:
    """Reports a lack of memory, or a failure of the model, in one line."""
    try:
        yield
    except (MemoryError, RuntimeError, IndexError, ValueError, TypeError) as error:
        reason = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {one_line(error)}"
        raise GenerationError(
            f"{what} cannot be encoded: {reason}; files that were written are whole"
        ) from error
