"""Videos and captions for training: bad input, and the frames and sizes of clips."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from scripts.lora import prepare as prepare_latents
from scripts.lora.config import DataConfig
from scripts.lora.dataset import Dataset, read_dataset
from scripts.lora.videos import Video, plan_clips, read_clips, too_short
from tests.support.latent_cases import run, table, write_video

CONFIG = Path("configs/train/wan_tiny_4x.yaml")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Makes a folder of one video with its caption."""
    write_video(tmp_path / "a.mp4", 9, 32, 32)
    (tmp_path / "a.txt").write_text("a red circle")
    return tmp_path


def vary_rate(path: Path) -> None:
    """Removes two of three frames of the second half, but keeps the times of the others."""
    write_video(path.with_name("full.mp4"), 40, 32, 32)
    words = ["-vf", "select='if(lt(n,20),1,not(mod(n,3)))'", "-fps_mode", "vfr", "-y", str(path)]
    full = path.with_name("full.mp4")
    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-i", str(full), *words], check=True)
    full.unlink()


def write_second(folder: Path, fps: int) -> None:
    """Writes another video with a caption."""
    write_video(folder / "b.mp4", 9, 32, 32, fps=fps)
    (folder / "b.txt").write_text("b")


UNREAD = "1 of 1 videos cannot be used: a.mp4 ("
BAD_FILES = {  # what is done to the folder, and parts of the message
    "no video": (lambda f: (f / "a.mp4").unlink(), ["data.folder", "has no videos", ".mp4"]),
    "no caption": (lambda f: (f / "a.txt").unlink(), [UNREAD, "(a.txt: No such file"]),
    "empty caption": (lambda f: (f / "a.txt").write_text(" \n"), ["a.mp4 (its caption is empty)"]),
    "unseen caption": (
        lambda f: (f / "a.txt").write_text("\ufeff\ufeff\u200b", "utf-8"),
        ["a.mp4 (its caption is empty)"],
    ),
    "no UTF-8": (
        lambda f: (f / "a.txt").write_bytes(b"caf\xe9"),
        ["(a.txt: line 1 is not UTF-8 (byte 0xe9)"],
    ),
    "text as video": (lambda f: (f / "a.mp4").write_text("text"), [UNREAD]),
    "empty video": (lambda f: (f / "a.mp4").write_bytes(b""), [UNREAD]),
    "mixed fps": (lambda f: write_second(f, 24), ["data.fps: got null", "16 (1, as a.mp4), 24", "up to 16"]),
    "varying fps": (lambda f: vary_rate(f / "a.mp4"), [UNREAD, "frame rate varies", "ffmpeg -i"]),
}
BAD_WORDS = {
    "data.folder=nope": ["data.folder", "'nope'", "is no folder"],
    "data.folder=null": ["data.folder: got None", "data.table: got None", "one of them"],
    "data.table=x.csv": ["data.table: got 'x.csv'", "one of them"],
    "data.fps=24": ["data.fps: got 24", "1 of 1", "a.mp4", "at most 16"],
    "data.sizes=13x32x32": ["data.sizes: none of 1 videos", "at most 9 frames"],
    "data.sizes=8x32x32": ["data.sizes: frames of 8x32x32: got 8", "4k + 1", "9"],
    "model.family=wan_i2v": ["model.family: got 'wan_i2v'", "wan, hunyuan_video, mochi"],
    "model.family=mochi": ["must hold a MochiPipeline"],
    "model.path=nope": ["model.path: got 'nope'"],
}
GOOD = '{"video": "a.mp4", "caption": "b"}\n'
BAD_TABLES = {  # name and content, and parts of the message
    ("t.txt", ""): ["data.table", ".jsonl or .csv"],
    ("t.jsonl", None): ["t.jsonl'", "No such file"],
    ("t.jsonl", GOOD + '\n{"video": '): ["data.table", "cannot be read: line 3: Expecting value"],
    ("t.jsonl", ""): ["data.table", "is empty"],
    ("t.jsonl", GOOD + GOOD): ["line 2 has the video of line 1, 'a.mp4'; give each once"],
    ("t.jsonl", GOOD + "[1]"): ["line 2 is no object"],
    ("t.jsonl", '{"video": "a.mp4", "caption": "x \\ud800 y"}'): ["line 1: \\ud800 is half of"],
    ("t.jsonl", '{"video": "a.mp4", "caption": 3}'): ["line 1 has a `caption` that is no text: 3"],
    ("t.csv", "file,caption\na.mp4,b\n"): ["data.table", "line 2 has no `video`, only 'file', 'caption'"],
    ("t.csv", "video;caption\na.mp4;b\n"): ["separated by semicolons"],
    ("t.csv", "video,caption\na.mp4,a red circle, moving\n"): ["line 2 has 3 cells, but there are 2"],
    ("t.csv", 'video,caption\na.mp4,"a red\nb.mp4,"\n'): ["line 2 has a quoted cell that goes on over"],
    ("t.csv", "video,caption\na.mp4,b\nx/../a.mp4,c\n"): ["line 3 has the video of line 2"],
    ("t.jsonl", '\n{"video": "b.mp4", "caption": "b"}'): ["1 of 1 videos cannot be used: b.mp4 (No such"],
    ("t.jsonl", '{"video": "\\u0000", "caption": "b"}'): ["1 of 1 videos cannot be used", "null byte"],
    ("t.csv", "video,caption\na.mp4,\n"): [UNREAD, "a.mp4 (its caption is empty)"],
    ("t.csv", "a.mp4,b\n"): ["data.table", "t.csv', which names no videos", "below a header"],
}


