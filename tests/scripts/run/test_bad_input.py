"""Bad input through the real command: exit code 2, one line with key, value and remedy, no file left."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts.generate import main

TINY = "configs/wan_tiny.yaml"
SHORT = ["generation.steps=2", "generation.num_frames=5"]


def arguments(model: Path, output: Path, *overrides: str) -> list[str]:
    return [TINY, f"model.path={model}", f"output.path={output}", *SHORT, *overrides]


def files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def check_refused(capsys: pytest.CaptureFixture, argv: list[str], *words: str) -> str:
    """Runs the command in this process and returns its one line."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert not [word for word in words if word not in lines[0]], lines[0]
    return lines[0]


VALUES = {
    "unknown key": (["generation.hight=64"], ["generation.hight", "'generation.height'"]),
    "height": (["generation.height=100"], ["generation.height", "100", "96", "112", "16"]),
    "width": (["generation.width=50"], ["generation.width", "50", "48", "64"]),
    "small width": (["generation.width=3"], ["generation.width", "3", "16"]),
    "num_frames": (["generation.num_frames=32"], ["generation.num_frames", "32", "4k + 1", "33"]),
    "num_frames down": (["generation.num_frames=30"], ["generation.num_frames", "30", "29"]),
    "negative height": (["generation.height=-64"], ["generation.height", "-64", "at least 1"]),
    "zero frames": (["generation.num_frames=0"], ["generation.num_frames", "0", "at least 1"]),
    "zero steps": (["generation.steps=0"], ["generation.steps", "0", "at least 1"]),
    "negative seed": (["generation.seed=-1"], ["generation.seed", "-1", "at least 0"]),
    "huge seed": (
        ["generation.seed=9223372036854775808"],
        ["generation.seed", "9223372036854775808", "2^63"],
    ),
    "guidance": (["generation.guidance_scale=0"], ["generation.guidance_scale", "0", "at least 1"]),
    "infinite guidance": (["generation.guidance_scale=inf"], ["generation.guidance_scale", "inf"]),
    "flow_shift": (["generation.flow_shift=0"], ["generation.flow_shift", "0", "above 0"]),
    "decay_factor": (["attention.decay_factor=-0.5"], ["attention.decay_factor", "-0.5", "above 0"]),
    "nan": (["attention.decay_factor=.nan"], ["attention.decay_factor", "nan", "above 0"]),
    "fps": (["output.fps=0"], ["output.fps", "0", "at least 1"]),
    "dense_steps": (
        ["attention.dense_steps=3"],
        ["attention.dense_steps", "3", "0 to 2", "generation.steps"],
    ),
    "last steps": (["attention.dense_last_steps=9"], ["attention.dense_last_steps", "9", "0 to 2"]),
    "dense_layers": (["attention.dense_layers=5"], ["attention.dense_layers", "5", "0 to 4"]),
    "negative layers": (["attention.dense_layers=-1"], ["attention.dense_layers", "-1", "at least 0"]),
    "block_size": (["attention.block_size=48"], ["attention.block_size", "48", "16, 32, 64, 128, 256"]),
    "decimation_width": (["attention.decimation_width=0"], ["attention.decimation_width", "0", "'block'"]),
    "decimation word": (["attention.decimation_width=x"], ["attention.decimation_width", "'x'", "'block'"]),
    "pattern": (["attention.pattern=spiral"], ["attention.pattern", "'spiral'", "radial, dense"]),
    "backend": (["attention.backend=cuda"], ["attention.backend", "'cuda'", "blocks", "flex"]),
    "quantize": (["attention.quantize=int4"], ["attention.quantize", "'int4'", "none, int8, fp8"]),
    "check": (["attention.check=on"], ["attention.check", "'on'", "auto, off, nan, reference"]),
    "dense_backend": (["attention.dense_backend=flsh"], ["attention.dense_backend", "'flsh'", "'flash'"]),
    "neighbour": (["attention.neighbour=some"], ["attention.neighbour", "'some'", "full, half"]),
    "neighbour above 1": (["attention.neighbour=1.5"], ["attention.neighbour", "1.5", "above 0 up to 1"]),
    "density 0": (["attention.density=0"], ["attention.density", "got 0", "above 0 up to 1"]),
    "negative density": (["attention.density=-0.2"], ["attention.density", "-0.2", "above 0 up to 1"]),
    "density above 1": (["attention.density=25"], ["attention.density", "25", "above 0 up to 1"]),
    "density nan": (["attention.density=nan"], ["attention.density", "nan", "above 0 up to 1"]),
    "density word": (["attention.density=low"], ["attention.density", "'low'", "null", "above 0 up to 1"]),
    "out of reach": (["attention.density=0.001"], ["attention.density must be", "to 1 for 2 x", "got 0.001"]),
    "no such pattern": (
        [
            "generation.height=32",
            "generation.width=32",
            "generation.num_frames=33",
            "attention.pattern=power",
        ],
        ["attention.pattern must have a mask within 5%", "got 'power'"],
    ),
    "dtype": (["model.dtype=int8"], ["model.dtype", "'int8'", "bfloat16, float16, float32"]),
    "device": (["model.device=tpu"], ["model.device", "'tpu'", "auto, cpu, cuda"]),
    "family": (["model.family=sora"], ["model.family", "'sora'", "wan"]),
    "empty prompt": (["generation.prompt="], ["generation.prompt", "''"]),
    "blank prompt": (["generation.prompt=  "], ["generation.prompt", "not empty"]),
    "no prompt file": (["generation.prompt_file=nope.txt"], ["generation.prompt_file", "'nope.txt'"]),
    "empty prompt file": (["generation.prompt_file="], ["generation.prompt_file", "''", "null"]),
    "home as prompt file": (["generation.prompt_file=~"], ["generation.prompt_file", "'~'"]),
    "bytes in the prompt": (["generation.prompt=caf\udce9"], ["generation.prompt", "UTF-8", "udce9"]),
    "bytes in the output": (["output.path=caf\udce9"], ["output.path", "UTF-8"]),
    "sexagesimal": (["generation.num_frames=1:30"], ["generation.num_frames", "'1:30'", "whole number"]),
    "no output": (["output.path="], ["output.path", ".mp4"]),
    "no model": (["model.path="], ["model.path", "''", "folder"]),
    "option": (["--seed=3"], ["'--seed=3'", "generation.seed=1"]),
    "two configs": (["configs/wan_tiny_4x.yaml"], ["wan_tiny.yaml", "wan_tiny_4x.yaml"]),
    "too long": (["generation.num_frames=4097"], ["generation.num_frames", "4097", "4093"]),
}


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("option", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_bad_values(case, option, tiny_model, tmp_path, capsys):
    overrides, words = VALUES[case]
    check_refused(capsys, arguments(tiny_model, tmp_path / "out", *overrides, *option), *words)
    assert not (tmp_path / "out").exists()


def test_a_missing_config_file_names_the_bundled_ones(capsys):
    check_refused(capsys, ["configs/nope.yaml"], "'configs/nope.yaml'", "configs/wan_tiny.yaml")


def test_cuda_asked_for_and_absent(tiny_model, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    argv = arguments(tiny_model, tmp_path / "out", "model.device=cuda")
    check_refused(capsys, argv, "model.device", "'cuda'", "auto, cpu")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _other_family(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "MochiPipeline"}))


