"""What each backend of `radial_attention` needs and serves, and the order in which "auto" tries them.

A kernel file states its `NEEDS`; a missing library or an unsuited call is one line that says what to do.
`python -m radial_attn.attention` prints the table.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType

import torch

from .block_mask import BlockMask

BACKENDS = ("auto", "reference", "cpp", "blocks", "flex", "triton", "flashinfer", "sage")
QUANTIZE = (None, "int8", "fp8")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
# by device type, or by CUDA compute capability ("sm90") where it was measured; the first that serves a call
ORDER = {"cpu": ("cpp", "blocks"), "cuda": ("flex", "triton", "blocks")}
MEASURED = {"cpu": "results/attention_cpu-avx512_2026-11-22.md", "cuda": "not measured yet"}


@dataclass(frozen=True)
class Call:
    """What decides whether a backend serves a call.

    Attributes:
        width: head width `D`.
        gradients: whether a backward pass may follow.
        mask: None where it is not known yet.
        quantize: one of `QUANTIZE`.
        partial: whether over a part of the keys, with the log-sum-exp (partial.py).
    """

    device: torch.device
    dtype: torch.dtype
    width: int
    gradients: bool
    mask: BlockMask | None = None
    quantize: str | None = None
    partial: bool = False


@dataclass(frozen=True)
class Needs:
    """What a backend serves.

    Attributes:
        devices: device types, None for any.
        dtypes: of query, key and value.
        widths: head widths, None for any.
        backward: device types on which it has gradients, None for any.
        modules: what must be importable, "a|b" where one of several will do, and `install`, the line
            that brings it.
        capability: least CUDA compute capability.
        quantize: what it multiplies in fewer bits when asked to.
        partial: whether it serves a part of the keys, without gradients or fewer bits.
        also: what else it asks of a call: a reason against it, or None.
    """

    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    widths: tuple[int, ...] | None = None
    backward: tuple[str, ...] | None = None
    modules: tuple[str, ...] = ()
    install: str = ""
    capability: tuple[int, int] = (0, 0)
    quantize: tuple[str | None, ...] = (None,)
    partial: bool = False
    also: Callable[[Call], str | None] | None = None


def kernel(backend: str) -> ModuleType:
    """The module of a backend, imported when it is first asked for."""
    match backend:
        case "reference":
            from .kernels import reference as module
        case "cpp":
            from .kernels import cpp as module
        case "blocks":
            from .kernels import blocks as module
        case "flex":
            from .kernels import flex as module
        case "triton":
            from .kernels import triton as module
        case "flashinfer":
            from .kernels import flashinfer as module
        case "sage":
            from .kernels import sage as module
    return module


def missing(needs: Needs) -> str | None:
    """Which library is not there, and how to install it."""
    absent = [names for names in needs.modules if not any(map(find_spec, names.split("|")))]
    return f"needs {', '.join(absent).replace('|', ' or ')}: {needs.install}" if absent else None


def unsuited(needs: Needs, call: Call) -> str | None:
    """Why a backend whose libraries are there does not serve this call; None where it does."""
    return next(_objections(needs, call), None)


def _objections(needs: Needs, call: Call) -> Iterator[str]:
    kind, bits = call.device.type, f"quantize={call.quantize!r}"
    if needs.devices is not None and kind not in needs.devices:
        yield f"runs on {' and '.join(needs.devices)}, got a tensor on {kind}"
    if kind == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_capability(call.device)
        if found < needs.capability:
            yield f"runs from compute capability {_dotted(needs.capability)} on, got {_dotted(found)}"
    if call.dtype not in needs.dtypes:
        yield f"takes {_names(needs.dtypes)}, got {call.dtype}"
    if needs.widths is not None and call.width not in needs.widths:
        yield f"takes head widths {needs.widths}, got {call.width}"
    if call.quantize not in needs.quantize:
        yield f"has no {bits}"
    if call.gradients and needs.backward is not None and kind not in needs.backward:
        yield f"has no gradients on {kind}"
    if call.gradients and call.quantize is not None:
        yield f"has no gradients with {bits}"
    yield from _partial_objections(needs, call) if call.partial else ()
    reason = None if needs.also is None else needs.also(call)
    if reason is not None:
        yield reason


def _partial_objections(needs: Needs, call: Call) -> Iterator[str]:
    if not needs.partial:
        yield "has no attention over a part of the keys"
    if call.gradients:
        yield "has no gradients over a part of the keys"
    if call.quantize is not None:
        yield f"has no quantize={call.quantize!r} over a part of the keys"


def obstacle(backend: str, call: Call) -> str | None:
    """Why a backend cannot take a call, in words that follow its name; None where it can.

    Inside torch.compile the mask and Python's libraries are not looked at; `cpp` finds or builds its own.
    """
    needs = kernel(backend).NEEDS
    if torch.compiler.is_compiling():
        return unsuited(needs, replace(call, mask=None))
    return missing(needs) or unsuited(needs, call)


def order(device: torch.device) -> tuple[str, ...]:
    """The backends that "auto" tries on a device, best first."""
    return ORDER[order_key(device)]


def order_key(device: torch.device) -> str:
    """The entry of `ORDER` for a device: its own compute capability, its type, or that of the CPU."""
    keys = [device.type, "cpu"]
    if device.type == "cuda" and torch.cuda.is_available():
        keys.insert(0, "sm{}{}".format(*torch.cuda.get_device_capability(device)))
    return next(key for key in keys if key in ORDER)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def table(call: Call) -> list[tuple[str, str, str, str]]:
    """Rows (backend, version of what it needs, "yes" or "no", why not) for calls like `call`."""
    rows = []
    for name in BACKENDS[1:]:
        needs = kernel(name).NEEDS
        reason = obstacle(name, call)
        rows.append((name, _versions(needs.modules), "no" if reason else "yes", reason or ""))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Prints the table of backends for this machine."""
    parser = argparse.ArgumentParser(
        prog="python -m radial_attn.attention", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=[str(x).removeprefix("torch.") for x in DTYPES])
    parser.add_argument("--width", type=int, default=128, help="head width (default: 128)")
    options = parser.parse_args(argv)
    device = _device(parser, options.device)
    name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    call = Call(device, getattr(torch, name), options.width, gradients=False)
    lines = [("backend", "installed", "usable", "why not"), *table(call)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"device {device}, {name}, head width {options.width}, no gradients")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    key = order_key(device)
    print(f"auto tries: {', '.join(ORDER[key])} ({MEASURED[key]})")


def _device(parser: argparse.ArgumentParser, name: str | None) -> torch.device:
    """The device asked for, or the best there is; an unusable one ends the program with one line."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        parser.exit(2, f"error: --device: {str(error).splitlines()[0]}\n")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"error: --device: got {name!r}, but torch sees no CUDA device here\n")
    return device


def _versions(modules: tuple[str, ...]) -> str:
    """Versions of the installed libraries, "built in" where none is needed."""
    found = []
    for name in (name for names in modules for name in names.split("|")):
        packages = metadata.packages_distributions().get(name, [name])
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{packages[0]} {metadata.version(packages[0])}")
    return ", ".join(found) or ("no" if modules else "built in")
