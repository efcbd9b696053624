"""Validates LoRA training: the loss on held-out samples at fixed noise, and videos of their captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from radial_attn.models.pipeline.load import load_pipeline
from scripts.lora.step import Run, flow_loss, generator
from scripts.run.config import GenerationConfig
from scripts.run.families import pipeline_arguments
from scripts.run.files import replacing, write_text
from scripts.run.outputs import encode
from scripts.run.sampler import to_bytes

PURPOSE = 1  # keeps the noise apart from that of training steps
FPS = 16
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@torch.no_grad()
def validate(run: Run, folder: Path, step: int) -> dict[str, float]:
    """Validates the adapter, or its mean if one is kept, and returns `validation_loss`.

    Writes videos, if any are wanted, to `folder/videos/<step>`.
    """
    before = {name: x.detach().clone() for name, x in run.trained.items()}
    run.plain.eval()
    try:
        run.set_adapter(before if run.average is None else run.average)
        loss = validation_loss(run)
        if run.config.validation.videos:
            make_videos(run, folder / "videos" / f"{step:06d}")
    finally:
        run.set_adapter(before)
    run.plain.train()
    return {"validation_loss": loss}


def validation_loss(run: Run) -> float:
    """Returns the mean over held-out samples and evenly spread noise levels; the noise is always the same."""
    levels, total = run.config.validation.levels, torch.zeros((), device=run.accelerator.device)
    least, most = run.span()
    for number, counts in shares(run, len(run.held_out)):
        for level in range(levels):
            sigma = torch.full((1,), least + (most - least) * (level + 0.5) / levels)
            random = generator(run.config.train.seed, PURPOSE, number, level)
            loss = flow_loss(run, run.plain, [run.held_out[number]], sigma, random=random, drop=0.0)
            total += loss if counts else 0
    return run.mean(total) * run.world / (levels * len(run.held_out))


def shares(run: Run, count: int) -> Iterator[tuple[int, bool]]:
    """Yields the numbers below `count` that this process takes, and whether its result counts.

    Processes that share weights must call the transformer equally often: one without work repeats the last.
    """
    for number in range(run.rank, count + run.rank, run.world):
        if number < count or run.config.parallel.shard != "none":
            yield min(number, count - 1), number < count


def make_videos(run: Run, folder: Path) -> None:
    """Writes a video for each of the first held-out captions, at its sample's size, seeded by its number."""
    parts = {**dict.fromkeys(TEXT_PARTS), "transformer": run.plain}  # the captions are encoded already
    device = str(run.accelerator.device)
    pipeline = load_pipeline(run.plan.path, run.config.model.family, run.plain.dtype, device, parts=parts)
    pipeline.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = run.held_out[: run.config.validation.videos]
    for index, counts in shares(run, len(chosen)):
        number = chosen[index]
        frames = to_bytes(sampled(run, pipeline, number))
        if run.leads and counts:
            with replacing(folder / f"{number:05d}.mp4", ".mp4") as part:
                encode(part, frames, round(run.config.data.fps or FPS))
            write_text(folder / f"{number:05d}.txt", run.store.samples[number].caption + "\n")


def sampled(run: Run, pipeline: Any, number: int) -> np.ndarray:
    """Samples frames `[T, H, W, 3]` in 0 .. 1 for the caption of a sample."""
    sample, validation = run.store.samples[number], run.config.validation
    generation = GenerationConfig(
        num_frames=sample.frames,
        height=sample.height,
        width=sample.width,
        steps=validation.steps,
        guidance_scale=validation.guidance_scale,
    )
    texts = run.placed([run.store.load(number)[1]])
    if validation.guidance_scale > 1 and "pooled_prompt_embeds" not in texts:  # HunyuanVideo's is built in
        empty = run.placed([run.store.empty_text])
        texts |= {f"negative_{name}": x for name, x in empty.items()} | {"negative_prompt": None}
    random = torch.Generator().manual_seed(number)
    arguments = pipeline_arguments(run.config.model.family, generation) | texts
    return pipeline(**arguments, generator=random).frames[0]
