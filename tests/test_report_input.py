"""What the report command says of bad input: one line, and no page."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts import report
from scripts.run.outputs import encode
from tests import report_cases as cases


def failure(capsys: pytest.CaptureFixture, out: Path, *words: object) -> str:
    """The one line of a command that ends with 2 and leaves nothing beside `out`."""
    try:
        code = report.main([*map(str, words), "--out", str(out)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and not out.is_file() and not list(out.parent.glob(".*part"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error") for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(kind="other"), "its kind is 'other'"),
        (lambda c: c.update(rows=5), ".rows: got 5, allowed: a list"),
        (lambda c: c["rows"][0].pop("frames"), ".rows[0]: has no 'frames'"),
        (
            lambda c: c["rows"][1].update(density="0.5"),
            ".rows[1].density: got '0.5', allowed: a number or null",
        ),
        (lambda c: c["rows"][1].update(frames=True), "allowed: a whole number"),
    ],
)
def test_a_file_of_another_form_gives_one_line(tmp_path, capsys, change: Callable, words: str):
    run = cases.edited(cases.cost(tmp_path / "cost"), "cost", change)
    line = failure(capsys, tmp_path / "out.html", run)
    assert words in line and "cost.json" in line


def test_places_that_are_no_runs_give_one_line(tmp_path, capsys):
    out = tmp_path / "out.html"
    (tmp_path / "empty").mkdir()
    assert "is no run" in failure(capsys, out, tmp_path / "empty")
    assert "no such file or folder" in failure(capsys, out, tmp_path / "none")
    (tmp_path / "broken.json").write_text('{"kind": "cost", ')
    assert "is no JSON" in failure(capsys, out, tmp_path / "broken.json")
    (tmp_path / "other.json").write_text('{"prompt": 3}')
    assert "is no run" in failure(capsys, out, tmp_path / "other.json")
    (tmp_path / "list.json").write_text("[]")
    assert "is no run" in failure(capsys, out, tmp_path / "list.json")


def test_bad_videos_give_one_line(tmp_path, capsys):
    out, run = tmp_path / "out.html", cases.generation(tmp_path / "run")
    (run / "circle_seed3.mp4").write_text("no video")
    assert "is no video" in failure(capsys, out, run)
    (run / "circle_seed3.mp4").unlink()
    assert "no such video" in failure(capsys, out, run / "circle_seed3.json")
    pair = [cases.generation(tmp_path / name, name) for name in ("dense", "radial")]
    encode(pair[1] / "circle_seed3.mp4", cases.toy_video(1, frames=9), 8)
    assert "got 9 frames of 64 x 64" in failure(capsys, out, *pair)


def test_a_page_that_would_be_too_large_gives_one_line(tmp_path, capsys):
    run = cases.generation(tmp_path / "run")
    noise = torch.randint(0, 256, (24, 256, 256, 3), dtype=torch.uint8).numpy()
    encode(run / "circle_seed3.mp4", noise, 8)
    line = failure(capsys, tmp_path / "out.html", run, "--limit", 1)
    assert "--videos: got 1" in line and "MiB" in line


def test_bad_masks_and_outputs_give_one_line(tmp_path, capsys):
    run = cases.analysis(tmp_path / "analysis")
    (tmp_path / "file").write_text("")
    assert "cannot write" in failure(capsys, tmp_path / "file" / "out.html", run)
    assert "allowed: a name ending in .html" in failure(capsys, tmp_path / "out.txt", run)
    cases.edited(run, "analysis", lambda content: content["mask"].update(block_size=17))
    assert "block_size must be one of" in failure(capsys, tmp_path / "out.html", run)
    assert "--videos" in failure(capsys, tmp_path / "out.html", run, "--videos", 0)


def test_a_mask_too_large_to_draw_is_a_sentence(tmp_path):
    run = cases.edited(
        cases.analysis(tmp_path / "run"), "analysis", lambda c: c.update(grid=[128, 45, 80, 0])
    )
    text = report.build([run], 1, 4, 100)
    assert "No picture of the mask of run: 28800 blocks a side, of which a page can show 4096." in text


def test_an_interrupted_command_leaves_the_page_that_was_there(tmp_path, capsys, monkeypatch):
    run, out = cases.cost(tmp_path / "cost"), tmp_path / "out.html"
    out.write_text("before")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "fill", interrupt)
    assert report.main([str(run), "--out", str(out)]) == 130
    assert out.read_text() == "before" and capsys.readouterr().err == "interrupted; no page was written\n"
