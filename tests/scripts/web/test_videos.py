"""Both videos of a request: files, comparison, mask, and nothing in part if it stops."""

import json
import re
from pathlib import Path

import pytest

from scripts.run.errors import UsageError
from scripts.run.files import claim
from scripts.run.outputs import is_whole
from scripts.web.jobs import Status, Stopped
from tests.support.web_cases import make_studio, request


def data_of(player: str) -> dict:
    """Returns what the player's script gets."""
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', player, re.DOTALL)[1])


def test_two_videos_are_made_step_by_step_and_compared(tiny_model, tmp_path):
    studio, told = make_studio(tiny_model, tmp_path), []
    shown = studio.make(request(density=0.75), told.append)
    texts = [status.text for status in told]
    made = [
        f"{way}: {at}"
        for way in ("dense", "static")
        for at in ("step 1 of 3", "step 2 of 3", "step 3 of 3", "decoding")
    ]
    assert texts == ["loading the model", *made, "comparing"]
    assert told[2] == Status("dense: step 2 of 3", 1, 3)
    files = sorted((tmp_path / "videos").rglob("*"))
    assert [file.name for file in files if file.is_dir()] == ["tiny_dense", "tiny_static_0.75"]
    assert sum(is_whole(file) for file in files if file.suffix == ".mp4") == 2
    assert re.fullmatch(r"static has [\d.]+x the speed of dense; PSNR [\d.]+ dB, density 0\.\d+", shown.line)
    assert (
        "| dense steps | 3 of 3 | 1 of 3 |" in shown.table
        and "tiny_static_0.75/a-circle_seed1.mp4" in shown.table
    )
    (clip,) = data_of(shown.player)["clips"]
    assert [video["name"] for video in clip["videos"]] == ["dense", "static"] and clip["frames"] == 5
    assert shown.mask.startswith("data:image/png;base64,")

    told.clear()
    again = studio.make(request(selection="dense_step"), told.append)
    assert not [status for status in told if status.text.startswith(("loading", "dense:"))]
    assert "from the previous run" in data_of(again.player)["clips"][0]["videos"][0]["caption"]
    assert again.line.startswith("dense_step has ") and again.mask != shown.mask


def test_a_stopped_run_leaves_nothing_in_part(tiny_model, tmp_path):
    studio = make_studio(tiny_model, tmp_path)

    def stop(status: Status) -> None:
        if status.text == "static: step 2 of 3":
            raise Stopped

    with pytest.raises(Stopped):
        studio.make(request(), stop)
    kept = [file for file in (tmp_path / "videos").rglob("*") if file.is_file()]
    assert sorted(file.suffix for file in kept) == [".json", ".mp4"] and is_whole(kept[0].with_suffix(".mp4"))
    assert "from the previous run" in studio.make(request(), lambda status: None).player


def test_a_video_that_another_run_makes_and_a_folder_that_cannot_be_written_are_one_line(
    tiny_model, tmp_path
):
    studio = make_studio(tiny_model, tmp_path)
    path = Path(studio.folder, "tiny_dense/a-circle_seed1.mp4")
    path.parent.mkdir(parents=True)
    with claim(path), pytest.raises(UsageError, match="is being made by another run; try again"):
        studio.make(request(), lambda status: None)
    studio.folder = str(tmp_path / "tiny.yaml")
    with pytest.raises(UsageError, match=r"output.path: got .*tiny_dense'"):
        studio.make(request(), lambda status: None)
