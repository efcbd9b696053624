"""Runs Ulysses under the forks: a group splits the tokens, and inside the attention the heads instead.

Hooks split the tokens before the first block and gather them after the last projection. Rotary tables are
split alike. `exchange` surrounds the attention op, which sees all tokens, video first and then the text once,
of a share of the heads. Query, key and value travel together, and so do video and text on their way back.
Text goes through every block whole, on every process. Heads that keep different numbers of blocks are dealt
for about equal work.
"""

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_to_all_single_autograd

from radial_attn import TokenGrid
from radial_attn.shards import HeadDeal, deal_heads

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class SequenceParallel:
    """Holds one process's share of a sequence that a group divides.

    Gradients are for the sum of all processes' losses, which are equal: average them over the group.

    Attributes:
        degree: processes of the group; rank: index of this one, from 0.
        ring: the `Ring` that passes keys around, None if each process has them all.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group
        self._device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
        self.degree = torch.distributed.get_world_size(group)
        self.rank = torch.distributed.get_rank(group)
        self.ring: Any = None
        self._all = self._tokens = self._heads = 0  # video tokens, those that are mixed here, heads

    def begin(self, grid: TokenGrid, block_size: int) -> None:
        """Sets the grid of the call that follows, and the block size of its mask."""
        self._all = self._tokens = grid.video_tokens

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Returns this process's part of all video tokens along `dim`; zeros pad the last parts."""
        share = -(-x.shape[dim] // self.degree)
        first = min(self.rank * share, x.shape[dim])
        part = x.narrow(dim, first, min(share, x.shape[dim] - first))
        return pad(part, dim, share - part.shape[dim])

    def own_of_first(self, count: int) -> int:
        """Returns how many of the first `count` video tokens this process has."""
        share = -(-self._tokens // self.degree)
        return max(0, min(share, count - self.rank * share))

    def own_heads(self, held: int) -> int:
        """Returns how many of the `held` heads that `attend` gets in order are the model's; zeros follow."""
        return max(0, min(held, self._heads - self.rank * held))

    def sum_heads(self, counts: Tensor) -> Tensor:
        """Returns the sum over the processes that share the heads."""
        total = counts.clone()
        torch.distributed.all_reduce(total, group=self._group)
        return total

    def deal(self, work: Tensor, before: Tensor | None) -> HeadDeal:
        """Deals the heads of a layer to the processes.

        Args:
            work: of the heads that this process holds, int64 `[h]`.
            before: which heads each process holds, as in `HeadDeal`; None for all in order.
        """
        with torch.no_grad():
            work = gather_parts(work.to(self._device), 0, self._group).cpu()
        return deal_heads(work if before is None else work[before.flatten().argsort()], self.degree)

    def hand_over(self, x: Tensor, dim: int, before: Tensor | None, after: Tensor) -> Tensor:
        """Returns `x` of the heads of this process after a deal, from the parts that processes held before.

        Args:
            x: of any dtype, with heads along `dim`.
            before: as in `deal`.
            after: `HeadDeal.heads`.
        """
        at = torch.arange(after.numel(), device="cpu") if before is None else before.flatten().argsort()
        at, held = at[after], x.shape[dim]  # where each head is: process and number
        if torch.equal(at.flatten(), torch.arange(at.numel(), device="cpu")):
            return x
        sent = [row[row // held == self.rank] % held for row in at]
        sources = at[self.rank] // held
        part = x.to(self._device).movedim(dim, 0).index_select(0, torch.cat(sent).to(self._device))
        coming = torch.empty_like(part, memory_format=torch.contiguous_format)
        counts = sources.bincount(minlength=self.degree).tolist(), [len(numbers) for numbers in sent]
        torch.distributed.all_to_all_single(coming, part.contiguous(), *counts, group=self._group)
        order = sources.argsort(stable=True).argsort().to(self._device)
        return coming.index_select(0, order).movedim(0, dim).contiguous().to(x.device)

    def gather(self, x: Tensor) -> Tensor:
        """Returns all video tokens `[B, N, C]` from the parts of all processes, `[B, n, C]`."""
        return gather_parts(x, 1, self._group)[:, : self._tokens].contiguous()

    def exchange(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: TokenGrid,
        attend: Attention,
        *,
        heads: Tensor | None = None,
    ) -> Tensor:
        """Computes attention of `[B, n + T, H, D]`, own video tokens and all text, over all tokens.

        `attend` gets `[B, N + T, h, D]`: all tokens of a share of the heads, padded with zero heads if the
        degree does not divide H. The three are parts of one tensor, contiguous in the last dimension alone.
        `heads` are those of each process, as in `HeadDeal`, None for all in order.
        Returns `[B, n + T, H, D]`.
        """
        self._heads, own_tokens = query.shape[2], query.shape[1] - grid.text
        order = None if heads is None else heads.flatten().to(query.device)
        together = self._own_heads((query, key, value), grid, order)
        mixed = attend(*together.chunk(3, dim=-1))
        return self._own_tokens(mixed, own_tokens, order)

    def _own_heads(self, tensors: Sequence[Tensor], grid: TokenGrid, order: Tensor | None) -> Tensor:
        """Returns `[B, N + T, h, 3 D]`, all tokens of this process's heads, from three `[B, n + T, H, D]`."""
        tensors = [pad(x, 2, -x.shape[2] % self.degree) for x in tensors]
        if order is not None:
            tensors = [x.index_select(2, order) for x in tensors]
        apart = [x.unflatten(2, (self.degree, -1)).movedim(2, 0) for x in tensors]
        own = apart[0].shape[2] - grid.text
        sent = torch.cat([x[:, :, :own] for x in apart], dim=-1)  # [P, B, n, h, 3 D]
        video = exchange_parts(sent, self._group).movedim(0, 1).flatten(1, 2)[:, : self._tokens]
        if not grid.text:
            return video
        text = torch.cat([x[self.rank, :, own:] for x in apart], dim=-1)
        return torch.cat([video, text], dim=1)

    def _own_tokens(self, mixed: Tensor, own: int, order: Tensor | None) -> Tensor:
        """Returns `[B, n + T, H, D]`, `own` video tokens and all text, from `[B, N + T, h, D]`."""
        video, text = mixed.tensor_split([self._tokens], dim=1)
        video = pad(video, 1, own * self.degree - video.shape[1])
        video = video.unflatten(1, (self.degree, own)).movedim(1, 0)
        sent = torch.cat([video, text.expand(self.degree, *text.shape)], dim=2)  # [P, B, n + T, h, D]
        output = exchange_parts(sent, self._group).movedim(0, 2)
        if order is None:
            return output.flatten(2, 3)[:, :, : self._heads]
        at = order.argsort()[: self._heads]
        return output[:, :, at // output.shape[3], at % output.shape[3]]

    def install(self, transformer: torch.nn.Module, family: ModuleType) -> list[Any]:
        """Adds and returns hooks that split tokens before a transformer's blocks and gather them after."""
        hooks = []
        for stack in family.stacks(transformer):
            for index, block in enumerate(stack):
                enter = _Entrance(self, block, first=index == 0)
                hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        for module in family.between_blocks(transformer) if hasattr(family, "between_blocks") else ():
            hooks.append(module.register_forward_pre_hook(self._join_input))
            hooks.append(module.register_forward_hook(self._split_output))
        if hasattr(transformer, "condition_embedder"):
            hooks.append(transformer.condition_embedder.register_forward_hook(self._split_times))
        last = getattr(transformer, "proj_out", None) or family.stacks(transformer)[-1][-1]
        hooks.append(last.register_forward_hook(self._leave))
        return hooks

    def _split_times(self, embedder: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        """Splits Wan's embedded time and its projection if each token has its own (TI2V-5B)."""
        time, projected, *texts = output
        if time.ndim == 3 and time.shape[1] != self._all:
            raise ValueError(
                f"several processes share tokens, and {time.shape[1]} timesteps are for frames, not for "
                f"{self._all} tokens; run diffusion forcing of SkyReels-V2 in one process"
            )
        if time.ndim == 3:
            time, projected = self.shard(time, 1), self.shard(projected, 1)
        return time, projected, *texts

    def _join_input(self, module: torch.nn.Module, args: tuple) -> tuple:
        return (self.gather(args[0]), *args[1:])

    def _split_output(self, module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.shard(output, 1)

    def _leave(self, projection: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.gather(output)


class _Entrance:
    """Splits a block's arguments that go by tokens, as its forward pre-hook; the stream itself only once."""

    def __init__(self, parallel: SequenceParallel, block: torch.nn.Module, *, first: bool) -> None:
        self._parallel, self._first = parallel, first
        self._signature = inspect.signature(type(block).forward)

    def __call__(self, block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        bound = self._signature.bind(block, *args, **kwargs)
        arguments = bound.arguments
        if self._first:
            for name in ("hidden_states", "control_hidden_states", "visual_embed"):
                if name in arguments:
                    arguments[name] = self._parallel.shard(arguments[name], 1)
        if "rope" in arguments:  # of Kandinsky 5, whose rotary tables come whole
            arguments["rope"] = self._parallel.shard(arguments["rope"], 1)
        if arguments.get("num_tokens") is not None:  # tokens of the given first frame, in HunyuanVideo-I2V
            arguments["num_tokens"] = self._parallel.own_of_first(arguments["num_tokens"])
        return bound.args[1:], bound.kwargs


def exchange_parts(x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Sends each process of a group its part of `[P, ...]`; returns theirs, in order, of the same shape."""
    if len(x) == 1:
        return x
    x = x.contiguous()
    if torch.is_grad_enabled():
        return all_to_all_single_autograd(x, None, None, group)
    coming = torch.empty_like(x)
    torch.distributed.all_to_all_single(coming, x, group=group)
    return coming


def gather_parts(x: Tensor, dim: int, group: torch.distributed.ProcessGroup) -> Tensor:
    """Concatenates the parts of all processes of a group along `dim`."""
    if not torch.is_grad_enabled():
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=dim)
    return all_gather_tensor_autograd(x.contiguous(), dim, group)


def pad(x: Tensor, dim: int, count: int) -> Tensor:
    """Appends `count` zeros along `dim`."""
    if count == 0:
        return x
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, count])
