"""Gradients of processes that share a sequence, run in tests/support/sharing_worker.py."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from peft import LoraConfig
from torch import Tensor

from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.ulysses import SequenceParallel
from tests.support.families import BY_NAME, DENSE, SPARSE, gradients

TARGETS = {
    "wan": "to_q to_k to_v to_out.0 ffn.net.0.proj ffn.net.2",
    "hunyuan_video": "to_q to_k to_v to_out.0 add_q_proj add_v_proj net.0.proj proj_mlp",
}
CALLS = {"wan": {"batch": 2}, "hunyuan_video": {"lengths": (4, 11)}}
PATTERNS = {"radial": SPARSE, "dense": DENSE}
WAYS = (("radial", False), ("radial", True), ("dense", False))  # whether checkpointed
LEARNT = ("hidden_states", "encoder_hidden_states")


def with_lora(family: str) -> torch.nn.Module:
    """Makes a random transformer in training, with a LoRA whose weights are all random."""
    transformer = BY_NAME[family].transformer().train()
    torch.manual_seed(1)
    targets = TARGETS[family].split()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    transformer.add_adapter(config)
    return transformer


def gradients_of_all(transformer: torch.nn.Module, family: str) -> dict[str, Tensor]:
    """Returns the gradients of the LoRA and of the inputs, for the mean square of the output."""
    inputs = BY_NAME[family].inputs(5, 6, 14, **CALLS[family])
    learnt = {name: inputs[name].requires_grad_() for name in LEARNT}
    return gradients(transformer, inputs) | {name: x.grad.clone() for name, x in learnt.items()}


def measure(group: torch.distributed.ProcessGroup) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields the worst relative error among parameters and among inputs, averaged over the group."""
    parallel = SequenceParallel(group)
    for family, (pattern, checkpointed) in itertools.product(CALLS, WAYS):
        transformer = with_lora(family)
        options = {"config": PATTERNS[pattern], "dense_layers": 1}
        with apply_radial_attention(transformer, **options):
            expected = gradients_of_all(transformer, family)
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        with apply_radial_attention(transformer, **options, parallel=parallel):
            actual = gradients_of_all(transformer, family)
        errors = {name: error(actual[name], expected[name], group) for name in expected}
        how = "checkpointed" if checkpointed else "kept"
        learnt = worst(errors.pop(name) for name in LEARNT)
        count = len(expected) if actual.keys() == expected.keys() else 0
        results = {"parameters": worst(errors.values()), "inputs": learnt, "count": count}
        yield f"gradients: {family}, {pattern}, {how}", results


def worst(errors: Iterable[float]) -> float:
    """Returns the largest; NaN if there is one."""
    return torch.tensor(list(errors)).max().item()


def error(actual: Tensor, expected: Tensor, group: torch.distributed.ProcessGroup) -> float:
    """Returns the relative error in the L2 norm, after averaging over the group."""
    torch.distributed.all_reduce(actual, group=group)
    average = actual / torch.distributed.get_world_size(group)
    return float((average - expected).norm() / expected.norm())
