"""Cuts a block mask into dense rectangles for kernels that know only dense attention.

A radial mask gives every query block its own key set, yet neighbours share most of their keys. The planner
joins neighbours into a binary tree: a node attends, with all of its rows at once, to the keys that all of
them keep and that no node above has handled. Every kept block belongs to exactly one rectangle, and partial
results of a row are merged through their log-sum-exp. Small blocks would need too many thin calls, so they
may also share a rectangle under a mask of its blocks.
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
TILE_TOKENS = (64, 128, 256)  # rows that may share a call under a small mask


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
        cells: kept blocks of each rectangle, bool `[G, r, c]`; None if all are kept.
    """

    rows: Span
    keys: Span
    slots: Span
    cells: Tensor | None


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
    cells: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Holds what a plan depends on besides the mask.

    Attributes:
        tail: first block that text or the end of the sequence may leave with fewer valid tokens.
        key_tail: the tail of the keys if it differs, as in a mask of a part of the keys.
        features: `B H D`, for the estimate of cost.
        key_bytes: bytes of one head's key and value of a token.
        merge: False keeps each row in one rectangle, without partial results.
    """

    block_size: int
    tail: int
    features: int = 512
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
    """Chooses the cheapest of `candidate_plans` for a mask, bool `[Q, K]` on the CPU; () if it is empty."""
    if not blocks.any():
        return ()
    plans = candidate_plans(blocks, layout).values()
    return min(plans, key=lambda plan: _cost(plan, layout))


def candidate_plans(blocks: Tensor, layout: Layout) -> dict[str, tuple[Group, ...]]:
    """Makes plans that cover a mask by rectangles in different ways.

    "rows" has one rectangle for each run of neighbours with equal key sets. "tiles" covers several blocks
    of rows by the union of their keys, under a mask that leaves out blocks that are not kept. "tree" shares
    a rectangle between all neighbours that keep the same keys, and leaves the rest to rows or tiles.
    """
    # runs of neighbouring rows with equal key sets; rows without keys are left out
    changes = (blocks[1:] != blocks[:-1]).any(dim=1).nonzero().flatten() + 1
    runs = pairwise([0, *changes.tolist(), len(blocks)])
    leaves = [_Node(start, stop, blocks[start]) for start, stop in runs if blocks[start].any()]
    plans = {"rows": _groups(leaves, layout, _Cut(blocks))}
    if len(leaves) == 1:
        return plans
    # rows of the tail stay alone, because their rectangles may be cut short
    alone = [node for node in leaves if node.stop > layout.tail]
    trees = _grow([node for node in leaves if node.stop <= layout.tail], layout.block_size) + alone
    shared = max(1, SHARED_TOKENS // layout.block_size)
    tiles = {size: size // layout.block_size for size in TILE_TOKENS if size > layout.block_size}
    if layout.merge:
        plans["tree"] = _groups(trees, layout, _Cut(blocks, least=shared))
    for size, rows in tiles.items():
        plans[f"tiles of {size}"] = _groups(trees, layout, _Cut(blocks, tile=rows))
        if layout.merge:
            cut = _Cut(blocks, least=shared, tile=rows)
            plans[f"tree, tiles of {size}"] = _groups(trees, layout, cut)
    return plans


@dataclass(frozen=True, eq=False)
class _Cut:
    """Cuts a tree: `least` shared key blocks make a rectangle, `tile` rows share the rest."""

    blocks: Tensor
    least: int | None = None
    tile: int = 1

    def rectangles(self, node: _Node, handled: Tensor) -> Iterator[_Rectangle]:
        """Yields the rectangles of a tree: each node takes what all its rows keep and no node above took."""
        rest = node.keys & ~handled
        if not node.children:
            yield from _rectangle(node, rest)
            return
        if len(node.rows) <= self.tile:
            rest = self.blocks[node.start : node.stop] & ~handled
            keys = rest.any(dim=0)
            cells = rest[:, keys]
            yield from _rectangle(node, keys, None if cells.all() else cells)
            return
        if self.least is not None and int(rest.sum()) >= self.least:
            yield from _rectangle(node, rest)
            handled = handled | rest
        for child in node.children:
            yield from self.rectangles(child, handled)


def _rectangle(node: _Node, keys: Tensor, cells: Tensor | None = None) -> Iterator[_Rectangle]:
    if keys.any():
        yield _Rectangle(node.rows, tuple(keys.nonzero().flatten().tolist()), (node.level,), cells)


def _grow(nodes: list[_Node], block_size: int) -> list[_Node]:
    """Pairs neighbours level by level until they hold `GROUP_TOKENS`."""
    level, finished = 1, []
    while nodes:
        pairs = list(zip(nodes[::2], nodes[1::2], strict=False))
        small = [(a, b) for a, b in pairs if (b.stop - a.start) * block_size <= GROUP_TOKENS]
        finished += [
            node for a, b in pairs if (b.stop - a.start) * block_size > GROUP_TOKENS for node in (a, b)
        ]
        finished += nodes[2 * len(pairs) :]
        nodes = [_Node(a.start, b.stop, a.keys & b.keys, level, (a, b)) for a, b in small]
        level += 1
    return sorted(finished, key=lambda node: node.start)


def _groups(trees: list[_Node], layout: Layout, cut: _Cut) -> tuple[Group, ...]:
    """Collects trees up to `GROUP_TOKENS` query tokens; rectangles of a group may share calls."""
    groups, rows, rectangles = [], (), []
    for tree in trees:
        if rows and (len(rows) + len(tree.rows)) * layout.block_size > GROUP_TOKENS:
            groups.append(_group(rows, rectangles, layout))
            rows, rectangles = (), []
        rows += tuple(tree.rows)
        rectangles += cut.rectangles(tree, torch.zeros_like(tree.keys))
    return (*groups, _group(rows, rectangles, layout))


def _group(rows: tuple[int, ...], rectangles: list[_Rectangle], layout: Layout) -> Group:
    if layout.merge:
        rectangles = [part for whole in rectangles for part in _chunks(whole, layout.key_blocks)]
    batches: dict[tuple, list[_Rectangle]] = {}
    for rectangle in rectangles:
        tails = _tail(rectangle.rows, layout.tail), _tail(rectangle.keys, layout.keys_from)
        sizes = len(rectangle.rows), len(rectangle.keys)
        batches.setdefault((sizes, rectangle.level, rectangle.cells is None, tails), []).append(rectangle)
    pieces = []
    for ((_, keys), *_), batch in batches.items():
        step = max(1, BATCH_TOKENS // (keys * layout.block_size))
        pieces += [_piece(batch[i : i + step], rows, layout) for i in range(0, len(batch), step)]
    covered = sum(len(rectangle.rows) for rectangle in rectangles)
    return Group(_span([rows], layout.tail), tuple(pieces), merge=covered > len(rows))


def _chunks(whole: _Rectangle, most: int) -> list[_Rectangle]:
    """Splits a rectangle into equal parts of about `most` key blocks, which never share a call."""
    count = max(1, round(len(whole.keys) / most)) if whole.cells is None else 1
    edges = [index * len(whole.keys) // count for index in range(count + 1)]
    parts = enumerate(pairwise(edges))
    return [replace(whole, keys=whole.keys[a:b], level=(*whole.level, i)) for i, (a, b) in parts]


def _piece(batch: list[_Rectangle], group: tuple[int, ...], layout: Layout) -> Piece:
    rows = [tuple(rectangle.rows) for rectangle in batch]
    slots = [tuple(map(group.index, numbers)) for numbers in rows]
    cells = None if batch[0].cells is None else torch.stack([rectangle.cells for rectangle in batch])
    keys = _span([rectangle.keys for rectangle in batch], layout.keys_from)
    return Piece(_span(rows, layout.tail), keys, _span(slots, len(group)), cells)


def _span(blocks: list[tuple[int, ...]], tail: int) -> Span:
    first = blocks[0]
    run = len(blocks) == 1 and first == tuple(range(first[0], first[0] + len(first)))
    return Span(torch.tensor(blocks, device="cpu"), first[0] if run else None, _tail(first, tail))


def _tail(blocks: Iterable[int], tail: int) -> tuple[int, ...]:
    return tuple(block for block in blocks if block >= tail)


def _cost(plan: tuple[Group, ...], layout: Layout) -> float:
    """Estimates microseconds on a CPU: calls, multiplications, gathered keys, masks and merged rows."""
    total = 0.0
    for group in plan:
        for piece in group.pieces:
            (count, rows), keys = piece.rows.blocks.shape, piece.keys.blocks.shape[1]
            rows, keys = rows * layout.block_size, keys * layout.block_size
            # 4 rows keys features FLOPs at up to 250 GFLOP/s, reached by large tiles only
            multiply = 1.6e-5 * keys * (rows + 64) * layout.features
            gather = 1e-3 * keys * layout.features
            bias = 1e-3 * keys * rows * (piece.cells is not None)
            merge = 2e-3 * rows * layout.features * group.merge
            total += 60 + count * (multiply + gather + bias + merge)
    return total


def to_device(plan: tuple[Group, ...], device: torch.device) -> tuple[Group, ...]:
    """Copies the plan with its tensors to a device."""

    def move(span: Span) -> Span:
        return replace(span, blocks=span.blocks.to(device))

    def move_piece(piece: Piece) -> Piece:
        cells = None if piece.cells is None else piece.cells.to(device)
        return Piece(move(piece.rows), move(piece.keys), move(piece.slots), cells)

    return tuple(Group(move(group.rows), tuple(map(move_piece, group.pieces)), group.merge) for group in plan)
