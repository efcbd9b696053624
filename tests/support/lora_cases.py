"""A small folder of latents and a configuration of LoRA training, for tests of any file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from radial_attn.models.pipeline.load import load_pipeline
from radial_attn.models.training.flow import encode_text
from scripts.lora.latent_shards import LatentShards
from scripts.lora.latents import fingerprint, text_key
from scripts.run.config import ROOT
from scripts.train_lora import main
from tests.support.multi_process import run_ranks

FILE = "pytorch_lora_weights.safetensors"
CLIPS, CAPTIONS = 8, ("a cat", "a dog", "a cow")
SIZE = (9, 48, 64)  # frames, height, width: 3 x 6 x 8 latents


def make_latents(
    model: Path,
    folder: Path,
    family: str = "wan",
    size: tuple = SIZE,
    *,
    channels: int = 4,
    step: int = 4,
    broken: int | None = None,
) -> Path:
    """Random latents of eight clips with the text of three captions, as prepare_latents.sh leaves them.

    `broken`: the clip whose latents are not finite.
    """
    frames, height, width = size
    generator = torch.Generator().manual_seed(7)
    shape = channels, (frames - 1) // step + 1, height // 8, width // 8
    pipeline = load_pipeline(str(model), family, torch.float32, "cpu")
    folder.mkdir(parents=True)
    shards = LatentShards(folder, "float32", shard_bytes=1 << 20)
    sizes = {"frames": frames, "height": height, "width": width}
    samples = [
        {"name": f"{i}.mp4", "caption": CAPTIONS[i % 3], "key": f"clip{i}", **sizes} for i in range(CLIPS)
    ]
    shards.begin(fingerprint(str(model), family), samples)
    shards.add_texts((text_key(prompt), encode_text(pipeline, family, prompt)) for prompt in ("", *CAPTIONS))
    videos = [torch.randn(shape, generator=generator) for _ in range(CLIPS)]
    if broken is not None:
        videos[broken].fill_(float("nan"))
    shards.add_latents((f"clip{i}", video) for i, video in enumerate(videos))
    return folder


def write_config(file: Path, model: Path, latents: Path, family: str = "wan", size: tuple = SIZE) -> Path:
    """Writes the configuration of six steps with a checkpoint after every second step."""
    file.write_text(
        f"""# tiny
model: {{path: {model}, family: {family}, dtype: float32, device: cpu}}
data: {{latents: {latents}, sizes: {"x".join(map(str, size))}}}
attention: {{block_size: 16, decimation_width: 64, dense_layers: 1}}
lora: {{rank: 4}}
train: {{steps: 6, batch: 2, rate: 1.0e-2, warmup: 2, save_every: 2, checkpointing: false}}
validation: {{every: 0, samples: 2, levels: 2, steps: 2, guidance_scale: 2.0}}
"""
    )
    return file


def train(config: Path, out: Path, *arguments: str) -> int:
    """Runs the training into a folder; returns the exit code."""
    return main([str(config), f"output.path={out}", *arguments])


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    first, second = adapter(one), adapter(other)
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return equal and losses(one) == losses(other)


def cut(folder: Path, copy: Path, step: int) -> Path:
    """Copies a run's folder without the checkpoints after `step`, as a stop soon after it leaves it."""
    shutil.copytree(folder, copy)
    for later in copy.glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    return copy


def launch_training(*arguments: str, by_torchrun: bool = False) -> None:
    """Trains in two processes of one thread."""
    if not by_torchrun:
        run_ranks(2, "scripts.train_lora", *arguments)
        return
    settings = {"NPROC": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "scripts.launch", "--module=scripts.train_lora", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | settings, capture_output=True)
