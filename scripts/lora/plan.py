"""Plans a LoRA training once: checks it and predicts its needs before any weight is loaded."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.kernels.contract import Call
from radial_attn.models.training.adapter import target_names
from scripts.lora.config import SCHEMA, DataConfig, LoraTrainConfig
from scripts.lora.latents import LatentStore
from scripts.run.attention import radial_config, solve_mask
from scripts.run.config import VideoSize
from scripts.run.errors import UsageError, one_line
from scripts.run.families import position_arguments
from scripts.run.files import user_path
from scripts.run.flops import Flops, beyond_mask, count_flops
from scripts.run.hub_models import find_model, read_model_info
from scripts.run.loras import meta_transformer
from scripts.run.machine_checks import find_device, missing_kernels
from scripts.run.memory import BLOCKS_AT_ONCE, DTYPE_BYTES, GIB, HOST_BYTES
from scripts.run.model_info import ModelInfo
from scripts.run.option_checks import check_frames, check_layers, check_size
from scripts.run.processes import local_processes, processes
from scripts.run.system import room

GRADIENT = 2.5  # backward over forward in attention: five products against two
ADAPTER_BYTES = 16  # a parameter in float32, its gradient and the two means of AdamW
SAVED_WIDTHS = 17  # activations of a block kept for the backward, in widths of a token; and
SAVED_HIDDEN = 3  # in hidden widths of its feed-forward; counted on Wan


@dataclass(frozen=True)
class SizePlan:
    """Holds one of `data.sizes`: its tokens and its mask, density solved."""

    size: VideoSize
    grid: TokenGrid
    mask: RadialConfig

    @property
    def density(self) -> float:
        return radial_mask(self.grid, self.mask).density


@dataclass(frozen=True)
class TrainPlan:
    """Holds everything about a training that is known before weights are loaded.

    Attributes:
        model: numbers of the model; path: its folder, or its hub id; device: "cpu" or "cuda".
        sizes: in the order of `data.sizes`.
        adapter: count of the adapter's parameters; None if only loading the model shows it.
        warnings: lines for the user before the run.
    """

    config: LoraTrainConfig
    model: ModelInfo
    path: str
    device: str
    sizes: tuple[SizePlan, ...]
    adapter: int | None
    warnings: tuple[str, ...] = ()

    def flops(self, size: SizePlan) -> Flops:
        """Counts the operations of one video forward and backward.

        Frozen matrices have no gradient of their own: their backward costs as much as their forward.
        """
        attention = self.config.attention
        options = {"far_field": self.far_field, "density": size.density}
        options |= {"steps": 0, "measures": False, "residual": False}
        beyond = beyond_mask(self.model, size.grid, attention.block_size, **options)
        layers = attention.dense_layers
        forward = count_flops(self.model, size.grid, size.density, dense_layers=layers, beyond=beyond)
        again = int(self.config.train.checkpointing)  # it computes the forward twice
        factor = 1 + GRADIENT + again
        return Flops(forward.dense * factor, forward.sparse * factor, forward.other * (2 + again))

    def memory(self, size: SizePlan) -> float:
        """Predicts the bytes at the peak of a process: transformer, adapter, optimizer, activations."""
        config, model = self.config, self.model
        element = DTYPE_BYTES[config.model.dtype]
        part = "transformer_2" if config.model.expert == 2 else "transformer"
        weights = element * model.parameters.get(part, 0)
        # A part of the weights, and the blocks that are gathered at a time. Loading takes no more if the file
        # has the dtype of the run: pages are divided as they are read.
        if self.sharers > 1:
            weights = weights / self.sharers + BLOCKS_AT_ONCE * weights / model.layers
        tokens = size.grid.tokens * config.train.batch / config.parallel.ulysses_degree
        stream = element * tokens * model.width
        block = element * tokens * (SAVED_WIDTHS * model.width + SAVED_HIDDEN * model.ffn)
        kept = model.layers * stream + block if config.train.checkpointing else model.layers * block
        adapter = self.adapter or 0
        average = 4 * adapter * (config.train.ema > 0)
        host = HOST_BYTES if self.device == "cpu" else 0
        return weights + ADAPTER_BYTES * adapter + average + kept + host

    @property
    def sharers(self) -> int:
        """Counts the processes that share the weights; a dry run in one process counts at least a video's."""
        parallel = self.config.parallel
        return 1 if parallel.shard == "none" else max(processes(), parallel.ulysses_degree)

    @property
    def far_field(self) -> str:
        """Returns how dropped blocks count; a dense pattern drops none."""
        attention = self.config.attention
        return "none" if attention.pattern == "dense" else attention.far_field

    def attention_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `apply_radial_attention`."""
        attention = self.config.attention
        backend = attention.dense_backend  # a backend that "auto" times may not take the dtypes of autocast
        return {
            "config": radial_config(attention),
            "dense_layers": attention.dense_layers,
            "backend": attention.backend,
            "tune": attention.tune,
            "far_field": self.far_field,
            "dense_backend": "native" if backend == "auto" else backend,
        }

    def position_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `extend_positions` for the longest size."""
        return position_arguments(self.config.model, max(size.size.frames for size in self.sizes), self.model)

    def about(self) -> dict[str, Any]:
        """Returns the content of the adapter's header, which says what it was trained for."""
        model, attention = self.config.model, self.config.attention
        names = ("path", "family", "expert", "positions", "positions_frames")
        sizes = []
        for size in self.sizes:
            frames, height, width = size.size
            entry = {"num_frames": frames, "height": height, "width": width, "mask": asdict(size.mask)}
            sizes.append(entry | {"dense_layers": attention.dense_layers, "far_field": self.far_field})
        about = {name: getattr(model, name) for name in names}
        about |= {"steps": self.config.train.steps, "flow_shift": self.config.train.flow_shift}
        return about | {"sizes": sizes}


