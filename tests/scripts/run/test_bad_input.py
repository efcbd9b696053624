"""Model folders and bytes that are refused in one line with key, value and remedy, no file left.

More bad input of every command is in tests/data/golden/bad_input.txt.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.generate import main

TINY = "configs/wan_tiny.yaml"
SHORT = ["generation.steps=2", "generation.num_frames=5"]


def arguments(model: Path, output: Path, *overrides: str) -> list[str]:
    return [TINY, f"model.path={model}", f"output.path={output}", *SHORT, *overrides]


def check_refused(capsys: pytest.CaptureFixture, argv: list[str], *words: str) -> str:
    """Runs the command in this process and returns its one line."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert not [word for word in words if word not in lines[0]], lines[0]
    return lines[0]


@pytest.mark.parametrize("key", ["generation.prompt", "output.path"])
@pytest.mark.parametrize("option", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_bytes_that_are_no_utf8(key, option, tiny_model, tmp_path, capsys):
    argv = arguments(tiny_model, tmp_path / "out", f"{key}=caf\udce9", *option)
    check_refused(capsys, argv, key, "UTF-8", "udce9")
    assert not (tmp_path / "out").exists()


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
