"""Whether the attention of a configuration can run here, found out before any weight is loaded."""

from dataclasses import replace

import torch
from radial_attn.models.runtime.dense_backend import check_dense_backend

from radial_attn import radial_mask
from radial_attn.attention import choose_backend
from radial_attn.dispatch import BACKENDS, obstacle
from radial_attn.kernels.compiler import compiler_problem
from radial_attn.kernels.contract import QUANTIZE, Call
from scripts.run.config import Config
from scripts.run.errors import UsageError
from scripts.run.model_info import ModelInfo
from scripts.run.plan import attention_options, dense_layers, dense_steps, radial_config, token_grid


def check_backends(config: Config, model: ModelInfo, device: str, dry_run: bool = False) -> list[str]:
    """Raises UsageError where a named backend does not serve device, data type, head width or mask.

    And where torch.compile, asked for, cannot work.

    A dry run without a GPU, where none was asked for, may plan for another machine: it gets notes instead.
    """
    problems = (_radial(config, model, device), _dense(config, model, device), _compiled(config, device))
    found = [line for line in problems if line]
    elsewhere = dry_run and device == "cpu" and config.model.device == "auto"
    if found and not elsewhere:
        raise UsageError(found[0])
    return [f"not on this machine: {line}" for line in found]


def _radial(config: Config, model: ModelInfo, device: str) -> str | None:
    """What is wrong with backend or quantize, where a layer is radial at all."""
    if len(dense_steps(config)) == config.generation.steps or dense_layers(config, model) == model.layers:
        return None
    name, call = config.attention.backend, _call(config, model, device)
    reason = _reason(name, call)
    if reason is None:
        return None
    plain = replace(call, quantize=None)
    if _reason(name, plain) is None:
        served = [bits or "none" for bits in QUANTIZE if _reason(name, replace(call, quantize=bits)) is None]
        backend = "" if name == "auto" else f"backend {name!r} "
        key, got, reason = "quantize", config.attention.quantize, f": {backend}{reason}"
    else:
        served = _served(call) or _served(plain)
        key, got, reason = "backend", name, f", which {reason}"
    return f"attention.{key}: got {got!r}{reason}; allowed here: {', '.join(served)}"


def _dense(config: Config, model: ModelInfo, device: str) -> str | None:
    """What is wrong with dense_backend; UsageError for a name that is unknown on every machine."""
    name = config.attention.dense_backend
    try:
        check_dense_backend(name)
    except ValueError as error:
        raise UsageError(f"attention.{error}") from error
    except ImportError as error:
        return f"attention.{error}"
    if name != "sage":
        return None
    call = _call(config, model, device)
    mask = radial_mask(call.mask.grid, replace(radial_config(config), pattern="dense"))
    reason = obstacle(name, replace(call, mask=mask, quantize=None))
    return reason and f"attention.dense_backend: got 'sage', which {reason}; allowed here: auto, native"


def _compiled(config: Config, device: str) -> str | None:
    """What keeps torch.compile from working, where it is asked for."""
    problem = compiler_problem(device) if config.model.compile != "none" else None
    return (
        problem and f"model.compile: got {config.model.compile!r}, which needs {problem}; allowed here: none"
    )


def _call(config: Config, model: ModelInfo, device: str) -> Call:
    mask = radial_mask(token_grid(config, model), radial_config(config))
    dtype = getattr(torch, config.model.dtype)
    return Call(
        torch.device(device), dtype, model.head_dim, False, mask, attention_options(config)["quantize"]
    )


def _reason(name: str, call: Call) -> str | None:
    """Why a backend, or each that "auto" looks at, does not serve a call."""
    if name != "auto":
        return obstacle(name, call)
    try:
        choose_backend(call)
    except ValueError as error:
        return str(error)
    return None


def _served(call: Call) -> list[str]:
    return [name for name in BACKENDS if _reason(name, call) is None]
