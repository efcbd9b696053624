"""Several processes: degrees, refusals, shared prompts, and how all end when one does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import imageio
import numpy as np
import psutil
import pytest

from radial_attn.models.parallel.groups import Degrees
from scripts.generate import main
from scripts.launch import machines
from scripts.run.config import ROOT, ParallelConfig, read_config
from scripts.run.describe import describe_degrees
from scripts.run.errors import UsageError
from scripts.run.model_info import ModelInfo
from scripts.run.parallel import plan_degrees
from scripts.run.plan import RunPlan
from scripts.run.process_groups import Groups
from tests.support.plans import TINY, plan_of
from tests.support.script_cases import SHORT


def chosen(processes: int, *, heads: int = 4, halves: int = 2, prompts: int = 1, **given: int) -> Degrees:
    """Chooses the degrees for so many heads and halves of guidance; `given`: keys of `parallel`."""
    options = {"heads": heads, "calls": halves, "processes": processes, "prompts": prompts}
    return plan_degrees(ParallelConfig(**given), **options)


def planned(processes: int, *overrides: str, heads: int = 4, **options: object) -> RunPlan:
    """Plans a run of several processes."""
    return plan_of(
        read_config(TINY, list(overrides)), ModelInfo(2, heads, 8, 64), processes=processes, **options
    )


@pytest.mark.parametrize(
    ("processes", "heads", "halves", "expected"),
    [
        (1, 40, 2, Degrees()),
        (2, 40, 2, Degrees(cfg=2)),
        (3, 40, 2, Degrees(data=3)),
        (4, 40, 2, Degrees(cfg=2, ulysses=2)),
        (5, 40, 2, Degrees(ulysses=5)),
        (6, 40, 2, Degrees(cfg=2, data=3)),
        (8, 40, 2, Degrees(cfg=2, ulysses=4)),
        (16, 40, 2, Degrees(cfg=2, ulysses=8)),
        (1, 24, 1, Degrees()),
        (2, 24, 1, Degrees(ulysses=2)),
        (5, 24, 1, Degrees(data=5)),
        (8, 24, 1, Degrees(ulysses=8)),
        (16, 24, 1, Degrees(ulysses=8, data=2)),
        (24, 24, 1, Degrees(ulysses=24)),
    ],
)
def test_guidance_first_then_heads_then_prompts(processes, heads, halves, expected):
    assert chosen(processes, heads=heads, halves=halves, prompts=processes) == expected
    assert expected.processes == processes


def test_given_degrees_stay_and_the_rest_is_chosen():
    assert chosen(8, ulysses_degree=4) == Degrees(ulysses=4, cfg=2)
    assert chosen(4, cfg_degree=1) == Degrees(ulysses=4)
    assert chosen(4, prompts=5, data_degree=2) == Degrees(cfg=2, data=2)
    assert chosen(3, ulysses_degree=3) == Degrees(ulysses=3)  # heads filled up
    assert chosen(4, ring_degree=2) == Degrees(ring=2, cfg=2)
    assert chosen(8, halves=1, ring_degree=2) == Degrees(ulysses=4, ring=2)
    assert chosen(6, halves=1, ulysses_degree=3, ring_degree=2) == Degrees(3, 2)
    plan = planned(8, "parallel.cfg_degree=2")
    assert plan.degrees == Degrees(ulysses=4, cfg=2)
    assert describe_degrees(plan) == "8 processes: cfg 2 (given), ulysses 4 (shares 4 heads)"


def test_a_dry_run_plans_for_the_processes_that_the_degrees_name():
    overrides = ("parallel.ulysses_degree=4", "parallel.cfg_degree=2")
    assert planned(1, *overrides).degrees == Degrees(ulysses=4, cfg=2)
    with pytest.raises(UsageError, match="parallel: got 16 processes"):
        planned(16, *overrides)
    with pytest.raises(UsageError, match=r"parallel\.ulysses_degree: got 4, must be 1 in one process"):
        planned(1, *overrides, dry_run=False)


@pytest.mark.parametrize(
    ("processes", "heads", "expected"),
    [
        (3, 4, Degrees(ring=3)),
        (6, 4, Degrees(ulysses=2, ring=3)),
        (16, 24, Degrees(ulysses=8, ring=2)),
        (48, 24, Degrees(ulysses=24, ring=2)),
    ],
)
def test_a_ring_takes_what_the_heads_leave(processes, heads, expected):
    plan = planned(processes, "generation.guidance_scale=1", heads=heads)
    assert plan.degrees == chosen(processes, heads=heads, halves=1) == expected
    assert describe_degrees(plan).endswith(
        f"ring {expected.ring} (shares keys, as {processes} does not divide {heads} heads)"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backend", "flex", r"attention\.backend: got 'flex'.*; allowed: auto, reference, blocks, triton"),
        ("compile", "blocks", r"model\.compile: got 'blocks'.*; allowed: none$"),
        ("quantize", "int8", r"attention\.quantize: .*'int8'.*without quantization"),
        ("check", "reference", r"attention\.check: .*'reference'.*allowed: auto, off, nan"),
        ("dense_backend", "sage", r"attention\.dense_backend: .*'sage'.*allowed: auto, native"),
    ],
)
def test_options_that_a_ring_refuses(key, value, message):
    group = "model" if key == "compile" else "attention"
    with pytest.raises(UsageError, match=message):
        planned(2, "generation.guidance_scale=1", "parallel.ring_degree=2", f"{group}.{key}={value}")


@pytest.mark.parametrize(
    ("parallel", "halves", "processes", "message"),
    [
        ({"ulysses_degree": 4}, 2, 1, "parallel.ulysses_degree: got 4, must be 1 in one process; start"),
        ({"cfg_degree": 2}, 1, 2, "parallel.cfg_degree: got 2, must be at most 1"),
        ({"cfg_degree": 3}, 2, 3, "parallel.cfg_degree: got 3, must be at most 2"),
        ({"data_degree": 2}, 2, 2, "parallel.data_degree: got 2, must be at most 1"),
        ({"ring_degree": 2}, 1, 3, "but no degrees (ring_degree 2) share 4 heads and 1 prompts"),
        ({"ring_degree": 2}, 1, 1, "parallel.ring_degree: got 2, must be 1 in one process; start"),
        ({"ulysses_degree": 2}, 1, 3, "numbers of processes that work: 2"),
    ],
)
def test_degrees_that_do_not_fit(parallel, halves, processes, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        chosen(processes, halves=halves, **parallel)


def check_refused(pattern: str, *overrides: str, device: str = "cpu") -> None:
    """Checks that two processes of this machine are refused."""
    with pytest.raises(UsageError, match=pattern):
        planned(2, *overrides, device=device, dry_run=False)


def test_options_that_several_processes_refuse(monkeypatch):
    check_refused("cache_ratios: got 'calibrate'.*numbers", "model.cache=mag", "model.cache_ratios=calibrate")
    check_refused("compile: got 'blocks'.*: none$", "model.compile=blocks", "parallel.ring_degree=2")
    pattern = "attention.check: got 'reference'.*parallel.cfg_degree=2.*auto, off, nan"
    check_refused(pattern, "attention.check=reference")
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "9999")
        check_refused("--nproc_per_node: got 9999.*one process a GPU$", device="cuda")
    for name in [name for name in sys.modules if name.startswith("xfuser")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "xfuser", None)
    check_refused("several processes need xfuser .*install it with")


def start(*overrides: str, processes: int = 2, **environment: str) -> subprocess.Popen:
    """Starts the command of `dist_*.sh` in this many processes of one thread."""
    settings = {"NPROC": str(processes), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "scripts.launch", TINY, *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | settings | environment, **pipes)


def launched(*overrides: str, processes: int = 2, code: int = 0) -> tuple[str, str]:
    """Runs the command to its end; checks the exit code, and returns stdout and stderr."""
    process = start(*overrides, processes=processes)
    out, errors = process.communicate()
    assert process.returncode == code, errors
    return out, errors


@pytest.mark.parametrize(
    ("processes", "words", "degrees"),
    [
        (2, ["parallel.cfg_degree=1"], "ulysses 2 (shares 2 heads)"),
        pytest.param(
            4, [], "cfg 2 (shares the halves of guidance), ulysses 2 (shares 2 heads)", marks=pytest.mark.long
        ),
    ],
)
def test_several_processes_make_the_video_of_one(processes, words, degrees, tiny_model: Path, tmp_path: Path):
    overrides = [f"model.path={tiny_model}", *SHORT, "generation.height=272", "model.vae_tiling=always"]
    overrides += ["model.cache=first_block", "model.cache_threshold=0.9"]
    assert main([TINY, *overrides, f"output.path={tmp_path / 'one.mp4'}"]) == 0
    out, _ = launched(*overrides, *words, f"output.path={tmp_path / 'many.mp4'}", processes=processes)
    assert f"{processes} processes: {degrees}" in out
    assert "decoding: 2 tiles shared by 2 processes" in out
    assert out.count("video ") == 1 and "DEBUG" not in out
    assert (tmp_path / "many.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()
    record = json.loads((tmp_path / "many.json").read_text())
    assert record["cache"]["computed"] < record["cache"]["due"]
    assert record["processes"] == {"ulysses": 2, "ring": 1, "cfg": processes // 2, "data": 1}


@pytest.mark.long
def test_a_ring_makes_the_video_of_one(tiny_model: Path, tmp_path: Path):
    overrides = [f"model.path={tiny_model}", *SHORT]
    assert main([TINY, *overrides, f"output.path={tmp_path / 'one.mp4'}"]) == 0
    overrides += ["parallel.ring_degree=2", "parallel.cfg_degree=1", f"output.path={tmp_path / 'many.mp4'}"]
    assert "2 processes: ring 2 (given)" in launched(*overrides)[0]
    files = (tmp_path / "one.mp4", tmp_path / "many.mp4")
    one, many = (np.stack(imageio.mimread(file, memtest=False)) for file in files)
    assert one.shape == many.shape  # sums in another order: a few values round the other way
    assert np.abs(one.astype(int) - many).mean() < 0.1
    record = json.loads((tmp_path / "many.json").read_text())
    assert record["processes"] == {"ulysses": 1, "ring": 2, "cfg": 1, "data": 1}


@pytest.mark.long
def test_prompts_are_shared_and_a_second_run_makes_none_again(tiny_model: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na cow\n")
    overrides = [f"model.path={tiny_model}", *SHORT, f"generation.prompt_file={prompts}"]
    overrides += [f"output.path={tmp_path / 'out'}", "parallel.data_degree=2"]
    launched(*overrides)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert len(names) == 6 and not [name for name in names if name.startswith(".")]
    alone = [word for word in overrides if not word.startswith("parallel")]
    assert "0 of 3 videos to make" in launched(*overrides)[0]
    assert main([TINY, *alone]) == 0


def test_bad_input_is_one_line_of_all_processes(tmp_path: Path):
    _, errors = launched("generation.height=65", f"output.path={tmp_path / 'out'}", code=2)
    (line,) = errors.splitlines()
    assert line.startswith("error: generation.height: got 65") and not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_failure_of_all_is_reported_once(tiny_model: Path, tmp_path: Path):
    """Every process has latents that are not finite."""
    overrides = [f"model.path={tiny_model}", *SHORT, "model.dtype=float16", "generation.guidance_scale=1e38"]
    _, errors = launched(*overrides, f"output.path={tmp_path / 'out'}", code=2)
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert re.match("error: rank [01]: non-finite latents after step", line) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_killed_process_ends_all_in_one_line(victim, tiny_model: Path, tmp_path: Path):
    process, ranks = endless(tiny_model, tmp_path)
    os.kill(ranks[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=800)  # the steps alone would take hours
    assert process.returncode != 0
    assert f"error: rank {victim} was ended by SIGKILL" in errors
    assert len([line for line in errors.splitlines() if line.startswith("error")]) == 1
    assert not any(psutil.pid_exists(pid) for pid in ranks) and not list(tmp_path.rglob("*.mp4"))


@pytest.mark.long
def test_a_killed_launcher_ends_all(tiny_model: Path, tmp_path: Path):
    process, ranks = endless(tiny_model, tmp_path)
    running = [psutil.Process(pid) for pid in ranks]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=800)
    assert psutil.wait_procs(running, timeout=60)[1] == [] and not list(tmp_path.rglob("*.mp4"))


@pytest.mark.long
def test_two_machines_share_a_video(tiny_model: Path, tmp_path: Path):
    """Both are this one, with a process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    overrides = [f"model.path={tiny_model}", *SHORT, f"output.path={tmp_path}"]
    node = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    both = [start(*overrides, processes=1, **node, NODE_RANK=str(rank)) for rank in range(2)]
    first, _ = (process.communicate(timeout=800)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert "2 processes: cfg 2" in first and len(list(tmp_path.glob("*.mp4"))) == 1


@pytest.mark.parametrize(
    ("node", "line"),
    [
        ({"NNODES": "2"}, "NNODES: got 2, so set MASTER_ADDR to the address of the first machine"),
        ({"NNODES": "two"}, "NNODES: got 'two', must be a whole number of at least 1"),
        (
            {"NNODES": "2", "MASTER_ADDR": "localhost", "NODE_RANK": "2"},
            "NODE_RANK to 0 on the first, up to 1",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "a.invalid", "NODE_RANK": "0"},
            "MASTER_ADDR: got 'a.invalid', which",
        ),
    ],
)
def test_machines_that_cannot_find_each_other_are_refused(node, line, monkeypatch):
    for name, value in node.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(line)):
        machines()


@pytest.mark.long
def test_ctrl_c_ends_all(tiny_model: Path, tmp_path: Path):
    process, ranks = endless(tiny_model, tmp_path)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=800)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "stopped by SIGINT; the files that were written are whole"
    assert not any(psutil.pid_exists(pid) for pid in ranks) and not list(tmp_path.rglob("*.mp4"))


def test_files_that_differ_between_machines_are_reported(monkeypatch):
    monkeypatch.setattr(Groups, "agree", lambda self, value: ["another"])
    with pytest.raises(UsageError, match="differ from those of rank 0"):
        Groups(everyone="all").compare(["mine"])


def endless(model: Path, folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """Starts a run of too many steps; when its progress bar moves, returns it and its processes by rank."""
    overrides = [f"model.path={model}", "generation.steps=100000", f"output.path={folder / 'out'}"]
    process, seen = start(*overrides), ""
    while "3/100000" not in seen:
        assert process.poll() is None, seen
        seen = seen[-200:] + process.stderr.read(40)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = {int(child.environ()["RANK"]): child.pid for child in children if "RANK" in child.environ()}
    return process, [ranks[number] for number in sorted(ranks)]
