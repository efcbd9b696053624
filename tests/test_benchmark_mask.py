from pathlib import Path

import pytest

from scripts.benchmarks.mask import growth, growth_figure, main, report


def test_report_and_picture_are_written(tmp_path: Path):
    points = growth((16, 32, 64), repeats=1)
    assert [point.kept for point in points] == sorted(point.kept for point in points)
    text = report(points, "| no | shapes |", "picture.png")
    assert f"| 64 | {points[-1].kept:,} | {points[-1].density:.4f} |" in text
    growth_figure(points).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_one_frame_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--frames", "1", "16"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --frames must be at least 2, got 1\n"
