"""What a LoRA training will take, worked out and checked before any weight is loaded."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import torch
from radial_attn.models.runtime.dense_backend import check_dense_backend
from radial_attn.models.training.adapter import target_names

from radial_attn import radial_mask
from radial_attn.attention import choose_backend, require
from radial_attn.dispatch import BACKENDS, obstacle
from radial_attn.kernels.contract import Call
from scripts.lora.config import SCHEMA, DataConfig, LoraTrainConfig
from scripts.run.config import AttentionConfig, Config, GenerationConfig, MaskConfig, ModelConfig
from scripts.run.errors import UsageError, multiples_around, one_line
from scripts.run.loras import meta_transformer
from scripts.run.memory import BLOCKS_AT_ONCE, DTYPE_BYTES, GIB, HOST_BYTES
from scripts.run.model_info import ModelInfo
from scripts.run.plan import attention_flops, other_flops, solved_config, token_grid
from scripts.run.processes import local_processes, processes
from scripts.run.system import room

GRADIENT = 2.5  # of attention: five products against two
AGAIN = 1.0  # of all: what checkpointing computes twice
ADAPTER_BYTES = 16  # a parameter in float32, its gradient and the two means of AdamW
SAVED_WIDTHS = 17  # activations of a block kept for the backward, in widths of a token; and
SAVED_HIDDEN = 3  # in hidden widths of its feed-forward; counted on Wan


def as_generation(config: LoraTrainConfig, size: list[int]) -> Config:
    """The same model, mask and size as a run of generation has them, in one step."""
    shared = {name.name for name in fields(ModelConfig)} & {name.name for name in fields(config.model)}
    model = ModelConfig(**{name: getattr(config.model, name) for name in shared})
    mask = {entry.name: getattr(config.attention, entry.name) for entry in fields(MaskConfig)}
    attention = AttentionConfig(**mask, dense_steps=0)
    frames, height, width = size
    generation = GenerationConfig(
        num_frames=frames,
        height=height,
        width=width,
        steps=1,
        guidance_scale=1.0,
        flow_shift=None if config.model.family == "mochi" else 1.0,
    )
    return Config(model, attention, generation)


def check_training(config: LoraTrainConfig, model: ModelInfo, path: str, device: str) -> None:
    """Raises UsageError for sizes, targets, dense layers and backends that training cannot take."""
    from scripts.run.validate import check_sizes

    check_data_sizes(config.data, model)
    for name, wrong, allowed in _refused(config, model):
        raise UsageError(f"{name}: got {wrong!r}, allowed: {allowed}")
    if config.lora.dropout >= 1:
        raise UsageError(f"lora.dropout: got {config.lora.dropout:g}, allowed: a number from 0 to below 1")
    if config.train.ema >= 1:
        raise UsageError(f"train.ema: got {config.train.ema:g}, allowed: a number from 0 to below 1")
    if config.model.expert == 2 and "transformer_2" not in model.parameters:
        raise UsageError("model.expert: got 2, allowed: 1, the model has one transformer")
    if config.train.optimizer == "adamw8bit":
        _check_8bit(device)
    for size in config.data.sizes:
        run = as_generation(config, size)
        check_sizes(run, model)
        _check_backend(config, model, run, device)
    trainable(config, path)
    _check_dense(config)


def check_data_sizes(data: DataConfig, model: ModelInfo) -> None:
    """Raises UsageError for no sizes, or one that the model does not take."""
    if not data.sizes:
        raise UsageError(f"data.sizes: got [], allowed: {SCHEMA.allowed('data.sizes')}")
    for size in data.sizes:
        for axis, step in enumerate((model.vae_frames, model.size_factor(1), model.size_factor(2))):
            value, offset = size[axis], int(axis == 0)
            if value % step != offset % step:
                name = ("frames", "height", "width")[axis]
                near = " or ".join(map(str, sorted(set(multiples_around(value, step, offset)))))
                rule = f"{step}k + 1" if axis == 0 else f"multiples of {step}"
                given = f"{name} {value} in {'x'.join(map(str, size))}"
                raise UsageError(f"data.sizes: got {given}, allowed: {rule}, nearest: {near}")


def _check_dense(config: LoraTrainConfig) -> None:
    try:
        check_dense_backend(config.attention.dense_backend)
    except (ValueError, ImportError) as error:
        raise UsageError(f"attention.{one_line(error)}") from error


def check_room(config: LoraTrainConfig, model: ModelInfo, path: str, device: str) -> None:
    """Raises UsageError where a process needs more memory than its device has free."""
    runs = [as_generation(config, size) for size in config.data.sizes]
    adapter, free = trainable(config, path) or 0, room(device)
    need = max(memory(config, model, run, adapter, device) for run in runs)
    here = local_processes() if device == "cpu" else 1
    if need * here > free:
        raise UsageError(
            f"out of memory: training needs about {need * here / GIB:.1f} GiB, {free / GIB:.1f} GiB are free "
            "on the device; allowed: train.checkpointing=true, train.batch=1, a larger "
            "parallel.ulysses_degree, parallel.shard=fsdp, smaller data.sizes"
        )


def _refused(config: LoraTrainConfig, model: ModelInfo) -> Iterator[tuple[str, Any, str]]:
    """Keys, their values, and what is allowed instead."""
    if config.model.dtype == "float16":
        yield "model.dtype", "float16", "bfloat16, float32; gradients of float16 would need scaling"
    if config.train.seed >= 2**63:
        yield "train.seed", config.train.seed, "0 to 2^63 - 1"
    if not config.output.path.strip():
        yield "output.path", config.output.path, "a folder"
    if config.validation.videos and "transformer_2" in model.parameters:
        yield "validation.videos", config.validation.videos, "0 with two experts, of which one is here"
    if config.model.positions != "plain" and len({size[0] for size in config.data.sizes}) > 1:
        yield "model.positions", config.model.positions, "plain with sizes of several lengths"
    name = config.attention.dense_backend
    if "sage" in name:
        yield "attention.dense_backend", name, "kernels with gradients: auto, native, flash and others"


def _check_8bit(device: str) -> None:
    from importlib.util import find_spec

    if device != "cuda" or find_spec("bitsandbytes") is None:
        lack = "needs a GPU" if device != "cuda" else "needs bitsandbytes: pip install bitsandbytes"
        raise UsageError(f"train.optimizer: got 'adamw8bit', which {lack}; allowed here: adamw")


def _check_backend(config: LoraTrainConfig, model: ModelInfo, run: Config, device: str) -> None:
    """A backend without a backward pass is refused, with those that have one."""
    name, kind = config.attention.backend, torch.device(device)
    if config.attention.pattern == "dense":
        return
    mask = radial_mask(token_grid(run, model), solved_config(run, model))
    call = Call(kind, getattr(torch, config.model.dtype), model.head_dim, gradients=True, mask=mask)
    try:
        if name == "auto":
            choose_backend(call)
        else:
            require(name, call)
    except (ValueError, ImportError) as error:
        served = [other for other in BACKENDS if other != "auto" and obstacle(other, call) is None]
        raise UsageError(
            f"attention.backend: got {name!r}: {one_line(error)}; allowed here, with gradients: "
            f"{', '.join(served)}"
        ) from error


def trainable(config: LoraTrainConfig, path: str) -> int | None:
    """Numbers in the adapter; None where only loading the model will tell.

    Raises UsageError for a target that the model's self-attention has not.
    """
    transformer = meta_transformer(path, config.model.family)
    if transformer is None:
        return None
    try:
        names = target_names(transformer, config.lora.targets)
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    return sum(config.lora.rank * sum(transformer.get_submodule(name).weight.shape) for name in names)


def training_flops(config: LoraTrainConfig, model: ModelInfo, run: Config, density: float) -> list[float]:
    """Operations of one video forward and backward: self-attention dense, with the mask, and all else.

    Frozen matrices have no gradient of their own: backward costs them as much as forward.
    """
    dense, sparse = attention_flops(run, model, density)
    again = AGAIN * config.train.checkpointing
    factor = 1 + GRADIENT + again
    return [dense * factor, sparse * factor, other_flops(run, model) * (2 + again)]


def memory(config: LoraTrainConfig, model: ModelInfo, run: Config, adapter: int, device: str) -> float:
    """Predicted bytes at the peak of a process: transformer, adapter with its optimizer, activations."""
    size = DTYPE_BYTES[config.model.dtype]
    part = "transformer_2" if config.model.expert == 2 else "transformer"
    weights = shared(config, model, size * model.parameters.get(part, 0))
    share = token_grid(run, model).tokens * config.train.batch / config.parallel.ulysses_degree
    stream = size * share * model.width
    block = size * share * (SAVED_WIDTHS * model.width + SAVED_HIDDEN * model.ffn)
    kept = model.layers * stream + block if config.train.checkpointing else model.layers * block
    average = 4 * adapter * (config.train.ema > 0)
    return weights + ADAPTER_BYTES * adapter + average + kept + (HOST_BYTES if device == "cpu" else 0)


def sharers(config: LoraTrainConfig) -> int:
    """Processes that the weights are divided over; `--dry-run` in one counts at least those of a video."""
    return 1 if config.parallel.shard == "none" else max(processes(), config.parallel.ulysses_degree)


def shared(config: LoraTrainConfig, model: ModelInfo, whole: float) -> float:
    """Bytes of weights in a process: its part, and the blocks that are gathered at a time.

    Loading takes no more where the file has the data type of the run: its pages are read as they are divided.
    """
    if sharers(config) == 1:
        return whole
    return whole / sharers(config) + BLOCKS_AT_ONCE * whole / model.layers


def describe_plan(config: LoraTrainConfig, model: ModelInfo, path: str, device: str) -> str:
    """The table that `--dry-run` prints: a line for the run, two for each size."""
    adapter, train, lora = trainable(config, path), config.train, config.lora
    numbers = "unknown before loading" if adapter is None else f"{adapter:,}"
    each = train.batch * train.accumulate
    rows = {
        "model": f"{config.model.path} ({config.model.family}, {config.model.dtype}) on {device}",
        "adapter": f"rank {lora.rank} on {', '.join(lora.targets)}: {numbers} trainable parameters",
        "steps": f"{train.steps}, {each} videos a process, rate {train.rate:g}, {train.schedule}",
    }
    if config.parallel.shard != "none":
        count = sharers(config)
        rows["weights"] = f"shared by {count} processes" if count > 1 else "whole, shared from NPROC=2 on"
    lines = [f"{name:<10} {text}" for name, text in rows.items()]
    for size in config.data.sizes:
        lines += _describe_size(config, model, size, adapter or 0, device)
    return "\n".join(lines)


def _describe_size(
    config: LoraTrainConfig, model: ModelInfo, size: list[int], adapter: int, device: str
) -> list[str]:
    run = as_generation(config, size)
    grid = token_grid(run, model)
    density = radial_mask(grid, solved_config(run, model)).density
    dense, sparse, other = training_flops(config, model, run, density)
    share, fewer = dense / (dense + other), (dense + other) / (sparse + other)
    need = memory(config, model, run, adapter, device) / GIB
    name = "x".join(map(str, size))
    return [
        f"{name:<10} {grid.tokens} tokens, density {density:.3f}, memory {need:.2f} GiB predicted",
        f"{'':<10} attention {dense / 1e12:.4g} TFLOP a video dense ({share:.0%} of all), "
        f"{sparse / 1e12:.4g} with the mask: {fewer:.2f}x fewer operations in all",
    ]


def mask_settings(config: LoraTrainConfig, model: ModelInfo) -> list[dict[str, Any]]:
    """Size, mask and dense layers of each size that is trained, as JSON can hold them."""
    found = []
    for frames, height, width in config.data.sizes:
        run = as_generation(config, [frames, height, width])
        sizes = {"num_frames": frames, "height": height, "width": width}
        mask = asdict(solved_config(run, model))
        found.append(sizes | {"mask": mask, "dense_layers": config.attention.dense_layers})
    return found
