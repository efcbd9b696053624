"""Runs of LoRA training: stopped and resumed, in several processes, refused."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from radial_attn.models.lora.files import read_header
from scripts.lora import checkpoint
from scripts.lora import train as train_lora
from scripts.lora import validation as lora_validation
from scripts.lora.checkpoint import Checkpoints
from scripts.lora.latents import LatentStore
from scripts.lora.step import Run
from scripts.run.config import ROOT
from scripts.train_lora import as_line
from tests.support.lora_cases import FILE, adapter, cut, launch_training, log, losses, same, train


def train_until(last: int, config: Path, out: Path, *words: str) -> None:
    """Trains, and stops at the beginning of step `last` as Ctrl-C does."""
    real = train_lora.train_step

    def stopped(run: Run, step: int) -> dict[str, float]:
        if step == last:
            raise KeyboardInterrupt
        return real(run, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lora, "train_step", stopped)
        assert train(config, out, *words) == 130


def test_a_stopped_run_ends_the_same(lora_config, lora_run, tmp_path):
    """It stops before the first checkpoint, and again after the second."""
    for step in (1, 4):
        train_until(step, lora_config, tmp_path)
    assert train(lora_config, tmp_path) == 0
    assert same(tmp_path, lora_run)
    assert Checkpoints(tmp_path, {}, 3).steps() == [2, 4, 6]


def test_a_killed_run_ends_the_same(lora_config, lora_run, tmp_path):
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
def test_every_kind_of_stopped_run_ends_the_same(lora_config, tmp_path, words):
    assert train(lora_config, tmp_path / "whole", *words) == 0
    train_until(3, lora_config, tmp_path / "cut", *words)
    assert train(lora_config, tmp_path / "cut", *words) == 0
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_two_processes_learn_what_one_does_that_accumulates(lora_config, tmp_path):
    """Both if each process has its own videos, and if two share one."""
    cases = {"own": [], "shared": ["train.accumulate=2", "parallel.ulysses_degree=2"]}
    assert train(lora_config, tmp_path / "one", "train.accumulate=2", "train.steps=3") == 0
    for name, keys in cases.items():
        launch_training(str(lora_config), f"output.path={tmp_path / name}", "train.steps=3", *keys)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        one, many = adapter(tmp_path / "one"), adapter(tmp_path / name)
        assert all(torch.allclose(one[key], many[key], atol=1e-4) for key in one)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the one error line of a command, which may have a progress bar before it."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_an_error_of_the_disk_names_the_file_if_there_is_one():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert as_line(full).startswith("output.path: cannot write (No space left on device); the last")
    full.filename = "a/log.jsonl"
    assert as_line(full).startswith("output.path: cannot write a/log.jsonl (No space left on device); the")


def test_steps_that_are_not_finite_are_skipped(lora_config, tmp_path, monkeypatch, capsys):
    real = LatentStore.load

    def broken(self, i):
        video, text = real(self, i)
        return (video * math.nan, text) if i in bad else (video, text)

    bad = {5}
    monkeypatch.setattr(LatentStore, "load", broken)
    assert train(lora_config, tmp_path / "some") == 0
    assert 0 < log(tmp_path / "some")[-1]["skipped"] < 6
    assert all(torch.isfinite(x).all() for x in adapter(tmp_path / "some").values())
    bad = range(8)
    assert train(lora_config, tmp_path / "all", "train.most_skipped=2") == 2
    assert "not finite in 3 steps in a row" in error_line(capsys)


def test_a_full_disk_leaves_the_checkpoint_before(lora_config, tmp_path, monkeypatch, capsys):
    assert train(lora_config, tmp_path, "train.steps=6", "train.save_every=2") == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("state.pt")}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    assert train(lora_config, tmp_path, "train.steps=8", "output.accept_changes=true") == 2
    line = error_line(capsys)
    assert "step_000008 cannot be written (No space" in line and "checkpoint before it is whole" in line
    assert {file: file.read_bytes() for file in tmp_path.rglob("state.pt")} == before
    assert not (tmp_path / "step_000008").exists()


def test_another_configuration_is_refused(lora_config, lora_run, capsys, tmp_path):
    assert train(lora_config, lora_run, "train.rate=1e-3", "lora.rank=8") == 2
    assert "other settings (lora.rank 4 -> 8, train.rate 0.01 -> 0.001)" in error_line(capsys)
    assert train(lora_config, lora_run, "train.rate=1e-3", "lora.rank=8", "output.accept_changes=true") == 2
    line = error_line(capsys)
    assert "output.path" in line and "(lora.rank 4 -> 8)" in line and line.endswith("another folder")
    assert train(lora_config, lora_run, "validation.every=2") == 2  # other samples to learn from
    assert "other clips, captions or held-out samples in data.latents" in error_line(capsys)
    assert train(lora_config, lora_run, "output.keep=9") == 0  # nothing that changes what is learnt


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.sizes=13x48x64", "has 0 clips of data.sizes"),
        ("validation.every=1 validation.samples=8", "has 8 clips of data.sizes, but validation.samples=8"),
        ("output.path=README.md", "output.path: got 'README.md'"),
        ("parallel.ulysses_degree=2", "parallel.ulysses_degree: got 2, must divide"),
        ("model.path=assets/wan-tiny", "another vae"),
    ],
)
def test_options_that_do_not_fit_the_latents_are_refused(lora_config, tmp_path, words, message, capsys):
    """A dry run says the same of the numbers of clips."""
    assert train(lora_config, tmp_path / "out", *words.split()) == 2
    line = error_line(capsys)
    assert message in line
    assert not (tmp_path / "out").exists()
    if "clips of" in message:
        assert train(lora_config, tmp_path / "out", *words.split(), "--dry-run") == 0
        assert line.replace("error: ", "note       ") in capsys.readouterr().out


@pytest.mark.parametrize("change", ["lacks 1 tensor of", "of shape"])
def test_a_transformer_that_is_not_whole_is_not_trained(change, lora_config, tiny_model, *, tmp_path, capsys):
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = "blocks.1.attn1.to_q.weight"
    whole = state.pop(name)
    save_file(state if "lacks" in change else state | {name: whole[1:].clone()}, file, {"format": "pt"})
    assert train(lora_config, tmp_path / "out", f"model.path={tmp_path / 'model'}") == 2
    line = error_line(capsys)
    assert "model.path" in line and "transformer" in line and change in line and name in line


def zeroed(file: Path) -> None:
    """Fills the second half with zeros, as a file system may after a loss of power."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def blank_second_line(file: Path) -> None:
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], bytes(len(lines[1])), *lines[2:]]))


