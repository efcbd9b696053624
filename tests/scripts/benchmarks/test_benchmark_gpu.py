"""Tests the GPU benchmark on the CPU: a rehearsal, its worker, its arithmetic, its command line."""

import json
import os
import subprocess
import sys

import pytest
import torch

from scripts.benchmark_gpu import Run, parse
from scripts.benchmarks import attention as gpu_attention
from scripts.benchmarks.attention import AttentionBench
from scripts.benchmarks.cases import CASES, DENSE, MEASURED, STAGES, STEPS, Task, shrink, tasks
from scripts.benchmarks.findings import Findings, whole_ms
from scripts.benchmarks.gpu_report import report
from scripts.benchmarks.machine import flashinfer_obstacle, read_log, short_name
from scripts.benchmarks.worker import Worker, describe
from scripts.run.config import ROOT
from tests.support.breaking_worker import Breakable

TOKENS = [69_120, 147_600, 115_456, 230_656, 461_056, 44_776, 178_336]
SCRIPT = "scripts/benchmark_gpu.sh"


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


def test_every_case_is_measured_and_the_important_ones_come_first():
    assert {case for stage, case in STAGES if stage == "forward"} == set(CASES)
    listed = list(tasks(list(CASES), MEASURED, tiny=False, steps=True))
    assert [task.kind for task in listed[: len(MEASURED)]] == ["check"] * len(MEASURED)
    assert listed[len(MEASURED)].title == "forward wan-69 cudnn"
    trained = {task.variant for task in listed if task.kind == "backward"}
    assert trained == {*DENSE, "triton", "flex"}
    assert not [task for task in tasks(["mochi-163"], ["flex"], tiny=True, steps=True) if task.kind == "step"]


def test_a_rehearsal_writes_what_a_run_writes(tmp_path):
    before = sorted((ROOT / "results").iterdir())
    new, words = tmp_path / "new", ["--device", "cpu", "--tiny", "--only", "wan-69", "--skip-steps"]
    done = bash(*words, "--out", str(new))
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "results").iterdir()) == before
    text, data, picture = (next(new.glob(f"rehearsal_cpu_*.{end}")) for end in ("md", "json", "png"))
    assert done.stdout.splitlines()[-1] == str(text)
    assert picture.stat().st_size > 1000 and len(list(new.iterdir())) == 3
    result = json.loads(data.read_text())
    assert result["rehearsal"] and result["finished"] and not result["left_out"]
    assert result["checks"]["blocks"]["right"] and result["checks"]["blocks"]["gradients"] < 1e-5
    rows = {(row["stage"], row["variant"]): row for row in result["rows"]}
    assert rows["forward", "flash-attn"]["failure"].startswith("needs flash_attn")
    for stage in ("forward", "backward"):
        assert rows[stage, "blocks"]["ms"] > 0 and rows[stage, "blocks"]["relative_l2"] < 1e-5
        assert rows[stage, "sdpa"]["ms"] > 0 and "kernels_ms" not in rows[stage, "sdpa"]
    assert result["steps"] == []
    lines = text.read_text().splitlines()
    assert lines[0] == "# Rehearsal on the CPU: tiny shapes, no measurement of a GPU"
    assert any(line.startswith("| wan-69 | blocks | ") for line in lines)


def test_the_kernels_of_a_call_are_listed():
    bench = AttentionBench("cpu", torch.float32, profile=True)
    result = bench.run(Task("forward", shrink(CASES["wan-69"]), "sdpa"))
    assert any("attention" in name for name in result["kernels_ms"])


def test_without_time_all_is_left_out_and_listed(tmp_path):
    run = Run(parse(["--device", "cpu", "--tiny", "--minutes", "0.001", "--out", str(tmp_path)]))
    run.data |= {key: results([])[key] for key in ("cases", "machine")}
    run.data["machine"]["device"] = "cpu"
    run._measure()
    run.save()
    (text,) = tmp_path.glob("*.md")
    assert "- check blocks: the 0.001 minutes were over" in text.read_text()
    assert len(run.data["left_out"]) > 40 and not [row for row in run.data["rows"] if "ms" in row]


def test_results_and_rehearsals_go_to_different_folders():
    assert parse([]).out.name == "results" and parse(["--tiny"]).out.name == "outputs"


def test_torch_and_numpy_are_enough_to_begin():
    """Hides what a GPU's Python may lack; an entry of None makes an import fail."""
    absent = ("diffusers", "matplotlib", "omegaconf", "PIL", "psutil", "tqdm", "yaml")
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import scripts.benchmark_gpu"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_missing_python_is_one_line():
    done = bash("--tiny", PYTHON="/no/such/python")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no Python 3.11 or newer with torch among: /no/such/python")


def test_a_worker_outlives_what_its_tasks_do():
    worker = Worker(Breakable)
    try:
        assert worker.ask("raise", 250).failure == "no"
        assert worker.ask("count", 250).result == {"calls": 2}
        lost = worker.ask("die", 250)
        assert lost.lost and lost.failure == "its process ended (exit code 3)"
        assert worker.ask("count", 250).result == {"calls": 1}
        assert worker.ask("hang", 0.2).failure == "given up after 0 s"  # not after the hour that it hangs
    finally:
        worker.close()


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
    case = next(tasks([], ["triton"], tiny=True, steps=False)).case
    bench = AttentionBench("cpu", torch.float32, False)
    result = bench.run(Task("check", case, "blocks"))
    assert result["right"] and result["gradients_right"] and case.mask.density < 0.8
    with pytest.raises((ValueError, ImportError), match="backend 'sage' "):
        bench.run(Task("check", case, "sage"))


def step(ms: float, **blocks: list[float]) -> dict:
    return {"ms": ms, "blocks_ms": blocks, "reduced": True}


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
        "checks": {"flashinfer": {"failure": "needs flashinfer"}},
        "rows": [dict(zip(names, row, strict=True)) | extra for row in rows],
        "steps": list(steps),
        "left_out": [],
    }


def test_what_the_numbers_amount_to(tmp_path):
    forward, backward = {"cudnn": 10.0, "flash": 12.0, "triton": 2.5}, {"cudnn": 40.0, "triton": 20.0}
    rows = [("forward", "wan-69", *item) for item in forward.items()]
    rows += [("backward", "wan-69", *item) for item in backward.items()]
    shared = {"case": "wan-69", "using": "x", "attention_ms": 1.0, "attention_calls": 1, "reduced": False}
    times = {"dense": 100.0, "radial": 40.0}.items()
    whole = [step(ms, blocks=[1.0]) | shared | {"variant": variant} for variant, ms in times]
    findings = Findings(results(rows, whole))
    assert findings.best_dense("forward", "wan-69") == ("cudnn", 10.0)
    assert findings.efficiency("forward", "wan-69", "triton") == 1
    assert findings.speedup("backward", "wan-69", "triton") == 2
    assert findings.efficiency("forward", "mochi-667", "triton") is None
    video = findings.end_to_end("wan-69")
    assert video.dense_seconds == pytest.approx(10) and video.radial_seconds == pytest.approx(5.44)
    assert not video.extrapolated and findings.end_to_end("hunyuan-117") is None
    text = report(findings.data, tmp_path / "none.png")
    assert "| wan-69 | triton | 0.250 | 2.50 | 1.000 | 4.00 | 1.00 |" in text and "3 passed" in text
    assert "| wan-69 | radial | 12 of 50 | 1 | 2 | 100.0 | 40.0 | 10 | 5 | 1.84 | 1.77 | whole" in text


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
