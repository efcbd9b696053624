"""LoRA training with shared weights: it learns exactly what training with whole weights does.

Weights are gathered as they were stored, and the same DDP averages the gradients. So results are equal bit by
bit, and nothing here has a tolerance.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline

from scripts.lora import plan as planning
from scripts.lora.config import SCHEMA
from scripts.lora.plan import TrainPlan, plan_training
from scripts.lora.validation import shares
from scripts.run.errors import UsageError
from scripts.train_lora import main
from tests.support.long import all_but
from tests.support.lora_cases import (
    adapter,
    cut,
    launch_training,
    log,
    make_latents,
    same,
    train,
    write_config,
)
from tests.support.multi_process import run_ranks
from tests.support.tiny_hunyuan import hunyuan_pipeline

SHARD = "parallel.shard=fsdp"
VALIDATION = ["train.ema=0.5", "validation.every=2", "validation.samples=3", "validation.videos=1"]


def run_of(config: Path, folder: Path, shard: str, *words: str) -> Path:
    """Trains in two processes and returns the run's folder."""
    launch_training(str(config), f"output.path={folder / shard}", f"parallel.shard={shard}", *words)
    return folder / shard


def pair(config: Path, folder: Path, *words: str) -> tuple[Path, Path]:
    """Trains with whole and with shared weights and returns both folders."""
    return run_of(config, folder, "none", *words), run_of(config, folder, "fsdp", *words)


