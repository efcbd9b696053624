"""Which videos are found for training, what is left out, and readings that are kept."""

import json
import os
from pathlib import Path

import pytest

from scripts.lora import dataset as datasets
from scripts.lora.config import DataConfig
from scripts.lora.dataset import LEFT_OUT, READINGS, Dataset, read_dataset
from scripts.lora.latents import LatentStore
from scripts.run.errors import UsageError
from tests.support.latent_cases import run, write_video

CONFIG = Path("configs/train/wan_tiny_4x.yaml")


def add(folder: Path, name: str, caption: str | None = "x") -> Path:
    """Writes a video, with a caption unless it is None."""
    write_video(folder / f"{name}.mp4", 9, 32, 32)
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption)
    return folder / f"{name}.mp4"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Makes a folder of one video with its caption."""
    return add(tmp_path / "videos", "a").parent


def dataset_of(folder: Path, *, dry_run: bool = False, **keys: object) -> Dataset:
    """Reads the videos of a folder, and keeps the readings beside it."""
    data = DataConfig(folder=str(folder), latents=str(folder.parent / "latents"), **keys)
    return read_dataset(data, dry_run=dry_run)


def names(dataset: Dataset) -> list[str]:
    return [video.name for video in dataset.videos]


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that gets the name of each video that is read."""
    real, read = datasets.probe, []

    def counting(path: Path) -> tuple:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(datasets, "probe", counting)
    return read


def test_a_second_try_decodes_nothing(folder, monkeypatch):
    add(folder, "b")
    (folder / "c.mp4").write_text("no video")
    (folder / "c.txt").write_text("c")
    read = decoded(monkeypatch)
    with pytest.raises(UsageError, match=r"1 of 3 videos cannot be used: c.mp4 \(.*data.skip_bad=true"):
        dataset_of(folder)
    assert sorted(read) == ["a.mp4", "b.mp4", "c.mp4"]
    with pytest.raises(UsageError, match=r"1 of 3 videos cannot be used: c.mp4 \("):
        dataset_of(folder)
    assert names(dataset_of(folder, skip_bad=True)) == ["a.mp4", "b.mp4"] and len(read) == 3
    os.utime(folder / "b.mp4", ns=(0, 0))
    (folder / "c.mp4").unlink()
    assert names(dataset_of(folder)) == ["a.mp4", "b.mp4"] and read[3:] == ["b.mp4"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"reader": 0}', b'{"reader": 1, "videos": 3}', b"\0" * 9]
)
def test_damaged_readings_are_made_again(content, folder, monkeypatch):
    expected = dataset_of(folder)
    file = folder.parent / "latents" / READINGS
    whole = file.read_bytes()
    file.write_bytes(content)
    read = decoded(monkeypatch)
    assert dataset_of(folder) == expected and read == ["a.mp4"]
    assert file.read_bytes() == whole


def test_a_damaged_reading_of_one_video_is_made_again(folder, monkeypatch):
    add(folder, "b")
    expected = dataset_of(folder)
    file = folder.parent / "latents" / READINGS
    content = json.loads(file.read_text())
    content["videos"][str(folder / "a.mp4")]["frames"] = "many"
    file.write_text(json.dumps(content))
    read = decoded(monkeypatch)
    assert dataset_of(folder) == expected and read == ["a.mp4"]


def test_a_dry_run_writes_nothing_and_prints_the_whole_list(folder, capsys):
    for i in range(5):
        add(folder, f"b{i}", caption=None)
    with pytest.raises(UsageError, match=r"5 of 6 videos .* and 2 more; .*all are listed above"):
        dataset_of(folder, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"b{i}.mp4: b{i}.txt: No such file or directory" for i in range(5)]
    assert not (folder.parent / "latents").exists()


def make_others(folder: Path) -> None:
    """Adds files and folders that are no videos, hidden ones, and links."""
    add(folder / "deep", "b")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "0").symlink_to(folder / "deep")
    add(folder.parent / "elsewhere", "c")
    (folder / "link").symlink_to(folder.parent / "elsewhere")
    (folder / "out").symlink_to(folder.parent)
    add(folder / ".cache", "d")
    (folder / "._a.mp4").write_text("of macOS")
    (folder / "a.json").write_text("{}")
    (folder / "b.json").write_text("{}")
    (folder / "lone.txt").write_text("a caption")
    (folder / "a.TXT").write_text("another caption")


