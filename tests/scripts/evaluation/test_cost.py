"""Tests the cost command: rows and fits by hand, the paper's sparsities, its files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from scripts import cost
from scripts.cost import main
from scripts.evaluation.cost import Case, Rates, curves, exponent, fit, n_log_n, sparsities
from scripts.run.config import AttentionConfig, Config, GenerationConfig, ModelConfig
from scripts.run.errors import UsageError
from scripts.run.model_info import ModelInfo
from tests.support.plans import plan_of

RATES = Rates(dense=2e9, radial=1e9, source="given")
USUAL = 13, (32, 128)


def case(**attention: object) -> Case:
    """Plans 4 latent frames of 2 x 8 tokens, one block a frame, 3 layers of 2 heads of 8."""
    options = {"block_size": 16, "decimation_width": 16, "neighbour": "full", "decay_factor": 1.0} | attention
    sizes = GenerationConfig(height=32, width=128, num_frames=13)
    model = ModelInfo(3, 2, 8, 64, rope_length=None)
    return Case("tiny", plan_of(Config(ModelConfig(), AttentionConfig(**options), sizes), model), RATES)


def test_row_by_hand():
    """Distances 1 and 2 are kept whole, 3 is skipped but for the sink: 15 of 16 blocks."""
    row = case().row(*USUAL)
    assert (row["model"], row["frames"], row["height"], row["width"]) == ("tiny", 13, 32, 128)
    assert (row["tokens"], row["kept_blocks"], row["density"]) == (64, 15, 15 / 16)
    assert row["dense_flops"] == 4 * 64**2 * 16 * 3 == 786432
    assert row["radial_flops"] == 786432 * 15 / 16
    assert row["seconds_dense"] == 786432 / 2e9 and row["seconds_radial"] == 737280 / 1e9
    assert row["of_bound"] == 15 * 256 / (4 * 16**2 * 4 * 2)
    assert case(sink=False).row(*USUAL)["kept_blocks"] == 14
    with pytest.raises(UsageError, match=r"generation\.num_frames: got 14.* nearest: 13"):
        case().row(14, (32, 128))


def test_no_rate_means_no_times():
    row = case()._replace(rates=None).row(*USUAL)
    assert row["seconds_dense"] is None and row["seconds_radial"] is None


def test_fit_and_exponent_of_known_curves():
    rows = [{"tokens": n, "radial_flops": 7.5 * n * math.log2(n)} for n in (64, 256, 4096)]
    factor, r2 = fit(rows)
    assert factor == pytest.approx(7.5) and r2 == pytest.approx(1)
    assert fit(rows[:1]) == (pytest.approx(7.5), None)
    sizes = np.array([64, 256, 1024])
    factor, r2 = fit([{"tokens": n, "radial_flops": float(n * n)} for n in sizes])
    x, y = sizes * np.log2(sizes), sizes**2
    by_hand = (x @ y) / (x @ x)
    assert factor == pytest.approx(by_hand)
    assert r2 == pytest.approx(1 - np.square(y - by_hand * x).mean() / y.var())
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2) and exponent([5, 5], [1, 2]) is None


def test_curves_over_length_and_resolution():
    rows, fits = curves(case(), frames=[13, 29], sizes=[(32, 128), (64, 128)])
    assert [(r["frames"], r["height"]) for r in rows] == [(13, 32), (29, 32), (13, 64)]
    assert fits["frames"] == 13 and fits["size"] == [32, 128]
    assert [r["n_log_n"] for r in rows] == pytest.approx([fits["c"] * n_log_n(r["tokens"]) for r in rows])
    assert fits["dense_exponent_pixels"] == pytest.approx(2)
    assert fits["dense_exponent_length"] == pytest.approx(2 * math.log(2) / math.log(29 / 13))
    usual, _ = curves(case())
    assert {r["frames"] for r in usual if r["height"] == 32} >= {9, 13, 25, 97}
    assert {(r["height"], r["width"]) for r in usual if r["frames"] == 13} >= {(16, 64), (48, 192)}


def test_sparsities_of_the_paper():
    """Allows 0.3 points each; Mochi's and HunyuanVideo's presets keep their text as well."""
    rows = sparsities()
    assert [(row["frames"], row["paper"]) for row in rows] == [
        *((253, 80.8), (509, 88.3)),
        *((331, 76.4), (667, 85.5)),
        (161, 73.6),
    ]
    for row in rows:
        assert abs(row["ours"] - row["paper"]) < 0.3
        assert row["preset"] == pytest.approx(row["ours"], abs=0.7)


def test_command_writes_json_table_and_picture(tmp_path: Path, capsys):
    words = ["--models", "wan_tiny", "--frames", "33", "65", "--rate", "0.5", "0.25"]
    assert main([*words, "--work", str(tmp_path / "w"), "--out", str(tmp_path / "cost.md")]) == 0
    data = json.loads((tmp_path / "w" / "cost.json").read_text())
    assert data["kind"] == "cost" and data["config"] is None and "--frames 33 65" in data["command"]
    first = data["rows"][0]
    assert (first["frames"], first["tokens"], round(first["density"], 3)) == (33, 576, 0.573)
    assert first["seconds_dense"] == pytest.approx(first["dense_flops"] / 0.5e12)
    assert first["seconds_radial"] == pytest.approx(first["radial_flops"] / 0.25e12)
    assert len(data["paper"]) == 5 and data["rates"]["source"] == "given by --rate"
    text = (tmp_path / "cost.md").read_text()
    assert "| HunyuanVideo | 253 | 80.8 |" in text and "| wan_tiny | 33 | 64x64 | 576 | 0.5725 |" in text
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cost.md", "cost.png", "w"]
    assert capsys.readouterr().out.count("written") == 3


def test_a_short_measurement_and_none(monkeypatch):
    options = cost.parse(["--no-times"])
    assert cost.rates_of(options, "cpu") is None
    rates = cost.rates_of(cost.parse([]), "cpu")
    assert rates.dense > 1e8 and rates.radial > 1e8 and rates.source.startswith("measured here on cpu")
    assert cost.rates_of(cost.parse(["--rate", "400"]), "cpu")[:2] == (4e14, 4e14)