def _cut_weights(folder: Path) -> None:
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _garble_header(folder: Path) -> None:
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00" + b"?" * 64 + file.read_bytes()[72:])


def _misshape(folder: Path) -> None:
    file = folder / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ffn_dim": 40}))


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing folder": (shutil.rmtree, ["is no folder"]),
    "empty folder": (_empty, ["empty folder"]),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), ["model_index.json"]),
    "index no JSON": (
        lambda folder: (folder / "model_index.json").write_text("{"),
        ["model_index.json", "JSON"],
    ),
    "other family": (_other_family, ["MochiPipeline", "WanPipeline"]),
    "no transformer": (lambda folder: shutil.rmtree(folder / "transformer"), ["transformer"]),
    "no weights": (
        lambda folder: (folder / "transformer/diffusion_pytorch_model.safetensors").unlink(),
        ["safetensors"],
    ),
    "no config": (lambda folder: (folder / "vae/config.json").unlink(), ["vae/config.json"]),
    "config no JSON": (
        lambda folder: (folder / "transformer/config.json").write_text("?"),
        ["transformer/config.json"],
    ),
    "cut weights": (_cut_weights, ["transformer", "safetensors"]),
    "garbled header": (_garble_header, ["vae", "safetensors"]),
    "other shapes": (_misshape, ["cannot be loaded"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_model_folders(case, tiny_model, tmp_path, capsys):
    damage, words = MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    check_refused(capsys, arguments(folder, tmp_path / "out"), "model.path", str(folder), *words)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_folder_of_the_repository_is_no_hub_id(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refused(capsys, [TINY, "model.path=configs/wan-tinny"], "model.path", "wan-tinny", "is no folder")


OUTPUTS: dict[str, Callable[[Path], Path]] = {
    "below a file": lambda folder: _touch(folder / "file") / "deeper",
    "a file": lambda folder: _touch(folder / "file"),
    "in proc": lambda folder: Path("/proc/videos"),
    "mp4 below a file": lambda folder: _touch(folder / "file") / "a.mp4",
    "a folder that ends in mp4": lambda folder: _mkdir(folder / "a.mp4"),
}


def _touch(file: Path) -> Path:
    file.touch()
    return file


def _mkdir(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("case", OUTPUTS)
def test_bad_output_paths(case, tiny_model, tmp_path, capsys):
    path = OUTPUTS[case](tmp_path)
    before = files(tmp_path)
    check_refused(capsys, arguments(tiny_model, path), "output.path", str(path))
    assert files(tmp_path) == before


def test_bad_prompt_files(tiny_model, tmp_path, capsys):
    for name, content in (("empty.txt", b""), ("blank.txt", b"\n \n"), ("latin.txt", b"caf\xe9")):
        (tmp_path / name).write_bytes(content)
        argv = arguments(tiny_model, tmp_path / "out", f"generation.prompt_file={tmp_path / name}")
        check_refused(capsys, argv, "generation.prompt_file", name)
    argv = arguments(tiny_model, tmp_path / "out", f"generation.prompt_file={tmp_path}")
    check_refused(capsys, argv, "generation.prompt_file", str(tmp_path))
    (tmp_path / "good.txt").write_text("a cat\n")
    argv = arguments(tiny_model, tmp_path / "a.mp4", f"generation.prompt_file={tmp_path / 'good.txt'}")
    check_refused(capsys, argv, "output.path", "a.mp4", "folder")
    assert not (tmp_path / "out").exists() and not (tmp_path / "a.mp4").exists()


def test_more_memory_than_there_is(tiny_model, tmp_path, capsys):
    sizes = ["generation.height=8192", "generation.width=8192", "generation.num_frames=4093"]
    line = check_refused(
        capsys, arguments(tiny_model, tmp_path / "out", *sizes), "out of memory", "8192", "4093", "GiB"
    )
    assert re.search(r"would fit: generation\.(num_frames|height)=\d+", line)
    assert not (tmp_path / "out").exists()
