"""Prompt accuracy: readings that continue, the table's arithmetic, the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from scripts.length.seeds import seed_records, seed_row, seed_table
from scripts.prompt_accuracy import density, parse, report, row, step_seconds
from scripts.run.config import ROOT, Config, read_config
from scripts.run.digest import digest
from scripts.run.plan import make_plan
from scripts.toyworld import all_attributes, read
from scripts.toyworld.accuracy import first_frame, readings, with_pattern
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


def test_readings_continue_where_they_stopped(tmp_path: Path, pipeline, config):
    file = tmp_path / "readings.json"
    made_before = entry(CAPTIONS[1].caption, "shape")
    file.write_text(json.dumps([made_before]))
    entries = readings(pipeline, config, CAPTIONS, 2, file)
    assert [e["caption"] for e in entries] == [CAPTIONS[i].caption for i in (1, 0, 2)]
    assert entries[0] == made_before and json.loads(file.read_text()) == entries
    assert list(tmp_path.iterdir()) == [file]


def test_a_caption_is_made_from_its_own_seed_whatever_was_made_before(tmp_path: Path, pipeline, config):
    whole = readings(pipeline, config, CAPTIONS, 3, tmp_path / "whole.json")
    part = tmp_path / "part.json"
    part.write_text(json.dumps(whole[:2]))
    assert readings(pipeline, config, CAPTIONS, 1, part) == whole


def test_row_counts_attributes_and_whole_captions(config):
    entries = [entry("a", *VOCABULARY), entry("b", "colour", "shape"), entry("c"), entry("d", "colour")]
    cells = [cell.strip() for cell in row(config, entries, 0.5, 0.25).strip("|").split("|")]
    assert cells == [
        "wan-tiny",
        "5",
        "radial",
        "0.500",
        "75.0",
        "50.0",
        "25.0",
        "25.0",
        "43.8",
        "25.0",
        "4",
        "0.250",
    ]


def test_measures_density_and_both_step_times(pipeline, config):
    usual = replace(config, generation=replace(config.generation, num_frames=33))
    assert density(pipeline, usual) == pytest.approx(0.573, abs=1e-3)
    assert density(pipeline, with_pattern(usual, "dense")) == 1
    seconds = step_seconds(pipeline, config, CAPTIONS[0])
    assert set(seconds) == {"dense", "radial"} and min(seconds.values()) > 0


def test_dense_steps_are_timed_apart(monkeypatch, config):
    """Four of twenty dense: the few steps that are timed are those of one kind."""
    seen = {}

    def timed(runs: dict, attributes: object) -> dict:
        seen.update({name: run for name, (_, run) in runs.items()})
        return {name: 2.0 if run.attention.pattern == "dense" else 1.0 for name, (_, run) in runs.items()}

    monkeypatch.setattr("scripts.toyworld.accuracy.seconds_in_turn", timed)
    warm = read_config("configs/wan_tiny.yaml", ["attention.dense_steps=3", "attention.dense_last_steps=1"])
    assert step_seconds(None, warm, CAPTIONS[0]) == {"dense": 2.0, "radial": pytest.approx(1.2)}
    radial, dense = seen["radial", False].attention, seen["radial", True].attention
    assert (radial.pattern, radial.dense_steps, radial.dense_last_steps) == ("radial", 0, 0)
    assert dense.pattern == "dense" and len(seen) == 3


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
    text = report("bash it.sh", [config, longer], ["| 5 | row |"], "cpu")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0].count("|") == table[1].count("|") and table[2] == "| 5 | row |"
    assert "    bash it.sh" in text and "2 steps" in text and "decimation_width 64" in text
    assert text.count(", LoRA assets/wan-tiny-4x-lora") == 1


def test_command_line():
    options = parse(["configs/wan_tiny.yaml", "configs/wan_tiny_4x.yaml", *SHORT, "--every", "1", "3"])
    assert options.configs == ["configs/wan_tiny.yaml", "configs/wan_tiny_4x.yaml"]
    assert options.overrides == SHORT and options.every == [1, 3]


def test_image_to_video_starts_from_a_scene_of_the_caption(config):
    """Seen as its caption says; other families get nothing."""
    assert first_frame(config, CAPTIONS[0], 3) == {}
    longer = read_config("configs/wan_i2v_tiny.yaml", [])
    image = first_frame(longer, CAPTIONS[0], 3)["image"]
    frame = torch.from_numpy(np.asarray(image)).float() / 255
    seen = read(frame[None])
    assert (seen.colour, seen.background) == (CAPTIONS[0].colour, CAPTIONS[0].background)
    assert image.size == (64, 64) and image == first_frame(longer, CAPTIONS[0], 3)["image"]
    assert image != first_frame(longer, CAPTIONS[0], 4)["image"]


def test_seeds_of_a_prompt_are_made_dense_and_radial_and_only_once(tmp_path: Path, config):
    plan, prompt, file = make_plan(config), CAPTIONS[0].caption, tmp_path / "seeds.json"
    first = seed_records(plan, [prompt], [3], file)
    assert [(one["seed"], one["pattern"]) for one in first] == [(3, "dense"), (3, "radial")]
    assert first[0]["density"] == 1 and min(one["denoise"] for one in first) > 0
    both = seed_records(plan, [prompt], [3, 4], file)
    assert both[:2] == first and [one["seed"] for one in both[2:]] == [4, 4]
    assert json.loads(file.read_text()) == both


def seed_record(seed: int, motion: bool = True, part: str = "around") -> dict:
    """The record of a video of 129 frames whose last part moves as `part` says."""
    asked = {"colour": "red", "shape": "circle", "motion": "around", "background": "navy"}
    return {
        **entry("a red circle", "colour", "shape", "background", *(["motion"] if motion else [])),
        **{"asked": asked, "frames": 129, "radius": 0.15, "period": 36.0},
        **{"parts": [asked, asked | {"motion": part}], "ends": [{"colour": "red", "shape": "circle"}] * 2},
        **{"pattern": "radial", "seed": seed, "density": 0.2333, "denoise": float(seed)},
    }


def test_row_of_seeds_names_those_that_fail():
    records = [seed_record(0), seed_record(1, motion=False), seed_record(2, part="diagonally")]
    cells = [cell.strip() for cell in seed_row(records).strip("|").split("|")]
    assert cells[:3] == ["a red circle", "radial", "0.233"]
    assert cells[3:] == ["2 of 3", "2 of 3", "3 of 3", "1 of 3", "1, 2", "1.00"]
    short = [one | {"frames": 33} for one in records]
    assert seed_row(short).split("|")[6].strip() == ""
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
