"""Tests denoising steps of the GPU benchmark on tiny models on the CPU."""

import sys

import pytest
import torch

from radial_attn.models.apply import TRANSFORMERS
from scripts.benchmarks.cases import CASES, STEPS, Task, shrink
from scripts.benchmarks.steps import StepBench
from tests.support.fake_cuda import fake_cuda


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_denoising_step_block_by_block(name, dtype):
    bench, case, spec = StepBench("cpu", dtype, tiny=True), shrink(CASES[name]), STEPS[name]
    dense = bench.run(Task("step", case, "dense", dense="sdpa"))
    kinds = dict.fromkeys(spec.counts, spec.built)
    assert {where: len(times) for where, times in dense["blocks_ms"].items()} == kinds
    assert dense["attention_calls"] == sum(kinds.values())
    assert 0 < dense["attention_ms"] < sum(sum(times) for times in dense["blocks_ms"].values()) < dense["ms"]
    task = Task("step", case, "radial", using="blocks", dense="sdpa")
    if spec.name not in TRANSFORMERS:
        with pytest.raises(ValueError, match="has no fork of"):
            bench.run(task)
        return
    radial = bench.run(task)
    assert radial["using"] == "blocks" and radial["attention_calls"] == sum(kinds.values())


@pytest.mark.parametrize("name", [pytest.param("wan-69", marks=pytest.mark.long), "hunyuan-509"])
def test_a_denoising_step_of_real_size(name, monkeypatch):
    """Runs on fake CUDA tensors: "cuda:0" has neither events nor memory here, so times are the host's."""
    monkeypatch.setattr(torch, "isfinite", lambda x: torch.tensor([True]))
    case, spec = CASES[name], STEPS[name]
    with fake_cuda() as mode:
        mode.watching, bench = "step", StepBench("cuda:0", torch.bfloat16, tiny=False)
        dense = bench.run(Task("step", case, "dense", dense="sdpa"))
        radial = bench.run(Task("step", case, "radial", using="triton", dense="sdpa"))
    assert dense["attention_calls"] == radial["attention_calls"] == spec.built * len(spec.blocks)
    ffn = {"wan-69": 13_824, "hunyuan-509": 12_288}[name]
    assert mode.largest[0] <= 2 * 2 * case.grid.tokens * ffn, mode.largest[1]


def test_stand_ins_for_attention_are_taken_back():
    bench, case = StepBench("cpu", torch.float32, tiny=True), shrink(CASES["wan-69"])
    bench.run(Task("step", case, "radial", using="blocks", dense="flash"))
    module = sys.modules["diffusers.models.transformers.transformer_wan"]
    upstream = sys.modules["diffusers.models.attention_dispatch"]
    assert module.dispatch_attention_fn is upstream.dispatch_attention_fn
    assert not [hook for block in bench._model.blocks for hook in block._forward_hooks]


def test_the_whole_models_have_the_shape_of_the_released_ones():
    """Counts parameters on the meta device."""
    counts = {"wan-69": 14_288_491_584, "hunyuan-117": 12_821_012_544}
    for name, count in counts.items():
        spec = STEPS[name]
        model = StepBench("meta", torch.bfloat16, False)._build(spec, CASES[name], spec.counts)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
