"""Several processes over gloo give what one gives: every family, radial and dense, guidance shared or not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.config import ROOT

MOST = 1e-5  # float32; relative to the largest value


@pytest.mark.parametrize(("processes", "cfg"), [(2, 1), (2, 2), (4, 1), (4, 2)], ids=str)
def test_all_together_give_what_one_gives(processes, cfg, tmp_path: Path):
    out = tmp_path / "differences.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [*launch, "-m", "tests.parallel_worker", str(out), str(cfg)]
    result = subprocess.run(
        words, cwd=ROOT, check=False, capture_output=True, text=True, timeout=280, env=environment()
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(out.read_text())
    assert len(found) == (60 if cfg == 1 else 6)
    assert {name: worst for name, worst in found.items() if not worst <= MOST} == {}


def environment() -> dict[str, str]:
    """One thread a process: there are more processes than cores."""
    return os.environ | {"OMP_NUM_THREADS": "1"}
