"""Runs of LoRA training: stopped and gone on with, shared by processes, refused."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from radial_attn.models.lora.files import read_header
from scripts.lora import state as lora_state
from scripts.lora import train as train_lora
from scripts.lora import validation as lora_validation
from scripts.lora.checkpoint import Checkpoints
from scripts.lora.latents import LatentStore
from scripts.run.config import ROOT
from scripts.train_lora import main
from tests.support.lora_cases import FILE, adapter, launch_training, losses, same, train


def test_a_stopped_run_goes_on_to_the_same(lora_config, lora_run, tmp_path, monkeypatch):
    """Stopped inside a step after the second checkpoint, and once more before the first."""
    real = train_lora.train_step
    for place in (1, 4):

        def stopped(run, step, place=place):
            if step == place:
                raise KeyboardInterrupt
            return real(run, step)

        monkeypatch.setattr(train_lora, "train_step", stopped)
        assert train(lora_config, tmp_path) == 130
    monkeypatch.setattr(train_lora, "train_step", real)
    assert train(lora_config, tmp_path) == 0
    assert same(tmp_path, lora_run)
    assert Checkpoints(tmp_path, {}, 3).steps() == [2, 4, 6]


def test_a_killed_run_goes_on_to_the_same(lora_config, lora_run, tmp_path):
    words = [sys.executable, "-m", "scripts.train_lora", str(lora_config), f"output.path={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not Checkpoints(tmp_path, {}, 3).steps():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train(lora_config, tmp_path) == 0 and same(tmp_path, lora_run)


@pytest.mark.parametrize("words", [("train.ema=0.5",), ("lora.dropout=0.5",), ("train.checkpointing=true",)])
def test_every_kind_of_run_goes_on_to_the_same(lora_config, tmp_path, words, monkeypatch):
    assert train(lora_config, tmp_path / "whole", *words) == 0
    real = train_lora.train_step

    def stopped(run, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(run, step)

    monkeypatch.setattr(train_lora, "train_step", stopped)
    assert train(lora_config, tmp_path / "cut", *words) == 130
    monkeypatch.setattr(train_lora, "train_step", real)
    assert train(lora_config, tmp_path / "cut", *words) == 0
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_processes_draw_what_one_does_that_accumulates(lora_config, tmp_path):
    """Two processes with videos of their own, two that share one, and one process."""
    cases = {"own": [], "shared": ["train.accumulate=2", "parallel.ulysses_degree=2"]}
    assert train(lora_config, tmp_path / "one", "train.accumulate=2", "train.steps=3") == 0
    for name, keys in cases.items():
        launch_training(str(lora_config), f"output.path={tmp_path / name}", "train.steps=3", *keys)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        one, many = adapter(tmp_path / "one"), adapter(tmp_path / name)
        assert all(torch.allclose(one[key], many[key], atol=1e-4) for key in one)


def test_numbers_that_are_not_finite(lora_config, tmp_path, monkeypatch, capsys):
    real = LatentStore.load

    def broken(self, i):
        video, text = real(self, i)
        return (video * math.nan, text) if i == 5 else (video, text)

    monkeypatch.setattr(LatentStore, "load", broken)
    assert train(lora_config, tmp_path / "some") == 0
    entries = [json.loads(line) for line in (tmp_path / "some" / "log.jsonl").read_text().splitlines()]
    assert 0 < entries[-1]["skipped"] < 6
    assert all(torch.isfinite(x).all() for x in adapter(tmp_path / "some").values())
    monkeypatch.setattr(LatentStore, "load", lambda self, i: (real(self, i)[0] * math.nan, real(self, i)[1]))
    assert train(lora_config, tmp_path / "all", "train.most_skipped=2") == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert "not finite in 3 steps in a row" in line


def test_a_full_disk_leaves_the_checkpoint_before(lora_config, tmp_path, monkeypatch, capsys):
    assert train(lora_config, tmp_path, "train.steps=6", "train.save_every=2") == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("state.pt")}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    assert train(lora_config, tmp_path, "train.steps=8", "output.accept_changes=true") == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert (
        "step_000008 cannot be written (No space left on device); the checkpoint before it is whole" in line
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("state.pt")} == before
    assert not list(tmp_path.glob(".step*"))


def test_another_configuration_is_refused(lora_config, lora_run, capsys, tmp_path):
    assert train(lora_config, lora_run, "train.rate=1e-3", "lora.rank=8") == 2
    line = capsys.readouterr().err
    assert "holds a run with other settings (lora.rank 4 -> 8, train.rate 0.01 -> 0.001)" in line
    assert train(lora_config, lora_run, "train.rate=1e-3", "lora.rank=8", "output.accept_changes=true") == 2
    line = capsys.readouterr().err
    assert "output.path" in line and "(lora.rank 4 -> 8)" in line and "another folder\n" in line
    assert train(lora_config, lora_run, "validation.every=2") == 2  # other samples to learn from
    assert "samples" in capsys.readouterr().err
    assert train(lora_config, lora_run, "output.keep=9") == 0  # nothing that changes what is learnt


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.sizes=13x48x64", "has 0 clips of data.sizes"),
        ("output.path=README.md", "output.path: got 'README.md'"),
        ("parallel.ulysses_degree=2", "parallel.ulysses_degree: got 2, must divide"),
        ("model.path=assets/wan-tiny", "another vae"),
    ],
)
def test_what_does_not_go_with_the_latents_is_one_line(lora_config, tmp_path, word, message, capsys):
    assert train(lora_config, tmp_path / "out", word) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_command_line(lora_config, capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "configs/train/hunyuan_4x.yaml" in text and "lora.targets=to_q,to_k,to_v,to_out.0" in text
    assert main([str(lora_config), "--dry-run"]) == 0
    assert "rank 4 on to_q, to_k, to_v, to_out.0: 3,072 trainable parameters" in capsys.readouterr().out


def test_the_newest_adapter_is_there_whenever_a_run_stops(lora_config, lora_run, tmp_path, monkeypatch):
    """Stopped between the last checkpoint and its adapter, and then called again."""
    real = lora_state.write_adapter

    def stopped(run, folder, step):
        if step == 6:
            raise KeyboardInterrupt
        real(run, folder, step)

    monkeypatch.setattr(lora_state, "write_adapter", stopped)
    assert train(lora_config, tmp_path) == 130
    monkeypatch.setattr(lora_state, "write_adapter", real)
    assert train(lora_config, tmp_path) == 0 and same(tmp_path, lora_run)
    assert read_header(tmp_path / FILE).trained["step"] == 6


def test_a_mean_that_begins_late_begins_with_the_adapter(lora_config, tmp_path):
    words = ["train.steps=4", "output.accept_changes=true"]
    assert train(lora_config, tmp_path, *words) == 0
    before = adapter(tmp_path)
    assert train(lora_config, tmp_path, *words, "train.ema=0.999") == 0
    assert all(torch.equal(x, before[name]) for name, x in adapter(tmp_path).items())


def test_best_is_never_one_that_is_not_finite(lora_config, tmp_path, monkeypatch):
    found = iter([2.0, math.nan, 3.0])
    monkeypatch.setattr(lora_validation, "validation_loss", lambda run: next(found))
    assert train(lora_config, tmp_path, "validation.every=2") == 0
    assert read_header(tmp_path / "best" / FILE).trained["step"] == 2
    assert '"validation_loss": null' in (tmp_path / "log.jsonl").read_text()


def test_processes_without_a_clip_to_validate_on_do_not_wait(lora_config, tmp_path):
    words = [str(lora_config), f"output.path={tmp_path}", "train.steps=2", "train.batch=1"]
    words += ["validation.every=1", "validation.samples=1"]
    launch_training(*words, by_torchrun=True)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(entry["validation_loss"] > 0 for entry in entries)
