"""Compiled blocks of transformers whose sequence is shared, run in tests/support/sharing_worker.py."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch._dynamo.testing import CompileCounter

from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.ulysses import SequenceParallel
from radial_attn.models.pipeline.efficiency import compile_blocks
from tests.support.families import SPARSE
from tests.support.tiny import wan_inputs, wan_transformer

STEPS = 3
FAMILIES = {
    "wan": (wan_transformer, lambda time: wan_inputs(5, 6, 14, timestep=time)),
}


@torch.no_grad()
def measure(group: torch.distributed.ProcessGroup) -> Iterator[tuple[str, dict[str, float]]]:
    """Relative difference from one process, not compiled, and graphs after each step of two videos."""
    parallel = SequenceParallel(group)
    for family, (make, inputs) in FAMILIES.items():
        torch._dynamo.reset()
        transformer, counter, differences, graphs = make(), CompileCounter(), [], []
        options = {"config": SPARSE, "dense_steps": 1, "dense_layers": 1}
        with apply_radial_attention(transformer, **options):
            expected = [transformer(**inputs(900.0 - 100 * step)).sample for step in range(STEPS)]
        compile_blocks(SimpleNamespace(transformer=transformer), backend=counter)
        with apply_radial_attention(transformer, **options, parallel=parallel):
            for step in [*range(STEPS)] * 2:
                output = transformer(**inputs(900.0 - 100 * step)).sample
                graphs.append(counter.frame_count)
                differences.append(
                    ((output - expected[step]).abs().max() / expected[step].abs().max()).item()
                )
        yield f"compile: {family}", {"difference": max(differences), "graphs": graphs}
