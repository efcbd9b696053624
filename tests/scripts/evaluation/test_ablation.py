"""Tests the ablation: its lists and runs, what it keeps and resumes, the numbers of a row, its files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from radial_attn.masks.patterns import COMPARED, TOLERANCE
from scripts import ablate
from scripts.ablate import captions_of, main
from scripts.evaluation import ablation as measured
from scripts.evaluation.ablation import TABLES, Ablation, Run, attention_of, read_table, runs_of
from scripts.evaluation.ablation_report import COLUMNS, draw, lines
from scripts.run.config import ROOT, read_config
from scripts.run.plan import RunPlan, make_plan
from scripts.run.sampler import sample
from scripts.toyworld import accuracy
from scripts.toyworld.render import VOCABULARY

SHORT = ["generation.num_frames=9", "generation.steps=2", "--captions", "2", "--batch", "1", "--rows", "6"]
ONLY = ["--only", "dense_steps", "sink"]


@pytest.fixture(scope="module")
def tiny() -> RunPlan:
    return make_plan(read_config("configs/wan_tiny.yaml", []))


def runs(plan: RunPlan, name: str) -> list[Run]:
    return runs_of(read_table(name), plan)[0]


def short(work: Path) -> Ablation:
    return ablate.prepare(ablate.parse([*SHORT, "--work", str(work)]))


def test_every_list_varies_its_option_around_the_configuration(tiny):
    assert {file.stem for file in (ROOT / "configs/ablation").iterdir()} == set(TABLES)
    for name in TABLES:
        varied = runs(tiny, name)
        assert [getattr(run.plan.config.attention, name) for run in varied] == [run.value for run in varied]
        assert len({run.value for run in varied}) == len(varied) >= 2
        default = getattr(tiny.config.attention, name)
        for run in varied:
            attention = replace(run.plan.config.attention, **{name: default})
            assert replace(run.plan.config, attention=attention) == tiny.config
        if name != "density":
            assert default in {run.value for run in varied}


def test_masks_of_the_runs(tiny):
    table = read_table("pattern")
    assert table["values"] == ["radial", *COMPARED] and table["title"].endswith(f"{100 * TOLERANCE:g} %")
    densities = {run.value: run.plan.block_mask.density for run in runs(tiny, "pattern")}
    for density in densities.values():
        assert density == pytest.approx(densities["radial"], rel=TOLERANCE)
    for run in runs(tiny, "density"):
        assert run.plan.block_mask.density == pytest.approx(run.value, rel=0.02)
    last = [tuple(range(20 - count, 20)) for count in (0, 1, 2, 4)]
    assert [run.plan.dense_steps for run in runs(tiny, "dense_last_steps")] == last


def test_a_mask_that_the_grid_lacks_is_left_out_and_named(tiny):
    words = ["generation.height=48", "generation.width=48"]
    kept, (why,) = runs_of(read_table("pattern"), make_plan(read_config("configs/wan_tiny.yaml", words)))
    assert {run.value for run in kept} == {"radial", *COMPARED} - {"power"}
    assert why.startswith("attention.pattern") and "got 'power'" in why
    kept, (why,) = runs_of({"key": "attention.density", "values": [0.1, 0.5]}, tiny)
    assert [run.value for run in kept] == [0.5]
    assert why.startswith("attention.density") and "got 0.1" in why


def test_runs_with_the_same_videos_are_one(tiny):
    """Has 64 tokens a frame, so the least width is a block and decay factors below 0.5 change nothing."""
    decays = {run.value: run.identity for run in runs(tiny, "decay_factor")}
    assert decays[0.25] == decays[0.5] != decays[1.0]
    steps = [run.identity for run in runs(tiny, "dense_steps")]
    assert len(set(steps)) == len(steps) and len({run.pace for run in runs(tiny, "dense_steps")}) == 1
    assert len({run.pace for run in runs(tiny, "dense_layers")}) == 4


def test_captions_come_once_with_all_values_early():
    captions = captions_of(180)
    assert len(set(captions)) == 180
    for name, values in VOCABULARY.items():
        assert {getattr(attributes, name) for attributes in captions[:12]} == set(values)


def test_dense_steps_and_layers_keep_everything(tiny):
    """Takes two steps of three layers; step 0 and layer 0 are dense, so two of six count."""
    run = Run(0, replace(tiny, dense_steps=(0,), dense_layers=1))
    table = {
        "recall": [[[0.1], [0.1], [0.1]], [[0.1], [0.4], [0.7]]],
        "mse": [[[9.0], [9.0], [9.0]], [[9.0], [1.0], [2.0]]],
        "dense": [[[2.0]] * 3] * 2,
    }
    expected = {"recall": (4 + 0.4 + 0.7) / 6, "mse": 0.5, "relative": 0.25}
    assert attention_of(run, table) == pytest.approx(expected)


def test_what_is_timed_is_timed_in_turn_here_and_now(tiny, tmp_path, monkeypatch):
    """Tables one after the other, then other hardware: never times of two calls together."""
    calls = []

    def timed(configs: dict, caption: object) -> dict:
        calls.append(set(configs))
        return dict.fromkeys(configs, float(len(calls)))

    monkeypatch.setattr(measured, "seconds_in_turn", timed)
    monkeypatch.setattr(Ablation, "pipeline", None)
    ablation = short(tmp_path)
    for count, name in enumerate(("sink", "neighbour"), 1):
        seconds = ablation.seconds(runs(tiny, name))
        assert seconds == dict.fromkeys({run.pace for run in runs(tiny, name)} | {"dense"}, count)
        assert ablation.seconds(runs(tiny, name)) == seconds and len(calls) == count
    monkeypatch.setattr(measured, "hardware", lambda device: {"device": device, "threads": 99})
    assert set(ablation.seconds(runs(tiny, "neighbour")).values()) == {3}
    cuda = replace(ablation, plan=replace(ablation.plan, device="cuda"))
    assert cuda.folder(cuda.dense) != ablation.folder(ablation.dense)


def test_a_row_counts_dense_steps_and_leaves_equal_videos_out_of_the_mean(tiny):
    run = runs(tiny, "dense_steps")[-1]
    entry = {"ssim": 1.0, **dict.fromkeys(VOCABULARY, True)}
    entries = [entry | {"psnr": None}, entry | {"psnr": 30.0}]
    table = dict.fromkeys(("recall", "mse", "dense"), [[[1.0]] * 6] * 20)
    line = ablate.row(run, entries, table, {"dense": 2.0, run.pace: 1.0})
    numbers = dict(zip(COLUMNS, line[1:], strict=True))
    assert numbers["PSNR"] == 30 and numbers["attributes, %"] == 100
    assert numbers["s a step"] == pytest.approx((8 * 2 + 12) / 20)
    (note,) = ablate.equal([run], {run.identity: entries})
    assert note.endswith("8 1 of 2") and ablate.equal([run], {run.identity: entries[1:]}) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """Runs an ablation from end to end."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([*SHORT, *ONLY, "--work", str(folder / "work"), "--out", str(folder / "ablation.md")]) == 0
    return json.loads((folder / "work" / "ablation.json").read_text())


