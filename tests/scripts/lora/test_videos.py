"""Videos and captions for training: bad input, which frames become clips, and of what size."""

import subprocess
from pathlib import Path

import imageio
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from scripts.lora import prepare as prepare_latents
from scripts.lora.config import DataConfig
from scripts.lora.videos import Video, plan_clips, read_clips, read_videos, too_short
from tests.support.latent_cases import run, table, write_video

CONFIG = Path("configs/train/wan_tiny_4x.yaml")


@pytest.fixture
def folder(tmp_path) -> Path:
    """One video with its caption."""
    write_video(tmp_path / "a.mp4", 9, 32, 32)
    (tmp_path / "a.txt").write_text("a red circle")
    return tmp_path


def vary_rate(path: Path) -> None:
    """Takes two of three frames out of the second half, and leaves the times of the others."""
    write_video(path.with_name("full.mp4"), 40, 32, 32)
    words = ["-vf", "select='if(lt(n,20),1,not(mod(n,3)))'", "-fps_mode", "vfr", "-y", str(path)]
    full = path.with_name("full.mp4")
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-i", str(full), *words], check=True)
    full.unlink()


BAD = {
    "no folder": (lambda f: ["data.folder=nope"], ["data.folder", "'nope'", "is no folder"]),
    "empty folder": (lambda f: [(f / "a.mp4").unlink()][1:], ["data.folder", "has no videos", ".mp4"]),
    "neither": (
        lambda f: ["data.folder=null"],
        ["data.folder: got None", "data.table: got None", "one of them"],
    ),
    "both": (lambda f: ["data.table=x.csv"], ["data.table: got 'x.csv'", "one of them"]),
    "no caption": (
        lambda f: [(f / "a.txt").unlink()][1:],
        ["1 of 1 videos have no caption", "a.mp4 (a.txt: No such"],
    ),
    "empty caption": (lambda f: [(f / "a.txt").write_text(" \n")][1:], ["a.mp4 (it is empty)"]),
    "no UTF-8": (lambda f: [(f / "a.txt").write_bytes(b"caf\xe9")][1:], ["a.mp4 (a.txt is not UTF-8)"]),
    "no video": (lambda f: [(f / "a.mp4").write_text("text")][1:], ["1 of 1 videos cannot be read: a.mp4 ("]),
    "empty video": (
        lambda f: [(f / "a.mp4").write_bytes(b"")][1:],
        ["1 of 1 videos cannot be read: a.mp4 ("],
    ),
    "mixed fps": (
        lambda f: [write_video(f / "b.mp4", 9, 32, 32, fps=24), (f / "b.txt").write_text("b")][2:],
        ["data.fps: got null", "16 (1, as a.mp4), 24 (1, as b.mp4)", "up to 16"],
    ),
    "varying fps": (
        lambda f: [vary_rate(f / "a.mp4")][1:],
        ["1 of 1 videos cannot be read: a.mp4 (", "on average", "ffmpeg -i"],
    ),
    "high fps": (lambda f: ["data.fps=24"], ["data.fps: got 24", "1 of 1", "a.mp4", "at most 16"]),
    "all short": (lambda f: ["data.sizes=13x32x32"], ["data.sizes: none of 1 videos", "at most 9 frames"]),
    "no sizes": (lambda f: ["data.sizes="], ["data.sizes: got []", "FRAMESxHEIGHTxWIDTH"]),
    "frames": (lambda f: ["data.sizes=8x32x32"], ["data.sizes: frames of 8x32x32: got 8", "4k + 1", "9"]),
    "height": (lambda f: ["data.sizes=9x40x32"], ["height of 9x40x32: got 40", "multiple of 16", "32 or 48"]),
    "family": (
        lambda f: ["model.family=wan_i2v"],
        ["model.family: got 'wan_i2v'", "wan, hunyuan_video, mochi"],
    ),
    "other family": (lambda f: ["model.family=mochi"], ["must hold a MochiPipeline"]),
    "no model": (lambda f: ["model.path=nope"], ["model.path: got 'nope'"]),
    "unknown key": (lambda f: ["data.foldr=x"], ["unknown key 'data.foldr'", "data.folder"]),
    "table of another kind": (lambda f: table(f, "t.txt", ""), ["data.table", ".jsonl or .csv"]),
    "no table": (lambda f: ["data.folder=null", "data.table=nope.csv"], ["'nope.csv'", "No such file"]),
    "broken table": (lambda f: table(f, "t.jsonl", '{"video": '), ["data.table", "cannot be read"]),
    "empty table": (lambda f: table(f, "t.jsonl", ""), ["data.table", "is empty"]),
    "no column": (
        lambda f: table(f, "t.csv", "file,caption\na.mp4,b\n"),
        ["data.table", "line 2", "`video` and `caption`"],
    ),
    "no video of the table": (
        lambda f: table(f, "t.jsonl", '\n{"video": "b.mp4", "caption": "b"}'),
        ["data.table: 1 of 1 videos cannot be read: b.mp4 (No such file"],
    ),
    "no caption in the table": (
        lambda f: table(f, "t.csv", "video,caption\na.mp4,\n"),
        ["data.table: 1 of 1 videos have no caption", "a.mp4 (it is empty)"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_a_weight_is_loaded(case, folder, capsys, monkeypatch):
    monkeypatch.setattr(prepare_latents, "prepare", None)
    damage, words = BAD[case]
    overrides = damage(folder)
    assert run(CONFIG, folder, folder / "out", "data.sizes=9x32x32", *overrides) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (folder / "out").exists()


def test_a_good_video_is_read_where_imageio_fails_once(folder, monkeypatch):
    reader, calls = imageio.get_reader, []

    def failing_once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError("Could not load meta information")
        return reader(*arguments, **options)

    monkeypatch.setattr(imageio, "get_reader", failing_once)
    (found,) = read_videos(DataConfig(folder=str(folder), sizes=[[9, 32, 32]]))
    assert (found.name, found.frames, len(calls)) == ("a.mp4", 9, 2)


def test_a_video_that_breaks_off_is_named(tmp_path):
    write_video(tmp_path / "a.mp4", 20, 32, 48)
    video = Video("a.mp4", tmp_path / "a.mp4", "a", "0", frames=30, fps=16, height=32, width=48)
    (clip,) = plan_clips([video], DataConfig(sizes=[[29, 32, 32]]))
    with pytest.raises(ValueError, match=r"a.mp4 breaks off at frame 20 of 30"):
        list(read_clips(video, [clip]))


def video(frames: int, fps: float = 16, height: int = 720, width: int = 1280) -> Video:
    return Video("v.mp4", Path("v.mp4"), "v", "0", frames, fps, height, width)


@pytest.mark.parametrize(
    ("frames", "clips", "starts"),
    [(9, 1, [0]), (12, 1, [1]), (17, 2, [4]), (18, 2, [0, 9]), (60, 3, [5, 25, 45]), (28, 5, [0, 9, 18])],
)
def test_clips_are_spread_evenly_and_do_not_overlap(frames, clips, starts):
    found = plan_clips([video(frames)], DataConfig(sizes=[[9, 64, 64], [5, 64, 64]], clips=clips))
    assert [clip.frames for clip in found] == [tuple(range(start, start + 9)) for start in starts]
    assert len({clip.key for clip in found}) == len({clip.name for clip in found}) == len(starts)


@pytest.mark.parametrize(
    ("fps", "rate", "frames", "taken"),
    [
        (16, None, 5, (0, 1, 2, 3, 4)),
        (32, 16, 9, (0, 2, 4, 6, 8)),
        (24, 16, 7, (0, 2, 3, 5, 6)),
        (60, 24, 11, (0, 3, 5, 8, 10)),
        (23.98, 24, 5, (0, 1, 2, 3, 4)),
    ],
)
def test_frames_are_taken_at_a_rate(fps, rate, frames, taken):
    (clip,) = plan_clips([video(frames, fps)], DataConfig(sizes=[[5, 64, 64]], fps=rate))
    assert clip.frames == taken
    assert too_short([video(taken[-1], fps)], DataConfig(sizes=[[5, 64, 64]], fps=rate)) == ["v.mp4"]


@pytest.mark.parametrize(
    ("height", "width", "chosen"),
    [
        (720, 1280, (720, 1280)),
        (480, 854, (480, 832)),
        (1080, 1920, (720, 1280)),
        (500, 480, (480, 480)),
        (90, 160, (480, 832)),
    ],
)
def test_a_video_goes_to_the_size_nearest_in_shape_that_needs_no_enlarging(height, width, chosen):
    sizes = [[9, 480, 832], [9, 720, 1280], [9, 480, 480], [5, 720, 1280]]
    (clip,) = plan_clips([video(12, height=height, width=width)], DataConfig(sizes=sizes))
    assert (clip.height, clip.width) == chosen
