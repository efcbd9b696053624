"""Decides which backend serves a call, and in which order "auto" tries them.

A kernel states its `NEEDS`. A missing library or an unsuited call gives one line that says what to do.
`python -m radial_attn backends` prints the table.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType

import torch

from .kernels.contract import Call, Needs

BACKENDS = ("auto", "reference", "cpp", "blocks", "flex", "triton", "flash4", "flashinfer", "sage")
# by device type, or by CUDA compute capability ("sm90") if measured; the first that serves a call is taken
ORDER = {"cpu": ("cpp", "blocks"), "cuda": ("flex", "triton", "blocks")}


def kernel(backend: str) -> ModuleType:
    """Imports the module of a backend on first use and returns it."""
    match backend:
        case "reference":
            from .kernels import reference as module
        case "cpp":
            from .kernels.cpp import op as module
        case "blocks":
            from .kernels.blocks import op as module
        case "flex":
            from .kernels import flex as module
        case "triton":
            from .kernels.triton import op as module
        case "flash4":
            from .kernels.flash4 import op as module
        case "flashinfer":
            from .kernels import flashinfer as module
        case "sage":
            from .kernels import sage as module
    return module


def missing(needs: Needs) -> str | None:
    """Says which libraries are missing and how to install them; None if none is."""
    absent = [names for names in needs.modules if not any(map(find_spec, names.split("|")))]
    return f"needs {', '.join(absent).replace('|', ' or ')}: {needs.install}" if absent else None


def unsuited(needs: Needs, call: Call) -> str | None:
    """Says why a backend with its libraries installed does not serve this call; None if it does."""
    for objection in _objections(needs, call):  # torch.compile of torch 2.8 has no next() with a default
        return objection
    return None


def _objections(needs: Needs, call: Call) -> Iterator[str]:
    kind, bits = call.device.type, f"quantize={call.quantize!r}"
    if needs.devices is not None and kind not in needs.devices:
        yield f"runs on {' and '.join(needs.devices)}, got a tensor on {kind}"
    if kind == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(call.device)
        if capability < needs.capability:
            least = _dotted(needs.capability)
            yield f"runs on compute capability {least} or later, got {_dotted(capability)}"
    if call.dtype not in needs.dtypes:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in needs.dtypes)
        yield f"takes {names}, got {call.dtype}"
    if needs.widths is not None and call.width not in needs.widths:
        yield f"takes head widths {needs.widths}, got {call.width}"
    if call.quantize not in needs.quantize:
        yield f"has no {bits}"
    if call.gradients and needs.backward is not None and kind not in needs.backward:
        yield f"has no gradients on {kind}"
    if call.gradients and call.quantize is not None:
        yield f"has no gradients with {bits}"
    yield from _partial_objections(needs, call) if call.partial else ()
    yield from _far_objections(needs, call) if call.far_field != "none" else ()
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


def _far_objections(needs: Needs, call: Call) -> Iterator[str]:
    wanted = f"far_field={call.far_field!r}"
    if not (needs.far_field or needs.partial):
        yield f"has no {wanted}, as it gives no log-sum-exp"
    if call.quantize is not None:
        yield f"has no {wanted} with quantize={call.quantize!r}"
    if call.gradients and call.device.type not in needs.far_backward:
        yield f"has no gradients with {wanted} on {call.device.type}"


def obstacle(backend: str, call: Call) -> str | None:
    """Says why a backend cannot take a call, in words that follow its name; None if it can.

    Inside torch.compile it ignores the mask and Python's libraries; `cpp` finds or builds its own library.
    """
    needs = kernel(backend).NEEDS
    if torch.compiler.is_compiling():
        return unsuited(needs, replace(call, mask=None))
    return missing(needs) or unsuited(needs, call)


def order(device: torch.device) -> tuple[str, ...]:
    """Returns the backends that "auto" tries on a device, best first."""
    return ORDER[order_key(device)]


def order_key(device: torch.device) -> str:
    """Returns the key of `ORDER` for a device: its compute capability, its type or "cpu"."""
    keys = [device.type, "cpu"]
    if device.type == "cuda" and torch.cuda.is_available():
        keys.insert(0, "sm{}{}".format(*torch.cuda.get_device_capability(device)))
    return next(key for key in keys if key in ORDER)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def table(call: Call) -> list[tuple[str, str, str, str]]:
    """Returns rows (backend, installed versions, "yes" or "no", why not) for calls like `call`."""
    rows = []
    for name in BACKENDS[1:]:
        needs = kernel(name).NEEDS
        reason = obstacle(name, call)
        rows.append((name, versions(needs.modules), "no" if reason else "yes", reason or ""))
    return rows


def versions(modules: tuple[str, ...]) -> str:
    """Returns the versions of the installed libraries, "built in" if none is needed."""
    present = []
    for name in (name for names in modules for name in names.split("|")):
        packages = _distributions().get(name, [name])
        with suppress(metadata.PackageNotFoundError):
            present.append(f"{packages[0]} {metadata.version(packages[0])}")
    return ", ".join(present) or ("no" if modules else "built in")


@lru_cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()
