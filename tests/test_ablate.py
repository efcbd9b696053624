"""The ablation: which runs there are, what is kept and continued, the numbers of a row, the files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from radial_attn import RadialConfig, radial_mask
from radial_attn.masks.patterns import COMPARED
from scripts import ablate, prompt_accuracy
from scripts.ablate import captions_of, main
from scripts.evaluation import ablation_attention as ablate_attention
from scripts.evaluation import ablation_measure as ablate_measure
from scripts.evaluation.ablation_attention import of_run
from scripts.evaluation.ablation_measure import paces, step_seconds
from scripts.evaluation.ablation_report import COLUMNS, draw, lines
from scripts.evaluation.ablation_runs import TABLES, Run, runs_of
from scripts.run.config import ROOT, read_config
from scripts.run.hub_models import read_model_info
from scripts.run.sampler import sample
from scripts.toyworld.render import VOCABULARY

SHORT = ["generation.num_frames=9", "generation.steps=2", "--captions", "2", "--batch", "1", "--rows", "6"]
ONLY = ["--only", "dense_steps", "sink"]
DENSE = RadialConfig(pattern="dense", block_size=16)


@pytest.fixture(scope="module")
def tiny() -> tuple:
    config = read_config("configs/wan_tiny.yaml", [])
    return config, read_model_info(str(ROOT / config.model.path))


def runs(tiny: tuple, name: str) -> list[Run]:
    return runs_of(TABLES[name], *tiny)[0]


def test_every_table_varies_its_option_around_the_configuration(tiny):
    config, _ = tiny
    for name, table in TABLES.items():
        found = runs(tiny, name)
        assert [getattr(run.config.attention, table.key) for run in found] == [run.value for run in found]
        assert len({run.value for run in found}) == len(found) >= 2
        for run in found:
            own = replace(run.config.attention, **{table.key: getattr(config.attention, table.key)})
            assert replace(run.config, attention=own) == config
        if name != "density":
            assert getattr(config.attention, table.key) in {run.value for run in found}


def test_masks_of_the_runs(tiny):
    densities = {run.value: run.mask.density for run in runs(tiny, "pattern")}
    assert densities.keys() == {"radial", *COMPARED}
    for density in densities.values():
        assert density == pytest.approx(densities["radial"], rel=0.05)
    for run in runs(tiny, "density"):
        assert run.mask.density == pytest.approx(run.value, rel=0.02)
    scarce = TABLES["density"]._replace(values=lambda *_: [0.1, 0.5])
    small = read_config("configs/wan_tiny.yaml", ["generation.height=48", "generation.width=48"])
    found, (why,) = runs_of(TABLES["pattern"], small, tiny[1])
    assert {run.value for run in found} == {"radial", *COMPARED} - {"power"}
    assert why.startswith("attention.pattern must have a mask within 5%") and why.endswith("got 'power'")
    found, left_out = runs_of(scarce, *tiny)
    assert [run.value for run in found] == [0.5] and len(left_out) == 1
    assert left_out[0].startswith("attention.density must be") and left_out[0].endswith("got 0.1")
    assert [sorted(run.dense) for run in runs(tiny, "dense_last_steps")] == [
        [],
        [19],
        [18, 19],
        [16, 17, 18, 19],
    ]


def test_runs_with_the_same_videos_are_one(tiny):
    """At 64 tokens a frame the least width is a block: decay factors below 0.5 change nothing."""
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
    """Two steps of three layers by hand: step 0 dense, layer 0 dense at every step, so two of six count."""
    run = replace(
        runs(tiny, "sink")[0],
        dense=frozenset({0}),
        config=replace(tiny[0], attention=replace(tiny[0].attention, dense_layers=1)),
    )
    readings = {
        "recall": [[0.1, 0.1, 0.1], [0.1, 0.4, 0.7]],
        "mse": [[9.0, 9.0, 9.0], [9.0, 1.0, 2.0]],
        "dense": [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]],
    }
    found = of_run(run, readings)
    assert found == {
        "recall": pytest.approx((4 + 0.4 + 0.7) / 6),
        "mse": pytest.approx(0.5),
        "relative": pytest.approx(0.25),
    }


def test_seconds_count_dense_steps(tiny):
    run = runs(tiny, "dense_steps")[-1]
    assert len(run.dense) == 8
    assert step_seconds(run, {"dense": 2.0, run.pace: 1.0}) == pytest.approx((8 * 2 + 12) / 20)


def test_what_is_timed_is_timed_in_turn_here_and_now(tiny, tmp_path, monkeypatch):
    """Tables one after the other, then other hardware: never times of two calls together."""
    calls = []

    def timed(configs: dict, caption: object) -> dict:
        calls.append(set(configs))
        return dict.fromkeys(configs, float(len(calls)))

    monkeypatch.setattr(ablate_measure, "seconds_in_turn", timed)
    setup = ablate.prepare(ablate.parse([*SHORT, "--work", str(tmp_path)]))
    for count, name in enumerate(("sink", "neighbour"), 1):
        found = paces(setup, None, runs(tiny, name))
        assert found == dict.fromkeys({run.pace for run in runs(tiny, name)} | {"dense"}, count)
        assert paces(setup, None, runs(tiny, name)) == found and len(calls) == count
    monkeypatch.setattr(ablate_measure, "hardware", lambda device: {"device": device, "threads": 99})
    assert set(paces(setup, None, runs(tiny, "neighbour")).values()) == {3}
    cuda = setup._replace(job=replace(setup.job, device="cuda"))
    assert cuda.folder(cuda.dense) != setup.folder(setup.dense)


def test_equal_videos_are_counted_and_not_in_the_mean(tiny, tmp_path):
    setup = ablate.prepare(ablate.parse([*SHORT, "--work", str(tmp_path)]))
    run = runs(tiny, "sink")[0]
    entry = {"ssim": 1.0, **dict.fromkeys(VOCABULARY, True)}
    entries = [entry | {"psnr": None}, entry | {"psnr": 30.0}]
    looked = {"recall": 1.0, "mse": 0.0, "relative": 0.0}
    line = ablate.row(setup, run, entries, looked, {"dense": 1.0, run.pace: 1.0})
    assert line[1 + COLUMNS.index("PSNR")] == 30
    (said,) = ablate.equal({4: entries[1:], 8: entries})
    assert said.endswith("8 1 of 2") and ablate.equal({4: entries[1:]}) == []


def test_files_are_named_by_the_configuration():
    options = ablate.parse(["configs/mochi_tiny.yaml"])
    assert options.work == Path("outputs/ablation/mochi_tiny")
    assert options.out.name.startswith("ablation_mochi_tiny_")
    assert ablate.parse([]).work == Path("outputs/ablation/wan_tiny")
    assert ablate.parse(["--work", "here"]).work == Path("here")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """An ablation from end to end."""
    return ablation(tmp_path_factory.mktemp("whole"))


def ablation(folder: Path) -> dict:
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


def test_recall_and_error_are_those_of_the_run_itself(whole, tmp_path, monkeypatch):
    """A mask that keeps everything: recall 1 and no error."""
    seen = []
    monkeypatch.setattr(
        ablate_attention, "mask_of", lambda grid, config: seen.append(config) or radial_mask(grid, DENSE)
    )
    setup = ablate.prepare(ablate.parse([*SHORT, "--work", str(tmp_path)]))
    pipeline = setup.job.load()
    looked = ablate_attention.looked_at(setup, pipeline, {"all": setup.job.config}, tmp_path / "a.json")[
        "all"
    ]
    assert [len(looked["recall"]), len(looked["recall"][0])] == [2, 6] and len(seen) == 1
    assert np.allclose(looked["recall"], 1) and np.allclose(looked["mse"], 0, atol=1e-10)
    assert np.min(looked["dense"]) > 0
    known = (tmp_path / "a.json").read_text()
    assert ablate_attention.looked_at(setup, None, {"all": setup.job.config}, tmp_path / "a.json") == {
        "all": looked
    }
    assert (tmp_path / "a.json").read_text() == known


def test_goes_on_where_it_was_interrupted(whole, tmp_path, monkeypatch, capsys):
    """Stopped at the fourth video: six are left, none is made twice, and the tables end the same."""
    made = []

    def counted(*args, **options):
        if options.get("output_type") != "latent":
            if len(made) == 3:
                raise KeyboardInterrupt
            made.append(args[2])
        return sample(*args, **options)

    words = [*SHORT, *ONLY, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "ablation.md")]
    monkeypatch.setattr(prompt_accuracy, "sample", counted)
    assert main(words) == 130 and capsys.readouterr().err.endswith("interrupted; the same command goes on\n")
    assert len(made) == 3 and not (tmp_path / "ablation.md").exists()
    made[:] = [None] * 10
    assert main(words) == 0
    assert len(made) == 10 + 5  # two dense videos and two of each of three runs, less three
    data = json.loads((tmp_path / "work" / "ablation.json").read_text())
    assert [[row[:-1] for row in found["rows"]] for found in data["tables"]] == [
        [row[:-1] for row in found["rows"]] for found in whole["tables"]
    ]
    made[:] = [None] * 10
    assert main(words) == 0 and len(made) == 10
    assert not list((tmp_path / "work").rglob("*.part"))


def test_files(whole, tmp_path):
    text = "\n".join(lines(whole, "a.png"))
    assert whole["command"] in text and text.count("| attention.") == 2 and "| false |" in text
    figure = draw(whole)
    assert [line.get_label() for line in figure.axes[0].lines] == [
        found["title"] for found in whole["tables"]
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "sinks"], "invalid choice: 'sinks'"),
        (["--captions", "181"], "--captions: got 181, allowed: 1 to 180"),
        (["a.yaml", "b.yaml"], "one configuration at most, got 'a.yaml' and 'b.yaml'"),
        (["attention.pattern=power"], "attention.pattern: got 'power', allowed here: radial"),
        (["attention.density=0.5"], "attention.density: got 0.5, allowed here: null"),
        (["model.compile=blocks"], "model.compile: got 'blocks', allowed here: none"),
        (["attention.backend=flashinfer"], "attention.backend: got 'flashinfer'"),
        (["attention.sinks=true"], "did you mean 'attention.sink'"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, capsys):
    try:
        code = main([*words, "--work", str(tmp_path / "w"), "--out", str(tmp_path / "a.md")])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
