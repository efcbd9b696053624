"""Chooses how the processes of a run share its work, and predicts the work of each in a step."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from radial_attn import BlockMask, TokenGrid
from radial_attn.models.parallel.groups import Degrees
from radial_attn.shards import Shards, deal, imbalance
from scripts.run.config import AnyModelConfig, ParallelConfig
from scripts.run.errors import UsageError
from scripts.run.flops import count_flops
from scripts.run.memory import DTYPE_BYTES
from scripts.run.model_info import ModelInfo

STREAMS = 4  # query, key and value to the processes that have the heads, the output back


def plan_degrees(wanted: ParallelConfig, *, heads: int, calls: int, processes: int, prompts: int) -> Degrees:
    """Chooses the degrees: guidance first, the largest Ulysses degree, prompts, then a ring.

    A Ulysses degree that is chosen here divides the heads. A given one need not: heads of zeros are added. If
    neither Ulysses nor ring is given and nothing else fits, a ring shares the rest.

    Args:
        heads: of the model; calls: passes of a step that can be shared, 2 with halves of guidance.
        prompts: how many videos the run makes, each with a prompt and a seed.

    Raises:
        UsageError: the degrees do not make up the processes, or the run has no use for them.
    """
    halves = "there are no two halves of guidance to share" if calls == 1 else "guidance has two halves"
    limits = {
        "cfg_degree": (min(calls, 2), halves),
        "data_degree": (
            prompts,
            "there are no more videos to share (generation.prompt_file, generation.seeds)",
        ),
    }
    for name, (most, reason) in limits.items():
        got = getattr(wanted, name)
        if got is not None and got > most:
            raise UsageError(f"parallel.{name}: got {got}, must be at most {most}: {reason}")
    fitting = list(_fitting(wanted, heads, calls, processes, prompts))
    if not fitting:
        raise UsageError(_nothing_fits(wanted, heads, calls, processes, prompts))
    return max(fitting, key=lambda degrees: (degrees.cfg, -degrees.ring, degrees.ulysses))


def _fitting(
    wanted: ParallelConfig, heads: int, calls: int, processes: int, prompts: int
) -> Iterator[Degrees]:
    """Yields all degrees that make up the processes and agree with the configuration."""
    cfgs = [wanted.cfg_degree] if wanted.cfg_degree else range(1, calls + 1)
    shares = [wanted.data_degree] if wanted.data_degree else range(1, prompts + 1)
    for cfg, data in itertools.product(cfgs, shares):
        sequence, rest = divmod(processes, cfg * data)
        for ring in range(1, sequence + 1) if rest == 0 else ():
            ulysses, rest = divmod(sequence, ring)
            if rest == 0 and _agrees(wanted, heads, ulysses, ring):
                yield Degrees(ulysses, ring, cfg, data)


def _agrees(wanted: ParallelConfig, heads: int, ulysses: int, ring: int) -> bool:
    """Returns whether a split of a sequence is the given one, or one that may be chosen."""
    if wanted.ulysses_degree is not None:
        return (ulysses, ring) == (wanted.ulysses_degree, wanted.ring_degree or 1)
    return heads % ulysses == 0 and ring == (wanted.ring_degree or ring)


def _nothing_fits(wanted: ParallelConfig, heads: int, calls: int, processes: int, prompts: int) -> str:
    given = {name: value for name, value in vars(wanted).items() if value not in (None, 1)}
    if processes == 1:
        name, value = next(iter(given.items()))
        launch = f"torchrun --nproc_per_node={math.prod(given.values())} -m scripts.generate"
        return f"parallel.{name}: got {value}, must be 1 in one process; start several with {launch}"
    most = 2 * max(processes, math.prod(given.values()))
    works = [n for n in range(1, most + 1) if any(_fitting(wanted, heads, calls, n, prompts))]
    shown = ", ".join(f"{name} {value}" for name, value in given.items()) or "all free"
    return (
        f"parallel: got {processes} processes, but no degrees ({shown}) share {heads} heads and {prompts} "
        f"prompts among them; numbers of processes that work: {', '.join(map(str, works)) or 'none'}"
    )


@dataclass(frozen=True)
class Exchange:
    """Holds the bytes that a process sends in a step.

    Attributes:
        streams: query, key, value and output of the video tokens, by all-to-all; text: the output's heads.
        tokens: all tokens, after the last projection; guidance: the model's output, to the other half.
        ring: keys and values that are passed on, and the text's output over a rank's own keys, in float32.
    """

    streams: float
    text: float
    tokens: float
    guidance: float
    ring: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class RankWork:
    """Holds the work of one process in a step.

    Attributes:
        tokens: its video tokens, padded to a whole share; sent: bytes.
        dense, sparse: operations of self-attention in a dense step, and in a sparse one; other: the rest.
        kept_blocks: in a call of a sparse layer, over the heads of the process; the busiest rank in a ring.
        busiest, waiting: kept blocks of a ring's busiest rank over the mean, and the same if each step of the
            ring waits for its busiest rank.
    """

    tokens: int
    sent: Exchange
    dense: float
    sparse: float
    other: float
    kept_blocks: int
    busiest: float
    waiting: float


def rank_work(
    model: ModelInfo,
    grid: TokenGrid,
    mask: BlockMask,
    options: AnyModelConfig,
    *,
    calls: int,
    dense_layers: int,
    degrees: Degrees,
) -> RankWork:
    """Predicts the work of a process in a step of `calls` passes; `degrees.cfg` is 1 or `calls`."""
    shards = deal(grid, mask.block_size, degrees.ring)
    tokens = -(-shards.most_tokens // degrees.ulysses)
    heads = -(-model.heads // degrees.ulysses)
    one = count_flops(model, grid, mask.density, dense_layers=dense_layers, calls=calls)
    part = heads / model.heads / degrees.cfg
    dense_share, sparse_share, kept, busiest, waiting = _ring_share(shards, mask)
    of_text = 4.0 * model.text_tokens * model.width**2 * model.attention_layers() * calls
    by_token = (one.other - of_text) * ((tokens + grid.text) / grid.tokens)
    # operations of the sparse layers in a sparse step
    sparse = (one.dense - one.sparse) / (1 / mask.density - 1) if mask.density < 1 else 0.0
    return RankWork(
        tokens,
        _exchange(model, shards, options, calls=calls / degrees.cfg, heads=heads, degrees=degrees),
        one.dense * part * dense_share,
        ((one.sparse - sparse) * dense_share + sparse * sparse_share) * part,
        (by_token + of_text) / degrees.cfg,
        heads * kept,
        busiest,
        waiting,
    )


def _exchange(
    model: ModelInfo, shards: Shards, options: AnyModelConfig, *, calls: float, heads: int, degrees: Degrees
) -> Exchange:
    """Counts the bytes that a process sends in a step of one prompt; none if it is alone."""
    grid, others, around = shards.grid, degrees.ulysses - 1, degrees.ring - 1
    tokens, size = -(-shards.most_tokens // degrees.ulysses), DTYPE_BYTES[options.dtype]
    output = model.latents * math.prod(model.patch) * size  # bytes of the model's output for a token
    passed = 2 * size * model.head_dim * (around * shards.most_tokens + grid.text)
    of_text = around * grid.text * 4 * (model.head_dim + 1)
    layers, head_bytes = calls * model.attention_layers(), heads * model.head_dim * size
    return Exchange(
        streams=layers * STREAMS * tokens * head_bytes * others,
        text=layers * grid.text * head_bytes * others,
        tokens=calls * tokens * output * (degrees.ulysses * degrees.ring - 1),
        guidance=(degrees.cfg - 1) * grid.video_tokens * output,
        ring=layers * heads * (passed + of_text) if around else 0.0,
    )


def _ring_share(shards: Shards, mask: BlockMask) -> tuple[float, float, int, float, float]:
    """Returns the share of a ring's busiest process in a dense and in a sparse layer, and its kept blocks.

    `busiest` and `waiting` of RankWork follow.
    """
    if shards.degree == 1:
        return 1.0, 1.0, int(mask.blocks.sum()), 1.0, 1.0
    grid, most, kept = shards.grid, shards.most_tokens, shards.kept(mask)
    # own rows over all keys, and the text over own keys
    pairs = most * grid.tokens + grid.text * (most + grid.text)
    busiest, waiting = imbalance(kept)
    sparse = waiting * kept.sum().item() / shards.degree / int(mask.blocks.sum())
    return pairs / grid.tokens**2, sparse, int(kept.sum(dim=1).max()), busiest, waiting
