"""Tests the making of profiles: resumed after Ctrl-C, the same file, and its use."""

from pathlib import Path

import pytest
import torch

from radial_attn.models.profile import ModelProfile
from scripts.calibrate import main
from scripts.evaluation import attention_run
from scripts.run.config import read_config
from scripts.run.plan import make_plan

SHORT = ["generation.num_frames=9", "generation.steps=2", "model.device=cpu", "--parts", "2"]


def calibrated(folder: Path, *words: str) -> tuple[int, Path]:
    """Runs a command on two prompts; returns its exit code and the file of the profile."""
    (folder / "prompts.txt").write_text("a red circle moving around on a black background\na blue square\n")
    file = folder / "profile.safetensors"
    options = [f"generation.prompt_file={folder / 'prompts.txt'}", "--work", str(folder / "work")]
    return main([*words, *SHORT, *options, "--out", str(file)]), file


def test_an_interrupted_calibration_goes_on(tmp_path, monkeypatch, capsys):
    look, looked = attention_run._look, []

    def stopped(plan, pipeline, prompt, callback, **options):
        looked.append((prompt, options["seed"]))
        if len(looked) == 2:
            raise KeyboardInterrupt
        return look(plan, pipeline, prompt, callback, **options)

    monkeypatch.setattr(attention_run, "_look", stopped)
    code, file = calibrated(tmp_path)
    assert code == 130 and not file.exists() and "run the same command to resume" in capsys.readouterr().err
    assert calibrated(tmp_path) == (0, file)
    assert [prompt for prompt, _ in looked[1:]] == ["a blue square"] * 2 and looked[0][1] != looked[1][1]
    profile = ModelProfile.read(file)
    assert profile.model.layers == 6 and profile.model.heads == 4 and profile.about["prompts"] == 2
    assert 1 > profile.edges[0] > 0.99 > profile.edges[1] > 0 and profile.frequencies[0] == 1.0
    out = capsys.readouterr().out
    assert f"attention.profile={file}" in out and "3 frames by 4 positions" in out
    (tmp_path / "other").mkdir()
    _, again = calibrated(tmp_path / "other")
    assert torch.equal(ModelProfile.read(again).basis, profile.basis)
    words = ["attention.selection=profile", f"attention.profile={file}", "attention.density=0.21"]
    plan = make_plan(read_config("configs/wan_tiny.yaml", words), dry_run=True)
    assert plan.density == pytest.approx(0.21) and plan.dense_steps == ()


def test_other_weights_are_told(tmp_path, monkeypatch):
    _, file = calibrated(tmp_path)
    monkeypatch.setattr("scripts.run.plan.model_digest", lambda path: "other")
    words = ["attention.selection=profile", f"attention.profile={file}"]
    with pytest.raises(ValueError, match="measured on another model: other weights; make one for it"):
        make_plan(read_config("configs/wan_tiny.yaml", words), dry_run=True)
