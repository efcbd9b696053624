"""Prompt accuracy: readings that resume, the numbers in the table, the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from scripts.length.seeds import PATTERNS, seed_records, seed_row, seed_table
from scripts.prompt_accuracy import parse, report, row
from scripts.run.config import ROOT, Config, read_config
from scripts.run.digest import digest
from scripts.run.plan import make_plan
from scripts.toyworld import all_attributes, read
from scripts.toyworld.accuracy import first_frame, readings, whole_run_seconds, with_pattern
from scripts.toyworld.render import VOCABULARY

CAPTIONS = all_attributes()[:3]
SHORT = ["generation.num_frames=5", "generation.steps=2"]


@pytest.fixture(scope="module")
def config() -> Config:
    return read_config("configs/wan_tiny.yaml", SHORT)


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(ROOT / "assets" / "wan-tiny")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def entry(caption: str, *right: str) -> dict:
    return {"caption": caption, **{name: name in right for name in VOCABULARY}}


def test_readings_resume(tmp_path: Path, pipeline, config):
    file = tmp_path / "readings.json"
    made_before = entry(CAPTIONS[1].caption, "shape")
    file.write_text(json.dumps([made_before]))
    entries = readings(pipeline, config, CAPTIONS, 2, file)
    assert [e["caption"] for e in entries] == [CAPTIONS[i].caption for i in (1, 0, 2)]
    assert entries[0] == made_before and json.loads(file.read_text()) == entries
    assert list(tmp_path.iterdir()) == [file]


def test_a_caption_keeps_its_seed_in_a_resumed_run(tmp_path: Path, pipeline, config):
    whole = readings(pipeline, config, CAPTIONS, 3, tmp_path / "whole.json")
    part = tmp_path / "part.json"
    part.write_text(json.dumps(whole[:2]))
    assert readings(pipeline, config, CAPTIONS, 1, part) == whole


@pytest.mark.parametrize("content", [b"", b'[{"caption": ', b"{}", bytes(40)])
def test_damaged_readings_are_made_again(content, tmp_path: Path, pipeline, config, capsys):
    file = tmp_path / "readings.json"
    file.write_bytes(content)
    entries = readings(pipeline, config, CAPTIONS[:1], 1, file)
    assert [e["caption"] for e in entries] == [CAPTIONS[0].caption] and json.loads(
        file.read_text()
    ) == entries
    assert f"note: {file} is damaged" in capsys.readouterr().out


def test_row_counts_attributes_and_whole_captions(config):
    entries = [entry("a", *VOCABULARY), entry("b", "colour", "shape"), entry("c"), entry("d", "colour")]
    cells = ["wan-tiny", "5", "radial", "0.500", "75.0", "50.0", "25.0", "25.0", "43.8", "25.0", "4", "0.250"]
    assert row(config, entries, 0.5, 0.25) == cells


def seconds_of(pipeline: WanPipeline | None, config: Config) -> dict[str, float]:
    """Measures the seconds of a step, dense and radial in turn."""
    runs = {pattern: (pipeline, with_pattern(config, pattern)) for pattern in PATTERNS}
    return whole_run_seconds(runs, CAPTIONS[0])


def test_both_step_times_are_measured(pipeline, config):
    seconds = seconds_of(pipeline, config)
    assert set(seconds) == {"dense", "radial"} and min(seconds.values()) > 0


def test_dense_steps_are_timed_apart(monkeypatch, config):
    """Four of twenty steps are dense; each timed run has steps of one kind."""
    timed = {}

    def measured(runs: dict, attributes: object) -> dict:
        timed.update({name: run.attention for name, (_, run) in runs.items()})
        return {name: 2.0 if attention.pattern == "dense" else 1.0 for name, attention in timed.items()}

    monkeypatch.setattr("scripts.toyworld.accuracy.seconds_in_turn", measured)
    warm = read_config("configs/wan_tiny.yaml", ["attention.dense_steps=3", "attention.dense_last_steps=1"])
    assert seconds_of(None, warm) == {"dense": 2.0, "radial": pytest.approx(1.2)}
    radial, dense = timed["radial", False], timed["radial", True]
    assert (radial.pattern, radial.dense_steps, radial.dense_last_steps) == ("radial", 0, 0)
    assert dense.pattern == "dense" and len(timed) == 3


def test_readings_follow_configuration_weights_and_version(monkeypatch, tmp_path, config):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    before = digest(config, str(tmp_path))
    assert digest(config, str(tmp_path)) == before != digest(config, str(tmp_path), "another fact")
    assert digest(with_pattern(config, "dense"), str(tmp_path)) != before
    weights.write_bytes(b"Weights")
    changed = digest(config, str(tmp_path))
    monkeypatch.setattr("scripts.run.digest.RESULTS_VERSION", 0)
    assert len({before, changed, digest(config, str(tmp_path))}) == 3


def test_report_holds_command_table_and_settings(config):
    longer = read_config("configs/wan_tiny_4x.yaml", [])
    text = report("Title", "bash it.sh", ["| 5 | row |"], [make_plan(config), make_plan(longer)])
    assert text.startswith("# Title\n\n    bash it.sh\n| 5 | row |\n\n- ")
    assert "2 steps" in text and "decimation_width 64" in text
    assert text.count(", LoRA assets/wan-tiny-4x-lora") == 1


def test_command_line():
    options = parse(["configs/wan_tiny.yaml", "configs/wan_tiny_4x.yaml", *SHORT, "--every", "1", "3"])
    assert options.configs == ["configs/wan_tiny.yaml", "configs/wan_tiny_4x.yaml"]
    assert options.overrides == SHORT and options.every == [1, 3]


def test_image_to_video_starts_from_a_scene_of_the_caption(config):
    """The image shows its caption; other families get none."""
    assert first_frame(config, CAPTIONS[0], 3) == {}
    longer = read_config("configs/wan_i2v_tiny.yaml", [])
    image = first_frame(longer, CAPTIONS[0], 3)["image"]
    frame = torch.from_numpy(np.asarray(image)).float() / 255
    reading = read(frame[None])
    assert (reading.colour, reading.background) == (CAPTIONS[0].colour, CAPTIONS[0].background)
    assert image.size == (64, 64) and image == first_frame(longer, CAPTIONS[0], 3)["image"]
    assert image != first_frame(longer, CAPTIONS[0], 4)["image"]


def test_seeds_of_a_prompt_are_made_once_dense_and_radial(tmp_path: Path, config):
    plan, prompt, file = make_plan(config), CAPTIONS[0].caption, tmp_path / "seeds.json"
    first = seed_records(plan, [prompt], [3], file)
    assert [(one["seed"], one["pattern"]) for one in first] == [(3, "dense"), (3, "radial")]
    assert first[0]["density"] == 1 and min(one["denoise"] for one in first) > 0
    both = seed_records(plan, [prompt], [3, 4], file)
    assert both[:2] == first and [one["seed"] for one in both[2:]] == [4, 4]
    assert json.loads(file.read_text()) == both


def seed_record(seed: int, motion: bool = True, part: str = "around") -> dict:
    """Makes the record of a video of 129 frames with `part` as the motion of its last part."""
    asked = {"colour": "red", "shape": "circle", "motion": "around", "background": "navy"}
    return {
        **entry("a red circle", "colour", "shape", "background", *(["motion"] if motion else [])),
        **{"asked": asked, "frames": 129, "radius": 0.15, "period": 36.0},
        **{"parts": [asked, asked | {"motion": part}], "ends": [{"colour": "red", "shape": "circle"}] * 2},
        **{"pattern": "radial", "seed": seed, "density": 0.2333, "denoise": float(seed)},
    }


def test_row_of_seeds_names_those_that_fail():
    records = [seed_record(0), seed_record(1, motion=False), seed_record(2, part="diagonally")]
    cells = ["a red circle", "radial", "0.233", "2 of 3", "2 of 3", "3 of 3", "1 of 3", "1, 2", "1.00"]
    assert seed_row(records) == cells
    assert seed_row([one | {"frames": 33} for one in records])[5] == ""
    both = [*records, *(one | {"pattern": "dense"} for one in records)]
    table = [line for line in seed_table(both, ["a red circle"], range(3)) if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("prompt", ["a pink circle moving around on a navy background", "a cat"])
def test_a_prompt_outside_the_toy_world_is_refused(prompt, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["configs/wan_tiny.yaml", "--prompt", prompt])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--prompt" in error and error.count("\n") == 1


def test_prompts_take_one_configuration(capsys):
    with pytest.raises(SystemExit):
        parse(["configs/wan_tiny.yaml", "configs/wan_tiny_4x.yaml", "--prompt", CAPTIONS[0].caption])
    error = capsys.readouterr().err
    assert "--prompt" in error and "name one" in error
