"""Tests the GPU benchmark on the CPU: rehearsals, its worker, its arithmetic, its command line."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.benchmark_gpu import Run, main, parse
from scripts.benchmarks import attention as gpu_attention
from scripts.benchmarks.attention import AttentionBench
from scripts.benchmarks.cases import (
    CASES,
    CHECK_TINY,
    DENSE,
    HEADLINES,
    MEASURED,
    STEPS,
    Task,
    compilations,
    shrink,
    tasks,
)
from scripts.benchmarks.findings import Findings, merge, whole_ms
from scripts.benchmarks.gpu_report import report
from scripts.benchmarks.machine import flashinfer_obstacle, read_log, short_name
from scripts.benchmarks.worker import Workers, describe
from scripts.run.config import ROOT
from tests.support.breaking_worker import Breakable
from tests.support.simulated_gpu import SimulatedWorkers

TOKENS = [69_120, 147_600, 115_456, 230_656, 461_056, 44_776, 178_336]
SCRIPT = "scripts/benchmark_gpu.sh"
ABSENT = ("diffusers", "ftfy", "imageio_ffmpeg", "matplotlib", "omegaconf", "PIL", "psutil", "tqdm", "xfuser")
ABSENT += ("yaml", "yunchang")


def bash(*words: str, **environment: str) -> subprocess.CompletedProcess:
    options = {"env": os.environ | environment, "capture_output": True, "text": True}
    return subprocess.run(["bash", SCRIPT, *words], check=False, cwd=ROOT, **options)


def test_cases_are_those_of_the_paper():
    assert [case.grid.tokens for case in CASES.values()] == TOKENS
    assert [case.heads for case in CASES.values()] == [40, 40, 24, 24, 24, 24, 24]
    for case in CASES.values():
        if case.sparsity is not None:
            assert 1 - case.mask.density == pytest.approx(case.sparsity, abs=0.006)
    case = CASES["wan-69"]
    assert case.flops(dense=True, backward=False) == 4 * 40 * 128 * 69_120**2
    assert case.flops(dense=False, backward=True) == 3.5 * 4 * 40 * 128 * case.mask.kept_pairs


def test_every_case_is_measured_once_by_the_variants_that_serve_it():
    listed = [task for part in (1, 2) for task in tasks(part, list(CASES), MEASURED, tiny=False)]
    for variant in ("cudnn", "flash4", "triton", "triton-int8"):
        rows = [task.case.name for task in listed if (task.kind, task.variant) == ("forward", variant)]
        assert set(rows) == set(CASES)
    assert {task.variant for task in listed if task.kind == "backward"} == {
        *DENSE,
        "flash4",
        "triton",
        "flex",
    }
    one = [task for part in (1, 2) for task in tasks(part, ["mochi-163"], ["flex"], tiny=True)]
    assert {task.kind for task in one} == {"check", "gradients", "forward", "backward"}


def test_each_kernel_is_compiled_once_on_a_short_video_like_the_long_one():
    listed = [task for part in (1, 2) for task in tasks(part, list(CASES), MEASURED, tiny=False)]
    made = [task.detail[0] for task in compilations(listed)]
    assert [task.variant for task in made[:5]] == ["flex"] * 5 and len(made) == 26
    tokens = {task.case.name: task.case.grid.tokens for task in made if task.variant == "triton"}
    assert tokens["wan-69"] == 7680 and max(tokens.values()) == CASES["mochi-163"].grid.tokens
    assert all(
        CASES[name].grid.tokens % 128 == count % 128 for name, count in tokens.items() if name in CASES
    )


def simulated(out: Path, *words: str, **options) -> tuple[Run, SimulatedWorkers]:
    """Runs the benchmark on a simulated GPU."""
    workers = SimulatedWorkers(**options)
    run = Run(parse([*words, "--skip-tests", "--out", str(out)]), workers)
    run.go()
    return run, workers


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Makes both parts on a simulated GPU; yields for each its run, its workers and the rows left by a kill.

    The rows are those in the file when a task begins.
    """
    made = []
    for part in (1, 2):
        folder, left = tmp_path_factory.mktemp("part"), []

        def killed(_: Task, folder: Path = folder, left: list = left) -> None:
            left.append([len(json.loads(file.read_text())["rows"]) for file in folder.glob("*.json")])

        made.append((*simulated(folder, f"--part={part}", before=killed), left))
    return made


