"""Contact sheets and GIFs: their frames and labels."""

import json
from pathlib import Path

import imageio
import numpy as np
import pytest
from PIL import Image

from scripts.contact_sheet import main
from scripts.evaluation.frame_sheet import GAP, LABEL, STILL, _steady, label, sheet


def test_rows_and_frames_are_in_order():
    rows = [np.full((3, 4, 6, 3), 10 * (i + 1), np.uint8) for i in range(2)]
    picture = sheet(rows, scale=2)
    assert picture.shape == (2 * 8 + GAP, 3 * 12 + 2 * GAP, 3)
    assert (picture[:8, :12] == 10).all() and (picture[-8:, -12:] == 20).all()
    assert (picture[8 : 8 + GAP] == 255).all()


def test_shows_first_and_last_frame_of_a_video(tmp_path):
    video = tmp_path / "ramp.mp4"
    frames = [np.full((32, 32, 3), 12 * i, np.uint8) for i in range(17)]
    imageio.mimwrite(video, frames, fps=8, quality=10, macro_block_size=1)
    main([str(video), "--out", str(tmp_path / "sheet.png"), "--frames", "3"])
    picture = imageio.imread(tmp_path / "sheet.png").astype(int)
    means = [picture[:, start : start + 32].mean() for start in (0, 32 + GAP, 2 * (32 + GAP))]
    assert means == pytest.approx([0, 96, 192], abs=4)


def write_video(path: Path, pattern: str, seconds: float, shade: int) -> None:
    """Writes a video of 5 frames that grow brighter from `shade` on, and its record."""
    frames = [np.full((32, 32, 3), shade + 20 * i, np.uint8) for i in range(5)]
    imageio.mimwrite(path, frames, fps=8, quality=10, macro_block_size=1)
    config = {"attention": {"pattern": pattern}, "output": {"fps": 10}}
    record = {"config": config, "seconds": {"denoise": seconds}, "density": 0.2333}
    path.with_suffix(".json").write_text(json.dumps(record))


def test_a_gif_plays_all_frames_side_by_side_under_labels(tmp_path):
    dense, radial, out = tmp_path / "dense.mp4", tmp_path / "radial.mp4", tmp_path / "both.gif"
    write_video(dense, "dense", 13.4, 20)
    write_video(radial, "radial", 8.8, 120)
    main([str(dense), str(radial), "--out", str(out), "--scale", "3"])
    with Image.open(out) as gif:
        assert (gif.n_frames, gif.info["duration"]) == (5, 100)
        gif.seek(4)
        frame = np.asarray(gif.convert("RGB")).astype(int)
    assert frame.shape == (LABEL + 96, 2 * 96 + GAP, 3)
    assert frame[LABEL:, :96].mean() == pytest.approx(100, abs=6)
    assert frame[LABEL:, 96 + GAP :].mean() == pytest.approx(200, abs=6)
    assert frame[:LABEL, :96].min() < 64 < frame[:LABEL, 96 + GAP :].max()


def test_a_label_has_pattern_and_measured_numbers(tmp_path):
    write_video(tmp_path / "a.mp4", "radial", 8.84, 20)
    record = json.loads((tmp_path / "a.json").read_text())
    assert label(record) == "radial, 8.8 s, density 0.23"
    record["config"]["attention"]["pattern"] = "dense"
    assert label(record) == "dense, 8.8 s"


def test_a_gif_needs_records(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", "dense", 1.0, 20)
    (tmp_path / "a.json").unlink()
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "a.mp4"), "--out", str(tmp_path / "a.gif")])
    assert stop.value.code == 2 and ".json" in capsys.readouterr().err
    assert not (tmp_path / "a.gif").exists()


def test_small_changes_are_held_until_they_add_up():
    shades = np.array([100, 100 + STILL - 1, 100 + STILL, 100 + STILL + 1, 180], np.uint8)
    video = np.broadcast_to(shades[:, None, None, None], (5, 2, 2, 3))
    assert _steady(video)[:, 0, 0, 0].tolist() == [100, 100, 108, 108, 180]


def test_a_picture_of_another_kind_is_refused(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", "dense", 1, 20)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "a.mp4"), "--out", str(tmp_path / "a.xyz")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "a.xyz" in line and ".png, .jpg, .gif" in line
