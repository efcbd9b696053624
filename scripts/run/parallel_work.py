"""What a denoising step on several processes asks of each: bytes, operations and memory, all predicted."""

import math
from dataclasses import dataclass, replace

from radial_attn.models.parallel.groups import Degrees

from radial_attn import BlockMask, TokenGrid, radial_mask
from radial_attn.shards import Shards, deal, imbalance
from scripts.run import plan
from scripts.run.config import Config
from scripts.run.families import calls_per_step
from scripts.run.memory import DTYPE_BYTES, Memory, peak
from scripts.run.model_info import ModelInfo

COMMAND = "python -m scripts.parallel_cost"
STREAMS = 4  # query, key and value to the processes that have the heads, the output back


@dataclass(frozen=True)
class Share:
    """What a process has of a step: video `tokens` and `heads`, filled up to whole shares, and `calls`."""

    tokens: int
    heads: int
    calls: float


@dataclass(frozen=True)
class Exchange:
    """Bytes that a process sends in a step.

    Attributes:
        streams: query, key, value and output of the video tokens, by all-to-all; text: the output's heads.
        tokens: all of them, after the last projection; guidance: the model's output, to the other half.
        ring: keys and values that are passed on, and what the text finds among own keys, in float32.
    """

    streams: float
    text: float
    tokens: float
    guidance: float
    ring: float = 0.0

    @property
    def total(self) -> float:
        return self.streams + self.text + self.tokens + self.guidance + self.ring


@dataclass(frozen=True)
class Work:
    """Operations of a process in a step.

    Attributes:
        dense: self-attention where the step is dense; radial: where it is not.
        other: all else; repeated: of that, what exceeds an equal part (text rows, filled-up tokens).
        kept_blocks: of a radial layer and a call, over the heads of the process, the busiest one of a ring.
        busiest, waiting: kept blocks of the busiest rank of a ring over the mean, and of the busiest one of
            each step, for whom the others wait.
    """

    dense: float
    radial: float
    other: float
    repeated: float
    kept_blocks: int
    busiest: float = 1.0
    waiting: float = 1.0