@pytest.mark.parametrize("part", [1, 2])
def test_the_first_numbers_come_early_and_a_part_takes_four_minutes(part, parts):
    """Rehearses by a simulated clock; a run that is killed at any task leaves what was measured before."""
    run, workers, left = parts[part - 1]
    rows, seconds = run.data["rows"], {title: at - 1000 for title, at in workers.log}
    assert run.data["finished"] and not run.data["left_out"] and max(seconds.values()) < 240
    timed = [title.split()[0] in {"forward", "backward", "launch"} for title in seconds]
    assert all(rows[0] >= sum(timed[:at]) for at, rows in enumerate(left) if rows)
    kinds = list(dict.fromkeys(title.split()[0] for title in seconds if not title.startswith("compile")))
    if part == 2:
        assert kinds == ["machine", "forward", "check", "gradients", "backward"]
        return
    assert kinds == ["machine", "check", "forward", "launch", "step"]
    first = [
        f"forward {case} {name}" for case in HEADLINES[:2] for name in ("flash4", "triton", "triton-int8")
    ]
    assert max(seconds[title] for title in first) < 120
    assert [*seconds].index("step wan-69 dense") > [*seconds].index("launch wan-69 triton 6")
    dense = [row for row in rows if row["case"] == "hunyuan-509" and row["variant"] in DENSE]
    assert [len(row["times_ms"]) for row in dense] == [1]  # one call
    in_turn = [row for row in rows if row["variant"] == "triton" and row["case"] != "hunyuan-509"]
    assert all(row["dense"] == "cudnn" and row["dense_ms"] > row["ms"] for row in in_turn)


def test_what_is_late_or_missing_blocks_nothing_else(tmp_path):
    late, absent = ["check triton-int8", "forward wan-69 triton-int8"], ["cudnn", "flash4", "flash4-dense"]
    run, workers = simulated(tmp_path, "--part=1", absent=[*absent, "diffusers"], late=late)
    rows = {(row["case"], row["variant"]): row for row in run.data["rows"]}
    assert rows["wan-69", "triton"]["ms"] and rows["wan-69", "triton"]["dense"] == "sdpa"
    assert rows["wan-69", "flash4"]["failure"] == "needs flash4"
    assert rows["wan-69", "triton-int8"]["failure"] == "given up after 45 s"  # in spite of its check
    assert rows["hunyuan-509", "triton-int8"]["failure"] == "its process was lost twice"
    assert {step.get("failure") for step in run.data["steps"]} >= {"needs diffusers"}
    assert workers.clock() - 1000 < 240
    text = next(tmp_path.glob("*.md")).read_text()
    assert "| triton-int8 | given up after 30 s |" in text and "| wan-69 | dense | needs diffusers |" in text


