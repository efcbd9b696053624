"""The shell scripts: set-up, call form, exit codes, any directory."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts.run.config import ROOT

SETUP = ROOT / "scripts/setup.sh"


def bash(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    options = {"env": os.environ | environment, "capture_output": True, "text": True}
    return subprocess.run(["bash", *arguments], check=False, cwd=cwd, **options)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Makes a repository of set-up and an empty requirements.txt, in a path with a space."""
    root = tmp_path / "my copy"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(SETUP, root / "scripts")
    (root / "requirements.txt").write_text("# nothing\n")
    return root


@pytest.mark.parametrize(
    "script", [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci/run"], ids=lambda path: path.name
)
def test_scripts_parse_and_begin_with_a_description(script):
    assert bash("-n", str(script)).returncode == 0
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ") or script.name == "run"
    assert any("set -euo pipefail" in line for line in lines)


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
def test_scripts_stay_where_the_user_stands(script):
    """Only the tests, and set-up in a process of its own, are about the checkout."""
    text = script.read_text()
    stays = [line for line in text.splitlines() if line.startswith("cd ")]
    assert script.name == "test.sh" or not stays
    if "python" in text and script.name not in ("setup.sh", "test.sh"):
        assert "-P -m scripts." in text and 'PYTHONPATH="$root' in text


@pytest.mark.long
def test_a_measuring_script_writes_where_the_user_stands(tmp_path):
    """Bundled configurations are found from anywhere."""
    before = set((ROOT / "results").iterdir())
    words = ["--models", "configs/wan_tiny.yaml", "--frames", "33", "--size", "64x64", "--no-times"]
    assert bash(str(ROOT / "scripts/cost.sh"), *words, cwd=tmp_path).returncode == 0
    assert len(list(tmp_path.glob("outputs/results/cost_wan_tiny_*.md"))) == 1
    assert set((ROOT / "results").iterdir()) == before


def test_the_demo_shows_its_help_and_takes_no_arguments(tmp_path):
    script = str(ROOT / "scripts/length_extension_demo.sh")
    helped = bash(script, "--help", cwd=tmp_path)
    assert helped.returncode == 0 and "VIDEOS=60 STEPS=300 CAPTIONS=6" in helped.stdout
    refused = bash(script, "configs/wan_tiny.yaml", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: got 'configs/wan_tiny.yaml', but this script takes no arguments\n"
    assert not list(tmp_path.iterdir())


def test_setup_makes_an_environment_once_and_then_changes_nothing(copy, tmp_path):
    first = bash(str(copy / "scripts/setup.sh"), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "making .venv with" in first.stdout and "setup: done" in first.stdout
    files = {file: file.lstat().st_mtime_ns for file in copy.rglob("*")}
    again = bash(str(copy / "scripts/setup.sh"), cwd=tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert {file: file.lstat().st_mtime_ns for file in copy.rglob("*")} == files
    sourced = bash("-c", f"set -e; source '{copy}/scripts/setup.sh'; echo on we go")
    assert sourced.stdout == "on we go\n"
    (copy / "requirements.txt").write_text("./no-such-package\n")
    failed = bash(str(copy / "scripts/setup.sh"))
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "no-such-package" in failed.stderr and str(copy / ".venv/setup.log") in failed.stderr
    assert bash("-c", f"set -e; source '{copy}/scripts/setup.sh'; echo on we go").returncode == 1
    (copy / "requirements.txt").write_text("# nothing again\n")
    assert bash(str(copy / "scripts/setup.sh")).returncode == 0


@pytest.mark.long
def test_setup_recovers_from_an_interruption_and_two_at_once_agree(copy):
    command = ["bash", str(copy / "scripts/setup.sh")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while not (copy / ".venv/bin/python").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (copy / ".venv/setup.sha256").exists()
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("setup: done" in text for text in printed) == 1


def test_setup_refuses_an_old_or_missing_python(copy, tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), "/no/such/python"):
        result = bash(str(copy / "scripts/setup.sh"), PYTHON=python)
        assert result.returncode == 1 and "set PYTHON=/path/to/python" in result.stderr
        assert result.stderr.startswith(f"error: no Python 3.11 or newer among: {python};")
    assert not (copy / ".venv").exists()


def test_the_inference_script_from_another_directory(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/__init__.py").write_text("raise SystemExit('the wrong package')\n")
    script = str(ROOT / "scripts/wan_t2v_inference.sh")
    result = bash(script, "configs/wan2.1_t2v_14b.yaml", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "69120 = 18 latent frames x 48 x 80" in result.stdout
    result = bash(script, "generation.sed=1", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: unknown key 'generation.sed'")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scripts"]