@dataclass(frozen=True)
class Rates:
    """Sustained by a GPU: operations a second in linear layers and in attention, bytes a second sent."""

    linear: float
    attention: float
    bandwidth: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of a dense, a radial and a mean step; `speed_up` over one GPU, in videos a second."""

    exchange: float
    dense: float
    radial: float
    mean: float
    speed_up: float
    efficiency: float


def share(config: Config, model: ModelInfo, degrees: Degrees) -> Share:
    """Of one process; ValueError for more halves of guidance than a step has."""
    calls = calls_per_step(config)
    if degrees.cfg not in (1, calls):
        raise ValueError(f"cfg must be 1 or {calls} with this guidance, got {degrees}")
    tokens = -(-_shards(config, model, degrees).most_tokens // degrees.ulysses)
    return Share(tokens, -(-model.heads // degrees.ulysses), calls / degrees.cfg)


def _shards(config: Config, model: ModelInfo, degrees: Degrees) -> Shards:
    return deal(plan.token_grid(config, model), config.attention.block_size, degrees.ring)


def exchange(config: Config, model: ModelInfo, degrees: Degrees) -> Exchange:
    """Bytes that a process sends in a step of one prompt; nothing where it is alone."""
    own, grid, others = share(config, model, degrees), plan.token_grid(config, model), degrees.ulysses - 1
    size, around = DTYPE_BYTES[config.model.dtype], degrees.ring - 1
    passed = 2 * size * model.head_dim * (around * _shards(config, model, degrees).most_tokens + grid.text)
    of_text, output = (
        around * grid.text * 4 * (model.head_dim + 1),
        _outputs(model, config.model.family) * size,
    )
    layers, head_bytes = own.calls * model.attention_layers(), own.heads * model.head_dim * size
    return Exchange(
        streams=layers * STREAMS * own.tokens * head_bytes * others,
        text=layers * grid.text * head_bytes * others,
        tokens=own.calls * own.tokens * output * (degrees.ulysses * degrees.ring - 1),
        guidance=(degrees.cfg - 1) * grid.video_tokens * output,
        ring=layers * own.heads * (passed + of_text) if around else 0.0,
    )


def _outputs(model: ModelInfo, family: str) -> int:
    """Channels that the model gives a token: those of its latents, times the patch."""
    latents = 12 if family == "mochi" else 48 if model.vae_pixels == 16 else 16
    return latents * math.prod(model.patch)


def work(config: Config, model: ModelInfo, degrees: Degrees) -> Work:
    """Operations of a process in a step, from those of the plan."""
    own, grid = share(config, model, degrees), plan.token_grid(config, model)
    mask, step = radial_mask(grid, plan.radial_config(config)), _one_step(config)
    dense, radial = plan.attention_flops(step, model, mask.density)
    part, around = own.heads / model.heads / degrees.cfg, _around(_shards(config, model, degrees), mask)
    everything = plan.other_flops(step, model)
    of_text = 4.0 * model.text_tokens * model.width**2 * model.attention_layers() * calls_per_step(config)
    by_token = (everything - of_text) * ((own.tokens + grid.text) / grid.tokens)
    other = (by_token + of_text) / degrees.cfg
    repeated = max(0.0, other - everything / (degrees.ulysses * degrees.ring * degrees.cfg))
    # of a radial step, the layers that are not dense
    sparse = (dense - radial) / (1 / mask.density - 1) if mask.density < 1 else 0.0
    return Work(
        dense * part * around.dense,
        ((radial - sparse) * around.dense + sparse * around.radial) * part,
        other,
        repeated,
        own.heads * around.kept,
        around.busiest,
        around.waiting,
    )


@dataclass(frozen=True)
class _Around:
    """Of the busiest process of a ring: its share of a dense and of a radial layer, and its kept blocks."""

    dense: float
    radial: float
    kept: int
    busiest: float = 1.0
    waiting: float = 1.0


def _around(shards: Shards, mask: BlockMask) -> _Around:
    if shards.degree == 1:
        return _Around(1.0, 1.0, int(mask.blocks.sum()))
    grid, most, kept = shards.grid, shards.most_tokens, shards.kept(mask)
    # own rows over all keys, and the text over own keys
    pairs = most * grid.tokens + grid.text * (most + grid.text)
    busiest, waiting = imbalance(kept)
    radial = waiting * kept.sum().item() / shards.degree / int(mask.blocks.sum())
    return _Around(pairs / grid.tokens**2, radial, int(kept.sum(dim=1).max()), busiest, waiting)


def _one_step(config: Config) -> Config:
    """The configuration of one step that is not dense."""
    attention = replace(config.attention, dense_steps=0, dense_last_steps=0)
    return replace(config, attention=attention, generation=replace(config.generation, steps=1))


def rank_memory(config: Config, model: ModelInfo, degrees: Degrees, device: str = "cuda") -> Memory:
    """Predicted peak of a process: weights whole, tokens by share."""
    own = TokenGrid(1, 1, share(config, model, degrees).tokens, model.joint_text)
    return peak(config, model, own, plan.mask_bytes(config, model), device)


def predict(config: Config, model: ModelInfo, degrees: Degrees, rates: Rates) -> Prediction:
    """Seconds of a step, exchange after compute; `degrees.data` videos are made at a time."""
    one, own = (_seconds(config, model, chosen, rates) for chosen in (Degrees(), degrees))
    speed_up = degrees.data * one[-1] / own[-1]
    return Prediction(*own, speed_up, speed_up / degrees.processes)


def _seconds(config: Config, model: ModelInfo, degrees: Degrees, rates: Rates) -> tuple[float, ...]:
    """Of the exchange, of a dense and of a radial step, of the mean of all steps."""
    todo = work(config, model, degrees)
    sending = exchange(config, model, degrees).total / rates.bandwidth
    always = sending + todo.other / rates.linear
    dense, radial = (always + flops / rates.attention for flops in (todo.dense, todo.radial))
    first = len(plan.dense_steps(config)) / config.generation.steps
    return sending, dense, radial, first * dense + (1 - first) * radial


def lines(config: Config, model: ModelInfo, degrees: Degrees, device: str) -> list[str]:
    """What each of several processes has to do, for `--dry-run`; nothing for one."""
    if degrees.processes == 1:
        return []
    sent, todo = exchange(config, model, degrees), work(config, model, degrees)
    need = rank_memory(config, model, degrees, device)
    dense, radial = (f"{(todo.other + flops) / 1e15:.3f}" for flops in (todo.dense, todo.radial))
    ring = (
        f"ring          {sent.ring / 1e9:.2f} GB of that; kept blocks of the busiest rank {todo.busiest:.3f} "
        f"of the mean, {todo.waiting:.3f} with waiting at each of {degrees.ring} steps"
    )
    return [
        f"each a step   {sent.total / 1e9:.2f} GB sent, {dense} PFLOP dense, {radial} radial, "
        f"{todo.kept_blocks} kept blocks a layer",
        *([ring] if degrees.ring > 1 else []),
        f"each          {plan.gib(need.total)} of memory; seconds at given rates: {COMMAND}",
    ]
