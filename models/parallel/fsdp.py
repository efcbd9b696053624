"""Shards weights by FSDP2 under the forks: each process keeps a part and gathers a block to use it.

That is ZeRO-3, which divides weights, gradients and the optimizer's states, without DeepSpeed and its CUDA.
In LoRA training only the frozen weights are large. The adapter stays whole in every process and DDP averages
its gradients. Checkpoints, the adapter's mean, clipping, the optimizer and the numbers are therefore the same
as in a run whose processes share no weights.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..apply import family_of

VIEW = "FSDP2-wrapped module .* returned a view"  # harmless if nothing is written into it, as in the blocks


@contextmanager
def shared_weights(
    transformer: torch.nn.Module, trained: Iterable[torch.nn.Parameter], device: torch.device
) -> Iterator[DistributedDataParallel]:
    """Yields a transformer in DDP, with its weights divided over all processes block by block.

    The mesh covers all processes, which leaves each the smallest part. Processes that share the tokens of a
    video (Ulysses) belong to it too: they call the same blocks in the same order with the same weights. From
    here on every call, with or without gradients, needs every process. Weights move to `device` a block at a
    time, and stay divided afterwards.

    Args:
        trained: parameters that stay whole. They must be equal in all processes: nothing is sent at first.

    Yields:
        The module that training calls. The transformer itself gives the same and averages no gradients.

    Raises:
        ValueError: the transformer has no fork, which would name its blocks.
    """
    kept = set(trained)
    for value in kept:
        value.data = value.data.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    options = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": kept}
    for stack in family_of(transformer).stacks(transformer):
        for block in stack:
            fully_shard(block, **options)
    fully_shard(transformer, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", VIEW)
        yield DistributedDataParallel(transformer, forward_sync_buffers=False, init_sync=False)
