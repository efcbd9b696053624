"""The commands print, write and refuse what the golden files hold; bundled presets make the kept frames."""

import json
import re
import shlex
from pathlib import Path

import imageio
import numpy as np
import pytest

from scripts.run.config import ROOT
from tests.support import golden

BAD, BOTH = golden.table("bad_input.txt"), "[--dry-run]"


def check(kind: str, name: str, folder: Path) -> None:
    """Compares a golden file with what is made now; the message says how to rewrite it."""
    expected = (golden.DATA / kind / f"{name}.txt").read_text(encoding="utf-8")
    said = golden.texts(kind)[name](folder)
    assert said == expected, f"if it is meant: python -m tests.support.golden --write {kind}"


@pytest.mark.parametrize("command", golden.texts("help"))
def test_help(command, tmp_path):
    check("help", command, tmp_path)


@pytest.mark.parametrize("plan", golden.texts("plans"))
def test_plans(plan, tmp_path):
    check("plans", plan, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", golden.KEYS)
def test_keys_of_json_files(name, tmp_path):
    check("keys", name, tmp_path)


@pytest.mark.parametrize("kind", ["help", "plans", "keys"])
def test_every_golden_file_has_its_test(kind):
    assert {file.stem for file in (golden.DATA / kind).iterdir()} == set(golden.texts(kind))


@pytest.mark.parametrize("preset", golden.FRAMES)
def test_frames(preset):
    expected = json.loads((golden.DATA / "frames/frames.json").read_text())[preset]
    now = golden.about(preset)
    assert [now[name] for name in ("changed", "shape", "kept")] == [
        expected[name] for name in ("changed", "shape", "kept")
    ]
    frames = golden.picture(golden.generated(preset)[0]).astype(int)
    difference = np.abs(frames - imageio.imread(golden.DATA / f"frames/{preset}.png"))
    if preset.endswith(golden.ROUNDED):
        assert difference.mean() <= golden.MEAN_LEVELS
    else:
        assert difference.max() <= golden.LEVELS
    if now["computed_by"] == expected["computed_by"]:
        assert now["sha256"] == expected["sha256"], "meant? python -m tests.support.golden --write frames"


def test_every_bundled_preset_has_its_frames():
    assert set(golden.FRAMES) == {file.stem for file in ROOT.glob("configs/*tiny*.yaml")}


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    """Makes a folder of files that are not what their names say."""
    for name in ("void", "folder.mp4", "folder.png"):
        (tmp_path / name).mkdir()
    texts = {"text.png": "no image", "text.mp4": "no video", "blank.txt": "\n \n", "list.yaml": "- 1\n"}
    texts |= {
        "empty.txt": "",
        "broken.yaml": "a: [",
        "broken.json": '{"kind": ',
        "list.json": "[]",
        "a.gif": "GIF89a",
    }
    texts |= {"sinks.yaml": "attention: {sinks: true}\n", "broken.safetensors": "?", "broken.gguf": "GGUF?"}
    texts |= {"bare.yaml": "seed: 3\n", "group.yaml": "output:\n", "word.yaml": "generation: {seed: x}\n"}
    texts |= {"control.yaml": "\0\1"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    return tmp_path


@pytest.mark.parametrize(("code", "named", "line"), BAD, ids=[golden.replaced(row[2]) for row in BAD])
def test_bad_input(code, named, line, bad_files):
    if line == "evaluate model.compile=blocks" and " " in str(ROOT):
        pytest.skip("torch.compile needs a folder without a space")
    key, *others = named.split(" & ")
    before = {folder: sorted(folder.rglob("*")) for folder in (bad_files, ROOT / "results")}
    for option in ("", "--dry-run") if BOTH in line else ("",):
        words = shlex.split(line.replace(BOTH, option))
        count = next(number for number, word in enumerate(words) if word in golden.COMMANDS)
        environment = dict(word.split("=", 1) for word in words[:count])
        said = golden.call(bad_files, *words[count:], **environment)
        assert said.code == int(code)
        (error,) = said.err.splitlines()
        assert "error: " in error
        assert re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", error), error
        assert not [word for word in others if word not in error], error
        assert {folder: sorted(folder.rglob("*")) for folder in before} == before


def test_every_command_and_every_group_has_bad_input():
    lines = [line for _, _, line in BAD]
    assert not [name for name in golden.COMMANDS if not any(name in line.split() for line in lines)]
    for command in ("generate", "train_lora"):
        file = golden.DATA / f"help/{command}.txt"
        keys = re.findall(r"^  (\w+\.\w+)=", file.read_text(encoding="utf-8"), re.MULTILINE)
        named = {key.split(" & ")[0] for _, key, line in BAD if command in line.split()}
        assert {key.split(".")[0] for key in keys} <= {key.split(".")[0] for key in named}
