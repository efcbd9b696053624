"""Makes the adapter that training fits to longer video: LoRA on the self-attention, in peft's layers.

It is saved in diffusers' format, so its pipelines load it. The header describes its training.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radial_attn.files import whole_file

from ..apply import family_of
from ..lora.files import METADATA_KEY, TRAINED_KEY

NAME = "length"
FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer"


def add_adapter(
    transformer: torch.nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, torch.nn.Parameter]:
    """Freezes a transformer and adds LoRA to the layers `targets` of each self-attention, in float32.

    `seed` is for the matrices A; the matrices B begin at zero, so nothing changes at first.

    Returns:
        The parameters to train, by name.

    Raises:
        ValueError: no self-attention has a target, or there is an adapter already.
    """
    from peft import LoraConfig

    names = target_names(transformer, targets)
    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=dropout)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(config, NAME)
    trained = {name: value for name, value in transformer.named_parameters() if value.requires_grad}
    for value in trained.values():
        value.data = value.data.float()
    return trained


def target_names(transformer: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Returns the full names of the layers `targets`, for the self-attentions that have them.

    Raises ValueError for a target that no self-attention has.
    """
    modules = {module: name for name, module in transformer.named_modules()}
    parents = [modules[attention] for attention in family_of(transformer).attention_layers(transformer)]
    known = set(modules.values())
    for target in targets:
        if not any(f"{parent}.{target}" in known for parent in parents):
            layers = sorted(
                name.removeprefix(f"{parents[0]}.")
                for name, module in transformer.named_modules()
                if name.startswith(f"{parents[0]}.") and isinstance(module, torch.nn.Linear)
            )
            raise ValueError(
                f"targets must be layers of the self-attention of {type(transformer).__name__}, which has "
                f"{', '.join(layers)}; got {target!r}"
            )
    return [f"{parent}.{target}" for parent in parents for target in targets if f"{parent}.{target}" in known]


def save_adapter(
    path: Path, trained: Mapping[str, Tensor], settings: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Saves the adapter in diffusers' format, whole or not at all.

    Args:
        settings: `r`, `lora_alpha` and peft's other settings.
        about: describes its training in values that JSON can hold; `lora.files.read_header` returns it.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    from safetensors.torch import save

    tensors = _by_key(trained)
    header = {f"{PREFIX}.{name}": value for name, value in settings.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(header), TRAINED_KEY: json.dumps(dict(about))}
    with whole_file(path) as part:
        part.write_bytes(save(tensors, metadata))


def holds_adapter(path: Path, trained: Mapping[str, Tensor]) -> bool:
    """Returns whether a file is whole and has these values."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError):
        return False
    wanted = _by_key(trained)
    return stored.keys() == wanted.keys() and all(torch.equal(stored[key], x) for key, x in wanted.items())


def _by_key(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the adapter's tensors on the CPU by the keys that peft gives them in a file."""
    return {
        f"{PREFIX}.{name.replace(f'.{NAME}.', '.')}": value.detach().cpu().contiguous()
        for name, value in trained.items()
    }


def adapter_settings(transformer: torch.nn.Module) -> dict[str, Any]:
    """Returns the settings that peft needs to load the adapter: rank, alpha, targets."""
    config = transformer.peft_config[NAME]
    names = sorted(config.target_modules)
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": names}
