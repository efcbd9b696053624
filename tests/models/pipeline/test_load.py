"""Loading a pipeline: what is built, and what is refused before any weight is read."""

import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from radial_attn.models.pipeline.load import check_model, flow_scheduler, load_pipeline
from tests.support.tiny import wan_pipeline


@pytest.fixture
def folder(tmp_path):
    wan_pipeline().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_index(folder, **changes):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_load(folder):
    pipeline = load_pipeline(str(folder), "wan", torch.bfloat16, "cpu", flow_shift=5.0)
    assert isinstance(pipeline, WanPipeline)
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)
    assert pipeline.scheduler.config.flow_shift == 5.0
    assert pipeline.scheduler.config.use_flow_sigmas
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"


def test_loaded_pipeline_makes_the_same_video(folder):
    settings = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
    }
    videos = []
    for pipeline in (wan_pipeline(), load_pipeline(str(folder), "wan", torch.float32, "cpu")):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        videos.append(pipeline("a red dot", generator=generator, output_type="pt", **settings).frames)
    torch.testing.assert_close(videos[1], videos[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "scheduler, shift, expected",
    [
        (UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=7.0), None, 7.0),
        (UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=7.0), 2.0, 2.0),
        (FlowMatchEulerDiscreteScheduler(shift=4.0), None, 4.0),
        (FlowMatchEulerDiscreteScheduler(), None, 1.0),
    ],
)
def test_flow_shift(scheduler, shift, expected):
    made = flow_scheduler(scheduler, shift)
    made.set_timesteps(4)
    assert made.config.flow_shift == expected
    sigma = 0.75025  # the second of linspace(1, 1 / 1000, 5)
    assert made.timesteps[1] == int(1000 * expected * sigma / (1 + (expected - 1) * sigma))


def test_unknown_family(folder):
    with pytest.raises(ValueError, match=r"family must be one of wan, hunyuan_video, .*, got 'cogvideo'"):
        check_model(str(folder), "cogvideo")


def test_a_model_of_another_family(folder):
    with pytest.raises(ValueError, match=r"must hold a MochiPipeline \(family 'mochi'\), got WanPipeline"):
        check_model(str(folder), "mochi")


@pytest.mark.parametrize("name", ["absent", "../absent", "some/deep/absent"])
def test_missing_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"model folder {name} does not exist"):
        load_pipeline(name, "wan", torch.float32, "cpu")


def test_missing_folder_beside_others(tmp_path, monkeypatch):
    """`assets/tiny` could be a hub id too; where assets/ exists it is a folder."""
    (tmp_path / "assets").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="model folder assets/tiny does not exist"):
        check_model("assets/tiny", "wan")


def test_unreadable_hub_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"model nobody/nothing .*hub .*check the name"):
        check_model("nobody/nothing", "wan")


def test_folder_without_index(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        check_model(str(tmp_path), "wan")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_broken_index(folder, text):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model_index.json must hold a JSON object"):
        check_model(str(folder), "wan")


def test_folder_of_another_family(folder):
    edit_index(folder, _class_name="MochiPipeline")
    with pytest.raises(ValueError, match=r"must hold a WanPipeline \(family 'wan'\), got MochiPipeline"):
        load_pipeline(str(folder), "wan", torch.float32, "cpu")


def test_missing_component(folder):
    (folder / "vae").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="lacks vae/"):
        check_model(str(folder), "wan")


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_broken_safetensors_is_named(folder, content):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"transformer/diffusion_pytorch_model.safetensors is not a whole"):
        load_pipeline(str(folder), "wan", torch.float32, "cpu")
