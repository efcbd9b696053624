"""Several processes over gloo give what one gives: every family, radial and dense, guidance shared or not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.guidance import GuidanceParallel
from radial_attn.models.parallel.ring import Ring
from tests.support import exchange_cost
from tests.support.families import SPARSE
from tests.support.multi_process import run_ranks
from tests.support.tiny import wan_inputs, wan_transformer
from tests.support.tiny_cosmos import cosmos_transformer
from tests.support.tolerances import MOST

DEGREES = [
    (2, 1, 1),
    (2, 2, 1),
    *(pytest.param(4, 1, ring, marks=pytest.mark.long) for ring in (1, 2)),
    (4, 2, 1),
]


@pytest.mark.parametrize(("processes", "cfg", "ring"), DEGREES, ids=str)
def test_all_together_give_what_one_gives(processes, cfg, ring, tmp_path: Path):
    out = tmp_path / "differences.json"
    run_ranks(processes, "tests.support.parallel_worker", out, cfg, ring)
    results = json.loads(out.read_text())
    alone = 139 if processes == 2 else 63
    assert len(results) == (127 if ring > 1 else alone if cfg == 1 else 9)
    assert {name: worst for name, worst in results.items() if not worst <= MOST} == {}


def test_guidance_that_is_not_shared():
    with pytest.raises(ValueError, match=r"cannot share the guidance of CosmosTransformer3DModel: .* tokens"):
        GuidanceParallel([cosmos_transformer()], None)


def test_tensors_travel_together():
    """Counts collectives: one to the heads, one back; results/ulysses_2026-11-30.md has bytes and copies."""
    for case in exchange_cost.CASES.values():
        assert exchange_cost.count(case)["exchanges"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "ring .*quantize='int8'.*without quantization"),
        ({"check": "reference"}, "ring .*check='reference'.*allowed: auto, off, nan"),
        ({"far_field": "mean"}, "ring .*far_field='mean'.*allowed: selection='static'"),
        ({"residual": "int8"}, "ring .*residual='int8'"),
        ({"dense_backend": "_native_math"}, "ring .*dense_backend='_native_math'.*allowed: auto, native"),
    ],
)
def test_what_a_ring_refuses(options, message):
    transformer = wan_transformer()
    with pytest.raises(ValueError, match=message):
        apply_radial_attention(transformer, SPARSE, parallel=SimpleNamespace(ring=Ring), **options)
    with apply_radial_attention(transformer, SPARSE):
        transformer(**wan_inputs())
