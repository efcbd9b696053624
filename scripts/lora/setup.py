"""Sets up a run of LoRA training from its configuration: processes, model, adapter, optimizer, samples."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.fsdp import shared_weights
from radial_attn.models.parallel.groups import Degrees, import_xfuser, start
from radial_attn.models.parallel.ulysses import SequenceParallel
from radial_attn.models.pipeline.load import is_local, read_index
from radial_attn.models.pipeline.rope_scaling import extend_positions
from radial_attn.models.pipeline.weights import check_weights
from radial_attn.models.training.adapter import add_adapter
from scripts.lora.checkpoint import Checkpoints
from scripts.lora.config import LoraTrainConfig
from scripts.lora.fingerprint import fingerprint
from scripts.lora.latent_shards import locked
from scripts.lora.latents import BucketSampler, LatentStore
from scripts.lora.plan import TrainPlan, divided, unknown_targets
from scripts.lora.step import Run
from scripts.run.errors import UsageError, one_line
from scripts.run.files import user_path
from scripts.run.hub_models import expert_boundary
from scripts.run.processes import processes


@contextmanager
def prepared(plan: TrainPlan) -> Iterator[tuple[Run, Checkpoints]]:
    """Yields the run of a plan, with its model on its device and its samples, while the block runs.

    Raises:
        UsageError: latents are missing, unfinished or of another model, the folder holds another run, or
            weights cannot be loaded.
    """
    config = plan.config
    store = LatentStore.open(config.data.latents)
    store.check(fingerprint(plan.path, config.model.family))
    trains, held_out = divided(config, store)
    world, ulysses = processes(), config.parallel.ulysses_degree
    accelerator, parallel = _start(plan.device, world, ulysses)
    keys = {f"{group}.{name}": x for group, values in asdict(config).items() for name, x in values.items()}
    keys |= {"processes": world // ulysses, "samples": store.digest([*chain(*trains.values()), *held_out])}
    checkpoints = Checkpoints(user_path(config.output.path), keys, config.output.keep)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(locked(checkpoints.folder, "output.path"))
            checkpoints.check_config(config.output.accept_changes)
        transformer = load_transformer(config, plan.path)
        trained = with_adapter(config, transformer)
        stack.enter_context(extend_positions(transformer, **plan.position_arguments()))
        arguments = plan.attention_arguments()
        stack.enter_context(apply_radial_attention(transformer, **arguments, parallel=parallel))
        optimizer = build_optimizer(config, list(trained.values()))
        if config.parallel.shard == "fsdp":  # accelerate's plugin for it does nothing without a GPU
            sharing = shared_weights(transformer, trained.values(), accelerator.device)
            wrapped, optimizer = stack.enter_context(sharing), accelerator.prepare(optimizer)
        else:
            wrapped, optimizer = accelerator.prepare(transformer, optimizer)
        run = Run(
            plan=plan,
            accelerator=accelerator,
            transformer=wrapped,
            plain=transformer,
            trained=trained,
            optimizer=optimizer,
            store=store,
            sampler=BucketSampler(trains, config.train.batch, config.train.seed),
            held_out=held_out,
            rank=accelerator.process_index // ulysses,
            world=world // ulysses,
            average={name: x.detach().clone() for name, x in trained.items()} if config.train.ema else None,
            boundary=expert_boundary(plan.path),
            leads=accelerator.process_index % ulysses == 0,
        )
        yield run, checkpoints
        accelerator.end_training()


def _start(device: str, world: int, ulysses: int) -> tuple[Accelerator, SequenceParallel | None]:
    """Returns the accelerator, and the group that shares the tokens of a video; None if no others do."""
    if ulysses > 1:
        start(Degrees(ulysses=ulysses, data=world // ulysses), device)
    # a process without a clip to validate on would not take part in broadcasting buffers
    wrapper = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[wrapper])
    if ulysses == 1:
        return accelerator, None
    return accelerator, SequenceParallel(import_xfuser(device).get_sp_group().ulysses_group)


def load_transformer(config: LoraTrainConfig, path: str) -> torch.nn.Module:
    """Loads the transformer to train; UsageError if it cannot be loaded, or lacks weights."""
    from diffusers import AutoModel
    from huggingface_hub import snapshot_download

    part = "transformer" if config.model.expert == 1 else "transformer_2"
    try:
        patterns = [f"{part}/*.json", f"{part}/*.safetensors"]
        folder = Path(path if is_local(path) else snapshot_download(path, allow_patterns=patterns))
        check_weights(folder, read_index(path), [part])
        dtype = getattr(torch, config.model.dtype)
        return AutoModel.from_pretrained(str(folder), subfolder=part, dtype=dtype, use_safetensors=True)
    except Exception as error:  # the libraries share no class for a folder that they cannot load
        raise UsageError(
            f"model.path: got {config.model.path!r}, whose {part} cannot be loaded: {one_line(error)}"
        ) from error


def with_adapter(config: LoraTrainConfig, transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Adds the adapter to the transformer, in training mode, and returns its parameters by name."""
    lora = config.lora
    options = {"rank": lora.rank, "alpha": lora.rank if lora.alpha is None else lora.alpha}
    options |= {"targets": lora.targets, "dropout": lora.dropout, "seed": config.train.seed}
    try:
        trained = add_adapter(transformer, **options)
    except ValueError as error:
        raise UsageError(unknown_targets(config, error)) from error
    if config.train.checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    return trained


def build_optimizer(config: LoraTrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Makes AdamW: torch's, or the 8-bit one of bitsandbytes."""
    train = config.train
    options = {"lr": train.rate, "betas": (0.9, 0.99), "weight_decay": train.weight_decay}
    if train.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)
