"""MiniMax-H3 through the command: modular blocks from text or keyframes, with sound."""

import json
from pathlib import Path

import av
import imageio
import numpy as np
import pytest
import torch
from diffusers import ModularPipeline
from PIL import Image

from radial_attn.models import apply_radial_attention
from radial_attn.models.pipeline.efficiency import economize
from radial_attn.models.pipeline.load import load_pipeline, noise_levels
from radial_attn.models.pipeline.minimax_h3 import Presenter
from scripts.generate import main
from scripts.run.config import read_config
from scripts.run.plan import make_plan
from scripts.run.sampler import Sampler
from tests.support.families import SPARSE
from tests.support.multi_process import run_ranks
from tests.support.script_cases import SMALL
from tests.support.tiny_minimax_h3 import minimax_h3_folder

SIZE, RATE, TEXT = (
    {"height": 64, "width": 64, "num_frames": 124},
    32000,
    "A cat walks on the grass, realistic",
)
SOUND = 2 * 207  # tokens of 124 frames
BOTH = ("image", "last_image")
KEYFRAMES = [(), BOTH, *(pytest.param((name,), marks=pytest.mark.long) for name in BOTH)]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> tuple[Path, ModularPipeline]:
    """Makes a folder with a model and two images; also returns the pipeline that was saved."""
    folder = tmp_path_factory.mktemp("minimax")
    pipeline = minimax_h3_folder(folder / "model")
    for name in ("image", "last_image"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder, pipeline


def argv(folder: Path, *keys: str) -> list[str]:
    return ["configs/minimax_h3.yaml", *SMALL, f"model.path={folder / 'model'}", *keys]


def given(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [f"generation.{name}={folder / name}.png" for name in names]


@pytest.mark.parametrize("names", KEYFRAMES, ids=str)
def test_a_dense_run_is_that_of_diffusers(names, here):
    """diffusers counts the level after the last step, too."""
    folder, modular = here
    dense = ["attention.pattern=dense", "attention.check=off", *given(folder, names)]
    sampler = Sampler(make_plan(read_config(*_split(argv(folder, *dense)))))
    pipeline = sampler.load()
    frames, run = sampler.sample_video(pipeline, TEXT, {})
    modular.register_components(processor=Presenter(pipeline.processor, pipeline.tokenizer))
    state = modular(
        prompt=TEXT,
        **SIZE,
        **{name: Image.open(folder / f"{name}.png") for name in names},
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    )
    assert np.array_equal(frames, (state.get("videos")[0] * 255).round().astype(np.uint8))
    assert np.array_equal(sampler.sound.samples, state.get("audio")[0].numpy()) and sampler.sound.rate == RATE
    assert list(run["attention"]["calls"]) == ["dense"] and len(run["step_seconds"]) == 3


@pytest.mark.parametrize("names", [(), BOTH], ids=str)
def test_a_radial_run_is_planned_and_has_sound(names, here, tmp_path):
    """Keyframes count twice: 4 tokens of the VAE, and 4 of Qwen3-VL between a label and two marks."""
    folder, _ = here
    words = argv(
        folder, "attention.decay_factor=0.2", f"output.path={tmp_path / 'out.mp4'}", *given(folder, names)
    )
    assert main(words) == 0
    record, plan = json.loads((tmp_path / "out.json").read_text()), make_plan(read_config(*_split(words)))
    report = record["attention"]
    assert report["steps"] == 3 and report["dense_steps"] == 1 and report["grid"] == [37, 2, 2]
    assert report["check"]["compared"] > 0 and report["check"]["worst"]["relative_l2"] < 1e-5
    assert (plan.grid.frames, plan.grid.text) == (37, 256 + SOUND + len(names) * 2 * (4 + 1))
    assert report["density"] < 0.99 and record["density"] == report["density"]
    assert plan.memory.weights == 4 * sum(plan.model.parameters.values()) and plan.calls == 1
    assert set(plan.model.parameters) == {"transformer", "text_encoder", "vae", "audio_vae"}
    assert record["video"]["sound"] == {"channels": 2, "rate": RATE, "seconds": 207 * 800 / RATE}
    with av.open(str(tmp_path / "out.mp4")) as container:
        (sound,), (video,) = container.streams.audio, container.streams.video
        assert (sound.rate, sound.channels, video.frames, video.average_rate) == (RATE, 2, 124, 24)
    assert set(record["inputs"]) == set(names)


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offload(offload, here):
    """The CPU stands for the GPU."""
    folder, _ = here
    options = SIZE | {"prompt": TEXT, "num_inference_steps": 2, "output_type": "pt"}
    options["image"] = Image.open(folder / "image.png")
    made = []
    for how in ("none", offload):
        pipeline = load_pipeline(str(folder / "model"), "minimax_h3", torch.float32, "cpu")
        economize(pipeline, "cpu", torch.float32, offload=how)
        pipeline.set_progress_bar_config(disable=True)
        with apply_radial_attention(pipeline, SPARSE, dense_steps=1):
            made.append(pipeline(**options, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(made[0].frames, made[1].frames, atol=1e-5, rtol=0)
    torch.testing.assert_close(made[0].audio, made[1].audio, atol=1e-5, rtol=0)


def test_noise_levels_are_those_of_the_run(here):
    """A shift of 12 keeps most of the steps at high noise."""
    folder, _ = here
    pipeline, levels = load_pipeline(str(folder / "model"), "minimax_h3", torch.float32, "cpu"), []
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda *args, **more: levels.append(1 - float(args[1])) or step(*args, **more)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(TEXT, 5, **SIZE, output_type="pt", generator=torch.Generator().manual_seed(0))
    planned = noise_levels(str(folder / "model"), "minimax_h3", 5, None, 148)
    assert levels == pytest.approx(planned) and planned[:2] == pytest.approx([1, 12 * 0.8 / (1 + 11 * 0.8)])


@pytest.mark.long
def test_two_processes_make_the_video_of_one(here, tmp_path):
    folder, _ = here
    words = argv(folder, "attention.check=off", *given(folder, ("image",)))
    one, two = (f"output.path={tmp_path / name}.mp4" for name in ("one", "two"))
    assert main([*words, one]) == 0
    run_ranks(2, "scripts.generate", *words, two, "parallel.ulysses_degree=2")
    videos = [imageio.mimread(tmp_path / f"{name}.mp4", memtest=False) for name in ("one", "two")]
    assert np.abs(np.diff(np.stack(videos).astype(float), axis=0)).mean() < 0.1
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert records[0]["video"]["sound"] == records[1]["video"]["sound"]


def _split(words: list[str]) -> tuple[str, list[str]]:
    return words[0], words[1:]
