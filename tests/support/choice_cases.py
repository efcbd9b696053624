"""The backends that processes choose by time, run in tests/support/sharing_worker.py."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from radial_attn import TokenGrid, radial_mask
from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.ulysses import SequenceParallel
from radial_attn.models.runtime import dense_backend as dense
from scripts.run.process_groups import Groups
from tests.support.families import SPARSE, run
from tests.support.timed_backends import Costs
from tests.support.tiny import wan_inputs, wan_transformer


def timed(rank: int, names: tuple[str, ...], *call: Any) -> dict[str, float | None]:
    """Returns times by which another backend is the fastest in each process."""
    return {name: float(1 + (index + rank) % len(names)) for index, name in enumerate(names)}


def measure(group: torch.distributed.ProcessGroup) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what was measured, the times that are used, and the choice."""
    rank, groups = torch.distributed.get_rank(group), Groups(replica=group)
    before, dense.measure = dense.measure, partial(timed, rank)
    mask = radial_mask(TokenGrid(2, 4, 4), SPARSE)
    names = ("native", "_native_flash")
    try:
        call = (names, (1, 32, 2, 8), torch.float32, torch.device("cpu"), mask)
        name, times = dense.choose(*call, agree=groups.agree_on_video)
    finally:
        dense.measure = before
    yield "choice: dense backend", {"own": timed(rank, names), "times": times, "name": name}
    yield "choice: sparse backend", sparse(rank, group, groups)


def sparse(rank: int, group: torch.distributed.ProcessGroup, groups: Groups) -> dict[str, Any]:
    """Returns the backends of three runs, and the difference of the last one from dense attention.

    By its own times, each process would choose another backend. Before the second run only the first process
    still has its file; the third measures again, and dense attention is the fastest for the first process.
    """
    transformer, inputs, names = wan_transformer(num_layers=2), wan_inputs(5, 6, 14), []
    expected = run(transformer, inputs)
    options = {"parallel": SequenceParallel(group), "agree": groups.agree_on_video}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RADIAL_ATTN_CACHE", folder)
        fast = ("reference", "blocks")[rank]
        costs = Costs(patch, {"cpp": 3e-3, "reference": 2e-3, "blocks": 2e-3, "dense": 9e-3} | {fast: 1e-3})
        costs.charge_models(patch)
        for tune in ("once", "once", "always"):
            radial_mask.cache_clear()
            with apply_radial_attention(transformer, SPARSE, **options, tune=tune) as handle:
                output = run(transformer, inputs)
                names += [choice["backend"] for choice in handle.report()["tuning"]]
            for file in Path(folder).glob("choice-*") if rank else ():
                file.unlink()
            costs.seconds |= {} if rank else dict.fromkeys(("cpp", "reference", "blocks"), 60.0)
    dense = (output - expected).abs().max().item()
    return {"names": names, "own": fast, "dense": dense}
