"""Checks whether this machine can run a plan: device, libraries, kernels, compiler and memory."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch

from radial_attn import RadialConfig, radial_mask
from radial_attn.attention import choose_backend
from radial_attn.dispatch import BACKENDS, obstacle
from radial_attn.kernels.compiler import compiler_problem
from radial_attn.kernels.contract import QUANTIZE, Call
from radial_attn.models.parallel.groups import Degrees, import_xfuser
from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.pipeline.weights import read_object
from radial_attn.models.runtime.dense_backend import OURS, dense_obstacle, known_backends
from scripts.run.config import AttentionConfig, MaskConfig, ModelConfig, find_path
from scripts.run.errors import UsageError, nearest_key
from scripts.run.memory import gib
from scripts.run.processes import local_processes
from scripts.run.system import available_memory

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
LIBRARIES = {  # value of a key -> module, and the command that installs it
    "int8": ("torchao", "pip install --no-deps 'torchao>=0.15'"),
    "nf4": ("bitsandbytes", "pip install --no-deps 'bitsandbytes>=0.46'"),
    "model": ("accelerate", "pip install 'accelerate>=1.10,<2'"),
    "sequential": ("accelerate", "pip install 'accelerate>=1.10,<2'"),
}


def find_device(wanted: str) -> str:
    """Returns 'cpu' or 'cuda'; UsageError if CUDA is asked for and absent."""
    present = torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise UsageError(
            f"model.device: got 'cuda', but torch {torch.__version__} sees no CUDA device; allowed: auto, cpu"
        )
    return "cuda" if present and wanted != "cpu" else "cpu"


def missing_libraries(model: ModelConfig, device: str) -> Iterator[str]:
    """Yields a line for each option that the device or the installed libraries do not support."""
    if model.offload != "none" and device == "cpu":
        yield f"model.offload: got {model.offload!r}, which needs a GPU; allowed on the CPU: none"
    if model.quantization == "nf4" and device == "cpu":
        yield "model.quantization: got 'nf4', which needs a GPU; allowed on the CPU: none, fp8, int8"
    for key in ("offload", "quantization"):
        value = getattr(model, key)
        module, remedy = LIBRARIES.get(value, ("", ""))
        if module and find_spec(module) is None:
            yield f"model.{key}: got {value!r}, which needs {module}; install it with: {remedy}"
    if FAMILIES[model.family].guarded and find_spec("cosmos_guardrail") is None:
        yield (
            f"model.family: got {model.family!r}, which needs cosmos_guardrail: diffusers and the model's "
            "licence ask for its check of prompt and video; install it with: pip install cosmos_guardrail"
        )
    part = "control net" if "controlnet" in FAMILIES[model.family].takes else "transformer"
    needed = FAMILIES[model.family].guarded and (part == "control net" or _pads(model.path))
    if needed and find_spec("torchvision") is None:
        yield (
            f"model.family: got {model.family!r}, whose {part} needs torchvision; pip install the "
            f"torchvision of torch {torch.__version__}"
        )


def _pads(path: str) -> bool:
    """Tells whether a Cosmos takes a mask of padded pixels, which diffusers resizes by torchvision."""
    file = find_path(path) / "transformer" / "config.json"
    return not file.is_file() or read_object(file).get("concat_padding_mask", True)


def missing_kernels(attention: MaskConfig, call: Call, compiled: str, *, radial: bool) -> Iterator[str]:
    """Yields a line for each kernel of a run, or torch.compile, that this machine cannot use.

    Args:
        call: the call of sparse attention; radial: whether any layer is sparse at all.
        compiled: `model.compile`.

    Raises:
        UsageError: no machine knows the `dense_backend`.
    """
    problems = (
        _radial_problem(attention.backend, call) if radial else None,
        dense_problem(attention.dense_backend, call),
    )
    yield from filter(None, problems)
    if compiled != "none" and (problem := compiler_problem(call.device.type)):
        yield f"model.compile: got {compiled!r}, which needs {problem}; allowed here: none"


def _radial_problem(backend: str, call: Call) -> str | None:
    """Returns the error message for `backend` or `quantize`; None if they can serve the call."""
    reason = _reason(backend, call)
    if reason is None:
        return None
    plain = replace(call, quantize=None)
    if _reason(backend, plain) is None:
        served = [
            bits or "none" for bits in QUANTIZE if _reason(backend, replace(call, quantize=bits)) is None
        ]
        named = "" if backend == "auto" else f"backend {backend!r} "
        key, got, reason = "quantize", call.quantize, f": {named}{reason}"
    else:
        served = [name for name in BACKENDS if _reason(name, call) is None] or [
            name for name in BACKENDS if _reason(name, plain) is None
        ]
        key, got, reason = "backend", backend, f", which {reason}"
    return f"attention.{key}: got {got!r}{reason}; allowed here: {', '.join(served)}"


def dense_problem(backend: str, call: Call | None = None) -> str | None:
    """Returns the error message for `dense_backend`; None if it can serve the call, or any call.

    Raises UsageError for a name that no machine knows.
    """
    got = f"attention.dense_backend: got {backend!r}, which"
    if backend not in (known := known_backends()):
        near = nearest_key(backend, known)
        raise UsageError(f"{got} is unknown; did you mean {near!r}? allowed: {', '.join(known)}")
    reason = dense_obstacle(backend)
    if reason is None and backend in OURS and call is not None:
        whole = radial_mask(call.mask.grid, RadialConfig(block_size=call.mask.block_size, pattern="dense"))
        reason = obstacle(backend, replace(call, mask=whole, quantize=None))
    return reason and f"{got} {reason}; allowed here: auto, native"


def _reason(backend: str, call: Call) -> str | None:
    """Says why a backend, or each backend that "auto" tries, cannot serve a call; None if it can."""
    if backend != "auto":
        return obstacle(backend, call)
    try:
        choose_backend(call)
    except ValueError as error:
        return str(error)
    return None


def check_processes(device: str, degrees: Degrees) -> None:
    """Raises UsageError if this machine cannot serve several processes."""
    local = local_processes()
    if device == "cuda" and local > torch.cuda.device_count():
        raise UsageError(
            f"torchrun --nproc_per_node: got {local}, but this machine has {torch.cuda.device_count()} GPUs; "
            "start at most one process a GPU"
        )
    try:
        import_xfuser(device)
    except ImportError as error:
        raise UsageError(str(error)) from error


def check_mask_memory(need: float, tokens: int, attention: AttentionConfig) -> None:
    """Raises UsageError if the mask alone, and so its density, takes more than the host has free."""
    free = available_memory("cpu")
    if need > free:
        raise UsageError(
            f"out of memory: attention.block_size={attention.block_size} on {tokens} tokens makes a mask of "
            f"{gib(need)}, but {gib(free)} are free; use a larger block_size, up to 256, or a smaller video"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error is a shortage of host or GPU memory."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(sign in str(error) for sign in OUT_OF_MEMORY)
