"""Whether torch.compile can make kernels on this machine."""

import os
import shutil
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch


def compiler_problem(device_type: str) -> str | None:
    """What torch.compile lacks for kernels on "cpu" or "cuda", to follow "needs", and how to get it; or None.

    On the CPU the folders of torch's libraries, of Python's and of what is compiled stand unquoted in the
    linker's command, so that none of them may have a space.
    """
    on_gpu = device_type == "cuda"
    if on_gpu and find_spec("triton") is None:
        return "Triton on CUDA: pip install triton"
    variable, *names = ("CC", "gcc", "clang", "cc") if on_gpu else ("CXX", "g++", "clang++")
    if find_program(variable, names) is None:
        return f"a compiler on {device_type}, and found none: apt install {names[0]}"
    spaced = [] if on_gpu else [folder for folder in _linked_folders() if " " in folder]
    if spaced:
        return f"folders without a space on cpu, and found {spaced[0]!r}: set this up in another folder"
    return None


def find_program(variable: str, names: Iterable[str]) -> str | None:
    """The path of the program that an environment variable names, else of the first one found; or None."""
    found = (shutil.which(name) for name in (os.environ.get(variable), *names) if name)
    return next(filter(None, found), None)


def _linked_folders() -> list[str]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return [str(Path(torch.__file__).parent), sysconfig.get_config_var("LIBDIR") or "", cache_dir()]
