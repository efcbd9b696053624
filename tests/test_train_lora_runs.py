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

from scripts import train_lora
from scripts.config import ROOT
from scripts.latents import LatentStore
from scripts.lora_checkpoint import Checkpoints
from scripts.train_lora import main
from tests.lora_cases import adapter, losses, same, train


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
    assert Checkpoints(tmp_path, 3).steps() == [2, 4, 6]


def test_a_killed_run_goes_on_to_the_same(lora_config, lora_run, tmp_path):
    words = [sys.executable, "-m", "scripts.train_lora", str(lora_config), f"output.path={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not Checkpoints(tmp_path, 3).steps():
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
    cases = {"own": ("2", []), "shared": ("2", ["train.accumulate=2", "parallel.ulysses_degree=2"])}
    assert train(lora_config, tmp_path / "one", "train.accumulate=2", "train.steps=3") == 0
    for name, (count, keys) in cases.items():
        words = ["--module=scripts.train_lora", str(lora_config), f"output.path={tmp_path / name}", *keys]
        settings = {"NPROC": count, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-P", "-m", "scripts.launch", *words, "train.steps=3"]
        subprocess.run(
            command, cwd=ROOT, check=True, env=os.environ | settings, capture_output=True, timeout=200
        )
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
    assert train(lora_config, lora_run, "output.keep=9") == 0  # nothing that changes what is learnt


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.sizes=[]", "data.sizes: got [], allowed: at least one"),
        ("data.sizes=10x48x64", "data.sizes: 10x48x64: generation.num_frames: got 10, allowed: 4k + 1"),
        ("data.sizes=13x48x64", "has 0 clips of data.sizes"),
        ("data.latents=/nowhere", "has no index.json"),
        ("lora.targets=to_z", "lora.targets: got 'to_z', allowed in WanTransformer3DModel: "),
        ("lora.dropout=1", "lora.dropout: got 1, allowed: a number from 0 to below 1"),
        ("lora.rank=0", "lora.rank: got 0, allowed: whole number of at least 1"),
        ("train.ema=1", "train.ema: got 1, allowed: a number from 0 to below 1"),
        ("train.rat=1", "unknown key 'train.rat'"),
        ("train.optimizer=adamw8bit", "which needs a GPU; allowed here: adamw"),
        ("model.expert=2", "model.expert: got 2, allowed: 1, the model has one transformer"),
        ("attention.backend=flex", "allowed here, with gradients: reference, blocks"),
        ("attention.dense_layers=9", "attention.dense_layers: got 9, allowed: 0 to 4"),
        ("parallel.ulysses_degree=2", "allowed: what divides 1 processes"),
        ("model.path=assets/wan-tiny", "latents were made with another vae"),
    ],
)
def test_bad_input_is_one_line(lora_config, tmp_path, word, message, capsys):
    assert train(lora_config, tmp_path / "out", word) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_command_line(lora_config, capsys):
    assert main([]) == 2 and "one configuration, got none" in capsys.readouterr().err
    assert main([str(lora_config), "--quick"]) == 2 and "unknown option '--quick'" in capsys.readouterr().err
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "configs/train/hunyuan_4x.yaml" in text and "lora.targets=to_q,to_k,to_v,to_out.0" in text
    assert main([str(lora_config), "--dry-run"]) == 0
    assert "rank 4 on to_q, to_k, to_v, to_out.0: 3,072 trainable parameters" in capsys.readouterr().out
