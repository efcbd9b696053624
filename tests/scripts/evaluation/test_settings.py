"""Tests an evaluation before anything is made: digests, means over steps, what a cache leaves out, files."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from radial_attn import RadialConfig
from scripts import ablate, analyse_attention, cost, evaluate
from scripts.evaluate import examined, main
from scripts.evaluation.recall import Readings, averaged
from scripts.evaluation.settings import settings_of
from scripts.evaluation.tables import explained
from scripts.evaluation.videos import Evaluation
from scripts.run.config import ROOT

TINY = "configs/wan_tiny.yaml"
THIN = "attention.density=0.6"


def planned(folder: Path, *words: str) -> Evaluation:
    """Plans the evaluation of these words."""
    config, settings = settings_of(TINY, list(words))
    return examined(config, {name: setting for name, (_, setting) in settings.items()}, folder / "work")


def test_weights_of_dense_count_for_every_setting(tmp_path: Path):
    words = "evaluate.compare=a; b: model.dtype=bfloat16"
    programs = planned(tmp_path, words).programs
    assert programs["a"] == programs["dense"] != programs["b"]
    other = planned(tmp_path, words)
    for name in ("dense", "a"):
        other.plans[name] = replace(other.plans[name], path=str(ROOT / "assets/mochi-tiny"))
    assert other.programs["b"] != programs["b"]


def test_attention_is_averaged_over_the_steps_that_a_cache_left_in_all_videos():
    def of(steps: list[int], value: float) -> dict[str, Any]:
        levels = [[[value + step]] for step in steps]
        return {"steps": steps, "recall": levels, "mse": levels}

    means = averaged([of([1, 2, 4], 0.0), of([1, 4], 1.0)])
    assert means == {"steps": [1, 4], "recall": [[[1.5]], [[4.5]]], "mse": [[[1.5]], [[4.5]]]}
    assert averaged([of([1], 0.0), of([2], 0.0)]) is None and averaged([]) is None


def test_a_step_without_all_layers_of_the_model_is_left_out():
    mask = RadialConfig()
    readings = Readings({"a": mask}, 4, [1, 2], 2, lambda: None)
    readings._calls = {(mask, 2, 0): [torch.ones(2, 4)]}
    assert readings.table()["a"] == {"steps": [], "recall": [], "mse": []}
    readings._calls |= {(mask, 1, layer): [torch.ones(2, 4)] for layer in (0, 1)}
    assert readings.table()["a"]["steps"] == [1]


def test_operations_are_not_given_with_a_cache(tmp_path: Path, capsys):
    words = [TINY, "--dry-run", "--work", str(tmp_path)]
    assert main(words) == 0
    assert "| attention, FLOP |" in capsys.readouterr().out
    assert main([*words, "model.cache=first_block"]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert "| density |" in head and "FLOP" not in head and "with warm-up" not in head
    data = {"reference": "dense", "videos": [{"metrics": {}}], "attention": {}, "elsewhere": 0, "means": {}}
    text = explained(data, planned(tmp_path, "model.cache=first_block"))
    assert (
        "There is no recall: in every observed step" in text
        and "Operations are not given with a cache" in text
    )


def test_each_video_has_its_own_file(tmp_path: Path):
    evaluation = planned(tmp_path, f"evaluate.compare=a.mp4: {THIN}", "evaluate.seeds=1,2")
    paths = {evaluation.path(name, take) for name in evaluation.plans for take in evaluation.takes}
    assert len(paths) == 4
    folder = tmp_path / "work" / "videos"
    assert {path.parent for path in paths} == {folder / name for name in evaluation.plans}


MOCHI = "configs/mochi_tiny.yaml"


@pytest.mark.parametrize(
    ("parse", "words", "work", "start"),
    [
        (evaluate.parse, [MOCHI], "evaluation/mochi_tiny", "evaluation_mochi_tiny"),
        (evaluate.parse, ["--folders", "a=b", "c=d"], "evaluation/folders", "evaluation_folders"),
        (ablate.parse, [], "ablation/wan_tiny", "ablation_wan_tiny"),
        (ablate.parse, [MOCHI], "ablation/mochi_tiny", "ablation_mochi_tiny"),
        (analyse_attention.parse, [MOCHI], "analysis/mochi_tiny", "attention_decay_mochi_tiny"),
        (cost.parse, [], "cost", "cost"),
        (cost.parse, ["--models", "wan", MOCHI], "cost/wan_mochi_tiny", "cost_wan_mochi_tiny"),
    ],
)
def test_files_are_named_by_the_configuration(parse, words, work, start):
    options = parse(words)
    assert options.work.parts[-work.count("/") - 2 :] == ("outputs", *work.split("/"))
    assert re.fullmatch(rf"{start}_(cpu|gpu)_\d{{4}}-\d\d-\d\d\.md", options.out.name)
    assert options.out.parent == Path("outputs/results") and not options.work.is_absolute()
    assert parse([*words, "--out", "there"]).out == Path("there", options.out.name)
    assert parse([*words, "--out", "there/a.md"]).out == Path("there/a.md")
    assert parse([*words, "--work", "here"]).work == Path("here")
