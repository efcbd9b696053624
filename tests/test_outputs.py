"""Names, whole files, resumption."""

import errno
import json
import tomllib
from pathlib import Path

import imageio
import numpy as np
import pytest

from scripts.config import ROOT, read_config
from scripts.errors import UsageError
from scripts.outputs import _raise_reason, finished, resolved, video_path, writable_folder, write_pair
from scripts.record import versions

TINY = "configs/wan_tiny.yaml"


def moving_square(frames: int = 9, height: int = 48, width: int = 80) -> np.ndarray:
    video = np.zeros((frames, height, width, 3), dtype=np.uint8)
    for i in range(frames):
        video[i, 8:24, 4 * i : 4 * i + 16] = (255, 40, 40)
    return video


def test_names():
    config = read_config(TINY, ["output.path=out", "generation.seed=4"])
    assert video_path(config, "A red circle, moving!") == Path("out/a-red-circle-moving_seed4.mp4")
    assert video_path(config, "A red circle", 7) == Path("out/0007_a-red-circle_seed4.mp4")
    assert video_path(config, "../../etc/passwd") == Path("out/etc-passwd_seed4.mp4")
    assert video_path(config, "?!") == Path("out/video_seed4.mp4")
    file = read_config(TINY, ["output.path=a/b.mp4"])
    assert video_path(file, "x") == Path("a/b.mp4")


def test_long_names_are_cut_and_still_differ():
    config = read_config(TINY, [])
    names = {video_path(config, "наша кошка " * 20 + end).name for end in ("one", "two")}
    assert len(names) == 2
    assert all(len(name.encode()) < 120 for name in names)


@pytest.mark.parametrize("size", [(48, 80), (16, 16), (64, 64)])
def test_a_video_is_written_whole_and_reads_back(tmp_path, size):
    frames = moving_square(height=size[0], width=size[1])
    record = {"seconds": {}, "prompt": "квадрат"}
    write_pair(tmp_path / "a.mp4", frames, 16, record)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.mp4"]
    back = np.stack(imageio.mimread(tmp_path / "a.mp4", memtest=False))
    with imageio.get_reader(tmp_path / "a.mp4") as reader:
        assert reader.get_meta_data()["fps"] == 16
    assert back.shape == frames.shape
    assert np.abs(back.astype(float) - frames).mean() < 4
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["prompt"] == "квадрат" and written["seconds"]["write"] > 0


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_pair(tmp_path / f"{name}.mp4", moving_square(), 16, {"seconds": {}})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"before")
    with pytest.raises(TypeError):
        write_pair(tmp_path / "a.mp4", moving_square(), 16, {"seconds": {}, "bad": object()})
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"before"


def test_the_reason_of_a_full_disk_is_told():
    with pytest.raises(OSError) as raised:
        _raise_reason(Path("/dev/full"))
    assert raised.value.errno == errno.ENOSPC


def test_folders_made_for_nothing_are_removed(tmp_path):
    config = read_config(TINY, [f"output.path={tmp_path / 'a/b/c'}"])
    with pytest.raises(UsageError), writable_folder(config, prompt_file=False) as folder:
        assert folder.is_dir()
        raise UsageError("later")
    assert not (tmp_path / "a").exists()
    with writable_folder(config, prompt_file=False) as folder:
        (folder / "kept").touch()
    assert [file.name for file in folder.iterdir()] == ["kept"]


def test_the_version_in_records_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert versions()["radial-attention"] == project["version"]


def test_finished_compares_what_changes_a_frame(tmp_path):
    config = read_config(TINY, [f"output.path={tmp_path}"])
    path = video_path(config, "a", 1)
    assert finished(path, config, "a") == (False, [])
    write_pair(path, moving_square(), 16, {"seconds": {}, "config": resolved(config, "a")})
    assert finished(path, config, "a") == (True, [])
    assert finished(path, read_config(TINY, ["output.path=elsewhere"]), "a") == (True, [])
    more = read_config(TINY, ["generation.steps=21", "model.dtype=bfloat16"])
    assert finished(path, more, "a") == (False, ["generation.steps", "model.dtype"])
    path.with_suffix(".json").write_text("{")
    assert finished(path, config, "a") == (False, ["config"])
    path.unlink()
    assert finished(path, config, "a") == (False, [])
