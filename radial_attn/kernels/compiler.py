"""Checks whether torch.compile can make kernels on this machine."""

import os
import shutil
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch


def compiler_problem(device_type: str) -> str | None:
    """Says, after "needs", what torch.compile lacks on "cpu" or "cuda" and how to get it; None if nothing.

    On the CPU the linker's command names the folders of torch's libraries, of Python's libraries and of the
    compiled code without quotes, so none of them may have a space.
    """
    on_gpu = device_type == "cuda"
    if on_gpu and find_spec("triton") is None:
        return "Triton on CUDA: pip install triton"
    variable, *names = ("CC", "gcc", "clang", "cc") if on_gpu else ("CXX", "g++", "clang++")
    if find_program(variable, names) is None:
        return f"a compiler on {device_type}, but none was found: apt install {names[0]}"
    spaced = [] if on_gpu else [folder for folder in _linked_folders() if " " in folder]
    if spaced:
        return f"folders without a space on cpu, got {spaced[0]!r}: install in another folder"
    return None


def find_program(variable: str, names: Iterable[str]) -> str | None:
    """Returns the path of the program that `variable` names, else of the first of `names`; or None."""
    paths = (shutil.which(name) for name in (os.environ.get(variable), *names) if name)
    return next(filter(None, paths), None)


def _linked_folders() -> list[str]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return [str(Path(torch.__file__).parent), sysconfig.get_config_var("LIBDIR") or "", cache_dir()]
