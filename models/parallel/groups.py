"""xDiT's process groups (`xfuser`): started under torchrun, over NCCL on GPUs and over gloo without any."""

import logging
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch

STATE = "xfuser.core.distributed.parallel_state"
HINT = "install it with: .venv/bin/python -m pip install xfuser==0.7.0"


@dataclass(frozen=True)
class Degrees:
    """How many processes share each kind of work; their product is the number of processes.

    Attributes:
        ulysses: share the heads of the attention, and the tokens everywhere else.
        ring: share the queries of the attention, beyond the number of heads.
        cfg: share the two halves of guidance, 1 or 2.
        data: share the prompts.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    data: int = 1

    @property
    def processes(self) -> int:
        return self.ulysses * self.ring * self.cfg * self.data


def ring_refusal(quantize: str | None, check: str, dense_backend: str) -> str | None:
    """What a ring does not serve of the options of `apply_radial_attention`: key, what it is, and allowed."""
    if quantize is not None:
        return (
            f"quantize: got {quantize!r}, allowed in a ring: none; 8-bit products have no log-sum-exp there"
        )
    if check == "reference":
        return "check: got 'reference', allowed in a ring: auto, off, nan; no process has all keys"
    if dense_backend not in {"auto", "native"}:
        return f"dense_backend: got {dense_backend!r}, allowed in a ring: auto, native: it has its own"
    return None


def start(degrees: Degrees, device: str) -> None:
    """Joins the processes of this torchrun and makes the groups of `degrees`, for a run on "cuda" or "cpu".

    Raises:
        ImportError: xfuser is missing; the message has the line that installs it.
        ValueError: the degrees do not make up the number of processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if degrees.processes != world:
        raise ValueError(f"degrees {degrees} are for {degrees.processes} processes, torchrun started {world}")
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
    """Leaves the groups; nothing where there are none."""
    if torch.distributed.is_initialized():
        state = import_module(STATE)
        state.destroy_model_parallel()
        state.destroy_distributed_environment()


def import_xfuser(device: str) -> Any:
    """`xfuser.core.distributed.parallel_state`.

    The package refuses to be imported where there is no accelerator: for a run on the CPU its own `__init__`,
    which asks for one, is left out, and its probes are answered for it.

    Raises:
        ImportError: xfuser is missing, or does not fit; the message has the line that installs it.
    """
    try:
        if device == "cpu":
            _import_without_accelerator()
        state = import_module(STATE)
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("xfuser")]:
            logging.getLogger(name).setLevel(logging.WARNING)  # each module of it has its own, at debug
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
