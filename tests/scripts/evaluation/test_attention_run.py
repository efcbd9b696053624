"""Tests the analysis of a model's attention: what it gathers in a run and on noise, and its files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from radial_attn import radial_mask
from radial_attn.analysis.decay import Profile, measure
from radial_attn.analysis.recall import recall, sample_rows
from radial_attn.models import apply_radial_attention
from scripts.analyse_attention import main, planned
from scripts.evaluation import attention_run as analyse_run
from scripts.evaluation.attention_report import stacked, thinned
from scripts.evaluation.attention_run import Looks, gather
from scripts.run.attention import attention_arguments
from scripts.run.config import read_config
from scripts.run.results import write_json
from scripts.run.sampler import Sampler, sample
from scripts.run.values import LoraConfig
from tests.support.map_cases import CONFIG, GRIDS, tensors

WAN, MOCHI = "configs/wan_tiny.yaml", "configs/mochi_tiny.yaml"
KINDS = ("profiles", "tails", "sums", "counts")  # of readings
SHORT = ["generation.num_frames=9", "generation.steps=2", "model.device=cpu"]
FEW = ["--rows", "9", "--tail-rows", "2"]


def analysed(folder: Path, *words: str) -> dict:
    """Runs a command that succeeds, and returns its JSON."""
    assert main([*words, *SHORT, *FEW, "--work", str(folder / "work"), "--out", str(folder / "a.md")]) == 0
    return json.loads((folder / "work" / "analysis.json").read_text())


@pytest.fixture(scope="module")
def both_steps(tmp_path_factory) -> tuple[Path, dict]:
    """Analyses both of two steps of the bundled Wan; returns folder and JSON."""
    folder = tmp_path_factory.mktemp("wan")
    return folder, analysed(folder, "--steps", "1", "2")


def test_json_holds_every_layer_and_head(both_steps):
    _, data = both_steps
    assert data["kind"] == "analysis"
    assert data["command"].startswith("bash scripts/analyse_attention.sh --steps 1 2")
    assert data["grid"] == [3, 8, 8, 0] and data["steps"] == [1, 2] and data["timestep"] is None
    assert data["layers"] == list(range(6)) and [len(layer) for layer in data["heads"]] == [4] * 6
    assert {head["class"] for layer in data["heads"] for head in layer} == {"spatial", "temporal"}
    for name, size in (("temporal", 3), ("spatial", 64), ("planar", 11)):
        profile, heads = data["profiles"][name], data["profiles"][name]["heads"]
        assert profile["distance"] == list(range(size)) and len(profile["mean"]) == size
        heads, mean = np.array(heads, dtype=float), np.array(profile["mean"], dtype=float)
        np.testing.assert_allclose(heads.mean(axis=(0, 1)), mean, rtol=1e-4)
        assert np.isfinite(mean[: size // 2 + 1]).all()
        assert set(data["fits"][name]) == {"a", "b", "r2"}
    assert data["config"]["generation"]["steps"] == 2 and data["mask"]["block_size"] == 16
    assert data["tail"]["rows"] == 2 * 2 * 6 * 4 * 2 and data["tail"]["exceeded"] == 0
    assert 0 < data["tail"]["mask_l1"] <= data["tail"]["mask_bound"]


def test_bands_hold_all_and_keep_what_recall_says(both_steps, caplog):
    """Observes the dense run of the same noise, with the same rows, without the command or any warning."""
    _, data = both_steps
    plan, recalls = planned(read_config(WAN, SHORT)), []

    def look(seen):
        rows = sample_rows(seen.mask.grid, 9, seed=seen.step)
        recalls.append(recall(seen.query, seen.key, seen.mask, rows).mean())

    pipeline, config = Sampler(plan).load(), plan.config
    options = attention_arguments(config.attention) | {"dense_steps": 2}
    with apply_radial_attention(pipeline, **options, observe=look):
        sample(pipeline, config, [plan.prompts[0]], [config.generation.seed], output_type="latent")
    assert not caplog.records
    assert [band["frames"] for band in data["bands"]] == ["0", "1", "2"]
    assert sum(band["mass"] for band in data["bands"]) == pytest.approx(1, abs=1e-5)
    kept = sum(band["mass"] * band["kept"] for band in data["bands"])
    assert len(recalls) == 2 * 2 * 6 and kept == pytest.approx(torch.stack(recalls).mean().item(), abs=1e-5)
    assert sum(data["frames"]["kept"]) == pytest.approx(kept, abs=1e-5)
    assert kept < 0.999


def test_tables_and_picture(both_steps):
    folder, data = both_steps
    text = (folder / "a.md").read_text()
    assert text.splitlines()[2] == f"    {data['command']}"
    assert "![attention over temporal and spatial distance](a.png)" in text
    assert f"| temporal | {data['fits']['temporal']['a']:.4g} |" in text
    assert "| all | 100.00 |" in text and "The error exceeds the bound in 0 rows" in text
    for name in ("a.png", "a_heads.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_chosen_blocks_keep_more_than_the_mask(both_steps):
    """Draws heads from the one of which the mask keeps least to the one of which it keeps most."""
    folder, data = both_steps
    options = {entry["name"]: entry for entry in data["maps"]["options"]}
    radial = options.pop("radial")
    assert [*options] == [f"chosen, budget of a {name}" for name in ("head", "layer", "model")]
    for chosen in options.values():
        assert 1 > chosen["kept"] > radial["kept"] and 0 < chosen["left"] < radial["left"]
        assert chosen["left_far"] < radial["left_far"]
        assert f"| {chosen['name']} | {chosen['kept']:.3f} |" in (folder / "a.md").read_text()
    heads = data["maps"]["heads"]
    shares = [head["kept"]["static"] for head in heads]
    assert len(heads) == 6 and shares == sorted(shares)
    static = np.array(data["maps"]["static"], dtype=bool)
    for head in heads:
        mass = np.array(head["mass"])
        assert mass.shape == static.shape == (12, 12) and mass.sum(1) == pytest.approx(1, abs=1e-4)
        assert head["kept"]["static"] == pytest.approx(mass[static].sum() / mass.sum(), abs=1e-4)


def test_a_second_run_looks_only_at_what_is_new(both_steps, monkeypatch, capsys):
    folder, data = both_steps
    monkeypatch.setattr(Sampler, "load", lambda sampler: pytest.fail("nothing is missing"))
    assert analysed(folder, "--steps", "1", "2") == data
    assert "temporal: y = exp(-a x + b), a " in capsys.readouterr().out


def test_readings_follow_from_version_weights_loras_and_the_prompts_number(tmp_path, monkeypatch):
    lora, config = tmp_path / "lora.safetensors", read_config(WAN, SHORT)
    lora.write_bytes(b"1")
    plan, taken = planned(config), []
    config.model.loras = [LoraConfig(str(lora))]
    kept, empty = "scripts.evaluation.attention_run._kept", {kind: {} for kind in KINDS}
    monkeypatch.setattr(kept, lambda file: taken.append(file.name) or empty)

    def name(number: int = 0) -> str:
        gather(replace(plan, prompts={number: "a"}), Looks(), tmp_path)
        return taken[-1]

    first = name()
    assert name() == first and name(1) != first
    lora.write_bytes(b"2")
    second = name()
    assert second != first
    read, weights = Path.read_bytes, "diffusion_pytorch_model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == weights))
        assert name() != second
    assert name() == second
    monkeypatch.setattr("scripts.run.digest.RESULTS_VERSION", 0)
    assert name() != second


@pytest.mark.long
def test_prompts_add_up_and_those_that_are_there_stay(tmp_path, monkeypatch, capsys):
    """Averages two prompts; after an interruption only the second is observed."""
    words = ["--layers", "1", "--steps", "2", f"generation.prompt_file={tmp_path / 'prompts.txt'}"]
    (tmp_path / "prompts.txt").write_text("a red circle moving left on a black background\na blue square\n")
    look, looked = analyse_run._look, []

    def stopped(plan, pipeline, prompt, gatherer, **options):
        if looked:
            raise KeyboardInterrupt
        looked.append(prompt)
        return look(plan, pipeline, prompt, gatherer, **options)

    command = [*words, *SHORT, *FEW, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "a.md")]
    monkeypatch.setattr(analyse_run, "_look", stopped)
    assert main(command) == 130
    assert len(list((tmp_path / "work").iterdir())) == 1
    again = []
    monkeypatch.setattr(
        analyse_run, "_look", lambda *given, **options: again.append(given[2]) or look(*given, **options)
    )
    assert main(command) == 0 and again == ["a blue square"]
    file = min((tmp_path / "work").glob("*.pt"))
    whole = file.read_bytes()
    for damaged in (whole[:99], whole[: len(whole) // 2].ljust(len(whole), b"\0")):
        file.write_bytes(damaged)
        again.clear()
        assert main(command) == 0 and len(again) == 1
        assert f"note: {file} is damaged" in capsys.readouterr().out
    data = json.loads((tmp_path / "work" / "analysis.json").read_text())
    assert data["layers"] == [1] and len(data["prompts"]) == 2 and data["tail"]["rows"] == 2 * 2 * 4 * 2
    plan = planned(read_config(WAN, [words[-1], *SHORT]))
    profiles, *_ = gather(plan, Looks((2,), None, 9, 2, (1,)), tmp_path / "work")
    assert profiles[1].rows == 2 * 2 * 9


@pytest.mark.parametrize("config", [WAN, MOCHI])
def test_one_call_on_noise_at_a_timestep(config, tmp_path, monkeypatch):
    """Calls the transformer once, without guidance, at this timestep, on the run's noise."""
    calls, load = [], Sampler.load

    def watched(sampler):
        pipeline = load(sampler)
        note = lambda module, args, kwargs: calls.append(kwargs)  # noqa: E731
        pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
        return pipeline

    monkeypatch.setattr(Sampler, "load", watched)
    frames = "generation.num_frames=7" if config == MOCHI else "generation.num_frames=9"
    words = [*SHORT[1:], frames, *FEW, "--work", str(tmp_path), "--out", str(tmp_path / "a.md")]
    assert main([config, "--timestep", "300", *words]) == 0
    assert len(calls) == 1 and calls[0]["timestep"].tolist() == [300]
    assert calls[0]["hidden_states"].std().item() == pytest.approx(1, abs=0.1)
    data = json.loads((tmp_path / "analysis.json").read_text())
    assert data["timestep"] == 300 and data["steps"] == []
    assert data["tail"]["rows"] == 2 * sum(len(layer) for layer in data["heads"])
    assert [band["frames"] for band in data["bands"]][-1] == ("text" if config == MOCHI else "2")
    assert "one call on noise at timestep 300" in (tmp_path / "a.md").read_text()


