"""Run in several processes: transformers whose frozen weights are shared, beside the same ones whole.

`run_ranks(N, "tests.support.sharding_worker", OUT.json)`: the first process writes what each one found
under the name of each case.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from radial_attn.models.apply import apply_radial_attention, family_of
from radial_attn.models.parallel.fsdp import shared_weights
from radial_attn.models.training.adapter import add_adapter
from tests.support.families import BY_NAME, SPARSE, Family

Case = tuple[str, Family, torch.dtype, bool]


def cases() -> Iterator[Case]:
    """Yields name, family, dtype, and whether the backward pass reruns the blocks."""
    for name in ("wan", "wan_vace", "hunyuan_video", "mochi", "ltx"):
        yield name, BY_NAME[name], torch.float32, False
        yield f"{name}, checkpointing", BY_NAME[name], torch.float32, True
    yield "wan, bfloat16", BY_NAME["wan"], torch.bfloat16, True


def prepared(family: Family, dtype: torch.dtype, again: bool) -> tuple[torch.nn.Module, dict]:
    """Makes a transformer with radial attention and an adapter whose two matrices are random."""
    transformer = family.transformer().to(dtype)
    trained = add_adapter(transformer, rank=2, alpha=2, targets=("to_q", "to_v"))
    random = torch.Generator().manual_seed(1)
    for value in trained.values():
        value.data = 0.1 * torch.randn(value.shape, generator=random)
    if again:
        transformer.enable_gradient_checkpointing()
    apply_radial_attention(transformer, SPARSE, dense_layers=1)
    return transformer.train(), trained


def measured(
    transformer: torch.nn.Module, trained: dict[str, Tensor], inputs: dict, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output, that without gradients, and the gradients of the adapter in one row."""
    inputs = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = transformer(**inputs, return_dict=False)[0]
        with torch.no_grad():
            plain = transformer(**inputs, return_dict=False)[0]
    output.float().square().mean().backward()
    return output.detach(), plain, torch.cat([value.grad.flatten() for value in trained.values()])


def local_bytes(transformer: torch.nn.Module) -> tuple[int, int]:
    """Returns the bytes of frozen weights in this process, and in all of them."""
    frozen = [value for value in transformer.parameters() if not value.requires_grad]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in frozen]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in local if x.numel()}
    return sum(held.values()), sum(value.numel() * value.element_size() for value in frozen)


def count_whole(transformer: torch.nn.Module) -> list[int]:
    """Returns a list that gets the count of whole blocks whenever a block begins, also in the backward."""
    blocks = [block for stack in family_of(transformer).stacks(transformer) for block in stack]
    counts = []

    def is_whole(block: torch.nn.Module) -> bool:
        return any(not isinstance(x, DTensor) for x in block.parameters() if not x.requires_grad)

    for block in blocks:
        block.register_forward_pre_hook(lambda *_: counts.append(sum(map(is_whole, blocks))))
    return counts


def measure(case: Case) -> dict[str, Any]:
    """Compares with the whole transformer; counts blocks and bytes, and checks names and adapter."""
    _, family, dtype, again = case
    given = family.inputs(3, 6, 8)
    whole, trained = prepared(family, dtype, again)
    expected = measured(whole, trained, given, dtype)
    shared, trained = prepared(family, dtype, again)
    with shared_weights(shared, trained.values(), torch.device("cpu")) as wrapped:
        counts = count_whole(shared)
        actual = measured(wrapped, trained, given, dtype)
    held, total = local_bytes(shared)
    return {
        "equal": [torch.equal(one, other) for one, other in zip(expected, actual, strict=True)],
        "blocks": max(counts),
        "held": held,
        "total": total,
        "adapter": not any(isinstance(value, DTensor) for value in trained.values()),
        "names": shared.state_dict().keys() == whole.state_dict().keys(),
    }


def main(arguments: list[str]) -> None:
    """Runs all cases in all processes."""
    torch.distributed.init_process_group("gloo")
    results = {}
    for case in cases():
        results[case[0]] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(results[case[0]], measure(case))
    if torch.distributed.get_rank() == 0:
        Path(arguments[0]).write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
