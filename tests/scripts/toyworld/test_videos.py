"""Files of captioned videos of the toy world: what they show, and resuming."""

import json
from pathlib import Path

import numpy as np
import torch

from scripts.render_toyworld import main
from scripts.run.inputs import read_frames
from scripts.toyworld import all_attributes, parse_caption, read, render
from scripts.toyworld.videos import draw_scene


def frames_of(path: Path) -> torch.Tensor:
    """Reads frames as the toy world's reader takes them, `[F, H, W, 3]` in [0, 1]."""
    return torch.from_numpy(np.stack(list(read_frames("video", str(path))))).float() / 255


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_videos_show_their_captions_and_a_second_call_adds_to_them(tmp_path, capsys):
    words = [str(tmp_path), "--frames", "33", "--size", "48", "--seed", "5"]
    assert main([*words, "--videos", "2"]) == 0
    before = contents(tmp_path)
    assert list(before) == [f"0000{i}.{kind}" for i in range(2) for kind in ("json", "mp4", "txt")]
    (tmp_path / "00001.mp4").unlink()
    assert main([*words, "--videos", "3"]) == 0
    assert "2 of 3 videos made" in capsys.readouterr().out
    after = contents(tmp_path)
    assert all(after[name] == before[name] for name in before if not name.startswith("00001.j"))
    for number in range(3):
        video = frames_of(tmp_path / f"{number:05d}.mp4")
        attributes = parse_caption((tmp_path / f"{number:05d}.txt").read_text())
        assert video.shape == (33, 48, 48, 3)
        assert all(read(video).matches(attributes).values())
        assert json.loads((tmp_path / f"{number:05d}.json").read_text())["frames"] == 33


def test_another_length_is_rendered_again(tmp_path):
    words = [str(tmp_path), "--videos", "1", "--size", "32"]
    assert main([*words, "--frames", "9"]) == main([*words, "--frames", "5"]) == 0
    assert len(frames_of(tmp_path / "00000.mp4")) == 5


def test_every_caption_comes_once_before_any_repeats():
    half = len(all_attributes())
    captions = [draw_scene(1, number).attributes.caption for number in range(2 * half)]
    assert len(set(captions[:half])) == len(set(captions[half:])) == half
    assert captions[:half] != captions[half:]
    assert draw_scene(1, 3) == draw_scene(1, 3) != draw_scene(2, 3)


def test_four_times_the_frames_keep_the_speed():
    """They show the path three to four and a half times, and the reader still reads the caption."""
    for number in range(0, 24, 6):
        scene = draw_scene(0, number)
        short, long = render(scene, 33), render(scene, 129)
        assert torch.equal(long[:33], short)
        assert 2.9 < 129 / scene.period < 4.7
        assert all(read(long).matches(scene.attributes).values())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file" / "out"), "--videos", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot write into")
