"""What surrounds a command - pipes, disks, locale, folders, users - gives one line, or it works."""

import ctypes
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts.run import console
from scripts.run.config import ROOT
from tests.support.plans import TINY
from tests.support.script_cases import SHORT

COMMANDS = sorted(file.stem for file in ROOT.glob("scripts/*.py") if file.stem != "__init__")
NOBODY = 65534
KEEP_CAPABILITIES, AMBIENT, RAISE, CAPABILITY_VERSION, MAY_READ = 8, 47, 2, 0x20080522, 2  # of Linux


def full_output() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


def no_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


def no_output() -> None:
    os.close(1)
    sys.stdout = None


def ascii_output() -> None:
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def no_input() -> None:
    os.close(0)
    sys.stdin = None


def strange_locale() -> None:
    os.environ.update(LC_ALL="xx_YY", LANG="xx_YY")


def no_folders() -> None:
    """Names folders that are not there and cannot be made."""
    names = ("HOME", "HF_HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")
    os.environ.update(dict.fromkeys(names, "/proc/nowhere"))
    tempfile.tempdir = None


def another_user() -> None:
    """Becomes a user without a home, who may read all, but write to the current folder only."""
    os.environ.pop("HOME", None)
    os.chmod(".", 0o777)
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        libc.prctl(KEEP_CAPABILITIES, 1)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
        libc.capset(header, (ctypes.c_uint32 * 6)(*[1 << MAY_READ] * 3, 0, 0, 0))
        libc.prctl(AMBIENT, RAISE, MAY_READ, 0, 0)  # for the programs that it starts


FAULTS = {  # what changes -> the exit code of --help, and its line on stderr
    full_output: (2, "No space left on device"),
    no_reader: (1, ""),
    no_output: (0, ""),
    ascii_output: (0, ""),
    no_input: (0, ""),
    strange_locale: (0, ""),
    no_folders: (0, ""),
    another_user: (0, ""),
}


def started(folder: Path, fault: Callable[[], None], name: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a command in a copy of this process, in `folder`; returns exit code, stdout and stderr."""
    files = [folder / "stdout", folder / "stderr"]
    if (copy := os.fork()) == 0:
        try:
            os._exit(_begin(folder, files, fault, [f"scripts.{name}", *arguments]))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    return code, *(file.read_text(errors="replace") for file in files)


def _begin(folder: Path, files: list[Path], fault: Callable[[], None], words: list[str]) -> int:
    signal.alarm(60)
    torch.set_num_threads(1)
    os.chdir(folder)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, ("stdout", "stderr")[number - 1], open(number, "w", 1, closefd=False))  # noqa: SIM115
    fault()
    sys.argv = ["-m", *words[1:]]
    code: object = 0
    try:
        console.adapt()
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    console.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_command_shows_its_help_or_one_line(fault, tmp_path):
    code, line = FAULTS[fault]
    for name in COMMANDS:
        result = started(tmp_path, fault, name, "--help")
        assert result[0] == code and line in result[2] and bool(line) == len(result[2].splitlines()), result
        assert code or fault is no_output or "usage" in result[1], name
        assert sorted(file.name for file in tmp_path.iterdir()) == ["stderr", "stdout"], name


def test_every_command_refuses_an_argument_that_is_not_utf8(tmp_path):
    for name in COMMANDS:
        result = started(tmp_path, lambda: None, name, "--out=caf\udce9.md")
        line = "error: got '--out=caf\\udce9.md', which is not UTF-8; use other characters"
        assert (result[0], result[2].strip()) == (2, line), name


@pytest.mark.parametrize(
    "fault",
    [ascii_output, no_output, no_input, strange_locale, no_folders, another_user],
    ids=lambda x: x.__name__,
)
def test_a_prompt_file_is_made_whatever_surrounds_it(fault, tiny_model, tmp_path):
    """The prompts hold characters that ASCII lacks."""
    (tmp_path / "prompts.txt").write_text("\u00e9\u732b\nb\n", encoding="utf-8")
    words = [str(ROOT / TINY), f"model.path={tiny_model}", *SHORT, "generation.steps=1"]
    words += ["generation.prompt_file=prompts.txt", "output.path=out"]
    code, _, errors = started(tmp_path, fault, "generate", *words)
    assert code == 0, errors
    assert len(list(tmp_path.glob("out/*.mp4"))) == 2 and "Traceback" not in errors
