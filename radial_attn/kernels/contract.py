"""Defines what decides whether a kernel serves a call, and what each kernel states about itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..block_mask import BlockMask

QUANTIZE = (None, "int8", "fp8")
FAR_FIELDS = ("none", "mean", "linear")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)


@dataclass(frozen=True)
class Call:
    """Holds what decides whether a backend serves a call.

    Attributes:
        width: head width `D`.
        gradients: whether a backward pass may follow.
        mask: None if it is not known yet.
        quantize: one of `QUANTIZE`.
        partial: whether it covers a part of the keys, with the log-sum-exp (partial.py).
        far_field: one of `FAR_FIELDS`.
    """

    device: torch.device
    dtype: torch.dtype
    width: int
    gradients: bool
    mask: BlockMask | None = None
    quantize: str | None = None
    partial: bool = False
    far_field: str = "none"


@dataclass(frozen=True)
class Needs:
    """States the calls that a backend serves.

    Attributes:
        devices: device types, None for any.
        dtypes: of query, key and value.
        widths: head widths, None for any.
        backward: device types on which it has gradients, None for any.
        modules: what must be importable, "a|b" if one of several will do.
        install: the line that installs it.
        capability: least CUDA compute capability.
        quantize: values of `quantize` that it serves.
        partial: whether it serves a part of the keys, without gradients or fewer bits; such results are
            merged with a far field.
        far_field: whether it computes the far field itself.
        far_backward: device types on which it has gradients with a far field.
        exact: whether products have the bits of the tensors unless `quantize` says otherwise.
        compiles: whether the first call of each shape compiles for seconds.
        also: further check of a call; returns a reason against it, or None.
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
    far_field: bool = False
    far_backward: tuple[str, ...] = ()
    exact: bool = True
    compiles: bool = False
    also: Callable[[Call], str | None] | None = None
