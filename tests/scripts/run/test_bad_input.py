"""Model folders and bytes that are refused in one line with key, value and remedy, no file left.

More bad input of every command is in tests/data/golden/bad_input.txt.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.script_cases import arguments, refused

WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = {  # name -> file, its damage (see `damage`), what the line names
    "missing folder": ("", None, ["is no folder"]),
    "empty folder": ("", "empty", ["empty folder"]),
    "no index": ("model_index.json", None, ["model_index.json"]),
    "index no JSON": ("model_index.json", b"?", ["model_index.json", "JSON"]),
    "other family": ("model_index.json", {"_class_name": "MochiPipeline"}, ["MochiPipeline", "WanPipeline"]),
    "no transformer": ("transformer", None, ["transformer"]),
    "no weights": (f"transformer/{WEIGHTS}", None, ["safetensors"]),
    "no config": ("vae/config.json", None, ["vae/config.json"]),
    "config no JSON": ("transformer/config.json", b"?", ["transformer/config.json"]),
    "cut weights": (f"transformer/{WEIGHTS}", -1000, ["transformer", "safetensors"]),
    "garbled header": (f"vae/{WEIGHTS}", b"\x40" + bytes(7) + b"?" * 64, ["vae", "safetensors"]),
    "other shapes": ("transformer/config.json", {"ffn_dim": 40}, ["cannot be loaded"]),
}


def damage(path: Path, change: object) -> None:
    """Removes a file or folder (None), empties a folder, or overwrites, cuts or updates a file."""
    match change:
        case None if path.is_file():
            path.unlink()
        case None:
            shutil.rmtree(path)
        case "empty":
            shutil.rmtree(path)
            path.mkdir()
        case bytes():
            path.write_bytes(change + path.read_bytes()[len(change) :])
        case int():
            path.write_bytes(path.read_bytes()[:change])
        case dict():
            path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("case", MODELS)
def test_bad_model_folders(case, tiny_model, tmp_path, capsys):
    name, change, parts = MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder / name, change)
    refused(capsys, arguments(folder, tmp_path / "out"), "model.path", str(folder), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["generation.prompt", "output.path"])
@pytest.mark.parametrize("option", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_bytes_that_are_no_utf8(key, option, tiny_model, tmp_path, capsys):
    argv = arguments(tiny_model, tmp_path / "out", f"{key}=caf\udce9", *option)
    refused(capsys, argv, key, "UTF-8", "udce9")
    assert not (tmp_path / "out").exists()
