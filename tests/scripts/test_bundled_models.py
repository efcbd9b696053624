"""The bundled models: small, load with plain diffusers, and show what captions say under radial attention."""

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from radial_attn.models import apply_radial_attention
from radial_attn.models.pipeline.families import FAMILIES
from scripts.run.attention import attention_arguments
from scripts.run.config import ROOT, Config, read_config
from scripts.run.plan import make_plan
from scripts.run.sampler import sample
from scripts.toyworld import all_attributes
from scripts.toyworld.accuracy import attention, first_frame, reading, with_pattern
from scripts.toyworld.render import VOCABULARY

# Numbers of captions, and their seeds, as in results/prompt_accuracy_*.
CHOSEN = range(7, 180, 22)
PRESETS = ("wan_tiny", "mochi_tiny", "wan_i2v_tiny", "hunyuan_tiny")
# Least shares of colours, shapes and all attributes. By chance they would be 0.2, 0.33, 0.28.
LEAST = {"wan": (1, 0.9, 0.9), "hunyuan_video": (0.9, 0.4, 0.73)}


@pytest.fixture(scope="module", params=PRESETS)
def config(request: pytest.FixtureRequest) -> Config:
    """Reads the preset, with half of its steps, which are enough."""
    return read_config(f"configs/{request.param}.yaml", ["generation.steps=10"])


@pytest.fixture(scope="module")
def pipeline(config: Config) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(ROOT / config.model.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def numbers(config: Config) -> range:
    """Returns the numbers of the captions: every other one if each video starts from its own image."""
    return CHOSEN[::2] if "image" in FAMILIES[config.model.family].takes else CHOSEN


def videos(pipeline: DiffusionPipeline, config: Config) -> list[Any]:
    """Makes a video of each chosen caption, as `scripts/prompt_accuracy.sh` does."""
    chosen = [(number, all_attributes()[number]) for number in numbers(config)]
    if "image" not in FAMILIES[config.model.family].takes:
        return list(sample(pipeline, config, [a.caption for _, a in chosen], list(numbers(config))))
    return [
        sample(pipeline, config, [a.caption], [number], **first_frame(config, a, number))[0]
        for number, a in chosen
    ]


def scores(pipeline: DiffusionPipeline, config: Config) -> dict[str, float]:
    """Returns for each attribute the share of videos in which the reader finds it as asked."""
    captions, config = [all_attributes()[index] for index in numbers(config)], with_pattern(config, "radial")
    with attention(pipeline, config) as handle:
        made = videos(pipeline, config)
        assert handle.report()["density"] < 1
    entries = [reading(video, a) for video, a in zip(made, captions, strict=True)]
    return {name: mean(entry[name] for entry in entries) for name in VOCABULARY}


def test_is_small_and_whole(config):
    folder = ROOT / config.model.path
    files = [file for file in folder.rglob("*") if file.is_file()]
    most = 10_000_000 if folder.name == "wan-tiny" else 8_000_000
    assert sum(file.stat().st_size for file in files) <= most
    assert {file.name for file in files} >= {"model_index.json", "scheduler_config.json", "tokenizer.json"}
    assert not [file for file in files if file.suffix == ".json" and str(ROOT) in file.read_text()]


def test_shows_what_it_has_learnt(pipeline, config):
    """It shows colours, backgrounds, shapes and most motions; results/prompt_accuracy_*.md has dense too."""
    right = scores(pipeline, config)
    colour, shape, whole = LEAST.get(config.model.family, (1, 0.9, 0.85))
    assert right["background"] == 1 and right["colour"] >= colour and right["shape"] >= shape
    assert mean(right.values()) >= whole


def test_profile_is_closer_to_dense_than_the_radial_mask(pipeline, config):
    """Keeps fewer blocks than radial, in four steps without a dense one; a change of the weights is told.

    HunyuanVideo has a few videos that change much for little, among them that of its preset. So its errors
    are compared by their logarithm, as PSNR does, over four captions.
    """
    captions = (ROOT / "assets" / "prompts" / "toyworld_60.txt").read_text().splitlines()[:4]
    preset = f"configs/{Path(config.output.path).name}"
    latents, densities = {}, {}
    for name, file in (("dense", preset), ("radial", preset), ("profile", f"{preset}_profile")):
        words = ["generation.steps=4", *(["attention.pattern=dense"] if name == "dense" else [])]
        plan = make_plan(read_config(f"{file}.yaml", words))  # compares the profile with the weights
        with apply_radial_attention(pipeline, **attention_arguments(plan.config.attention)) as handle:
            options = {"output_type": "latent", **plan.inputs.arguments}
            prompts = captions if config.model.family == "hunyuan_video" else [plan.config.generation.prompt]
            made = sample(pipeline, plan.config, prompts, range(1, len(prompts) + 1), **options)
            latents[name], densities[name] = torch.as_tensor(made), handle.report()["density"]
    errors = [
        (latents[name] - latents["dense"]).square().flatten(1).mean(1) for name in ("profile", "radial")
    ]
    assert densities["profile"] < densities["radial"] < 1
    assert errors[0].min() > 0 and (errors[0] / errors[1]).log().mean().exp() < 0.9


def test_all_together_leave_room_in_the_repository():
    files = [file for file in (ROOT / "assets").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 33_000_000
