"""Step times at growing length: of the bundled Wan's transformer, and by layer of the large ones."""

from dataclasses import replace

import pytest
import torch

from scripts import length_timing
from scripts.length.layers import MODELS, Setting, layer_times, layers_report
from tests.support.auto_backend import AUTO


def test_step_times_of_the_bundled_shape(tmp_path, capsys):
    out = tmp_path / "times.md"
    words = ["--sides", "32", "--frames", "9", "17", "--repeats", "1", "--rank", "2", "--out", str(out)]
    assert length_timing.main(["attention.decay_factor=0.25", *words]) == 0
    rows = [line for line in out.read_text().splitlines() if line.startswith("| 32 x 32")]
    assert [row.split(" | ")[2] for row in rows] == ["48", "80"]
    assert all(row.count("x |") == 4 for row in rows)
    assert "rank 2" in out.read_text() and out.with_suffix(".png").stat().st_size > 0
    assert length_timing.main(["--sides", "33", "--frames", "9", "--out", str(out)]) == 2
    assert "generation.height: got 33" in capsys.readouterr().err


def test_goals_of_step_times():
    seconds = {"training": (3.2, 1.0), "inference": (2.0, 1.0)}
    point = length_timing.Point(128, 129, 8448, 0.2, seconds, {"training": 4.0, "inference": 2.5})
    first, second, _ = length_timing.goal_lines([point])
    assert first.endswith("training: at least 3x wanted, 3.20x found, reached")
    assert second.endswith(
        "inference: at least 3x wanted, 2.00x found, not reached; 2.50x fewer operations in all"
    )
    assert not length_timing.goal_lines([replace(point, side=64, frames=33)])


@pytest.mark.parametrize("name", MODELS)
def test_step_times_by_layer(name, monkeypatch):
    """The way that a GPU goes, on layers of the same kinds that are small."""
    from scripts.benchmarks import cases as gpu_cases
    from scripts.length import layers as length_layers

    spec = MODELS[name]
    frames = max(spec.cases)
    case = gpu_cases.shrink(gpu_cases.CASES[spec.cases[frames]])
    options = {"num_attention_heads": 2, "attention_head_dim": 64, **length_options(spec.name)}
    small = replace(spec, options=options, text_tokens=case.grid.text or 7)
    monkeypatch.setattr(length_layers, "CASES", {spec.cases[frames]: case})
    setting = Setting(rank=2, repeats=1, device="cpu", dtype=torch.float32)
    times = layer_times(small, frames, setting)
    assert times.tokens == case.grid.tokens and times.backend == AUTO
    assert min(seconds for pair in times.attention.values() for seconds in pair) > 0
    text = layers_report("it", small, [frames], setting)
    assert f"{spec.depth} layers of which 2 stay dense" in text and f"- {frames} frames, training: " in text


def length_options(name: str) -> dict:
    from scripts.benchmarks.steps import TINY

    return TINY[name]


def test_a_step_is_the_sum_of_its_layers():
    from scripts.length.layers import Times

    times = Times({"training": (4.0, 1.0)}, {"training": 10.0}, 0.2, 100, "blocks")
    assert times.step("training", depth=10, dense_layers=2) == (50.0, 26.0)


def test_bounds_are_of_the_mask_that_is_timed():
    """Half of the layers dense: both kinds of step have less to gain."""
    found = []
    for count in (0, 3):
        words = ["attention.dense_steps=0", f"attention.dense_layers={count}"]
        config = length_timing.read_config(length_timing.PRESET, words)
        model = length_timing.read_model_info(length_timing.resolve_model(config))
        found.append(length_timing.bounds(config, model, 0.233, 16))
    for kind in ("training", "inference"):
        assert 1 < found[1][kind] < found[0][kind]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("attention.dense_steps=2", "error: attention.dense_steps: got 2, allowed here: 0"),
        ("attention.dense_last_steps=1", "error: attention.dense_last_steps: got 1, allowed here: 0"),
        ("attention.pattern=dense", "error: attention.pattern: got 'dense', allowed here: radial"),
    ],
)
def test_timing_is_of_radial_steps(word, said, tmp_path, capsys):
    out = tmp_path / "times.md"
    assert length_timing.main([word, "--sides", "32", "--frames", "9", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"{said}\n" and not out.exists()


def test_timing_refuses_in_one_line(capsys, monkeypatch):
    gpu = ["--model", "wan-14b", "--device", "cuda"]
    unused = (["generation.steps=9"], [*gpu, "attention.blok_size=64"], [*gpu, "--sides", "32"])
    for words in (["--model", "wan-14b"], ["--device", "cuda"], *unused):
        if words == ["--device", "cuda"] and torch.cuda.is_available():
            continue
        if words in unused:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(SystemExit) as stop:
            length_timing.parse(words)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: got" if words in unused else "error: --") and "allowed" in line