def test_two_parts_make_one_report(parts, tmp_path, capsys):
    files = [str(run.path.with_suffix(".json")) for run, _, _ in parts]
    assert main(["--merge", *files, "--out", str(tmp_path)]) == 0
    (text,) = tmp_path.glob("gpu_simulated_*.md")
    assert text.stem.endswith("_merged")  # beside the report of a whole run
    data = json.loads(text.with_suffix(".json").read_text())
    keys = [(row["stage"], row["case"], row["variant"]) for row in data["rows"]]
    assert len(keys) == len(set(keys)) and {case for _, case, _ in keys} == set(CASES)
    assert (
        data["finished"] and data["checks"]["triton"]["gradients_right"] and data["checks"]["triton"]["right"]
    )
    assert text.with_suffix(".png").stat().st_size > 1000
    lines = text.read_text()
    assert "| wan-161 | flash4 | 0.260 |" in lines and "| 0.90 | met: 0.9 |" in lines
    assert "| 0.60 | missed: 0.75 |" in lines and "| missed: 1.3x of triton in 16 bits |" in lines
    assert "missed: 0.8 |" in lines and "| missed: 1.77 |" in lines and "| met: 3.7 |" in lines


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"machine": {"gpu": "NVIDIA H100", "versions": {}}}, "bad.json is damaged, or has no results"),
        ({"rehearsal": True}, "a rehearsal among measurements"),
        ({"cases": {"wan-69": {"density": 0.5}}}, "bad.json is damaged, or has no results"),
        ({"rows": [{"stage": "forward", "case": "wan-69"}]}, "bad.json is damaged, or has no results"),
        ({"machine": []}, "bad.json is damaged, or has no results"),
        ({"minutes": "4"}, "bad.json is damaged, or has no results"),
        ({"tests": None}, "bad.json is damaged, or has no results"),
        ("", "bad.json is damaged, or has no results"),
        ("[]", "bad.json is damaged, or has no results"),
        ("\0", "bad.json is damaged, or has no results"),
        ({}, "bad.json has the same results as"),
        (None, "bad.json: No such file or directory"),
    ],
)
def test_what_cannot_be_joined_is_refused(parts, tmp_path, capsys, change, reason):
    file = parts[0][0].path.with_suffix(".json")
    if change is not None:
        whole = json.loads(file.read_text())
        (tmp_path / "bad.json").write_text(change if isinstance(change, str) else json.dumps(whole | change))
    out = tmp_path / "out"
    assert main(["--merge", str(file), str(tmp_path / "bad.json"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and not out.exists()


def test_parts_of_other_machines_masks_and_versions(parts):
    whole, _ = data = [json.loads(run.path.with_suffix(".json").read_text()) for run, _, _ in parts]

    def other(**about: object) -> dict:
        return whole | {"machine": whole["machine"] | about}

    with pytest.raises(ValueError, match="of different machines: NVIDIA H100, NVIDIA Simulated"):
        merge([whole, other(gpu="NVIDIA H100")])
    denser = whole["cases"] | {"wan-69": whole["cases"]["wan-69"] | {"density": 0.5}}
    with pytest.raises(ValueError, match="masks of different densities"):
        merge([whole, whole | {"cases": denser}])
    before = whole["machine"]["versions"]
    joined = merge([*data, other(versions=before | {"torch": "1.0"})])["machine"]["versions"]
    assert joined == before | {"torch": f"{before['torch']} or 1.0"}


def test_a_rehearsal_writes_what_a_run_writes(tmp_path):
    """Hides what the Python of a GPU machine may lack; torch and numpy are enough, but for steps and plot."""
    before = sorted((ROOT / "results").iterdir())
    hidden = f"import sys\nsys.modules |= dict.fromkeys({ABSENT})\n"  # None makes an import fail
    (tmp_path / "sitecustomize.py").write_text(hidden)
    new, words = tmp_path / "new", ["--device", "cpu", "--tiny", "--only", "wan-69"]
    done = bash(*words, "--out", str(new), PYTHONPATH=str(tmp_path), PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "results").iterdir()) == before
    text, data = (next(new.glob(f"rehearsal_cpu_*.{end}")) for end in ("md", "json"))
    assert done.stdout.splitlines()[-1] == str(text) and len(list(new.iterdir())) == 2
    result = json.loads(data.read_text())
    assert result["rehearsal"] and result["finished"]
    assert [line.split(":")[0] for line in result["left_out"]] == ["plot"]
    assert result["checks"]["blocks"]["right"] and result["checks"]["blocks"]["gradients"] < 1e-5
    rows = {(row["stage"], row["variant"]): row for row in result["rows"]}
    assert rows["forward", "flash-attn"]["failure"].startswith("needs flash_attn")
    for stage in ("forward", "backward"):
        assert rows[stage, "blocks"]["ms"] > 0 and rows[stage, "blocks"]["relative_l2"] < 1e-5
        assert rows[stage, "blocks"]["dense"] in DENSE and rows[stage, "blocks"]["dense_ms"] > 0
    assert rows["forward", "sdpa"]["ms"] > 0 and "kernels_ms" not in rows["forward", "sdpa"]
    assert [step["failure"].split(":")[0] for step in result["steps"]][:2] == ["needs diffusers"] * 2
    lines = text.read_text().splitlines()
    assert lines[0] == "# Rehearsal on the CPU: tiny shapes, no measurement of a GPU"
    assert any(line.startswith("| wan-69 | blocks | ") for line in lines)


def test_the_kernels_of_a_call_are_listed():
    bench = AttentionBench("cpu", torch.float32, profile=True)
    result = bench.run(Task("forward", shrink(CASES["wan-69"]), "sdpa"))
    assert any("attention" in name for name in result["kernels_ms"])


def test_without_time_all_is_left_out_and_listed(tmp_path):
    words = ["--device", "cpu", "--tiny", "--minutes", "0.001", "--skip-tests", "--out", str(tmp_path)]
    run = Run(parse(words), SimulatedWorkers())
    run.go()
    (text,) = tmp_path.glob("*.md")
    assert "- check blocks: the 0.001 minutes were over" in text.read_text()
    assert len(run.data["left_out"]) > 40 and not [row for row in run.data["rows"] if "ms" in row]


def test_results_and_rehearsals_go_to_different_folders():
    assert parse([]).out.name == "results" and parse(["--tiny"]).out.name == "outputs"


def test_carried_kernels_and_packages_are_found(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$RADIAL_ATTN_FLASH4 $PYTHONPATH"\n')
    python.chmod(0o755)
    (tmp_path / "site").mkdir()
    (tmp_path / "flash4.json").touch()
    done = bash(PYTHON=str(python), RADIAL_ATTN_FLASH4=str(tmp_path), PYTHONPATH="")
    assert done.stdout.split() == [str(tmp_path), f"{ROOT}:{tmp_path}/site"]


def test_a_missing_python_is_one_line():
    done = bash("--tiny", PYTHON="/no/such/python")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no Python 3.11 or newer with torch among: /no/such/python")


def test_a_worker_outlives_what_its_tasks_do():
    workers = Workers(Breakable)
    try:
        workers.begin(["count", "raise"], 250)  # in another process
        assert workers.ask("raise", 250).failure == "no"
        assert workers.ask("count", 250).result == {"calls": 2}
        lost = workers.ask("die", 250)
        assert lost.lost and not lost.late and lost.failure == "its process ended (exit code 3)"
        assert workers.ask("count", 250).result == {"calls": 1}
        late = workers.ask("hang", 0.2)  # does not wait for the hour that it hangs
        assert late.late and late.failure == "given up after 0 s"
        answers = dict(workers.compiled())
        assert answers["count"].result == {"calls": 1} and answers["raise"].failure == "no"
        workers.begin(["hang"], 250)
    finally:
        workers.close()
    assert not multiprocessing.active_children()


def test_failures_are_one_short_line():
    assert describe(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "out of memory"
    assert describe(RuntimeError("CUDA error | a\nb")) == "RuntimeError: CUDA error / a"
    assert describe(ValueError("x" * 900)).endswith("...") and len(describe(ValueError("x" * 900))) == 200


@pytest.mark.parametrize(
    "spoil", [lambda out: out * 1.05, lambda out: out.index_fill(1, torch.tensor([50]), torch.nan)]
)
def test_no_speed_for_what_is_wrong(spoil, monkeypatch):
    right = gpu_attention.attention
    monkeypatch.setattr(gpu_attention, "attention", lambda *a, **o: lambda *x: spoil(right(*a, **o)(*x)))
    task = Task("forward", shrink(CASES["wan-69"]), "blocks")
    result = AttentionBench("cpu", torch.float32, False).run(task)
    assert result["wrong"] and not [name for name in result if "ms" in name]


def test_a_check_tells_refusal_from_error():
    case = CHECK_TINY
    bench = AttentionBench("cpu", torch.float32, False)
    assert bench.run(Task("check", case, "blocks"))["right"] and case.mask.density < 0.8
    assert bench.run(Task("gradients", case, "blocks"))["gradients_right"]
    with pytest.raises((ValueError, ImportError), match="backend 'sage' "):
        bench.run(Task("check", case, "sage"))


def step(ms: float, **blocks: list[float]) -> dict:
    return {"ms": ms, "blocks_ms": blocks}


def test_the_whole_model_from_a_few_blocks():
    spec = STEPS["hunyuan-509"]
    dense = step(35.0, transformer_blocks=[20.0], single_transformer_blocks=[10.0])
    radial = step(14.0, transformer_blocks=[6.0], single_transformer_blocks=[3.0])
    assert whole_ms(spec, dense, dense) == 5 + 20 * 20 + 40 * 10
    assert whole_ms(spec, radial, dense) == 5 + 2 * 20 + 18 * 6 + 40 * 3


def results(rows: list[tuple], steps: list[dict] = ()) -> dict:
    """Returns what a run on a GPU would write, with made-up numbers."""
    about = {"title": "t", "heads": 2, "width": 64, "tokens": 9, "mask": "m", "density": 0.25}
    about |= {"paper_sparsity": None, "mask_ms": 1.0, "mask_again_ms": 0.0}
    names = ("stage", "case", "variant", "ms")
    extra = {"tflops": 1.0, "relative_l2": 0.0, "first_ms": 1.0}
    return {
        **{"command": "c", "date": "d", "minutes": 1.0, "rehearsal": True, "finished": True},
        "machine": {"versions": {}},
        "smi": {"query": "q", "before": "b", "after": "a"},
        "tests": {"counts": {"passed": 3}, "failed": []},
        "cases": dict.fromkeys(CASES, about),
        "compiled": {},
        "checks": {"flashinfer": {"failure": "needs flashinfer"}},
        "rows": [dict(zip(names, row, strict=True)) | extra for row in rows],
        "steps": list(steps),
        "left_out": [],
    }


def test_what_the_numbers_amount_to(tmp_path):
    forward, backward = {"cudnn": 10.0, "flash": 12.0, "triton": 2.5}, {"cudnn": 40.0, "triton": 20.0}
    rows = [("forward", "wan-69", *item) for item in forward.items()]
    rows += [("backward", "wan-69", *item) for item in backward.items()]
    shared = {"case": "wan-69", "using": "x", "attention_ms": 1.0, "attention_calls": 1}
    times = {"dense": 2.5, "radial": 1.0}.items()
    whole = [step(ms, blocks=[ms]) | shared | {"variant": variant} for variant, ms in times]
    findings = Findings(results(rows, whole))
    assert findings.best_dense("forward", "wan-69") == ("cudnn", 10.0)
    assert findings.efficiency("forward", "wan-69", "triton") == 1
    assert findings.speedup("backward", "wan-69", "triton") == 2
    assert findings.efficiency("forward", "mochi-667", "triton") is None
    video = findings.end_to_end("wan-69")
    assert video.dense_seconds == pytest.approx(10) and video.radial_seconds == pytest.approx(5.554)
    assert findings.end_to_end("hunyuan-117") is None
    text = report(findings.data, tmp_path / "none.png")
    assert (
        "| wan-69 | triton | 0.250 | 2.50 | 1.000 | 4.00 | 1.00 | met: 0.75 |" in text and "3 passed" in text
    )
    assert "| wan-69 | radial | 12 of 50 | 1 | 2 | 100.0 | 41.5 | 10 | 6 | 1.80 | met: 1.77 |" in text


def test_a_gpu_has_a_short_name():
    names = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100"}
    names |= {"NVIDIA GeForce RTX 4090": "rtx-4090", "AMD Instinct MI300X": "mi300x", "NVIDIA": "gpu"}
    assert {gpu: short_name(gpu) for gpu in names} == names


def test_the_log_of_the_kernel_tests_is_counted():
    log = """tests/a.py::one[64] PASSED [ 50%]
[gw1] [ 75%] FAILED tests/a.py::two[96]
FAILED tests/a.py::two[96] - AssertionError
"""
    expected = {"counts": {"passed": 1, "failed": 1}, "failed": ["tests/a.py::two[96]"], "exit_code": 1}
    assert read_log(log, 1, 90) == expected
    assert read_log(log, None, 90)["note"] == "ended after 90 s"
    broken = "E   ModuleNotFoundError: No module named 'x'\nERROR tests/a.py\n"
    assert read_log(broken, 2, 90)["note"] == "ModuleNotFoundError: No module named 'x'"


def test_flashinfer_is_left_alone_without_kernels(tmp_path, monkeypatch):
    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    assert "--build-flashinfer" in flashinfer_obstacle()
    kernels = tmp_path / ".cache/flashinfer/0.7/90/cached_ops/batch_prefill_x"
    kernels.mkdir(parents=True)
    (kernels / "batch_prefill_x.so").touch()
    assert flashinfer_obstacle() is None
