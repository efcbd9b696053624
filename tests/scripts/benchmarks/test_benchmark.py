"""Tests the other tables of the benchmark: the mask, 8-bit operands, steps at growing length."""

from pathlib import Path

import pytest

from scripts import benchmark
from scripts.benchmarks import length, mask, quantized
from scripts.benchmarks.mask import growth, growth_figure, report


def test_report_and_picture_are_written(tmp_path: Path):
    points = growth((16, 32, 64), repeats=1)
    assert [point.kept for point in points] == sorted(point.kept for point in points)
    lines = report("command", points, ["| no | shapes |"], "picture.png")
    (line,) = [line for line in lines if line.startswith("| 64 |")]
    assert f"| {points[-1].kept:,} | {points[-1].density:.4f} |" in line
    growth_figure(points).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_an_option_chooses_the_table(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(mask, "shape_table", lambda: [])
    assert benchmark.main(["--mask", "--frames", "32", "16", "--out", str(tmp_path)]) == 0
    text, picture = sorted(tmp_path.iterdir())
    assert text.name.startswith("mask_cost_cpu_") and picture.suffix == ".png"
    assert "`bash scripts/benchmark.sh --mask --frames 32 16 --out" in text.read_text()
    assert "| 16 |" in text.read_text() and picture.name in text.read_text()
    monkeypatch.setattr(quantized, "model_rows", lambda: iter(()))
    monkeypatch.setattr(quantized, "INPUTS", {"normal": quantized.normal})
    monkeypatch.setattr(quantized, "MODES", dict(list(quantized.MODES.items())[:1]))
    assert benchmark.main(["--out", str(tmp_path), "--quantized"]) == 0
    text = next(tmp_path.glob("quantization_cpu_*.md")).read_text()
    assert "| normal | 128 | 64 | int8, values in 16 bits (sm80, sm86, gfx942) | 0.01" in text


def test_step_times_at_growing_length(tmp_path: Path):
    words = ["--sides", "32", "--frames", "9", "17", "--repeats", "1", "--rank", "2", "--out", str(tmp_path)]
    assert benchmark.main(["--length", "attention.decay_factor=0.25", *words]) == 0
    text, picture = sorted(tmp_path.iterdir())
    rows = [line for line in text.read_text().splitlines() if line.startswith("| 32 x 32")]
    assert text.name.startswith("length_timing_cpu_") and picture.stat().st_size > 0
    assert [row.split(" | ")[2] for row in rows] == ["48", "80"]
    assert all(row.count("x |") == 4 for row in rows) and "rank 2" in text.read_text()


def test_bounds_are_of_the_mask_that_is_timed():
    """Makes half of the layers dense: both kinds of step gain less."""
    every, half = (
        length.bounds(length.plan_step(64, 129, [f"attention.dense_layers={count}"]), 16) for count in (0, 3)
    )
    for kind, fewer in {"training": 2.13, "inference": 1.76}.items():
        assert every[kind] == pytest.approx(fewer, abs=0.005) and 1 < half[kind] < every[kind]
