"""Backends and checks of outputs, through the command: refused before weights are loaded, or used."""

import json

import pytest
import torch

from radial_attn.models.runtime.output_check import MOST_ERROR
from scripts.generate import main
from scripts.run.config import read_config
from scripts.run.errors import UsageError
from scripts.run.sampler import Sampler
from tests.support.auto_backend import AUTO
from tests.support.failing_kernel import fail, one_nan, twice
from tests.support.plans import FULL, TINY, plan_of
from tests.support.script_cases import arguments, error_lines, refused

on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
REFUSED = {  # keys of attention -> how the line goes on after `attention.`
    "backend=triton": "backend: got 'triton', which ",
    "backend=flashinfer": "backend: got 'flashinfer', which needs flashinfer",
    "backend=blocks quantize=int8": "quantize: got 'int8': backend 'blocks' has no quantize='int8'; allowed "
    "here: none",
    "quantize=fp8": "quantize: got 'fp8': no backend serves this call: ",
    "dense_backend=flash": "dense_backend: got 'flash', which cannot be used here: ",
    "dense_backend=sage": "dense_backend: got 'sage', which ",
}


@on_the_cpu
@pytest.mark.parametrize("case", REFUSED)
def test_kernels_that_this_machine_lacks_are_refused_before_weights_are_loaded(
    case, tiny_model, tmp_path, capsys, monkeypatch
):
    message = f"attention.{REFUSED[case]}"
    monkeypatch.setattr(Sampler, "load", lambda self: pytest.fail("weights loaded"))
    argv = arguments(tiny_model, tmp_path / "out", *(f"attention.{word}" for word in case.split()))
    for more in ([], ["model.device=cpu", "--dry-run"]):
        line = refused(capsys, [*argv, *more], f"error: {message}")
    if case.startswith("backend=") and "blocks" not in case:
        assert f"; allowed here: auto, reference, {AUTO}" in line
    if case.startswith("dense_backend"):
        assert line.endswith("; allowed here: auto, native") and line.count("dense_backend") == 1
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--dry-run"]) == 0  # no GPU was asked for, so the plan may be for another machine
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "not on this machine" in line]
    assert note.startswith("note ") and message in note


def test_a_backend_that_is_never_called_is_not_checked():
    unused = (["attention.pattern=dense"], ["attention.dense_layers=40"], ["attention.dense_steps=50"])
    for overrides in unused:
        plan = plan_of(read_config(FULL, ["attention.backend=sage", "model.device=cpu", *overrides]))
        assert plan.missing == ()


def test_the_head_width_counts(tiny_model, monkeypatch):
    from radial_attn import dispatch as backends
    from radial_attn.kernels import flex

    monkeypatch.setattr(flex, "NEEDS", backends.Needs(widths=(64, 128)))
    overrides = ["attention.backend=flex", "model.device=cpu", f"model.path={tiny_model}"]
    with pytest.raises(UsageError, match=r"'flex', which takes head widths \(64, 128\), got 12; allowed"):
        plan_of(read_config(TINY, overrides))


@pytest.mark.parametrize("case", [("nan", one_nan), ("reference", one_nan), ("reference", twice)])
def test_a_failing_kernel_stops_the_run_without_a_file(case, tiny_model, tmp_path, capsys, monkeypatch):
    """The call that fails is layer 1 of the first half of guidance."""
    check, how = case
    fail(monkeypatch, 1, how)
    kind = "non-finite" if how is one_nan else "wrong"
    named = f"error: {kind} attention output in layer 1 at step 1 of 2, float32, backend blocks"
    line = refused(capsys, arguments(tiny_model, tmp_path / "out", f"attention.check={check}"), named)
    assert line.endswith("; no video written")
    assert not (tmp_path / "out").exists()


def test_a_failing_kernel_loses_one_prompt_not_the_rest(tiny_model, tmp_path, capsys, monkeypatch):
    """It fails in the second step of the second video: a video has 2 steps of 2 halves of 4 layers."""
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    fail(monkeypatch, 2 * 2 * 4 + 2 * 4 + 3, one_nan)
    argv = arguments(tiny_model, out, f"generation.prompt_file={prompts}", "attention.check=nan")
    assert main(argv) == 1
    (line,) = error_lines(capsys)
    assert line.startswith("error: line 2: non-finite attention output in layer 3 at step 2 of 2, ")
    assert sorted(file.name for file in out.iterdir()) == [
        f"{number:04d}_{name}_seed1.{kind}"
        for number, name in ((1, "a"), (3, "c"))
        for kind in ("json", "mp4")
    ]
    assert main([*argv[:-1], "attention.check=off"]) == 0  # the check changes no frame: only the second
    assert capsys.readouterr().out.count("is there already") == 2


def test_the_record_has_check_and_dense_backend(tiny_model, tmp_path, capsys):
    path = tmp_path / "a.mp4"
    overrides = ["check=reference", "dense_steps=1", "dense_backend=_native_math"]
    assert main(arguments(tiny_model, path, *(f"attention.{word}" for word in overrides))) == 0
    attention = json.loads(path.with_suffix(".json").read_text())["attention"]
    assert attention["check"]["compared"] == 4
    assert attention["check"]["worst"]["relative_l2"] < 1e-5 < MOST_ERROR
    assert attention["dense_backend"] == {"name": "_native_math", "backend": "_native_math", "seconds": {}}
    assert attention["quantize"] is None
    printed = capsys.readouterr().out
    assert printed.count("\ncheck layer") == 4
    assert "\ncheck      4 outputs against the reference, worst in layer " in printed


@on_the_cpu
def test_a_dense_backend_that_fails_is_named(tiny_model, tmp_path, capsys):
    """cuDNN's name is known everywhere and its kernel is not."""
    overrides = ["attention.dense_backend=_native_cudnn", "attention.dense_layers=1"]
    argv = arguments(tiny_model, tmp_path / "out", *overrides)
    refused(capsys, argv, "error: attention.dense_backend: got '_native_cudnn', which failed: ")
    assert not (tmp_path / "out").exists()
