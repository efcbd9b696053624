"""Names, whole files, resumption."""

import errno
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import av
import imageio
import numpy as np
import pytest

import radial_attn
from scripts.run.config import ROOT, read_config
from scripts.run.errors import UsageError
from scripts.run.files import claim, temporary
from scripts.run.outputs import (
    Contents,
    Sound,
    _raise_reason,
    check_target,
    encode,
    finished,
    is_whole,
    resolved,
    video_path,
    writable_folder,
    write_pair,
)
from scripts.run.system import cgroup_free, installed, own_memory, versions
from scripts.run.video_files import read_video
from tests.support.long import all_but

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


def test_a_sound_is_written_with_its_video(tmp_path):
    """A tone on the left and silence on the right come back; a sound longer than its video is not cut."""
    tone = 0.5 * np.sin(np.arange(16000) * 2 * np.pi * 440 / 16000, dtype=np.float32)
    record = {"seconds": {}}
    write_pair(tmp_path / "a.mp4", moving_square(), 16, record, Sound(np.stack([tone, 0 * tone]), 16000))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.mp4"]
    assert record["video"]["sound"] == {"channels": 2, "rate": 16000, "seconds": 1.0}
    with av.open(str(tmp_path / "a.mp4")) as container:
        back = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert abs(back.shape[1] - 16000) <= 2 * 1024
    spectrum = np.abs(np.fft.rfft(back[0, 2000:14000]))
    assert spectrum.argmax() == 440 * 12000 // 16000 and np.abs(back[1]).max() < 0.01
    assert np.abs(back[0, 2000:14000]).max() == pytest.approx(0.5, abs=0.05)
    assert sum(1 for _ in read_video(tmp_path / "a.mp4")) == 9 and is_whole(tmp_path / "a.mp4")


def test_a_sound_that_cannot_be_written_leaves_no_video(tmp_path):
    sound = Sound(np.zeros((40, 16000), np.float32), 16000)  # more channels than AAC has
    with pytest.raises(OSError, match="ffmpeg could not encode"):
        write_pair(tmp_path / "a.mp4", moving_square(), 16, {"seconds": {}}, sound)
    assert not list(tmp_path.iterdir())


PLAIN = ((230, 20, 20), (20, 200, 40), (30, 60, 220), (255, 255, 255), (0, 0, 0), (90, 110, 130))


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (33, 51), (32, 31), (720, 1280)])
def test_colours_are_written_in_bt709_and_marked(tmp_path, size):
    """A reader that follows the marks gets the colours back, and so does one that takes HD to be BT.709."""
    height, width = size
    slope = np.linspace(40, 200, width, dtype=np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
    videos = [np.broadcast_to(np.array(colour, np.uint8), (2, *size, 3)) for colour in PLAIN]
    videos += [np.broadcast_to(slope, (2, *size, 3))] * (width > 40)
    for frames in videos if height < 720 else videos[:1]:
        encode(tmp_path / "a.mp4", frames, 16)
        back = np.stack([np.asarray(frame) for frame in read_video(tmp_path / "a.mp4")])
        assert back.shape == frames.shape
        assert np.abs(back.astype(int) - frames).max() <= 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        about = container.streams.video[0].codec_context
        marks = (about.color_primaries, about.color_trc, about.colorspace, about.color_range)
    assert marks == (1, 1, 1, 1)  # BT.709 three times, limited range
    assert about.pix_fmt == ("yuv444p" if height % 2 or width % 2 else "yuv420p")


@pytest.mark.parametrize(("keep", "spoiled"), [(0, 0), (0.5, 0), (1, 1)])
def test_a_video_that_is_not_as_its_record_says_is_not_whole(tmp_path, keep, spoiled):
    path, content = tmp_path / "a.mp4", {"seconds": {}}
    write_pair(path, moving_square(), 16, content)
    assert is_whole(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) - spoiled] + b"x" * spoiled)
    assert not is_whole(path)
    path.write_bytes(whole)
    (tmp_path / "a.json").write_text(json.dumps({"seconds": {}}))  # a record of before
    assert is_whole(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert not is_whole(path)


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


def test_a_record_that_cannot_be_replaced_leaves_the_video_that_was_there(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"before")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError):
        write_pair(tmp_path / "a.mp4", moving_square(), 16, {"seconds": {}})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"before"


STOPPED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from scripts.run.outputs import write_pair
path, end, renames = Path(sys.argv[1]), getattr(signal, sys.argv[2]), []
def stop(event, arguments):
    if event == "os.rename" and Path(arguments[1]).parent == path.parent:
        renames.append(arguments)
        if len(renames) == 4:
            os.kill(os.getpid(), end)
sys.addaudithook(stop)
for steps in (20, 21):
    record = {"seconds": {}, "config": {"generation": {"steps": steps}}}
    write_pair(path, np.full((5, 32, 32, 3), steps, dtype=np.uint8), 16, record)
