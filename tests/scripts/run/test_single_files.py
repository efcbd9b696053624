"""`model.transformer`: videos from files of weights, what works with them, their record and their memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from scripts.generate import main
from scripts.run.config import read_config
from scripts.run.describe import describe_plan
from tests.support.plans import TINY, plan_of
from tests.support.script_cases import SMALL, refused
from tests.support.single_files import in_eight_bits, original, save, write_gguf
from tests.support.tiny import wan_pipeline
from tests.support.tiny_lora import random_pairs, spell, write

WIDE = {"attention_head_dim": 16, "ffn_dim": 256, "patch_size": (1, 1, 1), "rope_max_seq_len": 1024}
SHORT = ["generation.num_frames=5", "generation.guidance_scale=1", "attention.check=auto"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Writes a model whose transformer has a configuration only, its weights as files, and a LoRA."""
    folder, pipeline = tmp_path_factory.mktemp("files"), wan_pipeline(**WIDE)
    pipeline.save_pretrained(folder / "whole")
    shutil.copytree(
        folder / "whole",
        folder / "m",
        ignore=lambda path, names: (
            {"diffusion_pytorch_model.safetensors"} & set(names) if path.endswith("transformer") else ()
        ),
    )
    state = original(pipeline.transformer)
    save(folder / "a.safetensors", state, "model.diffusion_model.")
    save(folder / "fp8.safetensors", in_eight_bits(state, "scale_weight")[0])
    write_gguf(folder / "q8.gguf", state, "Q8_0")
    write(folder / "lora.safetensors", spell(random_pairs(pipeline.transformer), "original"))
    return folder


def arguments(files: Path, out: Path, file: str, *more: str) -> list[str]:
    given = [f"model.transformer={files / file}"] if file else []
    model = f"model.path={files / ('m' if file else 'whole')}"
    return [TINY, model, f"output.path={out / 'v.mp4'}", *SMALL, *SHORT, *given, *more]


def video(files: Path, out: Path, file: str, *more: str) -> bytes:
    """Makes a video and returns its bytes, whose encoding is always the same."""
    out.mkdir()
    assert main(arguments(files, out, file, *more)) == 0
    return (out / "v.mp4").read_bytes()


EACH = {
    "plain": (),
    "lora": ("model.loras={files}/lora.safetensors",),
    "adaptive": ("attention.selection=dense_step", "attention.residual=int8"),
    "cache": ("model.cache=first_block",),
    "fp8": ("model.quantization=fp8",),
}


@pytest.mark.parametrize("options", EACH)
def test_a_video_from_a_file_is_that_of_the_folder(options, files, tmp_path):
    more = [text.format(files=files) for text in EACH[options]]
    videos = [video(files, tmp_path / (name or "whole"), name, *more) for name in ("a.safetensors", "")]
    assert videos[0] == videos[1]


@pytest.mark.parametrize("options", [name for name in EACH if name != "fp8"])
@pytest.mark.parametrize("file", ["fp8.safetensors", "q8.gguf"])
def test_fewer_bits_with_all_on_top(file, options, files, tmp_path):
    more = [text.format(files=files) for text in EACH[options]]
    assert video(files, tmp_path / "v", file, *more)
    record = json.loads((tmp_path / "v/v.json").read_text())
    about = record["model"]["files"]["transformer"]
    assert about["file"] == str(files / file) and about["bytes"] == (files / file).stat().st_size
    assert about["types"] == (["F16", "Q8_0"] if file.endswith("gguf") else ["F32", "F8_E4M3"])


def test_another_content_of_the_file_is_another_video(files, tmp_path, capsys):
    shutil.copy(files / "a.safetensors", tmp_path / "b.safetensors")
    call = arguments(files, tmp_path, str(tmp_path / "b.safetensors"))
    assert main(call) == 0
    assert main(call) == 0
    assert "was made with these settings: made again" in capsys.readouterr().out
    state = original(wan_pipeline(1, **WIDE).transformer)
    save(tmp_path / "b.safetensors", state, "model.diffusion_model.")
    refused(capsys, call, "other settings (content of model.path or model.transformer)")
    refused(capsys, [*call[:-1], f"model.transformer={files / 'a.safetensors'}"], "(model.transformer)")


@pytest.mark.parametrize("file", ["a.safetensors", "fp8.safetensors", "q8.gguf"])
def test_memory_is_predicted_from_the_file(file, files, tmp_path):
    plan = plan_of(read_config(TINY, arguments(files, tmp_path, file)[1:]))
    whole = plan_of(read_config(TINY, arguments(files, tmp_path, "")[1:]))
    loaded = plan.files["transformer"].load(plan.path, "transformer", torch.float32)
    size = sum(value.numel() * value.element_size() for value in loaded.parameters())
    others = whole.memory.weights - 4 * whole.model.parameters["transformer"]
    assert plan.memory.weights == others + size
    assert (plan.memory.weights < whole.memory.weights) == file.endswith("gguf")
    (line,) = [x for x in describe_plan(plan).splitlines() if x.startswith("weights ")]
    assert f"transformer from {files / file}, 0.00 GiB, " in line


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("quantization=fp8", "allowed: none"),
        ("offload=sequential", "allowed: none, model, group"),
        ("lora_mode=fused", "allowed: separate"),
    ],
)
def test_what_does_not_work_with_gguf(given, allowed, files, tmp_path, capsys):
    more = [f"model.{given}", f"model.loras={files / 'lora.safetensors'}", "--dry-run"]
    key, value = given.split("=")
    call = arguments(files, tmp_path, "q8.gguf", *more)
    line = refused(capsys, call, f"model.{key}: got '{value}'", allowed)
    assert "q8.gguf" in line


def test_a_folder_without_configuration(files, tmp_path, capsys):
    shutil.copytree(files / "m", tmp_path / "m")
    shutil.rmtree(tmp_path / "m/transformer")
    call = arguments(files, tmp_path, "a.safetensors", f"model.path={tmp_path / 'm'}")
    refused(capsys, call, "model.transformer: ", "has no transformer/config.json")
