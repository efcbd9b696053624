"""Cuts a block mask into dense rectangles for kernels that know only dense attention.

A radial mask gives every query block its own key set, yet neighbours share most of theirs. The planner
joins query blocks into a binary tree: a node attends, with all of its rows at once, to the keys that
all of them keep and that no node above has handled. Every kept block belongs to exactly one rectangle,
and partial results of a row are merged through their log-sum-exp.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

GROUP_TOKENS = 2048  # query tokens that share an accumulator and may join in one tree
BATCH_TOKENS = 4096  # gathered keys of one call that joins rectangles of equal shape
SIMILAR_NODES = 2048  # the similarity of more query blocks than this is not compared


@dataclass(frozen=True)
class Span:
    """Block numbers along one side of `G` rectangles of equal shape.

    Attributes:
        blocks: int64 `[G, c]`, with those of the tail last.
        first: the first block where `G == 1` and the numbers are consecutive, else None.
        tail: those blocks, equal in all rectangles, that may hold fewer valid tokens than their size.
    """

    blocks: Tensor
    first: int | None
    tail: tuple[int, ...]

    def tokens(self, block_size: int, limit: int) -> int:
        """Tokens of each rectangle below position `limit` of the sequence."""
        whole = (self.blocks.shape[1] - len(self.tail)) * block_size
        return whole + sum(min(max(limit - block * block_size, 0), block_size) for block in self.tail)


@dataclass(frozen=True)
class Piece:
    """`G` rectangles, each `rows.blocks[g]` x `keys.blocks[g]`; `slots` are the rows' places in the group."""

    rows: Span
    keys: Span
    slots: Span


@dataclass(frozen=True)
class Group:
    """Query blocks, int64 `[R]`, that no other group holds, and the rectangles that cover their rows."""

    rows: Span
    pieces: tuple[Piece, ...]
    merge: bool


@dataclass(frozen=True, eq=False)
class _Node:
    rows: tuple[int, ...]
    keys: Tensor
    level: int = 0
    children: tuple["_Node", ...] = ()


@dataclass(frozen=True, eq=False)
class _Rectangle:
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    level: int


def plan_attention(
    blocks: Tensor, block_size: int, tail: int, features: int, merge: bool
) -> tuple[Group, ...]:
    """The cheapest of `candidate_plans`.

    Args:
        blocks: bool `[Q, K]` on the CPU.
        tail: first block that text or the end of the sequence may leave with fewer valid tokens.
        features: `B H D`, for the estimate of cost.
        merge: False keeps each row in one rectangle, so that no partial results arise.
    """
    plans = candidate_plans(blocks, block_size, tail, merge).values()
    return min(plans, key=lambda plan: _cost(plan, block_size, features))


def candidate_plans(
    blocks: Tensor, block_size: int, tail: int, merge: bool = True
) -> dict[str, tuple[Group, ...]]:
    """Ways to cover a mask by rectangles; arguments as in `plan_attention`.

    "rows" is one rectangle for each run of neighbours with equal key sets. The others join rows into
    trees, of "neighbours" or of the most "similar" rows, and share a rectangle from so many keys on.
    """
    leaves = _equal_neighbours(blocks)
    plans = {"rows": _groups(leaves, block_size, tail, least=1)}
    if not merge or len(leaves) < 2:
        return plans
    # rows of the tail stay alone, so that in every tree the order of rows is free
    alone = [node for node in leaves if node.rows[-1] >= tail]
    leaves = [node for node in leaves if node.rows[-1] < tail]
    trees = {"neighbours": _grow(leaves, block_size, by_similarity=False)}
    if len(leaves) <= SIMILAR_NODES:
        trees["similar"] = _grow(leaves, block_size, by_similarity=True)
    for name, tree in trees.items():
        for least in _least(block_size):
            plans[f"{name}, {least * block_size} keys"] = _groups(tree + alone, block_size, tail, least)
    return plans