def test_a_timestep_that_is_also_a_step_of_the_run(tmp_path):
    """Takes the second planned step of two."""
    plan = planned(read_config(WAN, SHORT))
    pipeline = Sampler(plan).load()
    pipeline.scheduler.set_timesteps(2)
    late = float(pipeline.scheduler.timesteps[1])
    profiles, *_ = gather(plan, Looks((), late, 9, 2), tmp_path)
    assert {int(profile.rows) for profile in profiles.values()} == {9}


def test_a_single_frame_has_no_temporal_fit(tmp_path):
    words = ["generation.num_frames=1", "--steps", "1", "--layers", "0"]
    out = ["--work", str(tmp_path), "--out", str(tmp_path / "a.md")]
    assert main([*SHORT, *words, *FEW, *out]) == 0
    data = json.loads((tmp_path / "analysis.json").read_text())
    assert data["fits"]["temporal"] == {"a": None, "b": None, "r2": None}
    assert data["fits"]["spatial"]["a"] is not None and data["fits"]["planar"]["a"] is not None
    assert [band["frames"] for band in data["bands"]] == ["0"]
    assert data["tail"]["l1"] == data["tail"]["bound"] == 0
    assert "| temporal | - | - | - | - | 0 of 4 |" in (tmp_path / "a.md").read_text()


