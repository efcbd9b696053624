"""What a denoising step on several GPUs will cost: bytes, operations, seconds and memory, all predicted.

`python -m scripts.parallel_cost CONFIG [key=value ...] --tflops T --bandwidth GB/s [GB/s ...]` prints tables.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from radial_attn import radial_mask
from radial_attn.models.parallel.groups import Degrees
from scripts.benchmarks.report import table
from scripts.run import plan
from scripts.run.config import Config, read_config
from scripts.run.errors import OneLineParser, UsageError, positive, positive_number
from scripts.run.hub_models import read_model_info
from scripts.run.model_info import ModelInfo
from scripts.run.parallel import plan_degrees
from scripts.run.parallel_work import COMMAND, Rates, exchange, predict, rank_memory, work
from scripts.run.validate import check_sizes, check_values, resolve_model

LEFT_OUT = """Left out: kernels that run at another rate on fewer heads or tokens, launch latencies, overlap
of compute and exchange, the copies around an exchange, what each process does once a step outside the blocks
(embeddings), text encoder and VAE. Repeated is what exceeds an equal part: rows of text, filled-up tokens.
Waiting is how many more blocks than the mean the busiest of a ring keeps at each of its steps, for which all
wait. Weights stay whole on each GPU, and each process first reads all of them into host memory; activations
are those of the stage that needs the most, a block or decoding, without what arrives in a ring."""


def _above_one(degrees: Degrees) -> str:
    return ", ".join(sorted(f"{name} {n}" for name, n in vars(degrees).items() if n > 1)) or "1"


def share_table(config: Config, model: ModelInfo, plans: Sequence[Degrees]) -> list[str]:
    """Markdown of what holds at any rate: bytes, operations, kept blocks and memory of a process."""
    titles = (
        "GPUs | degrees | all-to-all GB | ring GB | text MB | token gather GB | guidance MB | "
        "dense step PFLOP | radial step PFLOP | repeated TFLOP | kept blocks a layer | waiting | "
        "weights | activations"
    )
    rows = []
    for degrees in plans:
        sent, todo = exchange(config, model, degrees), work(config, model, degrees)
        sizes = sent.streams / 1e9, sent.ring / 1e9, sent.text / 1e6, sent.tokens / 1e9, sent.guidance / 1e6
        flops = (todo.other + todo.dense) / 1e15, (todo.other + todo.radial) / 1e15, todo.repeated / 1e12
        need = rank_memory(config, model, degrees)
        memory = plan.gib(need.weights), plan.gib(need.activations)
        cells = (
            *(f"{x:.2f}" for x in sizes),
            *(f"{x:.3f}" for x in flops),
            todo.kept_blocks,
            f"{todo.waiting:.3f}",
            *memory,
        )
        rows.append((degrees.processes, _above_one(degrees), *cells))
    return table(titles, rows)


def time_table(config: Config, model: ModelInfo, plans: Sequence[Degrees], rates: Rates) -> list[str]:
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
    config: Config, model: ModelInfo, plans: Sequence[Degrees], rates: Sequence[Rates], command: str
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
    parser.add_argument(
        "--prompts", type=positive, help="at most this many at a time (default: as many as GPUs)"
    )
    parser.add_argument("--tflops", type=positive_number, required=True, help="sustained by a GPU")
    parser.add_argument("--attention-tflops", type=positive_number, help="in attention, if other")
    parser.add_argument("--bandwidth", type=positive_number, nargs="+", required=True, help="GB/s of a GPU")
    parser.add_argument("--out", type=Path, help="Markdown file; without it the tables are printed")
    return parser


def _read(words: Sequence[str]) -> tuple[Config, ModelInfo]:
    """Raises UsageError for a configuration that no run takes, or with degrees of its own."""
    config = read_config(words[0], list(words[1:]))
    check_values(config)
    for name, value in vars(config.parallel).items():
        if value not in (None, 1):
            raise UsageError(f"parallel.{name}: got {value}, allowed: null; --gpus decides here")
    model = read_model_info(resolve_model(config))
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
        plans = [plan_degrees(config, model, gpus, args.prompts or gpus) for gpus in args.gpus]
        text = report(config, model, plans, rates, f"{COMMAND} {shlex.join(argv)}")
        if args.out is not None:
            args.out.write_text(text, encoding="utf-8")
        else:
            print(text, end="")
    except (UsageError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
