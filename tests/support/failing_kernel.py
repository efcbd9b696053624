"""A kernel that is made to fail: that of "auto" on the CPU, whose output is spoilt in one call."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from radial_attn.dispatch import kernel
from tests.support.auto_backend import AUTO

STATE: dict[str, object] = {"left": 0, "spoil": None}


@torch.library.custom_op("radial_tests::spoil", mutates_args=())
def spoil(output: Tensor) -> Tensor:
    """Copies an output, and spoils it in the call that `fail` was given."""
    STATE["left"] -= 1
    return STATE["spoil"](output) if STATE["left"] == -1 else output.clone()


@spoil.register_fake
def _(output: Tensor) -> Tensor:
    return torch.empty_like(output)


def one_nan(output: Tensor) -> Tensor:
    """The output with a single value that is not a number, in its last token."""
    output = output.clone()
    output[0, -1, 0, 0] = float("nan")
    return output


def twice(output: Tensor) -> Tensor:
    """Finite and wrong."""
    return 2 * output


def fail(monkeypatch: pytest.MonkeyPatch, call: int, how: Callable[[Tensor], Tensor]) -> None:
    """Spoils one attention call, numbered from 0 from now on, of a sparse mask or ("blocks") a dense one."""
    STATE.update(left=call, spoil=how)
    for module in map(kernel, {AUTO, "blocks"}):
        monkeypatch.setattr(module, "attention", partial(_spoilt, module.attention))


def _spoilt(original: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
    return spoil(original(*args, **options))
