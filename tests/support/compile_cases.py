"""Compiled blocks of transformers whose sequence is shared, run in tests/support/sharing_worker.py."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch._dynamo.testing import CompileCounter

from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.ulysses import SequenceParallel
from radial_attn.models.pipeline.efficiency import compile_blocks
from tests.support.families import BY_NAME, SPARSE, run

STEPS = 3


def measure(group: torch.distributed.ProcessGroup) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields the relative difference from one uncompiled process, and graphs after each step."""
    parallel, wan = SequenceParallel(group), BY_NAME["wan"]
    torch._dynamo.reset()
    transformer, counter, differences, graphs = wan.transformer(), CompileCounter(), [], []
    calls = [wan.inputs(5, 6, 14, timestep=900.0 - 100 * step) for step in range(STEPS)]
    options = {"config": SPARSE, "dense_steps": 1, "dense_layers": 1}
    with apply_radial_attention(transformer, **options):
        expected = [run(transformer, inputs) for inputs in calls]
    compile_blocks(SimpleNamespace(transformer=transformer), backend=counter)
    with apply_radial_attention(transformer, **options, parallel=parallel):
        for inputs, output in zip(2 * calls, 2 * expected, strict=True):
            actual = run(transformer, inputs)
            graphs.append(counter.frame_count)
            differences.append(((actual - output).abs().max() / output.abs().max()).item())
    yield "compile: wan", {"difference": max(differences), "graphs": graphs}
