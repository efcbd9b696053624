"""Length extension: scores of long videos, the study and its demo from end to end."""

import json
import os
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts import length_study
from scripts.length.report import differences
from scripts.length.runs import ROWS, Result, captions_of
from scripts.run.config import ROOT
from scripts.toyworld import Attributes, random_scene, render
from scripts.toyworld.render import VOCABULARY
from scripts.toyworld.scores import by_part, difference, judged, parts, record, shares

FRAMES, TRAINED = 129, 33
SMALL = ["generation.num_frames=17", "generation.height=32", "generation.width=32"]
KEYS = ["generation.steps=2", "attention.dense_steps=0", "model.positions_frames=5"]
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
        score = scores(video, asked)
        assert score["identity_held"] == score["identity_right"] == 0 and score["motion_throughout"] == 1


def test_an_identity_that_holds_may_be_the_wrong_one():
    score = scores(clip(attributes(colour="green")), attributes())
    assert score["identity_held"] == 1 and score["attributes"] == 0.75
    assert score["identity_right"] == score["colour"] == score["whole"] == 0


def test_a_video_that_stops_or_is_empty_fails():
    asked = attributes()
    video = clip(asked)
    stopped = torch.cat([video[:97], video[96:97].expand(32, -1, -1, -1)])
    score = scores(stopped, asked)
    assert score["motion"] == 1 and score["motion_throughout"] == 0 and score["identity_right"] == 1
    slowed = scores(clip(asked, 33).repeat_interleave(4, dim=0)[:FRAMES], asked)
    assert slowed["motion_throughout"] == slowed["speed_right"] == 0 and slowed["size_right"] == 1
    assert scores(clip(asked, 33), asked)["speed_right"] is None
    for radius in (0.1, 0.21):
        scene = random_scene(asked, torch.Generator().manual_seed(0))
        scene = replace(scene, radius=radius, reach=(0.2, 0.2), centre=(0, 0))
        assert scores(render(scene, FRAMES), asked)["size_right"] == 0
    gone = torch.cat([video[:64], torch.zeros(65, 64, 64, 3) + video[0, 0, 0]])
    assert scores(gone, asked)["identity_held"] == 0


@pytest.mark.parametrize("frames", [1, 2])
def test_a_motion_is_not_judged_in_one_or_two_frames(frames):
    score = scores(clip(attributes(), frames), attributes())
    assert score["motion"] is score["motion_throughout"] is score["whole"] is None
    assert score["attributes"] == score["colour"] == score["shape"] == score["background"] == 1


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


def results_of(**wrong: int) -> dict[str, Result]:
    """Makes results of runs by name, with this many wrong of ten captions."""
    right = record(clip(attributes()), attributes(), TRAINED)
    still = right | {"motion": False, "parts": [part | {"motion": None} for part in right["parts"]]}
    config = length_study.parse([]).study.config("radial")
    results = {}
    for name, count in wrong.items():
        entries = [(still if i < count else right) | {"caption": str(i)} for i in range(10)]
        trained = 3.0 * (1 + count) if ROWS[name].tuned else None
        results[name] = Result(config, entries, Path(), 0.25, 0.1 * (1 + count), trained, 1.0 + count)
    return results


def test_the_adapter_with_the_mask_is_compared_with_every_other_run():
    lines = differences(results_of(radial_lora=2, dense_lora=1, dense=4))
    head, _, tuned, plain = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    tuned, plain = dict(zip(head, tuned, strict=True)), dict(zip(head, plain, strict=True))
    assert tuned["whole captions"] == "-10.0 ± 10.0" and plain["whole captions"] == "+20.0 ± 13.3"
    assert tuned["all attributes"] == "-2.5 ± 2.5" and tuned["held-out loss, times theirs"] == "1.50"
    assert (tuned["training, times faster"], plain["training, times faster"]) == ("0.67", "")
    assert (tuned["inference, times faster"], plain["inference, times faster"]) == ("0.67", "1.67")
    assert differences(results_of(dense=0)) == differences(results_of(radial_lora=0)) == []


def run_study(folder: Path, *words: str) -> int:
    """Runs a small study and returns the exit code."""
    numbers = ["--videos", "3", "--steps", "2", "--captions", "2", "--batch", "1"]
    paths = ["--work", str(folder / "work"), "--out", str(folder / "results" / "table.md")]
    return length_study.main([*SMALL, *KEYS, *TRAIN_KEYS, *words, *numbers, *paths])


