"""Failures during a run: memory, disk, network, Ctrl-C, numbers that are not finite."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from scripts.generate import main
from scripts.run.config import ROOT, read_config
from scripts.run.errors import GenerationError
from scripts.run.hub_models import HUB_MODELS
from scripts.run.plan import make_plan
from scripts.run.sampler import Sampler
from scripts.run.system import available_memory, room
from tests.support.long import all_but
from tests.support.plans import TINY
from tests.support.script_cases import arguments, error_lines, refused

MOVES = 2**25  # what other programs take between two readings of free memory
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


def start(
    argv: list[str], limits: str = "", command: list[str] = COMMAND, **environment: str
) -> subprocess.Popen:
    """Starts the command in its own process, under limits as the shell's `ulimit` takes them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    shell = ["bash", "-c", f'{limits and f"ulimit {limits}; "}exec "$@"', "bash"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*shell, *command, *argv], env=environment, cwd=ROOT, **pipes)


def last_line(process: subprocess.Popen, code: int = 2) -> str:
    """Returns the last line on stderr; checks the exit code, and that only progress is printed before."""
    try:
        errors = process.communicate(timeout=800)[1]
    finally:
        process.kill()
    lines = re.split(r"[\r\n]+", errors.strip())
    assert process.returncode == code
    assert not [line for line in lines[:-1] if line.strip() and "denoising" not in line], lines
    return lines[-1]


@pytest.mark.parametrize(
    "path", all_but(["nobody/nothing"], ["nobody/nothing", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"])
)
def test_a_hub_id_out_of_reach(path, tmp_path):
    if path in HUB_MODELS and room("cpu") < 16 * 2**30:  # its memory is known, and checked first
        pytest.skip("less than 16 GiB of memory are free")
    argv = arguments(path, tmp_path / "out", "model.dtype=bfloat16")
    line = last_line(start(argv, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub")))
    assert all(word in line for word in ("error: ", "model.path", path, "hub", "configs/wan_tiny.yaml"))
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_on_the_way(tiny_model, tmp_path):
    small = ["generation.steps=1", "generation.guidance_scale=1", "attention.pattern=dense"]
    sizes = ["generation.height=512", "generation.width=512"]
    argv = arguments(tiny_model, tmp_path / "out", *small, *sizes)
    line = last_line(start(argv, command=[sys.executable, "-c", SHORT_OF_MEMORY]))
    assert line.startswith("error: out of memory: generation.height=512") and "would fit: generation." in line
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_disk_without_room_for_the_video(tiny_model, tmp_path):
    line = last_line(start(arguments(tiny_model, tmp_path / "out"), limits="-f 2"))
    assert line.startswith("error: output.path: cannot write") and "room" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_full_disk_stops_a_prompt_file(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cab\nabc\nbac\n")
    argv = arguments(tiny_model, tmp_path / "out", f"generation.prompt_file={prompts}")
    process = start(argv, limits="-f 2")
    errors = re.split(r"[\r\n]+", process.communicate(timeout=800)[1])
    first, *others = [line for line in errors if line.startswith("error")]
    assert process.returncode == 1 and first.startswith("error: line 1: output.path: cannot write")
    assert [line.split(",")[0] for line in others] == [f"error: line {n}: not tried" for n in (2, 3)]
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.long
def test_interrupting_leaves_no_partial_file(tiny_model, tmp_path):
    argv = arguments(tiny_model, tmp_path / "out", "generation.steps=100000", "attention.pattern=dense")
    process = start(argv)
    seen = ""
    while "step" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    assert last_line(process, 130).startswith("interrupted")
    assert not (tmp_path / "out").exists()


def smaller_text_encoder(model: Path, folder: Path, **changes: int) -> Path:
    """Returns the tiny model with another text encoder: one that knows fewer letters, or of another width."""
    shutil.copytree(model, folder)
    settings = UMT5Config.from_pretrained(folder / "text_encoder")
    UMT5EncoderModel(UMT5Config(**settings.to_dict() | changes)).save_pretrained(folder / "text_encoder")
    return folder


def test_a_pipeline_that_fails_loses_one_prompt_not_the_rest(tiny_model, tmp_path, capsys):
    """Letters from 'e' on are beyond the encoder's vocabulary, for which torch raises IndexError."""
    model, out = smaller_text_encoder(tiny_model, tmp_path / "model", vocab_size=8), tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("bad\nzzz\ncab\n")
    capsys.readouterr()  # what made the encoder's files printed
    assert main(arguments(model, out, f"generation.prompt_file={prompts}")) == 1
    (line,) = error_lines(capsys)
    assert line.startswith("error: line 2: the pipeline failed with IndexError: ")
    assert sorted(file.name for file in out.glob("*.mp4")) == ["0001_bad_seed1.mp4", "0003_cab_seed1.mp4"]


def test_a_failure_outside_the_op_is_not_the_backends(tiny_model, tmp_path, capsys):
    model = smaller_text_encoder(tiny_model, tmp_path / "model", d_model=24)
    refused(
        capsys, arguments(model, tmp_path / "out"), "error: the pipeline failed with RuntimeError: ", "shapes"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex needs the C++ compiler on the CPU")
def test_a_failure_of_the_op_names_the_backend(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    argv = arguments(tiny_model, tmp_path / "out", "attention.backend=flex")
    refused(capsys, argv, "error: attention.backend: got 'flex', which failed: ", "compiler")


def test_a_shortage_is_recognised_and_the_loaded_model_is_not_counted_twice(tiny_model):
    """The message is cuBLAS's. Memory that this process holds counts as room for the run."""
    overrides = [f"model.path={tiny_model}", "model.device=cpu"]
    config = read_config(TINY, [*overrides, "generation.height=512", "generation.width=512"])
    sampler = Sampler(make_plan(config, dry_run=True))
    held = torch.ones(2**27, dtype=torch.uint8)
    with (
        pytest.raises(GenerationError, match=r"would fit: generation\.") as raised,
        sampler.reporting_memory(),
    ):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert "out of memory: generation.height=512" in str(raised.value)
    assert room("cpu") >= available_memory("cpu") + 0.9 * held.nbytes - MOVES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_memory_that_torch_has_reserved_is_room_for_a_run():
    before, held = room("cuda"), torch.ones(2**30, dtype=torch.uint8, device="cuda")
    assert room("cuda") > before - held.nbytes / 2


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
    refused(capsys, argv, "error: non-finite latents after step 1 of 2", pattern)
    assert not (tmp_path / "out").exists()
