"""The dense backend that processes choose by time, run in tests/support/sharing_worker.py."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from radial_attn import TokenGrid, radial_mask
from radial_attn.models.runtime import dense_backend as dense
from scripts.run.process_groups import Groups
from tests.support.families import SPARSE


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