def test_from_end_to_end(whole):
    assert whole["kind"] == "ablation" and whole["config"]["generation"]["steps"] == 2
    steps, sink = whole["tables"]
    assert steps["columns"] == ["attention.dense_steps", *COLUMNS] and sink["title"] == "Attention sink"
    assert [row[0] for row in steps["rows"]] == [0, 1] and [row[0] for row in sink["rows"]] == [True, False]
    assert steps["rows"][0][1:] == sink["rows"][0][1:]
    warm, cold = (dict(zip(COLUMNS, row[1:], strict=True)) for row in (steps["rows"][1], steps["rows"][0]))
    assert warm["density of the run"] == pytest.approx((1 + cold["density of the run"]) / 2)
    assert warm["density"] == cold["density"] == cold["density of the run"]
    assert warm["PSNR"] > cold["PSNR"] > 10 and 0 < cold["SSIM"] < 1
    assert 0 < cold["recall"] < warm["recall"] < 1 and cold["output MSE"] > warm["output MSE"] > 0
    assert all(row[-1] > 0 for row in [*steps["rows"], *sink["rows"]])
    assert "% of the attributes" in steps["note"]


def test_attention_is_read_at_every_step_once_for_each_mask(tiny, tmp_path):
    """Keeps everything: recall 1 and no error."""
    ablation = short(tmp_path)
    full = replace(ablation.plan, mask=replace(ablation.plan.mask, pattern="dense"))
    table = ablation.attention([Run("all", full)])[Run("all", full).mask_name]
    assert [len(table["recall"]), len(table["recall"][0])] == [2, 6]
    numbers = attention_of(Run("all", full), table)
    assert numbers["recall"] == pytest.approx(1) and 0 <= numbers["relative"] < 1e-10
    del ablation.pipeline
    ablation.plan = replace(ablation.plan, path="none")
    known = replace(ablation, plan=full).attention([Run("all", full)])
    assert known[Run("all", full).mask_name] == table


@pytest.mark.long
def test_goes_on_where_it_was_interrupted(whole, tmp_path, monkeypatch, capsys):
    """Stops at the fourth video: five are left, none is made twice, and the tables are the same."""
    made = []

    def counted(*args, **options):
        if options.get("output_type") != "latent":
            if len(made) == 3:
                raise KeyboardInterrupt
            made.append(args[2])
        return sample(*args, **options)

    words = [*SHORT, *ONLY, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "ablation.md")]
    monkeypatch.setattr(accuracy, "sample", counted)
    assert main(words) == 130 and "interrupted; run the same command" in capsys.readouterr().err
    assert len(made) == 3 and not (tmp_path / "ablation.md").exists()
    made[:] = [None] * 10
    assert main(words) == 0
    assert len(made) == 10 + 5  # two dense videos and two of each of three runs, less three
    resumed = json.loads((tmp_path / "work" / "ablation.json").read_text())
    untimed = ([[row[:-1] for row in x["rows"]] for x in data["tables"]] for data in (resumed, whole))
    assert next(untimed) == next(untimed)
    made[:] = [None] * 10
    assert main(words) == 0 and len(made) == 10
    assert not list((tmp_path / "work").rglob("*.part"))
    frames, *_ = sorted((tmp_path / "work").rglob("*.npz"))
    frames.write_bytes(frames.read_bytes()[:-100])
    (frames.parent / "seconds.json").write_bytes(b'{"hardware": {')
    assert main(words) == 0 and len(made) == 11
    out = capsys.readouterr().out
    assert f"note: {frames} is damaged" in out and "seconds.json is damaged" in out
    remade = json.loads((tmp_path / "work" / "ablation.json").read_text())
    untimed = ([[row[:-1] for row in x["rows"]] for x in data["tables"]] for data in (remade, whole))
    assert next(untimed) == next(untimed)


def test_files(whole):
    text = "\n".join(lines(whole, "a.png"))
    assert whole["command"] in text and text.count("| attention.") == 2 and "| false |" in text
    titles = [table["title"] for table in whole["tables"]]
    assert [line.get_label() for line in draw(whole).axes[0].lines] == titles
