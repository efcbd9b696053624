"""Gradients of processes that share a sequence, run in tests/support/sharing_worker.py."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from peft import LoraConfig
from torch import Tensor

from radial_attn import RadialConfig
from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.ulysses import SequenceParallel
from tests.support.families import SPARSE
from tests.support.tiny import wan_inputs, wan_transformer
from tests.support.tiny_hunyuan import hunyuan_inputs, hunyuan_transformer

TARGETS = {
    "wan": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
    "hunyuan_video": [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_v_proj",
        "net.0.proj",
        "proj_mlp",
    ],
}
FAMILIES = {
    "wan": (wan_transformer, partial(wan_inputs, 5, 6, 14, batch=2)),
    "hunyuan_video": (hunyuan_transformer, partial(hunyuan_inputs, 5, 6, 14, lengths=(4, 11))),
}
PATTERNS = {"radial": SPARSE, "dense": RadialConfig(block_size=16, pattern="dense")}
WAYS = (("radial", False), ("radial", True), ("dense", False))  # whether checkpointed
LEARNT = ("hidden_states", "encoder_hidden_states")


def with_lora(family: str) -> torch.nn.Module:
    """A random transformer in training, with a LoRA whose weights are all random."""
    transformer = FAMILIES[family][0]().train()
    torch.manual_seed(1)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS[family], init_lora_weights=False)
    transformer.add_adapter(config)
    return transformer


def gradients(transformer: torch.nn.Module, make: Callable[[], dict]) -> dict[str, Tensor]:
    """Of the LoRA and of the inputs, for the mean square of the output."""
    transformer.zero_grad()
    inputs = make()
    learnt = {name: inputs[name].requires_grad_() for name in LEARNT}
    transformer(**inputs).sample.square().mean().backward()
    parameters = {name: p for name, p in transformer.named_parameters() if p.grad is not None}
    return {name: x.grad.clone() for name, x in (parameters | learnt).items()}


def measure(group: torch.distributed.ProcessGroup) -> Iterator[tuple[str, dict[str, float]]]:
    """The worst relative error of a tensor, among parameters and among inputs, averaged over the group."""
    parallel = SequenceParallel(group)
    for family, (pattern, checkpointed) in itertools.product(FAMILIES, WAYS):
        transformer, make = with_lora(family), FAMILIES[family][1]
        options = {"config": PATTERNS[pattern], "dense_layers": 1}
        with apply_radial_attention(transformer, **options):
            expected = gradients(transformer, make)
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        with apply_radial_attention(transformer, **options, parallel=parallel):
            found = gradients(transformer, make)
        errors = {name: error(found[name], expected[name], group) for name in expected}
        how = "checkpointed" if checkpointed else "kept"
        yield (
            f"gradients: {family}, {pattern}, {how}",
            {
                "parameters": worst(value for name, value in errors.items() if name not in LEARNT),
                "inputs": worst(errors[name] for name in LEARNT),
                "count": len(errors) if found.keys() == expected.keys() else 0,
            },
        )


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where one is."""
    return torch.tensor(list(errors)).max().item()


def error(found: Tensor, expected: Tensor, group: torch.distributed.ProcessGroup) -> float:
    """Norm of the difference of the average over the group, over the norm of what is expected."""
    torch.distributed.all_reduce(found, group=group)
    average = found / torch.distributed.get_world_size(group)
    return float((average - expected).norm() / expected.norm())
