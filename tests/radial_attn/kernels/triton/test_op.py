"""Triton: the interpreted tests in a process of their own, and what is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from radial_attn import radial_attention
from radial_attn.analysis.sampled_error import output_error
from radial_attn.dispatch import obstacle
from radial_attn.kernels.contract import Call
from tests.support.attention_cases import GRIDS, compare, make_inputs, make_mask
from tests.support.far_cases import some_mask

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("marks", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_interpreted(marks):
    files = [f"tests/radial_attn/kernels/triton/test_{name}.py" for name in ("interpreted", "quantized")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--timeout=600",
        "-m",
        marks,
        *files,
    ]
    options = {"cwd": ROOT, "env": os.environ | {"TRITON_INTERPRET": "1"}, "timeout": 890}
    result = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


CALL = Call(torch.device("cuda"), torch.float16, 64, gradients=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"far_field": "linear", "gradients": True}, None),
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
@pytest.mark.parametrize("quantize", [None, "int8", "fp8"])
def test_cuda_graph(quantize):
    """A captured call gives, on new values in the same memory, what a call gives."""
    mask = make_mask(GRIDS[1000], 128)
    tensors = [x.half().cuda() for x in make_inputs(mask.grid, 1, 3, 128)[:3]]

    def call() -> torch.Tensor:
        return radial_attention(*tensors, mask, backend="triton", quantize=quantize)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for tensor in tensors:
        tensor.normal_()
    graph.replay()
    assert torch.equal(captured, call())


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "most"), [("int8", 0.05), ("fp8", 0.08)])
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("block_size", [16, 128])
def test_quantized_on_a_gpu(block_size, width, bits, most):
    mask = make_mask(GRIDS[1000], block_size)
    tensors = [x.bfloat16().cuda() for x in make_inputs(mask.grid, 2, 3, width)[:3]]
    actual, defined, exact = (
        radial_attention(*tensors, mask, backend=name, quantize=quantize, text_lengths=[4, 10])
        for name, quantize in (("triton", bits), ("reference", bits), ("reference", None))
    )
    assert output_error(actual, exact).relative_l2 < most
    assert output_error(actual, defined).relative_l2 < most


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("block_size", [16, 128])
def test_far_field_on_a_gpu(block_size, width):
    grid = GRIDS[1000]
    *inputs, grad = (x.bfloat16() for x in make_inputs(grid, 2, 3, width))
    mask = some_mask(grid, block_size, 3)
    options = {"far_field": "linear", "text_lengths": [4, 10]}
    results = []
    for backend, device in (("triton", "cuda"), ("blocks", "cpu")):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        out = radial_attention(*leaves, mask, backend=backend, **options)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(device))])
    for actual, wanted in zip(*results, strict=True):
        assert output_error(actual.cpu(), wanted).relative_l2 < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"text_lengths": [4, 7]}], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("block_size", [16, 128])
def test_on_a_gpu(block_size, width, dtype, options):
    mask = make_mask(GRIDS[111], block_size)
    compare("triton", make_inputs(mask.grid, 2, 3, width), mask, dtype, device="cuda", **options)