def test_distances_that_no_row_has_are_null(tmp_path):
    """Takes one row, of the middle frame: no frame is further away than half the video."""
    query, key, _ = tensors(GRIDS[0])
    profile = measure(query, key, radial_mask(GRIDS[0], CONFIG), sample_rows(GRIDS[0], 1))
    result = thinned(profile.temporal_curve, 1)
    assert [math.isnan(value) for value in result["mean"]] == [False, False, False, True, True]
    written = json.loads(write_json(tmp_path / "a.json", result).read_text())
    assert written["mean"][3:] == [None, None] and written["heads"][0][2][3:] == [None, None]


def test_long_curves_are_thinned_but_for_their_start():
    curve = torch.arange(2.0 * 3600, dtype=torch.float64).view(2, 3600)
    result = thinned(curve, 2)
    distance = result["distance"]
    assert len(distance) <= 256 and distance[:20] == list(range(20)) and distance[-1] == 3599
    assert result["heads"][1][0] == [3600.0 + x for x in distance] and len(result["heads"]) == 2


def test_layers_are_stacked_head_by_head():
    query, key, _ = tensors(GRIDS[0])
    mask, rows = radial_mask(GRIDS[0], CONFIG), sample_rows(GRIDS[0], 9)
    one, two = measure(query, key, mask, rows), measure(key, query, mask, rows)
    whole = stacked([one, two])
    assert isinstance(whole, Profile) and whole.rows == one.rows
    assert torch.equal(whole.temporal_curve, torch.cat([one.temporal_curve, two.temporal_curve]))
    assert torch.equal(whole.column, torch.cat([one.column, two.column]))
