"""Kernels of FlashAttention-4 exported to files, and called without the package that compiled them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from radial_attn.kernels.flash4 import library
from scripts import export_flash4
from scripts.benchmarks.flash4_kernels import KINDS, wanted
from scripts.run.files import sha256

ROOT = Path(__file__).parents[2]


def test_every_mask_has_its_kernels():
    """Without a mask, and with one for blocks of 64 and of 128 or 256, shared or for each head."""
    calls = wanted((9, 0), [None], [64, 128], list(KINDS))
    assert len(calls) == len(set(calls)) == 2 * 2 * 5
    assert {(call.block_size, call.heads) for call in calls} == {
        *((None, False), (64, False), (64, True), (256, False), (256, True))
    }


ABOUT = {"format": 1, "package": "flash-attn-4 1", "capability": [9, 0], "compiler": "x 1"}


@pytest.mark.parametrize(
    ("index", "names", "noted"),
    [
        (None, [], False),
        (ABOUT, ["a"], False),
        (ABOUT | {"compiler": "x 2"}, [], True),
        (ABOUT | {"kernels": [1]}, [], True),
        (ABOUT | {"kernels": {"a": {}}}, [], True),
        ([], [], True),
    ],
)
def test_whole_kernels_of_an_earlier_export_stay_in_the_index(tmp_path, capsys, index, names, noted):
    for name in ("a", "cut"):
        (tmp_path / f"{name}.so").write_bytes(name.encode())
    entries = {name: {"file": f"{name}.so", "sha256": sha256(tmp_path / "a.so")} for name in ("a", "cut")}
    entries["absent"] = entries["a"] | {"file": "absent.so"}
    if index is not None:
        whole = {"kernels": entries} | index if index else index
        (tmp_path / "flash4.json").write_text(json.dumps(whole))
    kept = export_flash4.earlier(tmp_path, ABOUT)
    assert kept == {name: entries[name] for name in names}
    assert capsys.readouterr().out.startswith("note: ") == noted


@pytest.mark.long
@pytest.mark.skipif(export_flash4.problem() is not None, reason=f"flash4 {library.problem()}")
def test_exported_kernels_take_all_lengths_without_the_package(tmp_path):
    """They check every argument before they look for a driver, which is not there."""
    for kind in KINDS:
        command = [sys.executable, "-m", "scripts.export_flash4", "--out", str(tmp_path), "--width", "64"]
        command += ["--kind", kind]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    kernels = json.loads((tmp_path / "flash4.json").read_text(encoding="utf-8"))["kernels"]
    assert len(kernels) == 10 and all(
        (tmp_path / x["file"]).stat().st_size < 200_000 for x in kernels.values()
    )
    lengths = ["1000", "129", "128", "1"]
    command = [sys.executable, "-m", "tests.support.flash4_files", str(tmp_path), *lengths]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(lengths) * (5 + 5 * 3)
    assert all(line.endswith("Got Cuda Runtime Error: no driver no driver") for line in lines), done.stdout
