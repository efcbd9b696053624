"""Runs a ring under the forks: each process has a share of the video tokens, and keys and values rotate.

A ring works beyond the number of heads, and combines with Ulysses: the processes of a Ulysses group have one
share of the ring between them, split as in models/parallel/ulysses.py. A share consists of blocks of the mask
(radial_attn/shards.py). The last share ends with the text, whose rows every process computes over its own
keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, batch_isend_irecv, irecv, isend

from radial_attn import BlockMask, TokenGrid
from radial_attn.block_mask import Part
from radial_attn.partial import Partial, merge, partial_attention
from radial_attn.shards import Shards, deal

from .groups import ring_refusal
from .ulysses import SequenceParallel, gather_parts, pad


class Ring:
    """Passes keys and values around one ring of processes.

    Attributes:
        degree: processes of the ring; rank: index of this one, from 0; shards: of the running call.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.degree = torch.distributed.get_world_size(group)
        self.rank = torch.distributed.get_rank(group)
        self.shards: Shards | None = None

    refusal = staticmethod(ring_refusal)

    @torch.compiler.disable
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: BlockMask,
        *,
        backend: str,
        text_lengths: Tensor | None,
    ) -> Tensor:
        """Computes attention of `[B, n + T, H, D]`, own video tokens and all text, over all tokens.

        `backend` is a backend of `partial_attention`, or "dense" for torch's own attention. Blocks that the
        mask leaves out are not computed. Returns `[B, n + T, H, D]`.

        Raises:
            ValueError: the backend does not serve a part of the keys, or gradients are needed.
        """
        options = {"backend": "blocks" if backend == "dense" else backend, "text_lengths": text_lengths}
        video, text = query.tensor_split([query.shape[1] - mask.grid.text], dim=1)
        of_video, of_text = _nothing(video), None
        for source, held in self._go_round(key, value, video.shape[1]):
            of_video = _add(of_video, video, held, self.shards.part(mask, self.rank, source), options)
            if source == self.rank and mask.grid.text:
                of_text = self._text(text, held, mask, options)
        outputs = [of_video[0]] if of_text is None else [of_video[0], self._sum(of_text)]
        return torch.cat([x.to(query.dtype) for x in outputs], dim=1)

    def _go_round(self, key: Tensor, value: Tensor, video_tokens: int) -> Iterator[tuple[int, Tensor]]:
        """Yields ranks with keys and values `[2, B, K, H, D]`, own ones first, while the next travel."""
        last = self.degree - 1
        held = torch.stack([x if self.rank == last else x[:, :video_tokens] for x in (key, value)])
        for step in range(self.degree):
            source, following = ((self.rank - x) % self.degree for x in (step, step + 1))
            if step == last:
                yield source, held
                return
            count = len(self.shards.tokens[following]) + self.shards.grid.text * (following == last)
            coming = held.new_empty(*held.shape[:2], count, *held.shape[3:])
            requests = self._pass_on(held, coming)
            yield source, held
            for request in requests:
                request.wait()
            held = coming

    def _pass_on(self, held: Tensor, coming: Tensor) -> list[Any]:
        after, before = (
            torch.distributed.get_global_rank(self._group, (self.rank + step) % self.degree)
            for step in (1, -1)
        )
        moves = (isend, held, after), (irecv, coming, before)
        moving = [P2POp(way, x, peer, self._group) for way, x, peer in moves if x.numel()]
        return batch_isend_irecv(moving) if moving else []

    def _text(self, text: Tensor, held: Tensor, mask: BlockMask, options: dict[str, Any]) -> Partial:
        """Computes attention of the text over own keys; the rows before it in its first block are zeros."""
        front = self.shards.front
        rows = F.pad(text, [0, 0, 0, 0, front, 0])
        out, lse = _add(_nothing(rows), rows, held, self.shards.text_part(mask, self.rank), options)
        return out[:, front:], lse[:, front:]

    def _sum(self, partial: Partial) -> Tensor:
        """Merges attention over the keys of all processes, `[B, T, H, D]` in float32, the same on all."""
        of_all = (gather_parts(x, 0, self._group).chunk(self.degree) for x in partial)
        whole, *others = zip(*of_all, strict=True)
        for other in others:
            whole = merge(whole, other)
        return whole[0]


def share_sequence(group: Any) -> SequenceParallel | None:
    """Returns this process's share in the sequence of xDiT's sequence group; None if it is alone in it."""
    if group.world_size == 1:
        return None
    if group.ring_world_size == 1:
        return SequenceParallel(group.ulysses_group)
    return RingParallel(group.ulysses_group, group.ring_group, group.device_group)


class RingParallel(SequenceParallel):
    """Holds one process's share of a sequence in a ring of Ulysses groups, `everyone` of both together.

    Ranks of `everyone` count through a Ulysses group first. It serves calls without gradients only.
    """

    def __init__(self, ulysses: ProcessGroup, ring: ProcessGroup, everyone: ProcessGroup) -> None:
        super().__init__(ulysses)
        self.ring = Ring(ring)
        self._everyone = everyone
        self._share = 0
        self._places: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def begin(self, grid: TokenGrid, block_size: int) -> None:
        """Sets the grid of the call that follows, and the block size of its mask."""
        shards, self._all = deal(grid, block_size, self.ring.degree), grid.video_tokens
        if shards is not self.ring.shards:
            self.ring.shards, self._places = shards, {}
            self._tokens = len(shards.tokens[self.ring.rank])
            self._share = -(-shards.most_tokens // self.degree)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Returns this process's part of all video tokens along `dim`, padded with zeros to equal parts."""
        tokens = self._find_places(x.device)[0]
        return pad(x.index_select(dim, tokens), dim, self._share - len(tokens))

    def own_of_first(self, count: int) -> int:
        """Returns how many of the first `count` video tokens this process has; they come first there too."""
        return int((self._own() < count).sum())

    def gather(self, x: Tensor) -> Tensor:
        """Returns all video tokens `[B, N, C]` in order, from the parts of all processes, `[B, n, C]`."""
        return gather_parts(x, 1, self._everyone).index_select(1, self._find_places(x.device)[1])

    def _own(self) -> Tensor:
        """Returns the numbers of this process's tokens, int64, ascending."""
        tokens = self.ring.shards.tokens[self.ring.rank]
        return tokens[self.rank * self._share : (self.rank + 1) * self._share]

    def _find_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the numbers of own tokens, and where each token is in the concatenated parts of all."""
        if device not in self._places:
            shards = self.ring.shards
            back = torch.empty(shards.grid.video_tokens, dtype=torch.int64, device="cpu")
            for rank, tokens in enumerate(shards.tokens):
                start = rank * self.degree * self._share
                back[tokens] = torch.arange(start, start + len(tokens), device="cpu")
            self._places[device] = self._own().to(device), back.to(device)
        return self._places[device]


def _nothing(query: Tensor) -> Partial:
    """Returns attention over no keys, in float32."""
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    return torch.zeros_like(query, dtype=torch.float32), lse


def _add(partial: Partial, query: Tensor, held: Tensor, part: Part, options: dict[str, Any]) -> Partial:
    """Adds attention over further keys, `[2, B, K, H, D]`, to a result if the part keeps any of them."""
    if query.shape[1] == 0 or held.shape[2] == 0 or not part.blocks.any():
        return partial
    return merge(partial, partial_attention(query, *held, part, **options))
