"""Several processes under torchrun: who shares what with whom."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from radial_attn.models.parallel.groups import Degrees, import_xfuser, start, stop
from scripts.run.errors import UsageError
from scripts.run.processes import end_all

ALONE = Degrees()
BATCHED = ("mochi",)  # families whose one call a step has both halves of guidance


@dataclass(frozen=True)
class Groups:
    """What this process shares with which others.

    Attributes:
        degrees: of the whole run; everyone, replica: gloo groups of all processes, of those of one video.
        sequence: a `radial_attn.models.parallel.ulysses.SequenceParallel`, None where alone.
        guidance: the group of the other half of guidance, None where alone.
        decoding: the group of all processes of one video, over NCCL on GPUs, None where alone.
        leads: whether this process puts the video together and writes it; share: its number among those of
            `degrees.data`.
    """

    degrees: Degrees = ALONE
    everyone: Any = None
    replica: Any = None
    sequence: Any = None
    guidance: Any = None
    decoding: Any = None
    leads: bool = True
    share: int = 0

    def agree(self, value: Any) -> Any:
        """What the first process has for `value`."""
        return _of_first(value, self.everyone)

    def agree_on_video(self, value: Any) -> Any:
        """What the first process of this video has for `value`."""
        return _of_first(value, self.replica)

    def compare(self, value: Any) -> None:
        """Raises UsageError where another process has another `value`: files differ between machines."""
        if self.agree(value) != value:
            raise UsageError("configuration, prompts or input files differ from those of rank 0")

    def wait(self) -> None:
        """For the one that writes; in the next video's exchanges there is less patience."""
        if self.replica is not None:
            torch.distributed.barrier(group=self.replica)


def _of_first(value: Any, group: Any) -> Any:
    """What the first process of a group has, the value itself without one."""
    values = [value]
    if group is not None:
        torch.distributed.broadcast_object_list(values, group_src=0, group=group)
    return values[0]


@contextmanager
def process_groups(degrees: Degrees, device: str) -> Iterator[Groups]:
    """The groups of this process, connected for as long as the block runs; the process alone where it is so.

    A failure in the block ends the process at once, with one line: torchrun then stops the others, which may
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
    except Exception as error:  # whatever it is, the others must not wait for this process
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
    """Guidance shared with the other half's process, where there is one."""
    if groups.guidance is None:
        return nullcontext()
    from radial_attn.models.parallel.guidance import GuidanceParallel

    transformers = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    present = [transformer for transformer in transformers if transformer is not None]
    return GuidanceParallel(present, groups.guidance, batched=family in BATCHED)


def whole_tokens(family: str, groups: Groups) -> Callable[[Tensor], Tensor] | None:
    """What gathers `[B, N, C]`, the video tokens of one call, from those of the processes that share it.

    None where no others do: halves of guidance that are calls of their own are not shared.
    """
    halves = groups.guidance if family in BATCHED else None
    if groups.sequence is None and halves is None:
        return None

    def gather(own: Tensor) -> Tensor:
        tokens = own if groups.sequence is None else groups.sequence.gather(own)
        if halves is None:
            return tokens
        parts = [torch.empty_like(tokens) for _ in range(2)]
        torch.distributed.all_gather(parts, tokens.contiguous(), group=halves)
        return torch.cat(parts)

    return gather


def shared_decoding(pipeline: Any, groups: Groups) -> AbstractContextManager:
    """The tiles of the VAE shared with the other processes of the video, where there are any."""
    if groups.decoding is None:
        return nullcontext()
    from radial_attn.models.parallel.decoding import ParallelDecode

    return ParallelDecode(pipeline.vae, groups.decoding)