@pytest.mark.long
def test_study_from_end_to_end_and_again(tmp_path, monkeypatch, capsys):
    """It writes tables and pictures; a second call makes and trains nothing.

    One of two steps is dense, and takes twice as long.
    """

    def timed(runs: dict, attributes: Attributes) -> dict:
        return {name: 2.0 if run.attention.pattern == "dense" else 1.0 for name, (_, run) in runs.items()}

    runs = ["dense_1x", "dense_lora", "radial_lora", "strided_lora"]
    only = ["attention.dense_steps=1", "validation.every=2", "validation.samples=1", "--only", *runs]
    monkeypatch.setattr("scripts.toyworld.accuracy.seconds_in_turn", timed)
    assert run_study(tmp_path, *only) == 0
    table = tmp_path / "results" / "table.md"
    text = table.read_text()
    lines = [line for line in text.splitlines() if re.match(r"\| \d+x ", line)][: len(runs)]
    names = ["1x dense", "4x dense + LoRA", "4x radial + LoRA", "4x strided + LoRA"]
    assert [line.split(" | ")[0][2:] for line in lines] == names
    densities = [float(line.split(" | ")[1]) for line in lines]
    assert densities[:2] == [1, 1] and densities[3] == pytest.approx(densities[2], abs=0.1)
    assert [line.split(" | ")[-1] for line in lines] == [*["2.000 |"] * 2, *["1.500 |"] * 2]
    losses = [line.split(" | ")[-3] for line in lines]
    assert losses[0] == "" and all(float(loss) > 0 for loss in losses[1:])
    assert all((line.split(" | ")[-2] == "") == ("LoRA" not in line) for line in lines)
    assert "| held-out loss, times theirs |" in text and "3 videos, 1 of them held out" in text
    assert {file.name for file in table.parent.iterdir()} == {"table.md", "table.png", "table_frames.png"}

    def made_again(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("scripts.lora.train.train_step", made_again)
    monkeypatch.setattr(length_study, "record", made_again)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "readings").rglob("*.*")}
    assert run_study(tmp_path, *only) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before} and len(before) == 2 * len(runs)
    assert run_study(tmp_path, "lora.rank=4", *only[:3], "--only", "radial_lora") == 2
    assert "holds a run with other settings (lora.rank 2 -> 4)" in capsys.readouterr().err


def test_study_refuses_before_anything_is_made(tmp_path, monkeypatch, capsys):
    """Only the pattern `power` has no mask about as dense."""
    monkeypatch.setitem(ROWS, "random_lora", replace(ROWS["random_lora"], pattern="power"))
    assert run_study(tmp_path, "--only", "random_lora") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: attention.pattern") and "got 'power'" in line
    assert not list(tmp_path.iterdir())


def test_runs_differ_as_their_names_say():
    study = length_study.parse(["attention.density=0.3", "train.rate=1e-4"]).study
    configs = {name: study.config(name) for name in ROWS}
    assert configs["dense_1x"].generation.num_frames == 33 and configs["dense"].generation.num_frames == 129
    assert configs["riflex"].model.positions == "riflex" and configs["radial"].model.positions == "plain"
    assert {config.attention.density for config in configs.values()} == {0.3}
    trainings = {name: study.training_config(name) for name, row in ROWS.items() if row.tuned}
    patterns = ["dense", "radial", "spatial", "temporal", "strided", "random"]
    assert [config.attention.pattern for config in trainings.values()] == patterns
    assert {config.train.rate for config in trainings.values()} == {1e-4}
    assert {tuple(config.data.sizes[0]) for config in trainings.values()} == {(129, 64, 64)}
    file = configs["random_lora"].model.loras[0].path
    assert Path(file).parent == Path(trainings["random_lora"].output.path)


@pytest.mark.long
def test_demo_from_end_to_end(tmp_path):
    sizes = {"VIDEOS": "2", "STEPS": "1", "CAPTIONS": "1", "FRAMES": "9", "SIDE": "32"}
    keys = {"KEYS": " ".join(KEYS), "TRAIN_KEYS": " ".join(TRAIN_KEYS), "WORK": str(tmp_path)}
    command = ["bash", "scripts/length_extension_demo.sh"]
    pipes = {"capture_output": True, "text": True}
    run = subprocess.run(command, check=False, cwd=ROOT, env=os.environ | sizes | keys, **pipes)
    assert run.returncode == 0, run.stderr[-2000:]
    for name in ("scores.md", "frames.png", "scores.png", "scores_frames.png"):
        assert str(tmp_path / name) in run.stdout and (tmp_path / name).stat().st_size > 0
    assert "2x radial + LoRA" in (tmp_path / "scores.md").read_text()
