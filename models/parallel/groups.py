"""Starts xDiT's process groups (`xfuser`) under torchrun, over NCCL on GPUs and over gloo without any."""

import logging
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any, NamedTuple

import torch

STATE = "xfuser.core.distributed.parallel_state"
HINT = "install it with: python -m pip install xfuser==0.7.0"


@dataclass(frozen=True)
class Degrees:
    """Counts the processes that share each kind of work; the product is the number of processes.

    Attributes:
        ulysses: processes that share the heads of the attention, and the tokens everywhere else.
        ring: processes that share the queries of the attention, beyond the number of heads.
        cfg: processes that share the two halves of guidance, 1 or 2.
        data: processes that share the prompts.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    data: int = 1

    @property
    def processes(self) -> int:
        return self.ulysses * self.ring * self.cfg * self.data


class RingRefusal(NamedTuple):
    """Names an option that a ring does not support.

    Attributes:
        option: argument of `apply_radial_attention`.
        reason: a sentence with the option, its value and the remedy.
    """

    option: str
    reason: str


def ring_refusal(quantize: str | None, check: str, dense_backend: str) -> RingRefusal | None:
    """Returns the first of these options of `apply_radial_attention` that a ring does not support."""
    if quantize is not None:
        why = "8-bit products give no log-sum-exp there; run without quantization"
        return RingRefusal("quantize", f"a ring does not support quantize={quantize!r}: {why}")
    if check == "reference":
        why = "no process has all keys; allowed: auto, off, nan"
        return RingRefusal("check", f"a ring does not support check='reference': {why}")
    if dense_backend not in {"auto", "native"}:
        why = "it has its own; allowed: auto, native"
        return RingRefusal("dense_backend", f"a ring does not support dense_backend={dense_backend!r}: {why}")
    return None


def start(degrees: Degrees, device: str) -> None:
    """Joins the processes of this torchrun and makes the groups of `degrees`, for a run on "cuda" or "cpu".

    Raises:
        ImportError: xfuser is missing; the message has the line that installs it.
        ValueError: the product of the degrees is not the number of processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if degrees.processes != world:
        raise ValueError(
            f"degrees {degrees} need {degrees.processes} processes, torchrun started {world}; "
            "change the degrees or the number of processes"
        )
    state = import_xfuser(device)
    backend = "nccl" if device == "cuda" else "gloo"
    state.init_distributed_environment(backend=backend)
    state.initialize_model_parallel(
        data_parallel_degree=degrees.data,
        classifier_free_guidance_degree=degrees.cfg,
        sequence_parallel_degree=degrees.ulysses * degrees.ring,
        ulysses_degree=degrees.ulysses,
        ring_degree=degrees.ring,
        backend=backend,
    )


def stop() -> None:
    """Leaves the groups, if there are any."""
    if torch.distributed.is_initialized():
        state = import_module(STATE)
        state.destroy_model_parallel()
        state.destroy_distributed_environment()


def import_xfuser(device: str) -> Any:
    """Imports and returns `xfuser.core.distributed.parallel_state`.

    The package refuses to be imported without an accelerator. For a run on the CPU its own `__init__`, which
    asks for one, is skipped, and its probes get fixed answers.

    Raises:
        ImportError: xfuser is missing, or does not fit; the message has the line that installs it.
    """
    try:
        if device == "cpu":
            _import_without_accelerator()
        state = import_module(STATE)
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("xfuser")]:
            logging.getLogger(name).setLevel(logging.WARNING)  # each of its modules has a logger, at debug
        return state
    except ImportError as error:
        raise ImportError(f"several processes need xfuser ({error}); {HINT}") from error


def _import_without_accelerator() -> None:
    if "xfuser" not in sys.modules:
        spec = find_spec("xfuser")
        if spec is None:
            raise ImportError("No module named 'xfuser'")
        sys.modules["xfuser"] = module_from_spec(spec)
    envs = import_module("xfuser.envs")
    envs.get_device_version = lambda: "0.0"
    envs.get_torch_distributed_backend = lambda: "gloo"
    envs.get_device_name = lambda: "cpu"
    envs.get_device = lambda local_rank: torch.device("cpu")
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
