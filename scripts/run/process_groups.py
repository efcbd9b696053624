"""Groups the processes under torchrun by the work that they share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from radial_attn.models.parallel.groups import Degrees, import_xfuser, start, stop
from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.runtime.transformers import parts_of
from scripts.run.errors import UsageError
from scripts.run.processes import end_all


@dataclass(frozen=True)
class Groups:
    """Holds the groups of processes that share work with this one.

    Attributes:
        degrees: of the whole run.
        everyone: the gloo group of all processes; replica: of the processes of one video.
        sequence: a `radial_attn.models.parallel.ulysses.SequenceParallel`, None if alone.
        guidance: the group of the other half of guidance, None if alone.
        decoding: the group of all processes of one video, over NCCL on GPUs, None if alone.
        leads: whether this process puts the video together and writes it.
        share: the number of this process in the `degrees.data` processes that share the prompts.
    """

    degrees: Degrees = field(default_factory=Degrees)
    everyone: Any = None
    replica: Any = None
    sequence: Any = None
    guidance: Any = None
    decoding: Any = None
    leads: bool = True
    share: int = 0

    def agree(self, value: Any) -> Any:
        """Returns the first process's `value`."""
        return _of_first(value, self.everyone)

    def agree_on_video(self, value: Any) -> Any:
        """Returns the `value` of the first process of this video."""
        return _of_first(value, self.replica)

    def compare(self, value: Any) -> None:
        """Raises UsageError if the first process has another `value`: files may differ between machines."""
        if self.agree(value) != value:
            raise UsageError(
                "configuration, prompts or input files differ from those of rank 0; give every machine the "
                "same files"
            )

    def wait(self) -> None:
        """Waits for the process that writes the file; later collectives have a shorter timeout."""
        if self.replica is not None:
            torch.distributed.barrier(group=self.replica)


def _of_first(value: Any, group: Any) -> Any:
    """Returns the value of the first process in a group, or the value itself without a group."""
    values = [value]
    if group is not None:
        torch.distributed.broadcast_object_list(values, group_src=0, group=group)
    return values[0]


@contextmanager
def process_groups(degrees: Degrees, device: str) -> Iterator[Groups]:
    """Connects this process to its groups while the block runs; a single process has none.

    A failure in the block ends the process at once, with one line. torchrun then stops the others, which may
    be waiting for it.
    """
    if degrees.processes == 1:
        yield Groups()
        return
    try:
        start(degrees, device)
        yield _join(degrees, device)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # of any kind: the others must not wait for this process
        end_all(error)
    stop()


def _join(degrees: Degrees, device: str) -> Groups:
    from radial_attn.models.parallel.ring import share_sequence

    state = import_xfuser(device)
    sequence, guidance = state.get_sp_group(), state.get_cfg_group()
    replica = state.get_model_replica_group()
    return Groups(
        degrees,
        state.get_world_group().cpu_group,
        replica.cpu_group,
        share_sequence(sequence),
        guidance.device_group if degrees.cfg > 1 else None,
        replica.device_group if degrees.processes > degrees.data else None,
        leads=sequence.rank_in_group == 0 and guidance.rank_in_group == 0,
        share=state.get_dp_group().rank_in_group,
    )


def shared_guidance(pipeline: Any, family: str, groups: Groups) -> AbstractContextManager:
    """Shares guidance with the process of the other half, if there is one."""
    if groups.guidance is None:
        return nullcontext()
    from radial_attn.models.parallel.guidance import GuidanceParallel

    return GuidanceParallel(parts_of(pipeline), groups.guidance, batched=FAMILIES[family].batched)


def whole_tokens(family: str, groups: Groups) -> Callable[[Tensor], Tensor] | None:
    """Returns a function that gathers one call's video tokens `[B, N, C]` from the processes that share it.

    Returns None if no other process shares it. Halves of guidance in separate calls are not gathered.
    """
    halves = groups.guidance if FAMILIES[family].batched else None
    if groups.sequence is None and halves is None:
        return None

    def gather(part: Tensor) -> Tensor:
        tokens = part if groups.sequence is None else groups.sequence.gather(part)
        if halves is None:
            return tokens
        parts = [torch.empty_like(tokens) for _ in range(2)]
        torch.distributed.all_gather(parts, tokens.contiguous(), group=halves)
        return torch.cat(parts)

    return gather


def shared_decoding(pipeline: Any, groups: Groups) -> AbstractContextManager:
    """Shares the tiles of the VAE with the other processes of the video, if there are any."""
    if groups.decoding is None:
        return nullcontext()
    from radial_attn.models.parallel.decoding import ParallelDecode

    return ParallelDecode(pipeline.vae, groups.decoding)
