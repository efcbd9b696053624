"""Tests the evaluation from end to end on the bundled model: what it measures, resumes and refuses."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from radial_attn import radial_mask
from radial_attn.analysis.recall import kept_by, recall, sample_rows
from radial_attn.models import apply_radial_attention
from scripts.evaluate import examined, main
from scripts.evaluation.frame_sheet import read_video
from scripts.evaluation.metrics import compare
from scripts.evaluation.settings import settings_of
from scripts.evaluation.shown import captions, shown
from scripts.evaluation.tables import content as found_in
from scripts.evaluation.tables import draw, explained, gains, points, table
from scripts.evaluation.videos import Evaluation, make_missing, missing_videos, write_frames
from scripts.run import sampler as video
from scripts.run.attention import attention_arguments, radial_config
from scripts.run.config import ROOT, read_config
from scripts.run.plan import make_plan
from scripts.run.sampler import Sampler, sample, to_bytes
from scripts.toyworld import read
from scripts.toyworld.render import parse_caption
from tests.support.script_cases import timeless

TINY = "configs/wan_tiny.yaml"
SHORT = ["generation.num_frames=17", "generation.steps=2"]
THIN = "attention.density=0.6"
SETTINGS = f"thin: {THIN}; warm: {THIN} attention.dense_steps=1; all: attention.density=1"
COMPARE = [f"evaluate.compare={SETTINGS}", "evaluate.seeds=1,2", "evaluate.rows=6", "evaluate.steps=2"]


def evaluated(folder: Path, *words: str) -> int:
    return main([TINY, *SHORT, *words, "--work", str(folder / "work"), "--out", str(folder / "table.md")])


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "work" / "evaluation.json").read_text())


def planned(folder: Path, *words: str) -> Evaluation:
    """Plans the evaluation of these words."""
    config, settings = settings_of(TINY, [*SHORT, *words])
    return examined(config, {name: setting for name, (_, setting) in settings.items()}, folder / "work")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    assert evaluated(folder, *COMPARE) == 0
    return folder


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return Sampler(make_plan(read_config(TINY, [*SHORT, "model.device=cpu"]))).load()


def test_settings_hold_density_operations_and_mask(run: Path):
    data = content(run)
    assert data["kind"] == "evaluation" and data["reference"] == "dense"
    by_name = {setting["name"]: setting for setting in data["settings"]}
    assert list(by_name) == ["dense", "thin", "warm", "all"]
    plan = make_plan(read_config(TINY, [*SHORT, THIN]), dry_run=True)
    grid, density = plan.grid, plan.block_mask.density
    assert 0.5 < density < 0.7
    thin, warm = by_name["thin"], by_name["warm"]
    assert thin["grid"] == [grid.frames, grid.height, grid.width, grid.text]
    assert (thin["density"], warm["density"]) == (density, density)
    assert thin["density_with_warmup"] == pytest.approx(density)
    assert warm["density_with_warmup"] == pytest.approx((1 + density) / 2)
    assert warm["attention_flops"] == pytest.approx(by_name["dense"]["attention_flops"] * (1 + density) / 2)
    assert thin["mask"] == warm["mask"] and thin["mask"]["neighbour"] != "full"
    assert warm["words"] == [THIN, "attention.dense_steps=1"]
    assert all(setting["seconds_video"] > setting["seconds_step"] > 0 for setting in data["settings"])


def test_the_reader_scores_captions_of_the_toy_world_alone(run: Path):
    """With 17 frames there is one part, and no speed."""
    evaluation, data = planned(run, *COMPARE), content(run)
    for setting in data["settings"]:
        right = [
            read(
                torch.from_numpy(read_video(evaluation.path(setting["name"], take)) / np.float32(255))
            ).matches(parse_caption(take.prompt))
            for take in evaluation.takes
        ]
        assert setting["attributes"] == np.mean([list(entry.values()) for entry in right])
        assert setting["motion_throughout"] == np.mean([entry["motion"] for entry in right])
        assert setting["speed_right"] is None
    titles = table(data)[1]
    assert "attributes | motion" in titles and "speed" not in titles
    other = "a red circle moving vertically on a gray background at night"
    assert shown(planned(run, *COMPARE, f"generation.prompt={other}")) == {}


def test_what_the_reader_saw_is_kept_until_a_video_changes(run: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(run / "work", tmp_path / "work")
    evaluation, taken, look = planned(tmp_path, *COMPARE), [], read_video
    monkeypatch.setattr("scripts.evaluation.shown.read_video", lambda path: taken.append(path) or look(path))
    before = shown(evaluation)
    assert before and not taken
    changed = evaluation.path("thin", evaluation.takes[0])
    shutil.copy(evaluation.path("dense", evaluation.takes[1]), changed)
    assert shown(evaluation) and not taken  # that video is known
    changed.write_bytes(changed.read_bytes() + bytes(8))
    shown(evaluation)
    assert taken == [changed]
    (tmp_path / "work" / "shown.json").write_text("[")
    assert shown(evaluation) and len(taken) == 7  # the two of "all" are those of "dense"


RED = "a red circle moving vertically on a gray background"


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        ([RED], None),
        (["a cat", "a red circle"], None),
        ([RED.upper()], RED.upper()),
        ([RED, f"{RED}."], f"{RED}."),
        (["a cat", RED], "a cat"),
        ([f"{RED} "], f"{RED} "),
    ],
)
def test_a_note_says_which_prompt_the_reader_cannot_judge(prompts, named, capsys):
    assert bool(captions(prompts)) == (prompts == [RED])
    note = f"note: the toy world's reader is left out, because {named!r} is no caption of it; captions are as"
    assert capsys.readouterr().out == ("" if named is None else f"{note} {RED!r}\n")


def test_metrics_are_those_of_the_frames_before_encoding(run: Path, pipeline: Any):
    frames = {}
    for pattern, words in {"dense": ["attention.pattern=dense"], "thin": [THIN]}.items():
        config = read_config(TINY, [*SHORT, *words])
        with apply_radial_attention(pipeline, **attention_arguments(config.attention)):
            frames[pattern] = to_bytes(sample(pipeline, config, [config.generation.prompt], [2])[0])
    video = content(run)["videos"][1]
    assert video["seed"] == 2 and set(video["files"]) == {"dense", "thin", "warm", "all"}
    assert all((run / "work" / file).is_file() for file in video["files"].values())
    expected = compare(frames["thin"], frames["dense"])
    assert {name: video["metrics"]["thin"][name] for name in expected} == pytest.approx(expected)
    lossless = (run / "work" / video["files"]["dense"]).with_suffix(".mkv")
    np.testing.assert_array_equal(read_video(lossless), frames["dense"])


def test_means_are_over_videos(run: Path):
    data = content(run)
    for name in ("thin", "warm"):
        values = [video["metrics"][name]["psnr"] for video in data["videos"]]
        assert data["means"][name]["psnr"] == pytest.approx(sum(values) / 2)
    assert data["means"]["warm"]["psnr"] > data["means"]["thin"]["psnr"]
    table = (run / "table.md").read_text()
    assert f"| thin | {data['means']['thin']['psnr']:.2f} |" in table and "1 | warm" not in table


def test_attention_is_that_of_the_dense_run_at_the_steps_asked_for(run: Path, pipeline: Any):
    data = content(run)
    attention = data["attention"]["thin"]
    assert attention["steps"] == [2] and attention == data["attention"]["warm"]
    assert np.shape(attention["recall"]) == np.shape(attention["mse"]) == (1, 6, 4)
    np.testing.assert_allclose(data["attention"]["all"]["recall"], 1, atol=1e-6)
    assert np.max(data["attention"]["all"]["mse"]) < 1e-10
    config = read_config(TINY, [*SHORT, "attention.pattern=dense"])
    mask_config = radial_config(read_config(TINY, [*SHORT, THIN]).attention)
    calls: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def see(seen: Any) -> None:
        if seen.step == 1:
            mask, rows = radial_mask(seen.mask.grid, mask_config), sample_rows(seen.mask.grid, 6)
            kept = recall(seen.query, seen.key, mask, rows).mean(dim=(0, 2)).numpy()
            (errors,) = kept_by(seen.query, seen.key, seen.value, [mask], rows)
            calls.setdefault(seen.layer, []).append((kept, errors.mse.mean(dim=0).numpy()))

    for seed in (1, 2):
        with apply_radial_attention(pipeline, **attention_arguments(config.attention), observe=see):
            sample(pipeline, config, [config.generation.prompt], [seed], output_type="latent")
    assert {len(of_layer) for of_layer in calls.values()} == {4}  # two seeds, both halves of guidance
    for place, kind in enumerate(("recall", "mse")):
        expected = [np.mean([call[place] for call in calls[layer]], axis=0) for layer in range(6)]
        np.testing.assert_allclose(attention[kind][0], expected, rtol=1e-4)
        assert data["means"]["thin"][kind] == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.long
def test_a_stopped_evaluation_goes_on_to_the_same_end(run: Path, tmp_path: Path, monkeypatch, capsys):
    made, sampled = [], Sampler.sample_video

    def counts(sampler: Any, *rest: Any, **options: Any) -> Any:
        made.append(sampler.plan.config)
        return sampled(sampler, *rest, **options)

    def stops(sampler: Any, *rest: Any, **options: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        return counts(sampler, *rest, **options)

    monkeypatch.setattr(Sampler, "sample_video", stops)
    assert evaluated(tmp_path, *COMPARE) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; run the same command to resume"
    assert not (tmp_path / "work" / "evaluation.json").exists() and not (tmp_path / "table.md").exists()
    monkeypatch.setattr(Sampler, "sample_video", counts)
    assert evaluated(tmp_path, *COMPARE) == 0
    assert len(made) == 8
    assert timeless(content(tmp_path)) == timeless(content(run))
    assert evaluated(tmp_path, *COMPARE) == 0 and len(made) == 8
    more = [COMPARE[0] + f"; late: {THIN} attention.dense_last_steps=1", *COMPARE[1:]]
    assert evaluated(tmp_path, *more) == 0
    assert len(made) == 12  # with the dense ones, whose attention another mask looks at
    assert content(tmp_path)["attention"]["late"] == content(run)["attention"]["thin"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert evaluated(tmp_path, *COMPARE, "generation.guidance_scale=2") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "made with other settings (generation.guidance_scale); use these, or another --work" in line
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changed", ["version", "weights"])
def test_videos_of_another_version_or_other_weights_are_made_again(changed, run: Path, monkeypatch, capsys):
    assert missing_videos(planned(run, *COMPARE)) == []
    read, other = Path.read_bytes, planned(run, *COMPARE)
    if changed == "version":
        monkeypatch.setattr("scripts.run.digest.RESULTS_VERSION", 0)
    else:
        file = "diffusion_pytorch_model.safetensors"
        monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == file))
    assert len(missing_videos(other)) == 8
    monkeypatch.setattr(Sampler, "load", lambda sampler: pytest.fail("reached"))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        make_missing(other)
    line = "note: 8 videos are made again, because program, weights or device have changed"
    assert capsys.readouterr().out.splitlines() == [line]


def test_damaged_records_and_frames_are_made_again(run: Path, tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run")
    evaluation = planned(tmp_path / "run", *COMPARE)
    first, second = evaluation.takes
    record = evaluation.path("thin", first).with_suffix(".json")
    whole = json.loads(record.read_text())
    for harm in ({"metrics": None}, {"machine": "here"}, {"step_seconds": [1.0]}, {"seconds": 2}):
        record.write_text(json.dumps(whole | harm))
        assert missing_videos(evaluation) == [("thin", first)]
    record.write_bytes(record.read_bytes()[:100])
    assert missing_videos(evaluation) == [("thin", first)]
    frames = evaluation.path("dense", first).with_suffix(".mkv")
    frames.write_bytes(frames.read_bytes()[:-2000])
    assert missing_videos(evaluation) == [("dense", first), ("thin", first)]
    evaluation.path("dense", second).with_suffix(".json").write_bytes(bytes(50))
    assert missing_videos(evaluation)[2:] == [("dense", second)]
    monkeypatch.setattr(Sampler, "load", lambda sampler: pytest.fail("reached"))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        make_missing(evaluation)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: ") and line.endswith("made again, because the record is damaged")
    assert evaluation.path("thin", first).name in line


def test_seconds_of_another_machine_are_left_out(run: Path, monkeypatch):
    evaluation, whole = planned(run, *COMPARE), Evaluation.record
    words = {name: [] for name in evaluation.plans}
    assert found_in(evaluation, words)["elsewhere"] == 0

    def moved(seeds: tuple[int, ...]) -> dict[str, Any]:
        def record(self: Evaluation, name: str, take: Any) -> dict[str, Any]:
            kept = whole(self, name, take)
            return kept | ({"machine": {"threads": 99}} if take.seed in seeds else {})

        monkeypatch.setattr(Evaluation, "record", record)
        return found_in(evaluation, words)

    some = moved((1,))
    for setting in some["settings"]:
        kept = whole(evaluation, setting["name"], evaluation.takes[1])["seconds"]
        expected = kept["encode_text"] + kept["denoise"] + kept["decode"]
        assert setting["seconds_video"] == pytest.approx(expected)
    assert "The seconds of 4 videos, made on another machine" in explained(some, evaluation)
    every = moved((1, 2))
    assert every["elsewhere"] == 8 and "s a step" not in table(every)[0]
    assert every["means"] == some["means"]


def test_a_failing_pipeline_leaves_one_line_and_no_half_files(tmp_path: Path, monkeypatch, capsys):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("the kernel\nsaid no")

    monkeypatch.setattr(video, "call", fails)
    assert evaluated(tmp_path) == 2
    line = "error: dense: the pipeline failed with RuntimeError: the kernel"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_frames_are_kept_without_loss(tmp_path: Path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 21, 35, 3), dtype=np.uint8)
    write_frames(tmp_path / "a.mkv", frames, 16)
    np.testing.assert_array_equal(read_video(tmp_path / "a.mkv"), frames)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_the_shell_script_plans_without_making_anything(tmp_path: Path):
    words = [TINY, "evaluate.compare=[radial, {thin: attention.density=0.5}]", "--dry-run"]
    command = ["bash", "scripts/evaluate.sh", *words, "--work", tmp_path / "w"]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| setting", "| dense", "| radial", "| thin"]
    assert not (tmp_path / "w").exists()


def test_the_picture_joins_settings_that_differ_in_their_number():
    """Leaves out dense, settings without a PSNR, and operations that a cache hides."""
    costs = {"dense": 8.0, "radial_57": 4.0, "radial_21": 2.0, "chosen": 3.0, "cached": None, "failed": 1.0}
    psnr = {"radial_57": 24.0, "radial_21": 18.0, "chosen": 30.0, "cached": 20.0, "failed": None}
    data = {
        "settings": [{"name": name, "attention_flops": cost} for name, cost in costs.items()],
        "means": {name: {"psnr": value} for name, value in psnr.items()},
    }
    curves = points(data)
    assert curves == {"radial": [(0.25, 18.0), (0.5, 24.0)], "chosen": [(0.375, 30.0)]}
    (axes,) = draw(curves).axes
    assert [line.get_label() for line in axes.lines] == ["radial", "chosen"]
    assert list(axes.lines[0].get_xdata()) == [0.25, 0.5] and list(axes.lines[0].get_ydata()) == [18.0, 24.0]


def test_the_gain_is_over_radial_at_the_same_operations(run: Path):
    """Each video by itself; beyond the curve its last setting counts, and a line says so."""
    costs = {
        "dense": 8.0,
        "radial_57": 4.0,
        "radial": 2.0,
        "mid": 2.5,
        "much": 5.0,
        "less": 1.0,
        "equal": 3.0,
    }
    psnr = {"radial": (18, 20), "radial_57": (24, 22), "mid": (30, 24), "much": (26, 26), "less": (17, 18)}
    psnr |= {"equal": (None, 25)}
    data = {
        "reference": "dense",
        "settings": [{"name": name, "attention_flops": cost} for name, cost in costs.items()],
        "videos": [
            {"metrics": {name: {"psnr": x[i], "lpips": None} for name, x in psnr.items()}} for i in (0, 1)
        ],
        "elsewhere": 0,
    }
    found_gains = gains(data)
    assert {name: x["gain"] for name, x in found_gains.items()} == pytest.approx(
        {"mid": (10.5 + 3.5) / 2, "much": 3, "less": -1.5, "equal": 4}
    )
    assert (
        found_gains["mid"]["gain_error"] == pytest.approx(3.5) and found_gains["equal"]["gain_error"] is None
    )
    data["means"] = {name: found_gains.get(name, {}) for name in psnr}
    rows = table(data)
    assert rows[1] == "| setting | gain, dB | ± | attention, FLOP |"
    assert "| mid | +7.00 | 3.50 | 2.5 |" in rows
    text = explained(data, replace(planned(run, *COMPARE), rows=0))
    assert "For much it is at most this: every" in text and "For less it is at least this: every" in text
    data["settings"] = data["settings"][:2]
    assert gains(data) == {}
