"""Cuts a block mask into dense rectangles for kernels that know only dense attention.

A radial mask gives every query block its own key set, yet neighbours share most of their keys. The planner
joins neighbours into a binary tree: a node attends, with all of its rows at once, to the keys that all of
them keep and that no node above has handled. Every kept block belongs to exactly one rectangle, and partial
results of a row are merged through their log-sum-exp. If partial results cannot be merged, each run of
neighbours with equal key sets is one rectangle.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

GROUP_TOKENS = 2048  # query tokens that share an accumulator and may join in one tree
BATCH_TOKENS = 2048  # gathered keys of one call that joins rectangles of equal shape
SHARED_TOKENS = 512  # keys that are worth a rectangle of their own for the rows that share them
CACHE_BYTES = 1 << 19  # keys and values of one head that stay in a core's cache with the scores


@dataclass(frozen=True)
class Span:
    """Holds block numbers along one side of `G` rectangles of equal shape.

    Attributes:
        blocks: int64 `[G, c]`, the tail last.
        first: the first block if `G == 1` and the numbers are consecutive, else None.
        tail: the blocks, equal in all rectangles, that may hold fewer valid tokens than their size.
    """

    blocks: Tensor
    first: int | None
    tail: tuple[int, ...]

    def tokens(self, block_size: int, limit: int) -> int:
        """Counts the tokens of each rectangle below position `limit` of the sequence."""
        whole = (self.blocks.shape[1] - len(self.tail)) * block_size
        return whole + sum(min(max(limit - block * block_size, 0), block_size) for block in self.tail)


@dataclass(frozen=True)
class Piece:
    """Holds `G` rectangles, each `rows.blocks[g]` x `keys.blocks[g]`.

    Attributes:
        slots: indices of the rows in their group.
    """

    rows: Span
    keys: Span
    slots: Span


@dataclass(frozen=True)
class Group:
    """Holds query blocks, int64 `[R]`, that no other group has, and the rectangles that cover their rows."""

    rows: Span
    pieces: tuple[Piece, ...]
    merge: bool


@dataclass(frozen=True, eq=False)
class _Node:
    """Holds neighbouring query blocks `start ... stop - 1` and the keys that all of them keep, bool `[K]`."""

    start: int
    stop: int
    keys: Tensor
    level: int = 0
    children: tuple["_Node", ...] = ()

    @property
    def rows(self) -> range:
        return range(self.start, self.stop)


@dataclass(frozen=True, eq=False)
class _Rectangle:
    """Holds query and key blocks; rectangles of the same level have no row in common."""

    rows: range
    keys: tuple[int, ...]
    level: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Holds what a plan depends on besides the mask.

    Attributes:
        tail: first block that text or the end of the sequence may leave with fewer valid tokens.
        key_tail: the tail of the keys if it differs, as in a mask of a part of the keys.
        key_bytes: bytes of one head's key and value of a token.
        merge: False keeps each row in one rectangle, without partial results.
    """

    block_size: int
    tail: int
    key_bytes: int = 512
    merge: bool = True
    key_tail: int | None = None

    @property
    def keys_from(self) -> int:
        """Returns the tail of the keys."""
        return self.tail if self.key_tail is None else self.key_tail

    @property
    def key_blocks(self) -> int:
        """Estimates the key blocks of one call, if partial results can be merged."""
        return max(1, CACHE_BYTES // (self.key_bytes * self.block_size))


def plan_attention(blocks: Tensor, layout: Layout) -> tuple[Group, ...]:
    """Covers each kept block of a mask, bool `[Q, K]` on the CPU, by one rectangle; () if it is empty."""
    # runs of neighbouring rows with equal key sets; rows without keys are left out
    changes = (blocks[1:] != blocks[:-1]).any(dim=1).nonzero().flatten() + 1
    runs = pairwise([0, *changes.tolist(), len(blocks)])
    trees = [_Node(start, stop, blocks[start]) for start, stop in runs if blocks[start].any()]
    if layout.merge:
        # rows of the tail stay alone, because their rectangles may be cut short
        alone = [node for node in trees if node.stop > layout.tail]
        trees = _grow([node for node in trees if node.stop <= layout.tail], layout.block_size) + alone
    groups, rows, rectangles = [], (), []
    for tree in trees:
        if rows and (len(rows) + len(tree.rows)) * layout.block_size > GROUP_TOKENS:
            groups.append(_group(rows, rectangles, layout))
            rows, rectangles = (), []
        rows += tuple(tree.rows)
        rectangles += _cut(tree, torch.zeros_like(tree.keys), max(1, SHARED_TOKENS // layout.block_size))
    return (*groups, _group(rows, rectangles, layout)) if rows else ()


def _cut(node: _Node, handled: Tensor, least: int) -> Iterator[_Rectangle]:
    """Yields the rectangles of a tree: each node takes what all its rows keep and no node above took.

    A node with children takes nothing if that would be fewer than `least` key blocks.
    """
    rest = node.keys & ~handled
    if int(rest.sum()) >= (least if node.children else 1):
        yield _Rectangle(node.rows, tuple(rest.nonzero().flatten().tolist()), (node.level,))
        handled = handled | rest
    for child in node.children:
        yield from _cut(child, handled, least)


def _grow(nodes: list[_Node], block_size: int) -> list[_Node]:
    """Pairs neighbours level by level until they hold `GROUP_TOKENS`; a row without keys parts neighbours."""
    level, finished = 1, []
    while nodes:
        pairs, last = list(zip(nodes[::2], nodes[1::2], strict=False)), nodes[len(nodes) // 2 * 2 :]
        nodes, finished = [], finished + last
        for a, b in pairs:
            if a.stop == b.start and (b.stop - a.start) * block_size <= GROUP_TOKENS:
                nodes.append(_Node(a.start, b.stop, a.keys & b.keys, level, (a, b)))
            else:
                finished += [a, b]
        level += 1
    return sorted(finished, key=lambda node: node.start)


def _group(rows: tuple[int, ...], rectangles: list[_Rectangle], layout: Layout) -> Group:
    if layout.merge:
        rectangles = [part for whole in rectangles for part in _chunks(whole, layout.key_blocks)]
    batches: dict[tuple, list[_Rectangle]] = {}
    for rectangle in rectangles:
        tails = _tail(rectangle.rows, layout.tail), _tail(rectangle.keys, layout.keys_from)
        sizes = len(rectangle.rows), len(rectangle.keys)
        batches.setdefault((sizes, rectangle.level, tails), []).append(rectangle)
    pieces = []
    for ((_, keys), *_), batch in batches.items():
        step = max(1, BATCH_TOKENS // (keys * layout.block_size))
        pieces += [_piece(batch[i : i + step], rows, layout) for i in range(0, len(batch), step)]
    covered = sum(len(rectangle.rows) for rectangle in rectangles)
    return Group(_span([rows], layout.tail), tuple(pieces), merge=covered > len(rows))


def _chunks(whole: _Rectangle, most: int) -> list[_Rectangle]:
    """Splits a rectangle into equal parts of about `most` key blocks, which never share a call."""
    count = max(1, round(len(whole.keys) / most))
    edges = [index * len(whole.keys) // count for index in range(count + 1)]
    parts = enumerate(pairwise(edges))
    return [replace(whole, keys=whole.keys[a:b], level=(*whole.level, i)) for i, (a, b) in parts]


def _piece(batch: list[_Rectangle], group: tuple[int, ...], layout: Layout) -> Piece:
    rows = [tuple(rectangle.rows) for rectangle in batch]
    slots = [tuple(map(group.index, numbers)) for numbers in rows]
    keys = _span([rectangle.keys for rectangle in batch], layout.keys_from)
    return Piece(_span(rows, layout.tail), keys, _span(slots, len(group)))


def _span(blocks: list[tuple[int, ...]], tail: int) -> Span:
    first = blocks[0]
    run = len(blocks) == 1 and first == tuple(range(first[0], first[0] + len(first)))
    return Span(torch.tensor(blocks, device="cpu"), first[0] if run else None, _tail(first, tail))


def _tail(blocks: Iterable[int], tail: int) -> tuple[int, ...]:
    return tuple(block for block in blocks if block >= tail)


def to_device(plan: tuple[Group, ...], device: torch.device) -> tuple[Group, ...]:
    """Copies the plan with its tensors to a device."""

    def move(span: Span) -> Span:
        return replace(span, blocks=span.blocks.to(device))

    def move_all(group: Group) -> Group:
        pieces = (Piece(move(piece.rows), move(piece.keys), move(piece.slots)) for piece in group.pieces)
        return Group(move(group.rows), tuple(pieces), group.merge)

    return tuple(map(move_all, plan))
