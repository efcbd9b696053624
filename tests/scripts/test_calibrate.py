"""Tests the making of profiles: resumed after Ctrl-C, the same file, and its use."""

from pathlib import Path

import pytest
import torch

from radial_attn.models.profile import ModelProfile
from scripts.calibrate import divided, main, second_expert
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


@pytest.mark.parametrize(
    ("steps", "count", "boundary", "expected"),
    [
        (8, 4, None, [0, 0, 1, 1, 2, 2, 3, 3]),
        (5, 2, None, [0, 0, 0, 1, 1]),
        (8, 4, 3, [0, 0, 0, 1, 2, 2, 3, 3]),
        (8, 1, 3, [0] * 8),
        (20, 4, 13, [0] * 5 + [1] * 5 + [2] * 3 + [3] * 7),
    ],
)
def test_parts_are_equal_and_never_mix_experts(steps, count, boundary, expected):
    parts = divided(steps, count, boundary)
    assert parts == expected
    assert boundary is None or count == 1 or parts[boundary - 1] != parts[boundary]


def test_the_second_expert_begins_a_part():
    words = ["generation.steps=10", "generation.flow_shift=5.0", "attention.dense_steps=0"]
    plan = make_plan(read_config("configs/wan2.2_t2v_a14b.yaml", words), dry_run=True)
    first = second_expert(plan)
    assert plan.sigmas[first] < 0.875 <= plan.sigmas[first - 1]
    assert second_expert(make_plan(read_config("configs/wan_tiny.yaml", []), dry_run=True)) is None


def test_other_weights_are_told(tmp_path, monkeypatch):
    _, file = calibrated(tmp_path)
    monkeypatch.setattr("scripts.run.plan.model_digest", lambda path, files: "other")
    words = ["attention.selection=profile", f"attention.profile={file}"]
    with pytest.raises(ValueError, match="measured on another model: other weights; make one for it"):
        make_plan(read_config("configs/wan_tiny.yaml", words), dry_run=True)
