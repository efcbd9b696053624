"""Cosmos through the command: from text, image, video or controls, under a safety checker."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CosmosControlNetModel
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.pipelines.cosmos import (
    pipeline_cosmos2_5_predict,
    pipeline_cosmos2_5_transfer,
    pipeline_cosmos2_video2world,
)
from huggingface_hub import constants
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from radial_attn import RadialConfig
from radial_attn.models import apply_radial_attention
from radial_attn.models.pipeline.load import load_pipeline, noise_levels
from scripts.generate import main
from scripts.run.config import read_config
from scripts.run.plan import make_plan
from scripts.run.sampler import Sampler, sample
from tests.support.families import DENSE as DENSE_MASK
from tests.support.families import FULL, SPARSE, assert_near
from tests.support.script_cases import SMALL, refused
from tests.support.tiny_cosmos import Harmless, cosmos25_pipeline, cosmos_pipeline, transfer_pipeline

MODELS = {"2": cosmos_pipeline, "2.5": cosmos25_pipeline, "transfer": transfer_pipeline}
PRESETS = {"2": "cosmos_predict2_2b", "2.5": "cosmos_predict2.5_2b", "transfer": "cosmos_transfer25"}
RUNS = [
    ("2", "image=a.png"),
    ("2", "video=5"),
    ("2.5", ""),
    ("2.5", "image=a.png"),
    ("2.5", "video=7"),
    ("2.5", "video=11"),
    ("transfer", "video=11"),
]
SEGMENTS = ["generation.num_frames=11", "generation.segment_frames=5"]
FRAMES = ["generation.num_frames=9"]
DENSE = ["attention.pattern=dense", "attention.check=off"]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """Makes a folder with three models, an image, and folders of 3, 5, 7, 9 and 11 frames."""
    folder = tmp_path_factory.mktemp("cosmos")
    for name, make in MODELS.items():
        make().save_pretrained(folder / f"model{name}")
    frames = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), dtype=np.uint8)
    Image.fromarray(frames[0]).save(folder / "a.png")
    for count in (3, 5, 7, 9, 11):
        (folder / f"{count}").mkdir()
        for number in range(count):
            Image.fromarray(frames[number]).save(folder / f"{count}/{number}.png")
    return folder


@pytest.fixture
def guardrail(tmp_path, monkeypatch) -> list:
    """Installs a safety checker for the pipeline; returns what it reads and sees."""
    seen: list = []

    class Watching(Harmless):
        def check_text_safety(self, prompt: str) -> bool:
            seen.append(prompt)
            return "weapon" not in prompt

        def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
            seen.append(frames.shape)
            return frames

    (tmp_path / "cosmos_guardrail.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for module in (pipeline_cosmos2_video2world, pipeline_cosmos2_5_predict, pipeline_cosmos2_5_transfer):
        monkeypatch.setattr(module, "CosmosSafetyChecker", Watching)
    return seen


@pytest.fixture
def torchvision(tmp_path, monkeypatch) -> None:
    """Installs what a control net needs of torchvision, if it is absent: it resizes a mask of zeros."""
    if find_spec("torchvision") is None:
        (tmp_path / "torchvision.py").write_text("")
        resizing = SimpleNamespace(resize=lambda mask, size, interpolation: mask[..., : size[0], : size[1]])
        transforms = SimpleNamespace(functional=resizing, InterpolationMode=SimpleNamespace(NEAREST=None))
        monkeypatch.setattr(controlnet_cosmos, "transforms", transforms, raising=False)


def argv(here: Path, *words: str, model: str = "2") -> list[str]:
    frames = SEGMENTS if f"generation.video={here / '11'}" in words and model == "transfer" else FRAMES
    return [f"configs/{PRESETS[model]}.yaml", *SMALL, *frames, f"model.path={here / f'model{model}'}", *words]


def given(here: Path, key: str) -> list[str]:
    name, _, file = key.partition("=")
    return [f"generation.{name}={here / file}"] if key else []


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(("model", "key"), RUNS)
def test_from_text_an_image_or_a_video(model, key, here, guardrail, tmp_path):
    assert main(argv(here, *given(here, key), f"output.path={tmp_path / 'out.mp4'}", model=model)) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert [f"{name}={about['file']}" for name, about in record["inputs"].items()] == ([key] if key else [])
    segments = 3 if (model, key) == ("transfer", "video=11") else 1
    assert record["attention"]["grid"] == [2 if segments > 1 else 3, 4, 4]
    assert record["attention"]["steps"] == 3 * segments == len(record["step_seconds"])
    assert record["attention"]["dense_steps"] == record["attention"]["videos"] == segments
    assert record["attention"]["check"]["worst"]["relative_l2"] < 1e-5
    assert guardrail == [record["prompt"], (11 if segments > 1 else 9, 64, 64, 3)]


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(("model", "key"), RUNS)
def test_a_dense_run_is_that_of_diffusers(model, key, here, guardrail):
    preset, *words = argv(here, *DENSE, *given(here, key), model=model)
    plan = make_plan(read_config(preset, words))
    generation, sampler = plan.config.generation, Sampler(plan)
    loaded = sampler.load()
    frames, run = sampler.sample_video(loaded, generation.prompt, {})
    pipeline = MODELS[model]()
    pipeline.safety_checker = loaded.safety_checker  # that of Predict 2.5 rounds the video down to 8 bits
    expected = pipeline(
        prompt=generation.prompt,
        **plan.inputs.arguments,
        **{name: getattr(generation, name) for name in ("negative_prompt", "height", "width", "num_frames")},
        num_inference_steps=3,
        **{"2": {"fps": 16}, "2.5": {}, "transfer": {"num_frames_per_chunk": generation.size.frames}}[model],
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    assert np.array_equal(frames, (expected * 255).round().astype(np.uint8))
    assert list(run["attention"]["calls"]) == ["dense"]
    levels = loaded.scheduler.sigmas[:3]
    levels = levels / (1 + levels) if model == "2" else levels
    assert plan.sigmas == pytest.approx(levels.tolist())
    assert plan.sigmas == noise_levels(plan.path, plan.config.model.family, 3, None, 1)


def latents(here: Path, config: RadialConfig, *words: str) -> torch.Tensor:
    """Returns those of 9 frames by a Cosmos Transfer."""
    preset, *words = argv(here, *words, "generation.num_frames=9", model="transfer")
    plan = make_plan(read_config(preset, words))
    pipeline = Sampler(plan).load()
    with apply_radial_attention(pipeline, config, dense_steps=0):
        return sample(pipeline, plan.config, ["a"], [0], output_type="latent", **plan.inputs.arguments)


@pytest.mark.usefixtures("guardrail", "torchvision")
def test_controls_and_a_sparse_mask_change_a_video_and_a_full_mask_does_not(here):
    """The third of 11 frames, in order of their names, is not that of 9."""
    controls, others = (f"generation.video={here / count}" for count in ("9", "11"))
    expected = latents(here, DENSE_MASK, controls)
    assert_near(latents(here, FULL, controls), expected)
    assert (latents(here, SPARSE, controls) - expected).abs().max() > 0.01
    whole = latents(here, DENSE_MASK, others, "generation.segment_frames=9")
    assert (whole - expected).abs().max() > 1e-4


@pytest.mark.usefixtures("guardrail", "torchvision")
def test_a_control_net_in_a_branch_of_the_hub_or_in_a_folder(here, tmp_path, monkeypatch, capsys):
    """The index of the hub need not name it; a folder without it is refused before anything is loaded."""
    repository, hub_id = (
        tmp_path / "hub/models--nvidia--Cosmos-Transfer2.5-2B",
        "nvidia/Cosmos-Transfer2.5-2B",
    )
    model = shutil.copytree(here / "modeltransfer", repository / f"snapshots/{40 * 'a'}")
    kept = shutil.move(model / "controlnet", repository / f"snapshots/{40 * 'b'}")
    index = json.loads((model / "model_index.json").read_text()) | {"controlnet": [None, None]}
    (model / "model_index.json").write_text(json.dumps(index))
    for branch, commit in {"general": "a", "controlnet/general/depth": "b"}.items():
        file = repository / "refs/diffusers" / branch
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(40 * commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = argv(here, f"generation.video={here / '9'}", f"model.path={model}", model="transfer")
    refused(capsys, line, "model.path: got", "lacks controlnet/")
    options = "cosmos_transfer25", torch.float32, "cpu"
    found = [load_pipeline(hub_id, *options, controlnet="depth")]
    shutil.copytree(kept, model / "controlnet")
    found += [load_pipeline(str(model), *options)]
    weights = transfer_pipeline().controlnet.state_dict()
    for pipeline in found:
        assert all(torch.equal(weights[name], x) for name, x in pipeline.controlnet.state_dict().items())


@pytest.mark.usefixtures("torchvision")
def test_a_plan_counts_the_weights_and_operations_of_a_control_net():
    """The projections of text and patches are left out."""
    text = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 28 * 3584}
    with torch.device("meta"):
        controlnet = CosmosControlNetModel(num_attention_heads=16, img_context_dim_in=1152, **text)
        video, ones = torch.ones(1, 16, 6, 88, 160), torch.ones(1, 1, 6, 88, 160)
        context = torch.ones(1, 512, 28 * 3584), torch.ones(1, 256, 1152)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            times, padding = torch.ones(1, 1, 6, 1, 1), torch.ones(1, 1, 704, 1280)
            controlnet(video, video, times, context, ones, padding_mask=padding)
    plan = make_plan(
        read_config("configs/cosmos_transfer25.yaml", ["generation.num_frames=21"]), dry_run=True
    )
    passes = 2 * plan.config.generation.steps
    without = replace(plan, model=replace(plan.model, controlnet_layers=0)).flops
    assert (plan.flops.dense, plan.flops.sparse) == (without.dense, without.sparse)
    added = plan.flops.other - without.other
    assert added == pytest.approx(passes * counter.get_total_flops(), rel=0.02)
    assert plan.memory.weights == sum((4 if k == "vae" else 2) * n for k, n in plan.model.parameters.items())
    assert plan.model.parameters["controlnet"] == controlnet.num_parameters()


def test_an_unsafe_prompt_makes_no_video(here, guardrail, tmp_path, capsys):
    words = ["generation.prompt=a weapon", f"output.path={tmp_path / 'out.mp4'}"]
    assert main(argv(here, *words, f"generation.image={here / 'a.png'}")) == 2
    assert "Cosmos Guardrail detected unsafe text" in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


def test_without_a_guardrail_the_line_says_how_to_install_it(here, capsys):
    line = refused(capsys, argv(here, f"generation.image={here / 'a.png'}"), "model.family: got 'cosmos2'")
    assert line.endswith("install it with: pip install cosmos_guardrail")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_torchvision_is_asked_for_if_the_transformer_needs_it(here, guardrail, capsys):
    file = here / "model2.5/transformer/config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"concat_padding_mask": True}))
    line = refused(capsys, argv(here, model="2.5"), "model.family: got 'cosmos25', whose transformer needs")
    assert line.endswith(f"pip install the torchvision of torch {torch.__version__}")
    file.write_text(before)


def test_a_video_that_is_too_long_too_short_or_beside_an_image_is_refused(here, guardrail, capsys):
    image, video = f"generation.image={here / 'a.png'}", f"generation.video={here / '9'}"
    refused(capsys, argv(here, video), "generation.video: got", "with 9 frames, must have fewer than 9")
    refused(capsys, argv(here, image, video), "generation.video: got", "beside generation.image")
    controls = argv(here, f"generation.video={here / '7'}", model="transfer")
    refused(capsys, controls, "generation.video: got", "with 7 frames, must have at least 9")
    short = argv(here, f"generation.video={here / '3'}", model="2.5")
    refused(
        capsys,
        short,
        "generation.video: got",
        "with 3 frames, must have 5 or more: the new video begins with",
    )