def _least(block_size: int) -> list[int]:
    """Numbers of key blocks from which a shared rectangle is worth a call of its own: candidates."""
    return sorted({max(1, tokens // block_size) for tokens in (64, 256, 512)})


def _equal_neighbours(blocks: Tensor) -> list[_Node]:
    """Runs of neighbouring rows with equal key sets; rows without keys are left out."""
    changes = (blocks[1:] != blocks[:-1]).any(dim=1).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), len(blocks)]
    runs = pairwise(edges)
    return [_Node(tuple(range(a, b)), blocks[a]) for a, b in runs if blocks[a].any()]


def _grow(nodes: list[_Node], block_size: int, by_similarity: bool) -> list[_Node]:
    """Pairs nodes level by level until they hold `GROUP_TOKENS` or share no key."""
    level, finished = 1, []
    while len(nodes) > 1:
        pairs = _similar_pairs(nodes) if by_similarity else [(i, i + 1) for i in range(0, len(nodes) - 1, 2)]
        paired = {index for pair in pairs for index in pair}
        single = [node for index, node in enumerate(nodes) if index not in paired]
        joined = [_join(nodes[a], nodes[b], level) for a, b in pairs]
        finished += [node for node in joined if len(node.rows) * block_size >= GROUP_TOKENS]
        nodes = [node for node in joined if len(node.rows) * block_size < GROUP_TOKENS]
        if not pairs:
            return finished + single
        nodes, level = sorted(nodes + single, key=lambda node: node.rows[0]), level + 1
    return finished + nodes


def _join(first: _Node, second: _Node, level: int) -> _Node:
    return _Node(first.rows + second.rows, first.keys & second.keys, level, (first, second))


def _similar_pairs(nodes: list[_Node]) -> list[tuple[int, int]]:
    """Pairs of nodes that are each other's best partner by shared keys, until none is left."""
    keys = torch.stack([node.keys for node in nodes]).float()
    shared = keys @ keys.T
    index = torch.arange(len(nodes))
    shared[index, index] = -1
    even = index[: len(nodes) // 2 * 2]
    shared[even, even ^ 1] += 0.5 * (shared[even, even ^ 1] > 0)  # among equals prefer one fixed neighbour
    pairs = []
    while True:
        value, partner = shared.max(dim=1)
        mutual = ((partner[partner] == index) & (index < partner) & (value > 0)).nonzero().flatten()
        if not len(mutual):
            return sorted(pairs)
        pairs += zip(mutual.tolist(), partner[mutual].tolist(), strict=True)
        done = torch.cat([mutual, partner[mutual]])
        shared[done], shared[:, done] = -1, -1


def _rectangles(node: _Node, least: int, handled: Tensor) -> Iterator[_Rectangle]:
    """Rectangles of a tree: each node takes what all of its rows keep and nobody above took."""
    rest = node.keys & ~handled
    count = int(rest.sum())
    if count and (count >= least or not node.children):
        yield _Rectangle(node.rows, tuple(rest.nonzero().flatten().tolist()), node.level)
        handled = handled | rest
    for child in node.children:
        yield from _rectangles(child, least, handled)


def _groups(trees: list[_Node], block_size: int, tail: int, least: int) -> tuple[Group, ...]:
    """Collects trees up to `GROUP_TOKENS` query tokens; rectangles of a group may share calls."""
    groups, rows, rectangles = [], (), []
    for tree in trees:
        if rows and (len(rows) + len(tree.rows)) * block_size > GROUP_TOKENS:
            groups.append(_group(rows, rectangles, block_size, tail))
            rows, rectangles = (), []
        rows += tree.rows
        rectangles += _rectangles(tree, least, torch.zeros_like(tree.keys))
    return (*groups, _group(rows, rectangles, block_size, tail))


def _group(rows: tuple[int, ...], rectangles: list[_Rectangle], block_size: int, tail: int) -> Group:
    slots = {row: slot for slot, row in enumerate(rows)}
    batches: dict[tuple, list[_Rectangle]] = {}
    for rectangle in rectangles:
        tails = _tail(rectangle.rows, tail), _tail(rectangle.keys, tail)
        shape = rectangle.level, len(rectangle.rows), len(rectangle.keys), *tails
        batches.setdefault(shape, []).append(rectangle)
    pieces = []
    for (_, _, keys, *_), batch in batches.items():
        step = max(1, BATCH_TOKENS // (keys * block_size))
        pieces += [_piece(batch[i : i + step], slots, tail) for i in range(0, len(batch), step)]
    covered = sum(len(rectangle.rows) for rectangle in rectangles)
    return Group(_span([rows], tail), tuple(pieces), merge=covered > len(rows))


def _piece(batch: list[_Rectangle], slots: dict[int, int], tail: int) -> Piece:
    rows, keys = [r.rows for r in batch], [r.keys for r in batch]
    places = [tuple(slots[row] for row in group) for group in rows]
    return Piece(_span(rows, tail), _span(keys, tail), _span(places, len(slots)))


def _span(blocks: list[tuple[int, ...]], tail: int) -> Span:
    first = blocks[0]
    run = len(blocks) == 1 and first == tuple(range(first[0], first[0] + len(first)))
    return Span(torch.tensor(blocks), first[0] if run else None, _tail(first, tail))


def _tail(blocks: tuple[int, ...], tail: int) -> tuple[int, ...]:
    return tuple(block for block in blocks if block >= tail)


def _cost(plan: tuple[Group, ...], block_size: int, features: int) -> float:
    """Estimated microseconds on a CPU: calls, multiplications, gathered keys and merged rows."""
    total = 0.0
    for group in plan:
        for piece in group.pieces:
            (count, rows), keys = piece.rows.blocks.shape, piece.keys.blocks.shape[1]
            rows, keys = rows * block_size, keys * block_size
            # 4 rows keys features FLOPs at up to 250 GFLOP/s, reached by large tiles only
            multiply = 1.6e-5 * keys * (rows + 64) * features
            gather = 1e-3 * keys * features
            merge = 2e-3 * rows * features * group.merge
            total += 60 + count * (multiply + gather + merge)
    return total


def to_device(plan: tuple[Group, ...], device: torch.device) -> tuple[Group, ...]:
    """The plan with its index tensors on a device."""

    def move(span: Span) -> Span:
        return replace(span, blocks=span.blocks.to(device))

    return tuple(
        Group(
            move(group.rows),
            tuple(Piece(move(p.rows), move(p.keys), move(p.slots)) for p in group.pieces),
            group.merge,
        )
        for group in plan
    )
