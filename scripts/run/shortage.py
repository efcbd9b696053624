"""Memory that is missing, before a run or in the middle of one: how it is found, and what is said of it."""

import torch
from radial_attn.models.parallel.groups import Degrees

from scripts.run.config import Config
from scripts.run.errors import UsageError
from scripts.run.model_info import ModelInfo
from scripts.run.parallel_work import rank_memory
from scripts.run.plan import fitting, gib, host_bytes, mask_bytes, memory, token_grid
from scripts.run.processes import local_processes
from scripts.run.system import available_memory, room

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a shortage of host or GPU memory."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(sign in str(error) for sign in OUT_OF_MEMORY)


def check_memory(config: Config, model: ModelInfo, device: str, degrees: Degrees | None = None) -> None:
    """Raises UsageError where the predicted peak is more than device or host have room for.

    `degrees`: of several processes, which without GPUs share the host.
    """
    free = room(device)
    need = memory(config, model, device).total
    shared = degrees is not None and degrees.processes > 1
    if shared:
        here = local_processes() if device == "cpu" else 1
        need = here * rank_memory(config, model, degrees, device).total
    if need > free and shared:
        raise UsageError(
            f"out of memory: the processes of this machine need about {gib(need)} of what the {device} has "
            f"free, {gib(free)}; allowed: more processes on more GPUs, or a smaller or shorter video"
        )
    if need > free:
        raise UsageError(shortage(config, model, device, free, free))
    if device == "cuda":
        check_host(config, model, room("cpu") / local_processes())


def check_host(config: Config, model: ModelInfo, free: float) -> None:
    """Raises UsageError where the weights of a GPU run do not fit into `free` bytes of host memory."""
    need = host_bytes(config, model)
    if need > free:
        raise UsageError(
            f"out of memory: model.path={config.model.path} is read into host memory before it moves to the "
            f"GPU and needs about {gib(need)} there, {gib(free)} are free; "
            "allowed: a smaller model, such as configs/wan_tiny.yaml"
        )


def check_mask(config: Config, model: ModelInfo) -> None:
    """Raises UsageError where the mask alone, and so its density, takes more than the host has free."""
    need, free = mask_bytes(config, model), available_memory("cpu")
    if need > free:
        raise UsageError(
            f"out of memory: attention.block_size={config.attention.block_size} on "
            f"{token_grid(config, model).tokens} tokens makes a mask of {gib(need)}, {gib(free)} are free; "
            "allowed: a larger block_size, up to 256, or a smaller video"
        )


def shortage(config: Config, model: ModelInfo, device: str, free: float, budget: float) -> str:
    """One line: what was asked for, what it needs, and the nearest that needs at most `budget` bytes."""
    sizes = config.generation
    need = memory(config, model, device).total
    fit = fitting(config, model, device, budget)
    return (
        f"out of memory: generation.height={sizes.height} generation.width={sizes.width} "
        f"generation.num_frames={sizes.num_frames} need about {gib(need)} on {device}, {gib(free)} are free; "
        + (f"would fit: {fit}" if fit else "no size of this model would fit; try configs/wan_tiny.yaml")
    )