def plan_training(config: LoraTrainConfig, *, dry_run: bool = False) -> TrainPlan:
    """Plans a training, and checks everything that needs neither weights nor latents.

    `dry_run` ignores the number of processes and the memory of this machine.

    Raises:
        UsageError: training does not support sizes, targets, dense layers, backends or other values.
    """
    device, path = find_device(config.model.device), find_model(config.model)
    model = read_model_info(path)
    check_data_sizes(config.data, model)
    for name, wrong, remedy in _refused(config, model):
        raise UsageError(f"{name}: got {wrong!r}, {remedy}")
    if config.model.positions_frames is not None:
        check_frames("model.positions_frames", config.model.positions_frames, model)
    check_layers(config.attention, model)
    if config.train.optimizer == "adamw8bit" and (device != "cuda" or find_spec("bitsandbytes") is None):
        lack = "a GPU" if device != "cuda" else "bitsandbytes: pip install bitsandbytes"
        raise UsageError(f"train.optimizer: got 'adamw8bit', which needs {lack}; allowed here: adamw")
    sizes = []
    for entry in config.data.sizes:
        size = VideoSize(*entry)
        grid = model.grid(size)
        sizes.append(SizePlan(size, grid, solve_mask(config.attention, grid)))
        mask, dtype = radial_mask(grid, sizes[-1].mask), getattr(torch, config.model.dtype)
        call = Call(torch.device(device), dtype, model.head_dim, gradients=True, mask=mask)
        is_radial = config.attention.pattern != "dense"
        call = replace(call, far_field=config.attention.far_field if is_radial else "none")
        for problem in missing_kernels(config.attention, call, "none", radial=is_radial):
            raise UsageError(problem)
    plan = TrainPlan(config, model, path, device, tuple(sizes), _adapter_numbers(config, path))
    if dry_run:
        return plan
    _check_processes(config, processes())
    return replace(plan, warnings=memory_warnings(plan))


def check_data_sizes(data: DataConfig, model: ModelInfo) -> None:
    """Raises UsageError if there are no sizes, or the model does not take one."""
    if not data.sizes:
        raise UsageError(f"data.sizes: got [], must be {SCHEMA.allowed('data.sizes')}")
    for size in data.sizes:
        shape = "x".join(map(str, size))
        keys = tuple(f"data.sizes: {side} of {shape}" for side in ("frames", "height", "width"))
        check_size(VideoSize(*size), model, keys)


def _check_processes(config: LoraTrainConfig, world: int) -> None:
    """Raises UsageError for options that do not work with this number of processes."""
    ulysses, shard = config.parallel.ulysses_degree, config.parallel.shard
    if world % ulysses:
        raise UsageError(f"parallel.ulysses_degree: got {ulysses}, must divide the {world} processes")
    if shard != "none" and world == 1:
        raise UsageError(
            f"parallel.shard: got {shard!r}, must be none in one process; start several with NPROC=2 or more"
        )