def test_other_files_are_named_and_links_are_followed_without_a_circle(folder):
    make_others(folder)
    dataset = dataset_of(folder)
    assert names(dataset) == ["a.mp4", "deep/b.mp4", "link/c.mp4"] and dataset.count == 3
    kind = "a link to a folder that is read already, or holds this one"
    links = dict.fromkeys(("0/", "deep/up/", "out/"), kind)
    assert dataset.others == links | {
        ".cache/": "a hidden folder",
        "b.json": datasets.NO_VIDEO,
        "lone.txt": "a caption without a video",
        "a.TXT": "a second caption, a.txt is taken",
    }


def test_captioned_files_of_other_kinds_are_bad(folder):
    (folder / "b.heic").write_bytes(b"?")
    (folder / "b.txt").write_text("b")
    (folder / "c.mp4").symlink_to("nothing")
    with pytest.raises(
        UsageError, match=r"2 of 3 videos .*: c.mp4 \(a broken link\), b.heic \(it has a caption"
    ):
        dataset_of(folder)
    assert names(dataset_of(folder, skip_bad=True)) == ["a.mp4"]


def test_names_that_are_not_utf8_are_read_and_printed(folder, capfd):
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    os.link(folder / "a.mp4", f"{odd}.mp4")
    os.link(folder / "a.txt", f"{odd}.txt")
    assert names(dataset_of(folder)) == ["a.mp4", "caf\\xe9.mp4"]
    Path(f"{odd}.txt").unlink()
    with pytest.raises(UsageError, match=r"caf\\xe9.mp4 \(caf\\xe9.txt: No such file"):
        dataset_of(folder)
    assert "caf\\xe9.mp4\tcaf\\xe9.txt" in (folder.parent / "latents" / LEFT_OUT).read_text()


def test_slow_videos_are_skipped(folder):
    write_video(folder / "b.mp4", 9, 32, 32, fps=8)
    (folder / "b.txt").write_text("b")
    with pytest.raises(UsageError, match=r"1 of 2 videos have fewer .*: b.mp4 \(8 frames a second\)"):
        dataset_of(folder, fps=16.0)
    assert dataset_of(folder, fps=16.0, skip_bad=True).bad == {"b.mp4": "8 frames a second"}
    with pytest.raises(UsageError, match=r"data.folder: none of 2 videos can be used: a.mp4 \(16 frames"):
        dataset_of(folder, fps=100.0, skip_bad=True)


def test_a_video_that_changes_after_its_reading_is_skipped(folder, tmp_path, capsys):
    for name, frames in {"b": 10, "c": 11}.items():
        add(folder, name)
        write_video(folder / f"{name}.mp4", frames, 32, 32)
    out = tmp_path / "latents"
    dataset_of(folder)
    about = (folder / "b.mp4").stat()
    (folder / "b.mp4").write_bytes(bytes(about.st_size))
    os.utime(folder / "b.mp4", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert run(CONFIG, folder, out, "data.sizes=9x32x32") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "data: b.mp4 cannot be read" in line and "data.skip_bad=true" in line
    assert run(CONFIG, folder, out, "data.sizes=9x32x32", "data.skip_bad=true") == 0
    assert "left out   1 more, which could not be read: b.mp4 (" in capsys.readouterr().out
    assert [sample.name for sample in LatentStore.open(out).samples] == ["a.mp4", "c.mp4"]
    assert (out / LEFT_OUT).read_text().startswith("b.mp4\t")


def test_the_command_goes_on_without_bad_videos_and_lists_them(folder, tmp_path, capsys):
    for name in ("b", "c", "d", "e"):
        add(folder, name, caption=None)
    write_video(folder / "short.mp4", 5, 32, 32)
    (folder / "short.txt").write_text("short")
    (folder / "notes.md").write_text("notes")
    out, words = tmp_path / "out", ("data.sizes=9x32x32", "data.skip_bad=true")
    assert run(CONFIG, folder, out, *words[:1]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "4 of 6 videos cannot be used: b.mp4 (b.txt: No" in line and line.endswith(str(out / LEFT_OUT))
    assert run(CONFIG, folder, out, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("skipped    4 of 6 videos: b.mp4 (b.txt: No such file or directory), c.mp4")
    assert lines[3:5] == [
        "not read   1 other files: 1 .md",
        "dropped    1 of under 9 frames: short.mp4 (5 frames)",
    ]
    assert f"left out   6, listed with reasons in {out / LEFT_OUT}" in lines
    listing = dict(line.split("\t") for line in (out / LEFT_OUT).read_text().splitlines())
    assert list(listing) == ["b.mp4", "c.mp4", "d.mp4", "e.mp4", "notes.md", "short.mp4"]
    assert listing["e.mp4"] == "e.txt: No such file or directory" and listing["short.mp4"] == "5 frames"
    assert [sample.name for sample in LatentStore.open(out).samples] == ["a.mp4"]
    assert run(CONFIG, folder, out, *words, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "left out   short.mp4: 5 frames"
