"""Compiles the C++ source of a kernel for this machine's processor, once, and loads it.

The library is cached in a folder of the user, under a name that changes with the source, the compiler, its
flags and the processor. It is moved there when complete, so processes may build it at the same time, and ends
with its digest, so a damaged one is built again. If the folder cannot be written, each process builds its own
library and keeps nothing.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ..compiler import find_program

FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
# the first that the compiler accepts is used: the processor's instructions, torch's threads
CHOICES = (("-march=native", "-fopenmp"), ("-march=native", "-pthread"), ("-pthread",))
COMPILERS = ("g++", "clang++", "c++")
FOLDER = "RADIAL_ATTN_CACHE"
LIMIT = 300  # seconds for one attempt


@lru_cache
def load_library(source: Path) -> ctypes.CDLL | str:
    """Loads the library of a source file, or returns one line that says, after "needs", what is missing."""
    compiler = find_program("CXX", COMPILERS)
    if compiler is None:
        return "a C++ compiler, but none was found: apt install g++"
    try:
        with tempfile.TemporaryDirectory(prefix="radial_attn_") as spare:
            return ctypes.CDLL(str(_build(source, compiler, Path(spare))))
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        return f"{source.name} compiled by {compiler}, which failed: {reason}; set CXX to another compiler"


def cache_folder() -> Path:
    """Returns the folder of libraries: RADIAL_ATTN_CACHE, else radial_attn in the user's cache folder."""
    if named := os.environ.get(FOLDER):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radial_attn"


def _build(source: Path, compiler: str, spare: Path) -> Path:
    """Returns the library's path, which is in the folder `spare` if the cache cannot be written."""
    name = f"{source.stem}-{_fingerprint(source, compiler)}.so"
    try:
        target = cache_folder() / name
        if _is_whole(target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=target.parent)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return _compile(source, compiler, spare / name)
    try:
        os.replace(_compile(source, compiler, Path(folder) / name), target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _compile(source: Path, compiler: str, out: Path) -> Path:
    """Compiles with the first flags that work; raises CalledProcessError with the last failure's output."""
    for flags in CHOICES:
        command = [compiler, *FLAGS, *flags, str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        if done.returncode == 0:
            content = out.read_bytes()
            out.write_bytes(content + hashlib.sha256(content).digest())
            return out
    raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)


def _is_whole(library: Path) -> bool:
    """Returns whether a file is there and ends with its digest; to load one that was cut ends the process."""
    if not library.is_file():
        return False
    content = library.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _fingerprint(source: Path, compiler: str) -> str:
    """Returns a digest of everything on which the library depends."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=LIMIT, check=True).stdout
    headers = sorted(source.parent.glob("*.h"))
    parts = [*(file.read_bytes() for file in (source, *headers)), version, repr((FLAGS, CHOICES)).encode()]
    digest = hashlib.sha256()
    for part in (*parts, *(line.encode() for line in processor())):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def processor() -> Iterator[str]:
    """Yields what identifies the instructions of this machine's processor."""
    yield platform.machine()
    yield platform.processor()
    described = Path("/proc/cpuinfo")
    if described.is_file():
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