def check_refusal(folder: Path, capsys: pytest.CaptureFixture[str], parts: list[str], *words: str) -> None:
    """Asserts that the command stops with one line that has these parts, before a weight is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_latents, "prepare", None)
        assert run(CONFIG, folder, folder / "out", "data.sizes=9x32x32", *words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and all(part in line for part in parts), line
    assert not list((folder / "out").glob("[!rl]*"))  # but the readings, and the list of what is left out


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case, folder, capsys):
    damage, parts = BAD_FILES[case]
    damage(folder)
    check_refusal(folder, capsys, parts)


@pytest.mark.parametrize("word", BAD_WORDS)
def test_bad_keys_are_refused(word, folder, capsys):
    check_refusal(folder, capsys, BAD_WORDS[word], word)


@pytest.mark.parametrize(("name", "content"), BAD_TABLES)
def test_bad_tables_are_refused(name, content, folder, capsys):
    check_refusal(folder, capsys, BAD_TABLES[name, content], *table(folder, name, content))


def dataset_of(videos: Path, **keys: object) -> Dataset:
    """Reads the videos of a folder, or as other keys say, and keeps the readings beside it."""
    latents = str(videos.with_name(f"{videos.name}-latents"))
    return read_dataset(DataConfig(**{"folder": str(videos), "latents": latents} | keys))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", '{"video": "x/../a.mp4", "caption": "a red, round one", "score": 1}\n'),
        ("t.csv", '\ufeffcaption,video\n"a red, round one",x/../a.mp4\n'),
    ],
)
def test_a_table_names_videos_and_captions(name, content, folder):
    (folder / "x").mkdir()
    table(folder, name, content)
    (video,) = dataset_of(folder, folder=None, table=str(folder / name)).videos
    (expected,) = dataset_of(folder).videos
    assert (video.name, video.caption) == ("x/../a.mp4", "a red, round one")
    assert (video.digest, video.frames, video.fps) == (expected.digest, 9, 16)


def test_an_image_is_a_video_of_one_frame(tmp_path):
    """It has no rate, so it fits videos of any; an image beside a video of its name is a thumbnail."""
    write_video(tmp_path / "a.mp4", 9, 32, 48)
    for name in ("a.jpg", "b.png", "c.webp", "d.png"):
        Image.new("RGB", (48, 32), (200, 40, 60)).save(tmp_path / name)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    dataset = dataset_of(tmp_path, fps=16)
    assert {video.name: (video.frames, video.fps) for video in dataset.videos} == {
        "a.mp4": (9, 16),
        "b.png": (1, 0),
        "c.webp": (1, 0),
    }
    assert dataset.others == {
        "a.jpg": "an image beside its video",
        "d.png": "an image without a caption",
    }
    data = DataConfig(sizes=[[9, 32, 48], [1, 32, 32]])
    clips = plan_clips(dataset.videos, data)
    assert [clip.shape for clip in clips] == ["9x32x48", "1x32x32", "1x32x32"]
    ((_, frames),) = read_clips(clips[1].video, [clips[1]])
    assert np.array_equal(frames, np.broadcast_to((200, 40, 60), (1, 32, 32, 3)))
    assert list(too_short(dataset.videos, DataConfig(sizes=[[9, 32, 48]]))) == ["b.png", "c.webp"]
    (tmp_path / "b.png").write_bytes(b"\0\0\0\x18ftypheic")
    assert dataset_of(tmp_path, skip_bad=True).bad == {"b.png": "it is HEIC; save it as PNG"}


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
    planned = plan_clips([video(frames)], DataConfig(sizes=[[9, 64, 64], [5, 64, 64]], clips=clips))
    assert [clip.frames for clip in planned] == [tuple(range(start, start + 9)) for start in starts]
    assert len({clip.key for clip in planned}) == len({clip.name for clip in planned}) == len(starts)


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
    short = too_short([video(taken[-1], fps)], DataConfig(sizes=[[5, 64, 64]], fps=rate))
    assert short == {"v.mp4": "4 frames" if rate is None else f"4 frames at data.fps={rate}"}


def test_a_video_gets_the_size_nearest_in_shape_that_needs_no_enlarging():
    data = DataConfig(sizes=[[9, 480, 832], [9, 720, 1280], [9, 480, 480], [5, 720, 1280]])
    chosen = {
        (720, 1280): (720, 1280),
        (480, 854): (480, 832),
        (1080, 1920): (720, 1280),
        (500, 480): (480, 480),
        (90, 160): (480, 832),
    }
    for (height, width), size in chosen.items():
        (clip,) = plan_clips([video(12, height=height, width=width)], data)
        assert (clip.height, clip.width) == size
