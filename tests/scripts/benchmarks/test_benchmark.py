"""The other tables of the benchmark: the mask, 8-bit operands."""

from pathlib import Path

import pytest

from scripts import benchmark
from scripts.benchmarks import mask, quantized
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


@pytest.mark.parametrize("words", [["--mask", "--frames", "1", "16"], ["--quantized", "--frames", "16"]])
def test_wrong_options_are_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and "--frames" in error
    assert error.count("\n") == 1
