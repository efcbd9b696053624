"""Where torch.compile cannot make kernels: one line, before anything is loaded or lost."""

import pytest
import torch

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.kernels import compiler
from radial_attn.kernels.compiler import compiler_problem
from scripts import generate, train_tiny

TINY = "configs/wan_tiny.yaml"
SPACED = "needs folders without a space on cpu, got '/opt/my models/torch': install in another folder"


@pytest.fixture
def spaced(monkeypatch, tmp_path):
    """Makes a machine with a compiler, and with torch in a folder whose name has a space."""
    program = tmp_path / "g++"
    program.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setattr(compiler, "_linked_folders", lambda: ["/opt/python", "/opt/my models/torch"])


def test_folders_of_the_linker_are_looked_at(monkeypatch, tmp_path):
    """Torch's own, and the folder of compiled kernels, wherever it is told to be."""
    folders = compiler._linked_folders()
    assert folders[0] == torch.__path__[0]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a b"))
    spaced = [folder for folder in compiler._linked_folders() if " " in folder]
    assert spaced[-1] == str(tmp_path / "a b")
    assert repr(spaced[0]) in compiler_problem("cpu")


def test_a_space_matters_on_the_cpu_only(spaced, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", str(tmp_path / "g++"))
    assert compiler_problem("cuda") is None
    assert "without a space" in compiler_problem("cpu")


def test_nothing_is_missing_where_folders_have_no_space(spaced, monkeypatch):
    monkeypatch.setattr(compiler, "_linked_folders", lambda: ["/opt/torch"])
    assert compiler_problem("cpu") is None


def test_no_compiler_and_no_triton(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CXX", "CC"):
        monkeypatch.delenv(variable, raising=False)
    assert compiler_problem("cpu") == "a compiler on cpu, but none was found: apt install g++"
    monkeypatch.setattr(compiler, "find_spec", lambda name: object())
    assert compiler_problem("cuda") == "a compiler on cuda, but none was found: apt install gcc"
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert compiler_problem("cuda") == "Triton on CUDA: pip install triton"


def test_flex_is_refused(spaced):
    grid = TokenGrid(2, 4, 4)
    mask = radial_mask(grid, RadialConfig(block_size=16))
    inputs = torch.zeros(3, 1, grid.tokens, 1, 16)
    with pytest.raises(ImportError, match=f"backend 'flex' {SPACED}, or use backend='blocks'"):
        radial_attention(*inputs, mask, backend="flex")


def test_a_compiled_run_is_refused_before_its_model_is_read(spaced, tmp_path, capsys):
    arguments = ["model.compile=blocks", "model.device=cpu", f"output.path={tmp_path / 'a.mp4'}"]
    assert generate.main([TINY, *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"error: model.compile: got 'blocks', which {SPACED}; allowed here: none"
    assert not list(tmp_path.glob("a.*"))


def test_the_small_models_are_trained_uncompiled_unless_told(spaced, capsys):
    arguments = ["--device", "cpu"]
    assert not train_tiny.parse(arguments).compile
    with pytest.raises(SystemExit):
        train_tiny.parse([*arguments, "--compile"])
    assert f"--compile {SPACED}" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:0"])
def test_the_small_models_refuse_a_device_that_is_not_here(device, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        train_tiny.parse(["--device", device])
    assert stop.value.code == 2
    assert f"--device: got {device!r}, must be cpu" in capsys.readouterr().err
