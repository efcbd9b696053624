"""Triton: the interpreted tests in a process of their own, what compiles, and what is refused."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from radial_attn import radial_attention
from radial_attn.backends import Call, obstacle
from scripts.config import ROOT
from scripts.kernel_report import LAUNCHES, main
from tests.attention_cases import GRIDS, compare, make_inputs, make_mask

triton = pytest.importorskip("triton")


def test_interpreted():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_triton_interpreted.py",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=290
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


@pytest.mark.parametrize("arch", LAUNCHES)
def test_compiles_without_spills_for(arch, tmp_path, capsys):
    assert main(["--arch", arch, "--out", str(tmp_path / "report.md")]) == 0, capsys.readouterr().err
    assert (tmp_path / "report.md").read_text().count(f"| {arch} |") == 12


CALL = Call(torch.device("cuda"), torch.float16, 64, gradients=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "takes float16 and bfloat16, got torch.float32"),
        ({"width": 80}, r"takes head widths (64, 96, 128), got 80"),
        ({"device": torch.device("cpu")}, "runs on cuda, got a tensor on cpu"),
    ],
)
def test_what_the_kernels_do_not_serve_is_named(change, message):
    assert obstacle("triton", replace(CALL, **change)) == message


def test_a_named_backend_raises():
    tensors = [x.half() for x in make_inputs(GRIDS[63], 1, 1, 64)[:3]]
    with pytest.raises(ValueError, match="backend 'triton' runs on cuda, got a tensor on cpu"):
        radial_attention(*tensors, make_mask(GRIDS[63]), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"text_lengths": [4, 7]}], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("block_size", [16, 128])
def test_on_a_gpu(block_size, width, dtype, options):
    mask = make_mask(GRIDS[111], block_size)
    compare("triton", make_inputs(mask.grid, 2, 3, width), mask, dtype, device="cuda", **options)
