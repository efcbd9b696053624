"""Exports compiled kernels of FlashAttention-4 to files for a machine without network or compiler.

    bash scripts/export_flash4.sh --out flash4
    RADIAL_ATTN_FLASH4=flash4 python -m radial_attn backends

Needs flash-attn-4 and a C compiler, but no GPU. The GPU machine needs torch and apache-tvm-ffi. A file has
about 100 KB.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from radial_attn.kernels.compiler import find_program
from radial_attn.kernels.flash4 import library
from radial_attn.kernels.flash4.exported import FORMAT, INDEX, MADE
from radial_attn.kernels.flash4.op import HOPPER
from scripts.benchmarks.flash4_kernels import KINDS, Wanted, compile_kernel, prepare_compiler, wanted
from scripts.benchmarks.pool import pooled
from scripts.run.errors import OneLineParser, exit_code, positive
from scripts.run.files import sha256, write_text

# The package's own function for errors is in its library of 43 MB; this one needs only the CUDA runtime.
ERRORS = """
#include <stdint.h>
const char *cudaGetErrorName(int);
const char *cudaGetErrorString(int);
__attribute__((visibility("hidden"))) void CuteDSLRT_TVMFFISetRaisedCudaError(
    void (*raise)(const char *kind, const char **parts, int32_t count), int32_t code) {
  const char *parts[] = {cudaGetErrorName(code), ": ", cudaGetErrorString(code)};
  raise("RuntimeError", parts, 3);
}
"""


def export(call: Wanted, folder: Path) -> tuple[str, dict]:
    """Compiles a kernel into a library in `folder`; returns its name and its entry of the index."""
    made = compile_kernel(call, HOPPER)
    file = folder / f"{made.name}.so"
    with TemporaryDirectory() as spare:
        objects = []
        for step, function in made.functions.items():
            objects.append(str(Path(spare) / f"{step}.o"))
            function.export_to_c(objects[-1], function_name=step)
        link(objects, file, Path(spare))
    return made.name, {
        "file": file.name,
        "sha256": sha256(file),
        "functions": list(made.functions),
        "rows": made.rows,
    }


def link(objects: list[str], target: Path, spare: Path) -> None:
    """Links object files into a library that needs only tvm_ffi and the CUDA runtime of the process."""
    import tvm_ffi
    from cutlass.cute.runtime import find_runtime_libraries

    source = spare / "errors.c"
    source.write_text(ERRORS, encoding="utf-8")
    runtime = (
        Path(find_runtime_libraries(enable_tvm_ffi=False)[0]).parent / "libcuda_dialect_runtime_static.a"
    )
    needed = Path(tvm_ffi.__file__).parent / "lib"
    options = ["-shared", "-fPIC", "-O2", "-s", "-Wl,--gc-sections", "-Wl,--exclude-libs,ALL"]
    inputs = [*objects, str(source), str(runtime), f"-L{needed}", "-ltvm_ffi"]
    compiler = find_program("CC", ("gcc", "clang", "cc"))
    subprocess.run(
        [compiler, *options, *inputs, "-o", str(target)], check=True, capture_output=True, text=True
    )


def problem() -> str | None:
    """Says what this machine lacks to export; None if nothing."""
    if (reason := library.problem()) is not None:
        return reason
    if find_program("CC", ("gcc", "clang", "cc")) is None:
        return "needs a C compiler, but none was found: apt install gcc"
    return None


def main(argv: list[str] | None = None) -> int:
    """Exports the kernels and prints their sizes."""
    parser = OneLineParser(prog="scripts/export_flash4.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("flash4"), help="folder of the files")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16"), default=["bfloat16"])
    parser.add_argument(
        "--width", nargs="+", type=int, choices=(64, 128), default=[64, 128], help="of a head"
    )
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--jobs", type=positive, default=1, help="kernels compiled at the same time")
    options = parser.parse_args(argv)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a folder, got {options.out}")
    if (reason := problem()) is not None:
        parser.error(reason)
    return exit_code(lambda: run(options), "run the same command again", subprocess.SubprocessError)


def run(options: argparse.Namespace) -> None:
    """Writes the kernels and their index; kernels of an earlier export of the same versions stay in it."""
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"format": FORMAT, "package": MADE, "capability": list(HOPPER)}
    about["compiler"] = f"{library.COMPILER} {metadata.version(library.COMPILER)}"
    calls = wanted(HOPPER, [getattr(torch, name) for name in options.dtype], options.width, options.kind)
    kernels = {}
    work, start = [(call, options.out) for call in calls], partial(prepare_compiler, HOPPER)
    for name, entry in pooled(export, work, options.jobs, start):
        kernels[name] = entry
        print(f"{name}: {(options.out / entry['file']).stat().st_size / 1000:.0f} KB", flush=True)
    index = about | {"kernels": earlier(options.out, about) | kernels}
    write_text(options.out / INDEX, json.dumps(index, indent=1) + "\n")


def earlier(folder: Path, about: Mapping[str, Any]) -> dict[str, dict]:
    """Returns the index entries, by name, of the kernels in a folder that are whole; {} if there are none.

    If the index is damaged or differs from `about`, none of them counts, and a note says so.
    """
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        content = json.loads((folder / INDEX).read_bytes()) if (folder / INDEX).exists() else {"kernels": {}}
        kernels = content.pop("kernels")
        if not kernels or content == about:
            files = {name: folder / entry["file"] for name, entry in kernels.items()}
            whole = (x for x in files if files[x].is_file() and sha256(files[x]) == kernels[x]["sha256"])
            return {name: kernels[name] for name in whole}
    print(f"note: {folder / INDEX} is damaged or of other versions; its kernels are left out", flush=True)
    return {}


if __name__ == "__main__":
    sys.exit(main())
