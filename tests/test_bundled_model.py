"""The bundled model: small, loads with plain diffusers, and shows what captions say, dense and radial."""

from dataclasses import replace
from statistics import mean

import pytest
import torch
from diffusers import WanPipeline

from scripts.config import ROOT, read_config
from scripts.prompt_accuracy import attention, reading, with_pattern
from scripts.video import sample
from toyworld import Attributes, all_attributes

FOLDER = ROOT / "assets" / "wan-tiny"
CAPTIONS = all_attributes()[5::23]


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def score(pipeline: WanPipeline, captions: list[Attributes], **settings: object) -> float:
    """Share of attributes that the reader finds as asked, with the shipped preset."""
    config = with_pattern(read_config("configs/wan_tiny.yaml", []), settings.pop("pattern"))
    config = replace(config, generation=replace(config.generation, **settings))
    with attention(pipeline, config) as handle:
        videos = sample(pipeline, config, [a.caption for a in captions], list(range(len(captions))))
        assert (handle.report()["density"] <= 0.6) == (config.attention.pattern == "radial")
    entries = [reading(video, a) for video, a in zip(videos, captions, strict=True)]
    return mean(entry[name] for entry in entries for name in vars(captions[0]))


def test_is_small_and_whole():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 10_000_000
    assert {file.name for file in files} >= {"model_index.json", "scheduler_config.json", "tokenizer.json"}


@pytest.mark.parametrize("pattern", ["dense", "radial"])
def test_shows_the_caption(pipeline, pattern):
    assert len(CAPTIONS) >= 8
    assert score(pipeline, CAPTIONS, pattern=pattern) >= 0.85
