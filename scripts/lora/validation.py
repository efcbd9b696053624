"""Validation of LoRA training: the loss on samples held out, at fixed noise, and videos of their captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from radial_attn.models.pipeline.load import load_pipeline
from scripts.lora.state import mean_adapter
from scripts.lora.step import Run, flow_loss, generator
from scripts.run.config import GenerationConfig
from scripts.run.families import pipeline_arguments
from scripts.run.outputs import encode
from scripts.run.sampler import to_bytes

PURPOSE = 1  # a number of its own, so that no noise of a training step comes again
FPS = 16
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def validate(run: Run, folder: Path, step: int) -> dict[str, float]:
    """`validation_loss`, and the videos, where any are asked for, in `folder/videos/<step>`."""
    run.plain.eval()
    with mean_adapter(run), torch.no_grad():
        loss = validation_loss(run)
        if run.config.validation.videos:
            make_videos(run, folder / "videos" / f"{step:06d}")
    run.plain.train()
    return {"validation_loss": loss}


def validation_loss(run: Run) -> float:
    """Mean over the samples held out and evenly spread noise levels, the same noise at every validation."""
    levels, total = run.config.validation.levels, torch.zeros((), device=run.accelerator.device)
    least, most = run.span()
    for number, own in shares(run, len(run.held_out)):
        for place in range(levels):
            sigma = torch.full((1,), least + (most - least) * (place + 0.5) / levels)
            random = generator(run.config.train.seed, PURPOSE, number, place)
            loss = flow_loss(run, run.plain, [run.held_out[number]], sigma, random=random, drop=0.0)
            total += loss if own else 0
    return run.mean(total) * run.world / (levels * len(run.held_out))


def shares(run: Run, count: int) -> Iterator[tuple[int, bool]]:
    """Numbers below `count` that this process takes, and whether it is the one whose result counts.

    Processes that share weights call the transformer equally often: where none is left, the last once more.
    """
    for number in range(run.place, count + run.place, run.world):
        if number < count or run.config.parallel.shard != "none":
            yield min(number, count - 1), number < count


def make_videos(run: Run, folder: Path) -> None:
    """A video for each of the first captions held out, at the size of its sample; seeded by its number."""
    pipeline = sampling_pipeline(run)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = run.held_out[: run.config.validation.videos]
    for place, own in shares(run, len(chosen)):
        number = chosen[place]
        sample = run.store.samples[number]
        frames = to_bytes(sampled(run, pipeline, number))
        if run.leads and own:
            encode(folder / f"{number:05d}.mp4", frames, round(run.config.data.fps or FPS))
            (folder / f"{number:05d}.txt").write_text(sample.caption + "\n", encoding="utf-8")


def sampling_pipeline(run: Run) -> Any:
    """The model's pipeline around the transformer that is trained, without its text encoders."""
    parts = {**dict.fromkeys(TEXT_PARTS), "transformer": run.plain}
    device = str(run.accelerator.device)
    pipeline = load_pipeline(run.path, run.config.model.family, run.plain.dtype, device, parts=parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(run: Run, pipeline: Any, number: int) -> np.ndarray:
    """Frames `[T, H, W, 3]` of 0 .. 1 for the caption of a sample."""
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