@pytest.fixture(scope="module")
def whole(lora_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains in two processes with whole weights, a mean, validation and a video."""
    return run_of(lora_config, tmp_path_factory.mktemp("whole"), "none", *VALIDATION)


@pytest.fixture(scope="module")
def shared(lora_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Does the same with shared weights."""
    return run_of(lora_config, tmp_path_factory.mktemp("shared"), "fsdp", *VALIDATION)


@pytest.mark.long
def test_shared_weights_give_what_whole_ones_give(tmp_path):
    """Outputs and gradients of every family are equal, with and without checkpointing; each has half.

    One block is whole at a time; in the backward of Wan-VACE two are, as it has two stacks.
    """
    out = tmp_path / "results.json"
    run_ranks(2, "tests.support.sharding_worker", out)
    results = json.loads(out.read_text())
    assert len(results) == 11
    for name, everyone in results.items():
        for one in everyone:
            assert one["equal"] == [True] * 3, name
            assert one["adapter"] and one["names"], name
            assert one["blocks"] == (2 if name == "wan_vace, checkpointing" else 1), name
            assert abs(one["held"] / one["total"] - 1 / 2) < 0.01, name  # some rows 2 does not divide


def test_the_adapter_loads_in_plain_diffusers(shared, tiny_model):
    pipeline = WanPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(shared)
    loaded = {name: x for name, x in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(adapter(shared)) and all(x.abs().sum() > 0 for x in loaded.values())


def test_two_processes_learn_the_same(whole, shared):
    assert same(whole, shared)
    for name in ("gradient_norm", "validation_loss"):
        one, other = ([entry.get(name) for entry in log(run)] for run in (whole, shared))
        assert one == other and any(value is not None for value in one)
    for part in ("best", "videos/000006"):
        one, other = (sorted((run / part).iterdir()) for run in (whole, shared))
        assert [file.name for file in one] == [file.name for file in other] != []
    one, other = (next((run / "videos/000006").glob("*.mp4")) for run in (whole, shared))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("begun", all_but(["shared"], ["shared", "whole"]))
def test_a_stopped_run_ends_the_same(lora_config, shared, tmp_path, begun, request):
    """Both if it shared its weights from the first step, and if it did not."""
    folder = cut(request.getfixturevalue(begun), tmp_path / "cut", 2)
    launch_training(str(lora_config), f"output.path={folder}", SHARD, *VALIDATION)
    assert same(folder, shared)


@pytest.mark.long
def test_bfloat16_and_numbers_that_are_not_finite(tiny_model, tmp_path):
    """Norms stay in float32; blocks are recomputed; two batches make an update; one clip is NaN.

    All processes skip a step that one of them must skip.
    """
    latents = make_latents(tiny_model, tmp_path / "latents", broken=5)
    config = write_config(tmp_path / "tiny.yaml", tiny_model, latents)
    words = ["model.dtype=bfloat16", "train.checkpointing=true", "train.accumulate=2", "train.batch=1"]
    one, other = (log(run) for run in pair(config, tmp_path, *words))
    assert 0 < other[-1]["skipped"] < 6
    for name in ("loss", "gradient_norm", "skipped"):
        assert [entry[name] for entry in one] == [entry[name] for entry in other]
    first, second = adapter(tmp_path / "none"), adapter(tmp_path / "fsdp")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_hunyuan_video_with_a_video_shared_too(tmp_path):
    """It has Ulysses over the same processes, two kinds of blocks, masked text, and a video at validation."""
    hunyuan_pipeline().save_pretrained(tmp_path / "model")
    latents = make_latents(tmp_path / "model", tmp_path / "latents", "hunyuan_video")
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "model", latents, "hunyuan_video")
    words = ["train.steps=2", "validation.every=2", "validation.samples=1", "validation.videos=1"]
    words += ["parallel.ulysses_degree=2", "train.checkpointing=true"]
    assert same(*pair(config, tmp_path, *words))
    assert len(list((tmp_path / "fsdp" / "videos" / "000002").glob("*.mp4"))) == 1


def test_processes_that_share_weights_take_equally_many_samples():
    config = SimpleNamespace(parallel=SimpleNamespace(shard="fsdp"))
    runs = [SimpleNamespace(config=config, rank=rank, world=3) for rank in range(3)]
    taken = [list(shares(run, 4)) for run in runs]
    assert taken == [[(0, True), (3, True)], [(1, True), (3, False)], [(2, True), (3, False)]]
    config.parallel.shard = "none"
    assert [list(shares(run, 4)) for run in runs] == [[(0, True), (3, True)], [(1, True)], [(2, True)]]


def test_sharding_in_one_process_is_refused(lora_config, tmp_path, capsys):
    assert train(lora_config, tmp_path / "out", "parallel.shard=fsdp") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: parallel.shard: got 'fsdp'") and "NPROC=2" in line
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_weights_as_shared(lora_config, monkeypatch, capsys):
    """A process has a quarter of them, and two of the four blocks whole at a time."""
    plan = plan_training(SCHEMA.read(str(lora_config), [SHARD]), dry_run=True)
    assert plan.model.layers == 4 and plan.adapter == 3072
    whole = 4 * plan.model.parameters["transformer"]
    assert needed(plan) == pytest.approx(needed(whole_of(plan)))  # one process
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert needed(plan) == pytest.approx(needed(whole_of(plan)) + (1 / 4 + 2 / 4 - 1) * whole)
    for count, word, text in (
        ("4", "parallel.ulysses_degree=1", "shared by 4 processes"),
        ("1", "parallel.ulysses_degree=8", "shared by 8 processes"),
        ("1", "parallel.ulysses_degree=1", "whole, shared from NPROC=2 on"),
    ):
        monkeypatch.setenv("WORLD_SIZE", count)
        assert main([str(lora_config), SHARD, word, "--dry-run"]) == 0
        assert f"weights    {text}" in capsys.readouterr().out


def test_room_is_checked_for_shared_weights(lora_config, monkeypatch):
    """Weights of 4 GiB, in 16 blocks, need more than is free if whole, and less if eight share them."""
    config = SCHEMA.read(str(lora_config), [SHARD, "model.device=cpu"])
    plan = plan_training(config, dry_run=True)
    plan = replace(plan, model=replace(plan.model, layers=16, parameters={"transformer": 2**30}))
    monkeypatch.setattr(planning, "room", lambda device: 3 * 2**30)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert planning.memory_warnings(plan) == ()
    with pytest.raises(UsageError, match=r"about 4\.5 GiB, .*3\.0 GiB are free .* parallel\.shard=fsdp"):
        planning.memory_warnings(whole_of(plan))
    (warning,) = planning.memory_warnings(replace(whole_of(plan), device="cuda"))  # not measured there
    assert warning.startswith("memory may be short: ")
    assert "4.0 GiB" in warning and "3.0 GiB are free" in warning


def whole_of(plan: TrainPlan) -> TrainPlan:
    """Returns the plan of the same run with all weights in every process."""
    config = plan.config
    return replace(plan, config=replace(config, parallel=replace(config.parallel, shard="none")))


def needed(plan: TrainPlan) -> float:
    """Returns the predicted bytes of a process."""
    return plan.memory(plan.sizes[0])
