"""What can go wrong on the way: memory, disk, network, Ctrl-C, numbers that are not finite."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.config import ROOT
from scripts.generate import main

TINY = "configs/wan_tiny.yaml"
SHORT = ["generation.steps=2", "generation.num_frames=5"]
COMMAND = [sys.executable, "-P", "-m", "scripts.generate"]


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from diffusers import WanPipeline
from scripts.generate import main
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 450 * 2**20,) * 2)
sys.exit(main(sys.argv[1:]))
"""


def arguments(model: Path, output: Path, *overrides: str) -> list[str]:
    return [TINY, f"model.path={model}", f"output.path={output}", *SHORT, *overrides]


def start(
    argv: list[str], limits: str = "", command: list[str] = COMMAND, **environment: str
) -> subprocess.Popen:
    """The command in a process of its own, under limits as the shell's `ulimit` takes them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    shell = ["bash", "-c", f'{limits and f"ulimit {limits}; "}exec "$@"', "bash"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*shell, *command, *argv], env=environment, cwd=ROOT, **pipes)


def last_line(process: subprocess.Popen) -> str:
    """The last line on stderr; no traceback, and nothing but progress before it."""
    try:
        errors = process.communicate(timeout=200)[1]
    finally:
        process.kill()
    lines = re.split(r"[\r\n]+", errors.strip())
    assert not [line for line in lines[:-1] if line.strip() and "denoising" not in line], lines
    return lines[-1]


@pytest.mark.parametrize("path", ["nobody/nothing", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"])
def test_a_hub_id_out_of_reach(path, tmp_path):
    argv = [TINY, *SHORT, "model.dtype=bfloat16", f"model.path={path}", f"output.path={tmp_path / 'out'}"]
    process = start(argv, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    line = last_line(process)
    assert process.returncode == 2
    assert all(word in line for word in ("error: ", "model.path", path, "hub", "configs/wan_tiny.yaml"))
    assert not (tmp_path / "out").exists()


def test_a_plan_whose_mask_is_too_large(tiny_model, tmp_path, capsys):
    sizes = ["generation.height=8192", "generation.width=8192", "generation.num_frames=4093"]
    assert main(arguments(tiny_model, tmp_path / "out", *sizes, "--dry-run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: attention.block_size=16 on") and "256" in line


def test_memory_that_runs_out_on_the_way(tiny_model, tmp_path):
    small = ["generation.steps=1", "generation.guidance_scale=1", "attention.pattern=dense"]
    sizes = ["generation.height=512", "generation.width=512"]
    argv = arguments(tiny_model, tmp_path / "out", *small, *sizes)
    process = start(argv, command=[sys.executable, "-c", SHORT_OF_MEMORY])
    line = last_line(process)
    assert process.returncode == 2
    assert line.startswith("error: out of memory: generation.height=512") and "would fit: generation." in line
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_video(tiny_model, tmp_path):
    process = start(arguments(tiny_model, tmp_path / "out"), limits="-f 2")
    line = last_line(process)
    assert process.returncode == 2
    assert line.startswith("error: output.path: cannot write") and "room" in line
    assert not (tmp_path / "out").exists()


def test_interrupting_leaves_no_partial_file(tiny_model, tmp_path):
    argv = arguments(tiny_model, tmp_path / "out", "generation.steps=100000", "attention.pattern=dense")
    process = start(argv)
    deadline = time.monotonic() + 120
    seen = ""
    while "step" not in seen and time.monotonic() < deadline:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    assert last_line(process).startswith("interrupted")
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dense_steps", "pattern"), [(0, "pattern radial, backend blocks"), (1, "pattern dense")]
)
def test_non_finite_latents_stop_at_their_step(dense_steps, pattern, tiny_model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"] = torch.full_like(weights["proj_out.bias"], float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    argv = arguments(folder, tmp_path / "out", f"attention.dense_steps={dense_steps}")
    assert main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: non-finite latents after step 1 of 2") and pattern in line
    assert not (tmp_path / "out").exists()
