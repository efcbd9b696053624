"""Length extension: what a long video is judged by, the study and its demo from end to end, step times."""

import json
import os
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts import length_study, length_timing, train_lora
from scripts.config import ROOT
from scripts.length.layers import MODELS, Setting, layer_times, layers_report
from scripts.length.report import accuracy_goals, goal_lines
from scripts.length.runs import ROWS, Result, captions_of
from scripts.length.scores import by_part, difference, judged, parts, record, shares
from toyworld import Attributes, random_scene, render
from toyworld.render import VOCABULARY

FRAMES, TRAINED = 129, 33
SMALL = ["generation.num_frames=17", "generation.height=32", "generation.width=32"]
KEYS = ["generation.steps=2", "model.positions_frames=5"]
TRAIN_KEYS = ["validation.every=0", "train.batch=1", "lora.rank=2", "model.positions_frames=5"]


def attributes(**changes: str) -> Attributes:
    asked = {"colour": "red", "shape": "square", "motion": "around", "background": "navy"}
    return Attributes(**asked | changes)


def clip(asked: Attributes, frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    return render(random_scene(asked, torch.Generator().manual_seed(seed)), frames)


def scores(video: torch.Tensor, asked: Attributes) -> dict[str, float]:
    return judged(json.loads(json.dumps(record(video, asked, TRAINED))))


@pytest.mark.parametrize("motion", VOCABULARY["motion"])
def test_a_right_video_passes_all(motion):
    asked = attributes(motion=motion)
    assert set(scores(clip(asked), asked).values()) == {1.0}


def test_a_colour_or_shape_that_changes_half_way_is_not_held():
    asked = attributes()
    for change in ({"colour": "blue"}, {"shape": "circle"}):
        video = torch.cat([clip(asked)[:64], clip(attributes(**change))[64:]])
        found = scores(video, asked)
        assert found["identity_held"] == found["identity_right"] == 0
        assert found["motion_throughout"] == 1


def test_an_identity_that_holds_may_be_the_wrong_one():
    found = scores(clip(attributes(colour="green")), attributes())
    assert (found["identity_held"], found["identity_right"], found["colour"], found["whole"]) == (1, 0, 0, 0)
    assert found["attributes"] == 0.75


def test_a_video_that_stops_or_is_empty_fails():
    asked = attributes()
    video = clip(asked)
    stopped = torch.cat([video[:97], video[96:97].expand(32, -1, -1, -1)])
    found = scores(stopped, asked)
    assert found["motion"] == 1 and found["motion_throughout"] == 0 and found["identity_right"] == 1
    slowed = clip(asked, 33).repeat_interleave(4, dim=0)[:FRAMES]
    assert scores(slowed, asked)["motion_throughout"] == 0
    gone = torch.cat([video[:64], torch.zeros(65, 64, 64, 3) + video[0, 0, 0]])
    assert scores(gone, asked)["identity_held"] == 0


def test_parts_are_as_long_as_the_training():
    assert parts(129, 33) == [slice(0, 33), slice(32, 65), slice(64, 97), slice(96, 129)]
    assert parts(33, 33) == [slice(0, 33)] and parts(17, 33) == [slice(0, 17)]
    assert all(part.stop - part.start == 33 for part in parts(120, 33)) and parts(120, 33)[-1].stop == 120


def test_means_and_paired_differences():
    asked = attributes()
    right, wrong = (record(clip(one), asked, TRAINED) for one in (asked, attributes(colour="green")))
    entries = [right | {"caption": str(i)} for i in range(4)]
    others = [*entries[:3], wrong | {"caption": "3"}]
    assert shares(others)["colour"] == 75 and shares(others)["attributes"] == 93.75
    assert by_part(others) == [75.0] * 4
    gap, error = difference("whole", entries, others[::-1])
    assert gap == 25 and error == pytest.approx(25)
    with pytest.raises(ValueError, match="same captions, got 4 and 3"):
        difference("whole", entries, others[:3])


@pytest.mark.parametrize(("count", "spread"), [(60, 2), (180, 0)])
def test_captions_are_different_and_mixed(count, spread):
    chosen = captions_of(count)
    assert len(set(chosen)) == count and chosen[:6] == captions_of(6)
    for name in VOCABULARY:
        counts = Counter(getattr(one, name) for one in chosen)
        assert len(counts) == len(VOCABULARY[name]) and max(counts.values()) - min(counts.values()) <= spread


def results_of(**gaps: int) -> dict[str, Result]:
    """Results in which so many of ten captions are wrong."""
    right = record(clip(attributes()), attributes(), TRAINED)
    wrong = right | {"motion": False, "parts": [part | {"motion": None} for part in right["parts"]]}
    config = length_study.parse([]).study.config("radial")
    results = {}
    for name, count in gaps.items():
        entries = [(wrong if i < count else right) | {"caption": str(i)} for i in range(10)]
        results[name] = Result(config, entries, 0.25, None, 1.0, Path())
    return results


def test_goals_say_what_is_reached_and_why_not():
    goals = {
        wanted: (found, ok, why)
        for wanted, found, ok, why in accuracy_goals(
            results_of(radial_lora=2, dense_lora=1, dense=4, spatial_lora=9, random_lora=0)
        )
    }
    found, ok, why = goals["whole captions: within 2 points of dense + LoRA"]
    assert found.startswith("-10.0 ±") and not ok and "more captions would tell" in why
    assert goals["whole captions: at least 10 points above dense without tuning"][:2] == (
        "+20.0 ± 13.3",
        True,
    )
    assert goals["whole captions: ahead of spatial + LoRA"][1]
    assert "at most 0.0 points are left" in goals["motion throughout: ahead of random + LoRA"][2]
    assert "need the runs" in goal_lines(length_study.parse([]).study, results_of(dense=0))[0]


def run_study(folder: Path, *words: str) -> int:
    numbers = ["--videos", "3", "--steps", "2", "--captions", "2", "--batch", "1"]
    places = ["--work", str(folder / "work"), "--out", str(folder / "results" / "table.md")]
    return length_study.main([*SMALL, *KEYS, *TRAIN_KEYS, *words, *numbers, *places])


def test_study_from_end_to_end_and_again(tmp_path, monkeypatch, capsys):
    """Table, goals and pictures; a second call makes and trains nothing, and names are checked at once."""
    runs = ["dense_1x", "dense_lora", "radial_lora", "strided_lora"]
    only = ["--only", *runs]
    monkeypatch.setattr("scripts.prompt_accuracy.TIMED_RUNS", 1)
    assert run_study(tmp_path, *only) == 0
    table = tmp_path / "results" / "table.md"
    text = table.read_text()
    lines = [line for line in text.splitlines() if re.match(r"\| \d+x ", line)]
    names = ["1x dense", "4x dense + LoRA", "4x radial + LoRA", "4x strided + LoRA"]
    assert [line.split(" | ")[0][2:] for line in lines] == names
    densities = [float(line.split(" | ")[1]) for line in lines]
    assert densities[:2] == [1, 1] and densities[3] == pytest.approx(densities[2], abs=0.1)
    assert all((line.split(" | ")[-2] == "") == ("LoRA" not in line) for line in lines)
    assert "training step at least 1.5x faster than dense" in text and "3 videos, 0 of them held out" in text
    assert {file.name for file in table.parent.iterdir()} == {"table.md", "table.png", "table_frames.png"}

    def made_again(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(train_lora, "train_step", made_again)
    monkeypatch.setattr(length_study, "record", made_again)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "readings").rglob("*.*")}
    assert run_study(tmp_path, *only) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before} and len(before) == 2 * len(runs)
    assert run_study(tmp_path, "lora.rank=4", "--only", "radial_lora") == 2
    assert "holds a run with other settings (lora.rank 2 -> 4)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.rat=1"], "error: unknown key 'train.rat'"),
        (["--captions", "181"], "error: --captions: got 181, allowed: 1 to 180"),
        (["quick"], "error: got 'quick', allowed: key=value"),
        (["--only", "power"], "invalid choice: 'power'"),
    ],
)
def test_study_refuses_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        length_study.parse(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_runs_differ_in_what_their_names_say():
    study = length_study.parse(["attention.density=0.3", "train.rate=1e-4"]).study
    configs = {name: study.config(name) for name in ROWS}
    assert configs["dense_1x"].generation.num_frames == 33 and configs["dense"].generation.num_frames == 129
    assert configs["riflex"].model.positions == "riflex" and configs["radial"].model.positions == "plain"
    assert {config.attention.density for config in configs.values()} == {0.3}
    trainings = {name: study.training_config(name) for name, row in ROWS.items() if row.tuned}
    assert [config.attention.pattern for config in trainings.values()] == [
        "dense",
        "radial",
        "spatial",
        "temporal",
        "strided",
        "random",
    ]
    assert {config.train.rate for config in trainings.values()} == {1e-4}
    assert {tuple(config.data.sizes[0]) for config in trainings.values()} == {(129, 64, 64)}
    file = configs["random_lora"].model.loras[0].path
    assert Path(file).parent == Path(trainings["random_lora"].output.path)


def test_demo_from_end_to_end(tmp_path):
    sizes = {"VIDEOS": "2", "STEPS": "1", "CAPTIONS": "1", "FRAMES": "9", "SIDE": "32"}
    keys = {"KEYS": " ".join(KEYS), "TRAIN_KEYS": " ".join(TRAIN_KEYS), "WORK": str(tmp_path)}
    run = subprocess.run(
        ["bash", "scripts/length_extension_demo.sh"],
        cwd=ROOT,
        env=os.environ | sizes | keys,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for name in ("scores.md", "frames.png", "scores.png", "scores_frames.png"):
        assert str(tmp_path / name) in run.stdout and (tmp_path / name).stat().st_size > 0
    assert "2x radial + LoRA" in (tmp_path / "scores.md").read_text()


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
    from scripts.gpu import cases as gpu_cases
    from scripts.length import layers as length_layers

    spec = MODELS[name]
    frames = max(spec.cases)
    case = gpu_cases.shrink(gpu_cases.CASES[spec.cases[frames]])
    options = {"num_attention_heads": 2, "attention_head_dim": 64, **length_options(spec.name)}
    small = replace(spec, options=options, text_tokens=case.grid.text or 7)
    monkeypatch.setattr(length_layers, "CASES", {spec.cases[frames]: case})
    setting = Setting(rank=2, repeats=1, device="cpu", dtype=torch.float32)
    times = layer_times(small, frames, setting)
    assert times.tokens == case.grid.tokens and times.backend == "blocks"
    assert min(seconds for pair in times.attention.values() for seconds in pair) > 0
    text = layers_report("it", small, [frames], setting)
    assert f"{spec.depth} layers of which 2 stay dense" in text and f"- {frames} frames, training: " in text


def length_options(name: str) -> dict:
    from scripts.gpu.steps import TINY

    return TINY[name]


def test_a_step_is_the_sum_of_its_layers():
    from scripts.length.layers import Times

    times = Times({"training": (4.0, 1.0)}, {"training": 10.0}, 0.2, 100, "blocks")
    assert times.step("training", depth=10, dense_layers=2) == (50.0, 26.0)


def test_timing_refuses_in_one_line(capsys):
    for words in (["--model", "wan-14b"], ["--device", "cuda"]):
        if "cuda" in words and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as stop:
            length_timing.parse(words)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --") and "allowed" in line
