"""The bundled model: small, loads with plain diffusers, and shows what captions say, dense and radial."""

from statistics import mean

import pytest
import torch
from diffusers import WanPipeline

from scripts.config import ROOT, read_config
from scripts.prompt_accuracy import attention, reading, with_pattern
from scripts.video import sample
from toyworld import all_attributes
from toyworld.render import VOCABULARY

FOLDER = ROOT / "assets" / "wan-tiny"
CHOSEN = range(
    7, 180, 15
)  # of the captions, each with its number as its seed, as in results/prompt_accuracy_*


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scores(pipeline: WanPipeline, pattern: str) -> dict[str, float]:
    """Share of captions in which the reader finds each attribute as asked, with the shipped preset."""
    captions = [all_attributes()[index] for index in CHOSEN]
    config = with_pattern(read_config("configs/wan_tiny.yaml", []), pattern)
    with attention(pipeline, config) as handle:
        videos = sample(pipeline, config, [a.caption for a in captions], list(CHOSEN))
        assert (handle.report()["density"] <= 0.6) == (pattern == "radial")
    entries = [reading(video, a) for video, a in zip(videos, captions, strict=True)]
    return {name: mean(entry[name] for entry in entries) for name in VOCABULARY}


def test_is_small_and_whole():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 10_000_000
    assert {file.name for file in files} >= {"model_index.json", "scheduler_config.json", "tokenizer.json"}


@pytest.mark.parametrize("pattern", ["dense", "radial"])
def test_shows_what_it_has_learnt(pipeline, pattern):
    """Colours, backgrounds, shapes; most motions (results/prompt_accuracy_*.md has the whole numbers)."""
    found = scores(pipeline, pattern)
    assert found["colour"] == found["background"] == 1
    assert found["shape"] >= 0.9
    assert mean(found.values()) >= 0.9
