"""What the compiler makes of the Triton kernels at the sizes of real videos, without a GPU."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from radial_attn import TokenGrid
from radial_attn.kernels.triton.configs import KINDS, LAUNCHES
from scripts.benchmarks.cases import CASES
from scripts.kernel_report import main
from tests.support.compiled_kernels import compiled

pytest.importorskip("triton")
SMALL = replace(CASES["wan-69"], heads=12, grid=TokenGrid(21, 30, 52))  # Wan2.1-1.3B, 81 frames, 480 x 832
VIDEOS = {"wan-1.3b": SMALL} | {name: CASES[name] for name in ("wan-69", "hunyuan-117", "mochi-163")}


def test_the_hot_loop_holds_three_buffers_and_copies_no_tile():
    """On Hopper keys and values arrive two tiles ahead, and the tensor cores read them where they lie."""
    case = CASES["hunyuan-117"]
    (kernel,) = compiled("sm90", "forward", case.mask, case.heads, 128)
    assert kernel.faults == []
    assert kernel.tiles.loops == 2  # whole tiles, and those with padded text
    assert kernel.tiles.buffers == 3 and kernel.tiles.moved == 0
    assert 0 < kernel.loop["barriers"] <= 3 and kernel.loop["tensor"] == 16


@pytest.mark.long
@pytest.mark.parametrize("video", VIDEOS)
@pytest.mark.parametrize("arch", ["sm89", "sm90"])
def test_every_kernel_at_real_sizes(arch, video):
    """Nothing spills, shared memory suffices, and nothing that a call passes stops the compiler."""
    case = VIDEOS[video]
    for kind in KINDS:
        kernels = compiled(arch, kind, case.mask, case.heads, 128)
        assert {kernel.variant.kind for kernel in kernels} >= {kind} - {"key gradients"}
        assert [(kernel.variant.kind, kernel.faults) for kernel in kernels if kernel.faults] == []
        assert kind == "far field" or all(k.tiles.buffers >= 2 for k in kernels if k.variant.kind in KINDS)


@pytest.mark.long
@pytest.mark.parametrize("arch", LAUNCHES)
def test_every_kernel_compiles_without_spills(arch, tmp_path, capsys):
    """All variants of the launch table, as in results/kernels_compiled.md."""
    files = ["--out", str(tmp_path / "report.md"), "--speed", str(tmp_path / "speed.md")]
    assert main(["--arch", arch, *files]) == 0, capsys.readouterr().err
    rows = (tmp_path / "report.md").read_text().splitlines()
    kinds = {row.split(" | ")[1] for row in rows if row.startswith(f"| {arch} |")}
    assert kinds >= {"forward", "far field", "query gradient", "key gradients", "int8", "row products"}
    assert ("fp8" in kinds) == (("fp8", 64) in LAUNCHES[arch])


def test_an_interrupted_report_is_one_line(tmp_path):
    options = ["--arch", "sm90", "--out", str(tmp_path / "a.md")]
    command = [sys.executable, "-m", "scripts.kernel_report", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not tasks.read_text().split():
            time.sleep(0.1)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate()[1] == "interrupted; nothing was written\n"
    assert process.returncode == 130 and not list(tmp_path.iterdir())
