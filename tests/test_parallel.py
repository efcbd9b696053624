"""Several processes over gloo give what one gives: every family, radial and dense, guidance shared or not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from models import apply_radial_attention
from scripts.config import ROOT
from tests.families import SPARSE
from tests.tiny import wan_inputs, wan_transformer

MOST = 1e-5  # float32; relative to the largest value


DEGREES = [(2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 2, 1), (4, 1, 2)]


@pytest.mark.parametrize(("processes", "cfg", "ring"), DEGREES, ids=str)
def test_all_together_give_what_one_gives(processes, cfg, ring, tmp_path: Path):
    out = tmp_path / "differences.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [*launch, "-m", "tests.parallel_worker", str(out), str(cfg), str(ring)]
    result = subprocess.run(
        words, cwd=ROOT, check=False, capture_output=True, text=True, timeout=280, env=environment()
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(out.read_text())
    alone = 61 if processes == 2 else 29
    assert len(found) == (60 if ring > 1 else alone if cfg == 1 else 6)
    assert {name: worst for name, worst in found.items() if not worst <= MOST} == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8"}, "quantize: got 'int8', allowed in a ring: none"),
        ({"check": "reference"}, "check: got 'reference', allowed in a ring: auto, off, nan"),
        (
            {"dense_backend": "_native_math"},
            "dense_backend: got '_native_math', allowed in a ring: auto, native",
        ),
    ],
)
def test_what_a_ring_refuses(options, message):
    transformer = wan_transformer()
    with pytest.raises(ValueError, match=message):
        apply_radial_attention(transformer, SPARSE, parallel=SimpleNamespace(ring=object()), **options)
    with apply_radial_attention(transformer, SPARSE):
        transformer(**wan_inputs())


def environment() -> dict[str, str]:
    """One thread a process: there are more processes than cores."""
    return os.environ | {"OMP_NUM_THREADS": "1"}
