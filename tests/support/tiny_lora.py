"""Random LoRAs of tiny transformers, as files in every format that users bring."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from radial_attn.models.lora.load import Lora, load_loras
from tests.support.families import run
from tests.support.tiny import wan_transformer

RANK = 3
PARTS = {  # of a block: diffusers, original
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
OTHERS = {  # outside the blocks, as step-distilled LoRAs have them
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
NORMS = {  # full changes without a matrix: diffusers' parameter, original key
    "attn1.norm_q.weight": "self_attn.norm_q.diff",
    "attn1.norm_k.weight": "self_attn.norm_k.diff",
    "attn2.norm_q.weight": "cross_attn.norm_q.diff",
    "attn2.norm_k.weight": "cross_attn.norm_k.diff",
    "norm2.weight": "norm3.diff",
    "norm2.bias": "norm3.diff_b",
    "scale_shift_table": "diff_m",
}
FORMATS = (
    "diffusers",
    "adapter",
    "peft",
    "compiled",
    "original",
    "original down",
    "diffsynth",
    "diffsynth model",
    "kohya",
    "kohya dots",
    "fun",
    "lycoris",
)
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def original_names(layers: int = 4) -> dict[str, str]:
    """Returns the layers with a low rank, diffusers -> original."""
    blocks = {
        f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(layers) for ours, theirs in PARTS.items()
    }
    return blocks | OTHERS


def random_pairs(
    transformer: torch.nn.Module, seed: int = 0, rank: int = RANK, only: str = "blocks."
) -> Pairs:
    """Returns (down `[rank, in]`, up `[out, rank]`) of each layer whose name begins with `only`."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer in original_names(len(transformer.blocks)):
        if layer.startswith(only):
            out, width = transformer.get_submodule(layer).weight.shape
            down = 0.3 * torch.randn(rank, width, generator=generator)
            pairs[layer] = down, 0.3 * torch.randn(out, rank, generator=generator)
    return pairs


def spell(pairs: Pairs, form: str, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """Names the pairs as a format does; kohya's has an alpha for each layer, by default its rank."""
    names = original_names(40)
    state = {}
    for layer, (down, up) in pairs.items():
        flat = names[layer].replace(".", "_")
        stem, a, b = {
            "diffusers": (f"transformer.{layer}", "lora_A", "lora_B"),
            "adapter": (layer, "lora_A", "lora_B"),
            "peft": (f"base_model.model.{layer}", "lora_A", "lora_B"),
            "original": (f"diffusion_model.{names[layer]}", "lora_A", "lora_B"),
            "original down": (f"diffusion_model.{names[layer]}", "lora_down", "lora_up"),
            "diffsynth": (names[layer], "lora_A.default", "lora_B.default"),
            "diffsynth model": (f"pipe.dit.{names[layer]}", "lora_A.default", "lora_B.default"),
            "compiled": (f"transformer._orig_mod.{layer}", "lora_A", "lora_B"),
            "kohya": (f"lora_unet_{flat}", "lora_down", "lora_up"),
            "kohya dots": (f"lora_unet_{names[layer].replace('.', '_', 1)}", "lora_down", "lora_up"),
            "fun": (f"lora_unet__{flat}", "lora_down", "lora_up"),
            "lycoris": (f"lycoris_{flat}", "lora_down", "lora_up"),
        }[form]
        state |= {f"{stem}.{a}.weight": down.clone(), f"{stem}.{b}.weight": up.clone()}
        if alpha is not None or form == "kohya":
            state[f"{stem}.alpha"] = torch.tensor(float(alpha or down.shape[0]))
    return state


def random_distilled(
    transformer: torch.nn.Module, seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(a file as lightx2v and FusionX have it, the change of each parameter of the transformer by name)."""
    generator = torch.Generator().manual_seed(seed + 100)
    pairs = random_pairs(transformer, seed, only="")
    state = spell(pairs, "original down")
    change = {f"{layer}.weight": up @ down for layer, (down, up) in pairs.items()}
    keys = {f"{layer}.bias": f"{name}.diff_b" for layer, name in original_names().items()}
    for block in range(len(transformer.blocks)):
        keys |= {f"blocks.{block}.{ours}": f"blocks.{block}.{theirs}" for ours, theirs in NORMS.items()}
    keys |= {
        "patch_embedding.weight": "patch_embedding.diff",
        "patch_embedding.bias": "patch_embedding.diff_b",
        "scale_shift_table": "head.diff_m",
    }
    for name, key in keys.items():
        shape = transformer.get_parameter(name).shape
        change[name] = 0.1 * torch.randn(shape, generator=generator)
        state[f"diffusion_model.{key}"] = change[name].clone()
    return state, change


def write(file: Path, state: dict[str, torch.Tensor], settings: dict | None = None, **metadata: str) -> Path:
    """Writes the file, with peft's settings in its header as diffusers does, and other metadata."""
    metadata["format"] = "pt"
    if settings is not None:
        metadata["lora_adapter_metadata"] = json.dumps(settings)
    save_file(state, file, metadata=metadata)
    return file


def loaded(file: Path, scale: float = 1.0, **options: str) -> torch.Tensor:
    """Returns the output of the transformer with a LoRA."""
    transformer = wan_transformer()
    load_loras(transformer, [Lora(file, scale)], **options)
    return run(transformer)


@torch.no_grad()
def changed(change: dict[str, torch.Tensor], scale: float = 1.0) -> torch.Tensor:
    """Returns the output of the transformer with its parameters changed by hand."""
    transformer = wan_transformer()
    for name, delta in change.items():
        transformer.get_parameter(name).add_(scale * delta)
    return run(transformer)


def product(pairs: Pairs) -> dict[str, torch.Tensor]:
    """Returns the change of each weight."""
    return {f"{layer}.weight": up @ down for layer, (down, up) in pairs.items()}


def fused_pairs(
    transformer: torch.nn.Module, names: dict[str, Iterable[str]], rank: int = RANK, seed: int = 0
) -> Pairs:
    """Makes a pair for each of the authors' names, which holds the rows of its layers one after another."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, layers in names.items():
        weights = [transformer.get_submodule(layer).weight for layer in layers]
        down = 0.3 * torch.randn(rank, weights[0][0].numel(), generator=generator)
        pairs[name] = down, 0.3 * torch.randn(sum(map(len, weights)), rank, generator=generator)
    return pairs


@torch.no_grad()
def add_fused(
    transformer: torch.nn.Module, names: dict[str, Iterable[str]], pairs: Pairs, scale: float = 1.0
) -> torch.nn.Module:
    """Adds `scale` times the product of each pair to the transformer by hand, cut row by row."""
    for name, (down, up) in pairs.items():
        weights = [transformer.get_submodule(layer).weight for layer in names[name]]
        changes = (scale * up @ down).split([len(weight) for weight in weights])
        for weight, change in zip(weights, changes, strict=True):
            weight.add_(change.view_as(weight))
    return transformer