def divided(config: LoraTrainConfig, store: LatentStore) -> tuple[dict[tuple, list[int]], list[int]]:
    """Divides the samples of the run's sizes: some to train on, by bucket, and some held out, spread evenly.

    Raises UsageError if none are left to train on.
    """
    sizes = [tuple(size) for size in config.data.sizes]
    fitting = [
        i for i, sample in enumerate(store.samples) if (sample.frames, sample.height, sample.width) in sizes
    ]
    count = config.validation.samples if config.validation.every else 0
    if len(fitting) <= count:
        raise UsageError(
            f"data.latents: {store.folder} has {len(fitting)} clips of data.sizes, but "
            f"validation.samples={count} holds out {count}; add clips, or hold out fewer"
        )
    held_out = [fitting[(2 * n + 1) * len(fitting) // (2 * count)] for n in range(count)]
    trains: dict[tuple, list[int]] = {}
    for i in fitting:
        if i not in held_out:
            trains.setdefault(store.samples[i].bucket, []).append(i)
    return trains, held_out


def memory_warnings(plan: TrainPlan) -> tuple[str, ...]:
    """Returns a warning if a GPU has less memory free than predicted, which was not measured there yet.

    Raises UsageError if the CPU has less.
    """
    need, free = max(map(plan.memory, plan.sizes)), room(plan.device)
    here = local_processes() if plan.device == "cpu" else 1
    if need * here <= free:
        return ()
    short = (
        f"training needs about {need * here / GIB:.1f} GiB, but {free / GIB:.1f} GiB are free on the device; "
        "set train.checkpointing=true, train.batch=1, a larger parallel.ulysses_degree, "
        "parallel.shard=fsdp, or smaller data.sizes"
    )
    if plan.device == "cpu":
        raise UsageError(f"out of memory: {short}")
    return (f"memory may be short: {short}",)


def _refused(config: LoraTrainConfig, model: ModelInfo) -> Iterator[tuple[str, Any, str]]:
    """Yields key, value and remedy of each value that training does not support."""
    for name, share in (("lora.dropout", config.lora.dropout), ("train.ema", config.train.ema)):
        if share >= 1:
            yield name, share, "must be a number from 0 to below 1"
    if config.model.expert == 2 and "transformer_2" not in model.parameters:
        yield "model.expert", 2, "must be 1: the model has one transformer"
    if config.model.dtype == "float16":
        yield "model.dtype", "float16", "whose gradients would need scaling; allowed: bfloat16, float32"
    if config.train.seed >= 2**63:
        yield "train.seed", config.train.seed, "must be 0 to 2^63 - 1"
    if not config.output.path.strip():
        yield "output.path", config.output.path, "must be a folder"
    if config.validation.videos and "transformer_2" in model.parameters:
        yield "validation.videos", config.validation.videos, "must be 0 with two experts: only one is loaded"
    if config.model.positions != "plain" and len({size[0] for size in config.data.sizes}) > 1:
        yield "model.positions", config.model.positions, "must be plain with sizes of several lengths"
    name = config.attention.dense_backend
    if "sage" in name:
        yield "attention.dense_backend", name, "which has no gradients; use auto, native, flash or others"


def _adapter_numbers(config: LoraTrainConfig, path: str) -> int | None:
    """Counts the adapter's parameters; None if only loading the model shows them.

    Raises UsageError for a target that the model's self-attention does not have.
    """
    transformer = meta_transformer(path, config.model.family)
    if transformer is None:
        return None
    try:
        names = target_names(transformer, config.lora.targets)
    except ValueError as error:
        raise UsageError(unknown_targets(config, error)) from error
    return sum(config.lora.rank * sum(transformer.get_submodule(name).weight.shape) for name in names)


def unknown_targets(config: LoraTrainConfig, error: ValueError) -> str:
    """Returns the error message for `lora.targets` that the model does not have."""
    return f"lora.targets: got {', '.join(config.lora.targets)!r}, which the model lacks: {one_line(error)}"


def describe_training(plan: TrainPlan) -> str:
    """Returns the table that `--dry-run` prints; the latents need not be there yet."""
    config = plan.config
    train, lora = config.train, config.lora
    numbers = "unknown before loading" if plan.adapter is None else f"{plan.adapter:,}"
    each, share = train.batch * train.accumulate, config.parallel.ulysses_degree
    videos = f"{each} video{'s' if each > 1 else ''}"
    videos += " a process" if share == 1 else f"{', each' if each > 1 else ''} shared by {share} processes"
    rows = {
        "model": f"{config.model.path} ({config.model.family}, {config.model.dtype}) on {plan.device}",
        "adapter": f"rank {lora.rank} on {', '.join(lora.targets)}: {numbers} trainable parameters",
        "steps": f"{train.steps}, {videos}, rate {train.rate:g}, {train.schedule}",
    }
    if config.parallel.shard != "none":
        count = plan.sharers
        rows["weights"] = f"shared by {count} processes" if count > 1 else "whole, shared from NPROC=2 on"
    lines = [f"{name:<10} {text}" for name, text in rows.items()]
    far = "" if plan.far_field == "none" else f", far field {plan.far_field}"
    for size in plan.sizes:
        flops, need = plan.flops(size), plan.memory(size) / GIB
        lines += [
            f"{'x'.join(map(str, size.size)):<10} {size.grid.tokens} tokens, density {size.density:.3f}"
            f"{far}, memory {need:.2f} GiB predicted",
            f"{'':<10} attention {flops.dense / 1e12:.4g} TFLOP a video dense ({flops.share:.0%} of all), "
            f"{flops.sparse / 1e12:.4g} with the mask: {flops.fewer:.2f}x fewer operations in all",
        ]
    if not (data := user_path(config.data.latents)).is_dir():
        lines.append(f"{'note':<10} {data} is not there yet; run prepare_latents.sh")
    else:
        try:
            divided(config, LatentStore.open(data))
        except UsageError as error:
            lines.append(f"{'note':<10} {one_line(error)}")
    return "\n".join(lines)
