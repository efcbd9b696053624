"""What a denoising step on several GPUs will cost: bytes, operations, seconds and memory, all predicted.

`python -m scripts.parallel_cost CONFIG [key=value ...] --tflops T --bandwidth GB/s [GB/s ...]` prints tables.
"""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.xdit import Degrees
from radial_attn import TokenGrid, radial_mask
from scripts import plan
from scripts.architecture import Architecture, read_architecture
from scripts.config import Config, read_config
from scripts.errors import OneLineParser, UsageError, positive, positive_number
from scripts.gpu_report import table
from scripts.memory import DTYPE_BYTES, Memory, peak
from scripts.sampling import calls_per_step
from scripts.team import plan_degrees
from scripts.validate import check_sizes, check_values, resolve_model

COMMAND = "python -m scripts.parallel_cost"
STREAMS = 4  # query, key and value to the processes that have the heads, the output back
LEFT_OUT = """Left out: kernels that run at another rate on fewer heads or tokens, launch latencies, overlap
of compute and exchange, the copies around an exchange, what each process does once a step outside the blocks
(embeddings), text encoder and VAE. Repeated is what exceeds an equal part: rows of
text, filled-up tokens. Weights stay whole on each GPU, and each process first reads all of them into host
memory; activations are those of the stage that needs the most, a block or decoding."""


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
    """

    streams: float
    text: float
    tokens: float
    guidance: float

    @property
    def total(self) -> float:
        return self.streams + self.text + self.tokens + self.guidance


@dataclass(frozen=True)
class Work:
    """Operations of a process in a step.

    Attributes:
        dense: self-attention where the step is dense; radial: where it is not.
        other: all else; repeated: of that, what exceeds an equal part (text rows, filled-up tokens).
        kept_blocks: of a radial layer and a call, over the heads of the process.
    """

    dense: float
    radial: float
    other: float
    repeated: float
    kept_blocks: int


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


def share(config: Config, model: Architecture, degrees: Degrees) -> Share:
    """Of one process; ValueError for a ring, or for more halves of guidance than a step has."""
    calls = calls_per_step(config)
    if degrees.ring != 1 or degrees.cfg not in (1, calls):
        raise ValueError(f"ring must be 1 and cfg 1 or {calls} with this guidance, got {degrees}")
    tokens = -(-plan.token_grid(config, model).video_tokens // degrees.ulysses)
    return Share(tokens, -(-model.heads // degrees.ulysses), calls / degrees.cfg)


def exchange(config: Config, model: Architecture, degrees: Degrees) -> Exchange:
    """Bytes that a process sends in a step of one prompt; nothing where it is alone."""
    own, grid, others = share(config, model, degrees), plan.token_grid(config, model), degrees.ulysses - 1
    size = DTYPE_BYTES[config.model.dtype]
    layers, head_bytes = own.calls * model.attention_layers(), own.heads * model.head_dim * size
    return Exchange(
        streams=layers * STREAMS * own.tokens * head_bytes * others,
        text=layers * grid.text * head_bytes * others,
        tokens=own.calls * own.tokens * _outputs(model, config.model.family) * size * others,
        guidance=(degrees.cfg - 1) * grid.video_tokens * _outputs(model, config.model.family) * size,
    )


def _outputs(model: Architecture, family: str) -> int:
    """Channels that the model gives a token: those of its latents, times the patch."""
    latents = 12 if family == "mochi" else 48 if model.vae_pixels == 16 else 16
    return latents * math.prod(model.patch)


def work(config: Config, model: Architecture, degrees: Degrees) -> Work:
    """Operations of a process in a step, from those of the plan."""
    own, grid = share(config, model, degrees), plan.token_grid(config, model)
    mask, step = radial_mask(grid, plan.radial_config(config)), _one_step(config)
    dense, radial = plan.attention_flops(step, model, mask.density)
    part = own.heads / model.heads / degrees.cfg
    everything = plan.other_flops(step, model)
    of_text = 4.0 * model.text_tokens * model.width**2 * model.attention_layers() * calls_per_step(config)
    by_token = (everything - of_text) * ((own.tokens + grid.text) / grid.tokens)
    other = (by_token + of_text) / degrees.cfg
    repeated = max(0.0, other - everything / (degrees.ulysses * degrees.cfg))
    return Work(dense * part, radial * part, other, repeated, own.heads * int(mask.blocks.sum()))


def _one_step(config: Config) -> Config:
    """The configuration of one step that is not dense."""
    attention = replace(config.attention, dense_steps=0, dense_last_steps=0)
    return replace(config, attention=attention, generation=replace(config.generation, steps=1))


def rank_memory(config: Config, model: Architecture, degrees: Degrees, device: str = "cuda") -> Memory:
    """Predicted peak of a process: weights whole, tokens by share."""
    own = TokenGrid(1, 1, share(config, model, degrees).tokens, model.joint_text)
    return peak(config, model, own, plan.mask_bytes(config, model), device)


def predict(config: Config, model: Architecture, degrees: Degrees, rates: Rates) -> Prediction:
    """Seconds of a step, exchange after compute; `degrees.data` videos are made at a time."""
    one, own = (_seconds(config, model, chosen, rates) for chosen in (Degrees(), degrees))
    speed_up = degrees.data * one[-1] / own[-1]
    return Prediction(*own, speed_up, speed_up / degrees.processes)


def _seconds(config: Config, model: Architecture, degrees: Degrees, rates: Rates) -> tuple[float, ...]:
    """Of the exchange, of a dense and of a radial step, of the mean of all steps."""
    todo = work(config, model, degrees)
    sending = exchange(config, model, degrees).total / rates.bandwidth
    always = sending + todo.other / rates.linear
    dense, radial = (always + flops / rates.attention for flops in (todo.dense, todo.radial))
    first = len(plan.dense_steps(config)) / config.generation.steps
    return sending, dense, radial, first * dense + (1 - first) * radial


def lines(config: Config, model: Architecture, degrees: Degrees, device: str) -> list[str]:
    """What each of several processes has to do, for `--dry-run`; nothing for one."""
    if degrees.processes == 1:
        return []
    sent, todo = exchange(config, model, degrees), work(config, model, degrees)
    need = rank_memory(config, model, degrees, device)
    dense, radial = (f"{(todo.other + flops) / 1e15:.3f}" for flops in (todo.dense, todo.radial))
    return [
        f"each a step   {sent.total / 1e9:.2f} GB sent, {dense} PFLOP dense, {radial} radial, "
        f"{todo.kept_blocks} kept blocks a layer",
        f"each          {plan.gib(need.total)} of memory; seconds at given rates: {COMMAND}",
    ]


def _above_one(degrees: Degrees) -> str:
    return ", ".join(sorted(f"{name} {n}" for name, n in vars(degrees).items() if n > 1)) or "1"


def share_table(config: Config, model: Architecture, plans: Sequence[Degrees]) -> list[str]:
    """Markdown of what holds at any rate: bytes, operations, kept blocks and memory of a process."""
    titles = (
        "GPUs | degrees | all-to-all GB | text MB | token gather GB | guidance MB | dense step PFLOP | "
        "radial step PFLOP | repeated TFLOP | kept blocks a layer | weights | activations"
    )
    rows = []
    for degrees in plans:
        sent, todo = exchange(config, model, degrees), work(config, model, degrees)
        sizes = sent.streams / 1e9, sent.text / 1e6, sent.tokens / 1e9, sent.guidance / 1e6
        flops = (todo.other + todo.dense) / 1e15, (todo.other + todo.radial) / 1e15, todo.repeated / 1e12
        need = rank_memory(config, model, degrees)
        memory = plan.gib(need.weights), plan.gib(need.activations)
        cells = (*(f"{x:.2f}" for x in sizes), *(f"{x:.3f}" for x in flops), todo.kept_blocks, *memory)
        rows.append((degrees.processes, _above_one(degrees), *cells))
    return table(titles, rows)


def time_table(config: Config, model: Architecture, plans: Sequence[Degrees], rates: Rates) -> list[str]:
    """Markdown of seconds at these rates."""
    steps = config.generation.steps
    titles = f"GPUs | exchange s | dense step s | radial step s | mean step s | {steps} steps s | speed-up"
    rows = []
    for degrees in plans:
        found = predict(config, model, degrees, rates)
        seconds = (f"{x:.2f}" for x in (found.exchange, found.dense, found.radial, found.mean))
        gains = f"{found.speed_up:.2f}", f"{found.efficiency:.0%}"
        rows.append((degrees.processes, *seconds, f"{steps * found.mean:.0f}", *gains))
    return table(f"{titles} | efficiency", rows)


def report(
    config: Config, model: Architecture, plans: Sequence[Degrees], rates: Sequence[Rates], command: str
) -> str:
    """The whole Markdown file."""
    sizes, grid = config.generation, plan.token_grid(config, model)
    density = radial_mask(grid, plan.radial_config(config)).density
    lines = [
        f"Predicted, not measured: `{command}`",
        "",
        f"# {config.model.path}, {sizes.height}x{sizes.width}, {sizes.num_frames} frames on several GPUs",
        "",
        f"{grid.video_tokens} video tokens and {grid.text} of text, {model.heads} heads, density "
        f"{density:.4f}, {len(plan.dense_steps(config))} of {sizes.steps} steps dense, {config.model.dtype}.",
        "",
        "## Of each GPU a step",
        *share_table(config, model, plans),
    ]
    for rate in rates:
        speeds = f"{rate.linear / 1e12:g} TFLOP/s in linear layers, {rate.attention / 1e12:g} in attention"
        lines += ["", f"## {speeds}, {rate.bandwidth / 1e9:g} GB/s sent by a GPU"]
        lines += time_table(config, model, plans, rate)
    return "\n".join([*lines, "", LEFT_OUT, ""])


def _parser() -> OneLineParser:
    parser = OneLineParser(prog=COMMAND, description="Predict the cost of a run on several GPUs.")
    parser.add_argument("words", nargs="+", metavar="CONFIG key=value", help="as for generation")
    parser.add_argument("--gpus", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tflops", type=positive_number, required=True, help="sustained by a GPU")
    parser.add_argument("--attention-tflops", type=positive_number, help="in attention, if other")
    parser.add_argument("--bandwidth", type=positive_number, nargs="+", required=True, help="GB/s of a GPU")
    parser.add_argument("--out", type=Path, help="Markdown file; without it the tables are printed")
    return parser


def _read(words: Sequence[str]) -> tuple[Config, Architecture]:
    """Raises UsageError for a configuration that no run takes, or with degrees of its own."""
    config = read_config(words[0], list(words[1:]))
    check_values(config)
    for name, value in vars(config.parallel).items():
        if value not in (None, 1):
            raise UsageError(f"parallel.{name}: got {value}, allowed: null; --gpus decides here")
    model = read_architecture(resolve_model(config))
    check_sizes(config, model)
    plan.solved_config(config, model)
    return config, model


def main(argv: list[str] | None = None) -> None:
    """Prints or writes the tables; bad input is one line and exit code 2."""
    argv, parser = sys.argv[1:] if argv is None else argv, _parser()
    args = parser.parse_args(argv)
    attention = 1e12 * (args.attention_tflops or args.tflops)
    rates = [Rates(1e12 * args.tflops, attention, 1e9 * bandwidth) for bandwidth in args.bandwidth]
    try:
        config, model = _read(args.words)
        plans = [plan_degrees(config, model, gpus, prompts=gpus) for gpus in args.gpus]
        text = report(config, model, plans, rates, f"{COMMAND} {shlex.join(argv)}")
        if args.out is not None:
            args.out.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
    except (UsageError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