"""


def test_a_run_removes_what_killed_runs_left(tmp_path):
    """A video without a record, whose temporary record is there, is half of a pair."""
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "a.mp4"), "SIGKILL"]
    subprocess.run(command, check=False, cwd=ROOT)
    (left,) = tmp_path.glob(".*.part")
    assert left.name.startswith(".a.json.") and (tmp_path / "a.mp4").is_file()
    kept = [
        temporary(tmp_path / "b.mp4", ".mp4"),
        tmp_path / ".c.mp4.0a1b2c3d-1.part.mp4",
        tmp_path / "d.mp4",
    ]
    old = tmp_path / ".c.mp4.0a1b2c3d-2.part.mp4"  # of another machine
    for file in (*kept, old, tmp_path / ".e.mp4.lock"):
        file.touch()
    os.utime(old, (0, 0))
    with claim(tmp_path / "f.mp4") as mine, writable_folder(read_config(TINY, [f"output.path={tmp_path}"])):
        assert mine and set(tmp_path.iterdir()) == {*kept, tmp_path / ".f.mp4.lock"}
        with claim(tmp_path / "f.mp4") as again:
            assert not again
    assert set(tmp_path.iterdir()) == set(kept)


def test_a_file_name_of_the_greatest_length(tmp_path):
    path = tmp_path / f"{'ж' * 125}x.mp4"  # 255 bytes; that of its record is longer by one
    config = read_config(TINY, [f"output.path={path}"])
    with pytest.raises(UsageError, match=r"cannot be used .*too long"):
        check_target(config)
    path = path.with_name(path.name[1:])
    with claim(path) as mine:
        assert mine
        write_pair(path, moving_square(), 16, {"seconds": {}})
    assert {file.name for file in tmp_path.iterdir()} == {path.name, path.with_suffix(".json").name}


@pytest.mark.parametrize("end", all_but(["SIGKILL"], ["SIGINT", "SIGKILL"]))
def test_a_stop_between_the_two_renames_leaves_no_mixed_pair(tmp_path, end):
    """The second video has no record yet, and the first record must not stand for it."""
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "a.mp4"), end]
    stopped = subprocess.run(command, check=False, cwd=ROOT, capture_output=True)
    assert stopped.returncode != 0
    left = sorted(file.name for file in tmp_path.iterdir() if not file.name.startswith("."))
    assert left == ([] if end == "SIGINT" else ["a.mp4"])


def test_the_reason_of_a_full_disk_is_reported():
    with pytest.raises(OSError) as raised:
        _raise_reason(Path("/dev/full"))
    assert raised.value.errno == errno.ENOSPC


def test_folders_made_for_nothing_are_removed(tmp_path):
    config = read_config(TINY, [f"output.path={tmp_path / 'a/b/c'}"])
    with pytest.raises(UsageError), writable_folder(config) as folder:
        assert folder.is_dir()
        raise UsageError("later")
    assert not (tmp_path / "a").exists()
    with writable_folder(config) as folder:
        (folder / "kept").touch()
    assert [file.name for file in folder.iterdir()] == ["kept"]


def test_the_version_in_records_is_the_projects():
    assert versions()["radial-attention"] == radial_attn.__version__
    assert installed(("pytest", "no-such-package")) == {
        "pytest": pytest.__version__,
        "no-such-package": "absent",
    }


@pytest.mark.parametrize(
    ("names", "droppable"),
    [
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
            "total_inactive_file",
        ),
    ],
)
def test_a_memory_limit_counts_less_what_is_used(tmp_path, names, droppable):
    """Used memory of a control group is not free, except for file pages that can be dropped."""
    (tmp_path / "memory").mkdir()
    assert cgroup_free(tmp_path) == []
    for name, text in zip(names, ("1000\n", "700\n", f"anon 1\n{droppable} 50\n"), strict=True):
        (tmp_path / name).write_text(text)
    assert cgroup_free(tmp_path) == [350]
    (tmp_path / names[0]).write_text("max\n")
    assert cgroup_free(tmp_path) == []


def test_the_memory_of_the_process_is_counted():
    before, size = own_memory("cpu"), 2**27
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # pages that no earlier test has left behind
    with mmap.mmap(-1, size, flags=private) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        assert own_memory("cpu") - before > 0.9 * size


def test_finished_compares_what_changes_a_frame(tmp_path):
    config = read_config(TINY, [f"output.path={tmp_path}"])
    path = video_path(config, "a", 1)
    assert finished(path, config, "a") == (False, [])
    write_pair(path, moving_square(), 16, {"seconds": {}, "config": resolved(config, "a")})
    assert finished(path, config, "a") == (True, [])
    assert finished(path, read_config(TINY, ["output.path=elsewhere"]), "a") == (True, [])
    assert finished(path, config, "a", Contents(loras=["0" * 64])) == (False, ["content of model.loras"])
    record = path.with_suffix(".json")
    content = json.loads(record.read_text())
    del (
        content["config"]["generation"]["seeds"],
        content["config"]["attention"]["quantize"],
    )  # of an old version
    record.write_text(json.dumps(content | {"loras": [{"sha256": "0" * 64}]}))
    assert finished(path, config, "a", Contents(loras=["0" * 64])) == (True, [])
    assert finished(path, config, "a", Contents(loras=["1" * 64])) == (False, ["content of model.loras"])
    assert finished(path, config, "a", Contents(model="0" * 64)) == (
        True,
        [],
    )  # the record has no digest to compare
    record.write_text(json.dumps(content | {"model": {"sha256": "0" * 64}}))
    assert finished(path, config, "a", Contents(model="0" * 64)) == (True, [])
    assert finished(path, config, "a", Contents(model="1" * 64)) == (False, ["content of model.path"])
    more = read_config(TINY, ["generation.steps=21", "model.dtype=bfloat16"])
    assert finished(path, more, "a") == (False, ["generation.steps", "model.dtype"])
    path.with_suffix(".json").write_text("{")
    assert finished(path, config, "a") == (False, ["config"])
    path.unlink()
    assert finished(path, config, "a") == (False, [])
