"""Loading a pipeline: what is built, and what is refused before any weight is read."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from safetensors.torch import load_file, save_file

from radial_attn.models.pipeline.load import check_model, flow_scheduler, load_pipeline
from tests.support.pipelines import generate
from tests.support.tiny import quiet, wan_pipeline
from tests.support.tiny_wan import i2v_pipeline


@pytest.fixture
def folder(tmp_path):
    wan_pipeline().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


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
    pipelines = wan_pipeline(), quiet(load_pipeline(str(folder), "wan", torch.float32, "cpu"))
    videos = [generate(pipeline, 2, height=32, width=32, output_type="pt") for pipeline in pipelines]
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


@pytest.mark.parametrize("listed", [True, False], ids=["without its folder", "not listed"])
@pytest.mark.parametrize("absent", ["transformer", "transformer_2"])
def test_one_expert_of_two_makes_every_step(absent, listed, tmp_path):
    """As in a folder without the weights of the other, or one whose index says that there are none."""
    pipeline = wan_pipeline(experts=2)
    kept = pipeline.transformer if absent == "transformer_2" else pipeline.transformer_2
    pipeline.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / absent)
    if not listed:
        index = json.loads((tmp_path / INDEX).read_text())
        (tmp_path / INDEX).write_text(json.dumps(index | {absent: [None, None]}))
    check_model(str(tmp_path), "wan")
    loaded = quiet(load_pipeline(str(tmp_path), "wan", torch.float32, "cpu"))
    assert loaded.transformer_2 is None and loaded.config.boundary_ratio is None
    alone = wan_pipeline()
    alone.transformer = kept
    small = {"height": 32, "width": 32, "num_frames": 5}
    expected = generate(alone, 4, **small)
    torch.testing.assert_close(generate(loaded, 4, **small), expected, atol=1e-5, rtol=0)
    assert (generate(wan_pipeline(experts=2), 4, **small) - expected).abs().max() > 1e-3
    shutil.rmtree(tmp_path / ("transformer_2" if absent == "transformer" else "transformer"))
    with pytest.raises(FileNotFoundError, match="lacks transformer"):
        check_model(str(tmp_path), "wan")


def test_files_of_a_wan_are_a_chronoedit(tmp_path):
    """The published ones name Wan's classes; weights are the same, but not the positions."""
    i2v_pipeline().save_pretrained(tmp_path)
    load = partial(load_pipeline, str(tmp_path), "chronoedit", torch.bfloat16, "cpu")
    transformer = load().transformer
    assert type(transformer) is ChronoEditTransformer3DModel and transformer.dtype == torch.bfloat16
    shutil.copy(tmp_path / WEIGHTS, tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match="'chronoedit': weights of its transformer are read from its folder"):
        load(files={"transformer": tmp_path / "alone.safetensors"})


WEIGHTS, INDEX = "transformer/diffusion_pytorch_model.safetensors", "model_index.json"


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("cogvideo", "family must be one of wan, hunyuan_video, .*, got 'cogvideo'"),
        ("mochi", r"must hold a MochiPipeline \(family 'mochi'\), got WanPipeline"),
    ],
)
def test_another_family(folder, family, message):
    for check in (check_model, partial(load_pipeline, dtype=torch.float32, device="cpu")):
        with pytest.raises(ValueError, match=message):
            check(str(folder), family)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (INDEX, None, FileNotFoundError, r"has no model_index\.json"),
        (INDEX, b"", ValueError, r"model_index.json must hold a JSON object"),
        (INDEX, b"{", ValueError, r"model_index.json must hold a JSON object"),
        (INDEX, b"[1]", ValueError, r"model_index.json must hold a JSON object"),
        (INDEX, b"3", ValueError, r"model_index.json must hold a JSON object"),
        ("vae", None, FileNotFoundError, "lacks vae/"),
        (WEIGHTS, b"", ValueError, f"{WEIGHTS} is not a whole"),
        (WEIGHTS, b"nonsense", ValueError, f"{WEIGHTS} is not a whole"),
        (WEIGHTS, -100, ValueError, f"{WEIGHTS} is not a whole"),  # bytes that it lacks
    ],
)
def test_files_that_are_missing_or_broken(folder, name, content, error, message):
    file = folder / name
    if content is None:
        file.rename(folder / "elsewhere")
    else:
        file.write_bytes(file.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(error, match=message):
        load_pipeline(str(folder), "wan", torch.float32, "cpu")


def without_a_tensor(file):
    """Removes the second of a file's tensors that is no norm's, and returns its name."""
    tensors = load_file(file)
    name = [name for name, x in tensors.items() if x.ndim > 1][1]
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("model", "part"),
    [
        *(("wan-tiny", part) for part in ("transformer", "text_encoder", "vae")),
        *(("hunyuan-tiny", part) for part in ("transformer", "text_encoder", "text_encoder_2", "vae")),
        *(("mochi-tiny", part) for part in ("transformer", "text_encoder", "vae")),
    ],
)
def test_a_part_that_lacks_a_tensor(model, part, tmp_path, capfd):
    folder = tmp_path / model
    shutil.copytree(f"assets/{model}", folder)
    name = without_a_tensor(next((folder / part).glob("*.safetensors")))
    family = {"wan-tiny": "wan", "hunyuan-tiny": "hunyuan_video", "mochi-tiny": "mochi"}[model]
    message = rf"{model}/{part} lacks 1 tensor of \w+: {re.escape(name)}; download it again"
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(folder), family, torch.float32, "cpu")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_sharded_part(part, tmp_path):
    pipeline = wan_pipeline()
    pipeline.save_pretrained(tmp_path / "tiny")
    for file in (tmp_path / "tiny" / part).glob("*.safetensors"):
        file.unlink()
    getattr(pipeline, part).save_pretrained(tmp_path / "tiny" / part, max_shard_size="3KB")
    shards = sorted((tmp_path / "tiny" / part).glob("*-of-*.safetensors"))
    assert len(shards) > 2
    load_pipeline(str(tmp_path / "tiny"), "wan", torch.float32, "cpu")
    name = without_a_tensor(shards[1])
    with pytest.raises(ValueError, match=f"tiny/{part} lacks 1 tensor of .*{re.escape(name)}"):
        load_pipeline(str(tmp_path / "tiny"), "wan", torch.float32, "cpu")
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"tiny/{part} lacks {shards[1].name}; download it again"):
        load_pipeline(str(tmp_path / "tiny"), "wan", torch.float32, "cpu")


@pytest.mark.parametrize("name", ["absent", "../absent", "some/deep/absent", "assets/tiny"])
def test_missing_folder(tmp_path, monkeypatch, name):
    """`assets/tiny` could be a hub id too; if assets/ exists it is a folder."""
    (tmp_path / "assets").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"model folder {name} does not exist"):
        load_pipeline(name, "wan", torch.float32, "cpu")


def test_unreadable_hub_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"model nobody/nothing .*hub .*check the name"):
        check_model("nobody/nothing", "wan")