def flipped(file: Path) -> None:
    """Changes a bit here and there."""
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 32, len(content), len(content) // 16):
        content[place] ^= 4
    file.write_bytes(content)


DAMAGES = {  # file in the folder of a run; its damage; part of the note, None without one
    "adapter cut": (FILE, halved, None),
    "adapter zeroed": (FILE, zeroed, None),
    "checkpoint cut": ("step_000004/state.pt", halved, "state.pt ("),
    "checkpoint zeroed": ("step_000004/state.pt", zeroed, "resuming from step 2"),
    "checkpoint empty": ("step_000004/state.pt", lambda file: file.write_bytes(b""), "resuming from step 2"),
    "checkpoint flipped": ("step_000004/state.pt", flipped, "resuming from step 2"),
    "log cut": ("log.jsonl", lambda file: file.write_bytes(file.read_bytes()[:-9]), "1 line of"),
    "log with NUL": ("log.jsonl", blank_second_line, "1 line of"),
    "settings cut": ("config.json", halved, "config.json cannot be read"),
    "settings gone": ("config.json", Path.unlink, "config.json cannot be read"),
    "parts of a killed run": ("step_000004/.state.pt.1.part", lambda file: file.write_bytes(b"x"), None),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_run_with_a_damaged_file_ends_the_same(case, lora_config, lora_run, *, tmp_path, capsys):
    """What a resumed run reads is made again, or the checkpoint before is taken."""
    folder = cut(lora_run, tmp_path / "run", 4)
    name, damage, note = DAMAGES[case]
    damage(folder / name)
    assert train(lora_config, folder) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(lines) == (note is not None) and all(note in line for line in lines)
    first, second = adapter(folder), adapter(lora_run)
    assert all(torch.equal(first[name], second[name]) for name in second)
    lost = {2} if case == "log with NUL" else set()  # what is past is not measured again
    assert {entry["step"] for entry in log(folder)} == {1, 2, 3, 4, 5, 6} - lost
    keys, expected = (json.loads((run / "config.json").read_text()) for run in (folder, lora_run))
    assert {key for key in expected if keys.get(key) != expected[key]} <= {"output.keep", "output.path"}
    assert not list(folder.rglob("*.part*"))


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(lora_config, lora_run, tmp_path, capsys):
    folder = cut(lora_run, tmp_path / "run", 4)
    for file in folder.rglob("state.pt"):
        halved(file)
    before = {
        file: file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "tensorboard" not in str(file)
    }
    assert train(lora_config, folder) == 2
    line = error_line(capsys)
    assert (
        "output.path: no checkpoint can be read: " in line and "remove their folders to begin again" in line
    )
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_damaged_best_adapter_is_written_again(lora_config, tmp_path, monkeypatch, capsys):
    validated = iter([2.0, 3.0, 2.5])
    monkeypatch.setattr(lora_validation, "validation_loss", lambda run: next(validated))
    assert train(lora_config, tmp_path, "validation.every=2", "train.steps=4", "train.schedule=constant") == 0
    halved(tmp_path / "best" / FILE)
    words = ["validation.every=2", "train.schedule=constant", "output.accept_changes=true"]
    assert train(lora_config, tmp_path, *words) == 0
    assert "the next validation writes it again" in capsys.readouterr().out
    assert read_header(tmp_path / "best" / FILE).trained["step"] == 6


def test_a_run_that_stops_before_its_adapter_writes_it_later(lora_config, lora_run, tmp_path, monkeypatch):
    """It stops between the last checkpoint and its adapter, and is then called again."""
    real = checkpoint.write_adapter

    def stopped(run, folder, step):
        if step == 6:
            raise KeyboardInterrupt
        real(run, folder, step)

    monkeypatch.setattr(checkpoint, "write_adapter", stopped)
    assert train(lora_config, tmp_path) == 130
    monkeypatch.setattr(checkpoint, "write_adapter", real)
    assert train(lora_config, tmp_path) == 0 and same(tmp_path, lora_run)
    assert read_header(tmp_path / FILE).trained["step"] == 6


def test_a_mean_that_is_turned_on_later_begins_with_the_adapter(lora_config, tmp_path):
    words = ["train.steps=4", "output.accept_changes=true"]
    assert train(lora_config, tmp_path, *words) == 0
    before = adapter(tmp_path)
    assert train(lora_config, tmp_path, *words, "train.ema=0.999") == 0
    assert all(torch.equal(x, before[name]) for name, x in adapter(tmp_path).items())


def test_best_ignores_a_loss_that_is_not_finite(lora_config, tmp_path, monkeypatch):
    validated = iter([2.0, math.nan, 3.0])
    monkeypatch.setattr(lora_validation, "validation_loss", lambda run: next(validated))
    assert train(lora_config, tmp_path, "validation.every=2") == 0
    assert read_header(tmp_path / "best" / FILE).trained["step"] == 2
    assert '"validation_loss": null' in (tmp_path / "log.jsonl").read_text()


@pytest.mark.long
def test_processes_without_a_clip_to_validate_on_do_not_wait(lora_config, tmp_path):
    words = ["train.steps=2", "train.batch=1", "validation.every=1", "validation.samples=1"]
    launch_training(str(lora_config), f"output.path={tmp_path}", *words, by_torchrun=True)
    assert all(entry["validation_loss"] > 0 for entry in log(tmp_path))
