"""Whole models that take their branches for CUDA, on CPU tensors that pretend to be on a GPU."""

import logging
from types import SimpleNamespace

import pytest
import torch

from radial_attn import radial_mask
from radial_attn.models import apply_radial_attention
from radial_attn.models.pipeline.efficiency import place
from radial_attn.models.runtime import dense_backend
from tests.support.families import FAMILIES, SPARSE, assert_near, run
from tests.support.pretended_cuda import OnGpu, on_gpu, pretended_cuda
from tests.support.timed_backends import Costs

QUICK = ("wan", "hunyuan_video")
CASES = [pytest.param(x, id=x.name, marks=[pytest.mark.long] * (x.name not in QUICK)) for x in FAMILIES]


@pytest.mark.parametrize("family", CASES)
def test_a_model_on_a_gpu_gives_what_it_gives_on_a_cpu(family, monkeypatch, caplog, tmp_path):
    """Times dense kernels, slices padded text off, measures sparse ones and keeps the times."""
    caplog.set_level(logging.INFO, logger="radial_attn")
    monkeypatch.setenv("RADIAL_ATTN_CACHE", str(tmp_path))
    monkeypatch.setattr(dense_backend, "CANDIDATES", ("native", "_native_math"))
    transformer = family.transformer()
    calls = [family.sized(timestep=time, **family.samples[-1]) for time in (900.0, 500.0, 100.0)]
    calls = calls[::-1] if family.rises else calls
    options = {"dense_steps": 1, "dense_layers": 1, "check": "reference"}
    with apply_radial_attention(transformer, SPARSE, **options, backend="blocks"):
        expected = [run(transformer, call) for call in calls]
    costs = Costs(monkeypatch, {"flex": 1e-3, "blocks": 2e-3, "reference": 3e-3, "dense": 9e-3})
    costs.charge_models(monkeypatch)
    radial_mask.cache_clear()
    with (
        pretended_cuda(monkeypatch) as mode,
        apply_radial_attention(transformer, SPARSE, **options) as handle,
    ):
        there = [
            {name: on_gpu(x) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
            for call in calls
        ]
        outputs = [run(transformer, call) for call in there]
        report = handle.report()
    assert mode.asked and all(isinstance(output, OnGpu) for output in outputs)
    for output, want in zip(outputs, expected, strict=True):
        assert_near(output.as_subclass(torch.Tensor), want)
    (tuned,) = report["tuning"]
    assert costs.seconds.keys() <= tuned["seconds"].keys() and report["calls"].keys() == {"dense", "flex"}
    assert len(list(tmp_path.glob("choice-*.json"))) == 1
    assert any(line.startswith("backend flex for ") for line in caplog.messages)


def test_offload_names_the_gpu_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    named: dict[str, str] = {}
    for device in ("cuda", "cpu"):
        place(SimpleNamespace(enable_model_cpu_offload=named.update), device, "model")
        assert named == {"device": "cuda:3" if device == "cuda" else "cpu"}
