"""Training and inference steps at growing length, dense and radial: `python -m scripts.length_timing`.

Random weights and inputs, LoRA on the self-attention. Without --model the bundled Wan's transformer,
whole, on grids and lengths that a CPU takes; with --model wan-14b or hunyuan the layers of that model on a
GPU (`scripts/length/layers.py` says how). Dense and radial take turns, medians are reported.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from radial_attn import radial_mask
from radial_attn.masks.draw import save_figure
from radial_attn.models import apply_radial_attention
from radial_attn.models.training.adapter import add_adapter
from radial_attn.models.training.flow import predict_velocity
from scripts.benchmarks.timing import medians_in_turn
from scripts.length.layers import MODELS, Layers, Setting, layers_report
from scripts.lora.config import SCHEMA as TRAINING
from scripts.lora.plan import as_generation, training_flops
from scripts.run.config import ROOT, Config, read_config
from scripts.run.errors import OneLineParser, UsageError, exit_code, positive
from scripts.run.files import write_text
from scripts.run.hub_models import read_model_info
from scripts.run.model_info import ModelInfo
from scripts.run.plan import attention_flops, attention_options, other_flops, solved_config, token_grid
from scripts.run.system import hardware, pairs, versions
from scripts.run.validate import check_sizes, check_values, resolve_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESET, TRAIN_PRESET = "configs/wan_tiny_4x.yaml", "configs/train/wan_tiny_4x.yaml"
SIDES, FRAMES = (64, 128), (33, 65, 129, 257)
GOALS = {(64, 129): 1.5, (128, 129): 3.0}  # pixels a side and frames: how many times faster than dense
KINDS = ("training", "inference")
FEWEST = 2  # steps that the schema takes
NEEDED = {"pattern": "radial", "dense_steps": 0, "dense_last_steps": 0}  # one step is timed, a radial one


@dataclass(frozen=True)
class Point:
    """One size.

    Attributes:
        seconds: of a step, by kind: dense, radial.
        bounds: by kind: how many times fewer operations with the mask than dense.
    """

    side: int
    frames: int
    tokens: int
    density: float
    seconds: dict[str, tuple[float, float]]
    bounds: dict[str, float]

    def ratio(self, kind: str) -> float:
        dense, radial = self.seconds[kind]
        return dense / radial


def measure(side: int, frames: int, *, rank: int, repeats: int, device: str, words: list[str]) -> Point:
    """Both kinds of step of the bundled architecture at one size; UsageError for a size it does not take."""
    sizes = [f"generation.{axis}={side}" for axis in ("height", "width")]
    sizes += [f"generation.num_frames={frames}", "generation.guidance_scale=1", f"generation.steps={FEWEST}"]
    config = read_config(PRESET, ["attention.dense_steps=0", "model.loras=null", *words, *sizes])
    check_values(config)
    for name, needed in NEEDED.items():
        if (got := getattr(config.attention, name)) != needed:
            raise UsageError(f"attention.{name}: got {got!r}, allowed here: {needed}")
    path = resolve_model(config)
    model = read_model_info(path)
    check_sizes(config, model)
    calls = {"training": training_call, "inference": inference_call}
    seconds = {}
    for kind, build in calls.items():
        call = build(path, config, model, rank, device)
        patterns = {"dense": lambda *_, **__: nullcontext(), "radial": apply_radial_attention}
        runs = {name: partial(call, apply) for name, apply in patterns.items()}
        seconds[kind] = tuple(medians_in_turn(runs, repeats, device).values())
    grid = token_grid(config, model)
    density = radial_mask(grid, solved_config(config, model)).density
    return Point(side, frames, grid.tokens, density, seconds, bounds(config, model, density, rank))


def training_call(
    path: str, config: Config, model: ModelInfo, rank: int, device: str
) -> Callable[[Callable], None]:
    """Forward, backward and update of an adapter, with the attention that `apply` gives."""
    transformer, noisy, text = random_model(path, config, model, device)
    trained = list(add_adapter(transformer, rank=rank, alpha=rank).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    transformer.train()
    sigma = torch.full((len(noisy),), 0.5, device=device)

    def step(apply: Callable) -> None:
        with apply(transformer, **attention_options(config)):
            velocity = predict_velocity(transformer, config.model.family, noisy, sigma, text)
            (velocity - noisy).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference_call(
    path: str, config: Config, model: ModelInfo, rank: int, device: str
) -> Callable[[Callable], None]:
    """One call of the transformer without gradients; a fused adapter costs nothing in it."""
    transformer, noisy, text = random_model(path, config, model, device)
    transformer.eval()
    sigma = torch.full((len(noisy),), 0.5, device=device)

    def step(apply: Callable) -> None:
        with torch.no_grad(), apply(transformer, **attention_options(config)):
            predict_velocity(transformer, config.model.family, noisy, sigma, text)

    return step


def random_model(
    path: str, config: Config, model: ModelInfo, device: str
) -> tuple[torch.nn.Module, Tensor, dict[str, Tensor]]:
    """The transformer of the folder `path` with random weights, latents and text for it."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    options = WanTransformer3DModel.load_config(path, subfolder="transformer")
    transformer = WanTransformer3DModel.from_config(options).to(device)
    sizes = config.generation
    side = [size // model.vae_pixels for size in (sizes.height, sizes.width)]
    frames = (sizes.num_frames - 1) // model.vae_frames + 1
    noisy = torch.randn(1, transformer.config.in_channels, frames, *side, device=device)
    text = torch.randn(1, model.text_tokens, transformer.config.text_dim, device=device)
    return transformer, noisy, {"prompt_embeds": text}


def bounds(config: Config, model: ModelInfo, density: float, rank: int) -> dict[str, float]:
    """How many times fewer operations a step has with the mask than dense, by kind."""
    sizes = config.generation
    words = [f"lora.rank={rank}", f"data.sizes={sizes.num_frames}x{sizes.height}x{sizes.width}"]
    training = TRAINING.read(TRAIN_PRESET, words)
    run = replace(as_generation(training, training.data.sizes[0]), attention=config.attention)
    operations = {
        "training": training_flops(training, model, run, density),
        "inference": [*attention_flops(config, model, density), other_flops(config, model)],
    }
    return {kind: (dense + other) / (sparse + other) for kind, (dense, sparse, other) in operations.items()}


def report(command: str, points: list[Point], picture: str, device: str, about: str) -> str:
    """The Markdown file."""
    head = ["pixels", "frames", "tokens", "density"]
    for kind in KINDS:
        head += [f"{kind}, dense, s", "radial, s", "faster", "by operations"]
    machine = pairs(versions(), hardware(device))
    text = [
        "# Step times at growing length",
        "",
        f"    {command}",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *map(row, points),
        "",
        about,
        "",
        *goal_lines(points),
        f"![how many times faster]({picture})",
        "",
        machine,
        "",
    ]
    return "\n".join(text)


def row(point: Point) -> str:
    """One line of the table."""
    cells = [f"{point.side} x {point.side}", point.frames, point.tokens, f"{point.density:.3f}"]
    for kind in KINDS:
        dense, radial = point.seconds[kind]
        cells += [f"{dense:.3f}", f"{radial:.3f}", f"{point.ratio(kind):.2f}x", f"{point.bounds[kind]:.2f}x"]
    return "| " + " | ".join(map(str, cells)) + " |"


def goal_lines(points: list[Point]) -> list[str]:
    """What is wanted of the sizes that have a goal, and whether it is reached."""
    lines = []
    for point in points:
        wanted = GOALS.get((point.side, point.frames))
        for kind in KINDS if wanted else ():
            found, bound = point.ratio(kind), point.bounds[kind]
            end = "reached" if found >= wanted else f"not reached; {bound:.2f}x fewer operations in all"
            size = f"{point.side} x {point.side}, {point.frames} frames"
            lines.append(f"- {size}, {kind}: at least {wanted:g}x wanted, {found:.2f}x found, {end}")
    return [*lines, ""] if lines else []


def draw(points: list[Point]) -> "Figure":
    """How many times faster radial is, over the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, side in enumerate(sorted({point.side for point in points})):
        own = [point for point in points if point.side == side]
        for kind, style in zip(KINDS, ("-", "--"), strict=True):
            ratios = [point.ratio(kind) for point in own]
            label = f"{side} x {side}, {kind}"
            axes.plot([p.frames for p in own], ratios, style, marker="o", color=f"C{number}", label=label)
    ticks = sorted({point.frames for point in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set(xlabel="frames", ylabel="time of a dense step / time of a radial step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="length_timing", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys of attention")
    parser.add_argument("--sides", type=positive, nargs="+", help="pixels a side")
    parser.add_argument("--frames", type=positive, nargs="+", help="lengths")
    parser.add_argument("--repeats", type=positive, default=3, help="counted turns")
    parser.add_argument("--rank", type=positive, help="of the adapter: 16, with --model 128")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, help="of whose layers, on a GPU")
    parser.add_argument("--out", type=Path, help="file of the table")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device: got cuda, but torch {torch.__version__} sees no CUDA device; allowed: cpu")
    if options.model and options.device == "cpu":
        parser.error("--model: these layers need a GPU; allowed with --device cuda")
    words = [*options.words, *(["--sides"] if options.sides else [])]
    if unused := [word for word in words if options.model or not word.startswith(("attention.", "--"))]:
        parser.error(f"got {unused[0]!r}, allowed: keys of attention and --sides, and with --model neither")
    if options.model and (strange := set(options.frames or ()) - MODELS[options.model].cases.keys()):
        known = ", ".join(map(str, MODELS[options.model].cases))
        parser.error(f"--frames: got {min(strange)}, allowed with {options.model}: {known}")
    name = f"length_timing_{options.model or options.device}_{time.strftime('%Y-%m-%d')}.md"
    options.out = options.out or ROOT / "results" / name
    return options


def described(words: list[str], rank: int, repeats: int) -> str:
    """What was timed."""
    keys = f" with {' '.join(words)}" if words else ""
    return (
        f"The bundled Wan's transformer with random weights, batch 1, float32, mask of {PRESET}{keys}. A "
        f"training step is forward, backward and update of an adapter of rank {rank}, without checkpointing; "
        f"an inference step is one call of the transformer. Medians of {repeats} turns. By operations: how "
        "many times fewer they are in all, which is what the mask could gain if a kept block cost what it "
        "costs when dense."
    )


def run(options: argparse.Namespace, command: str) -> None:
    """Measures and writes."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.model:
        spec: Layers = MODELS[options.model]
        setting = Setting(options.rank or 128, options.repeats, options.device)
        text = layers_report(command, spec, options.frames or [max(spec.cases)], setting)
        write_text(options.out, text)
        print(f"written {options.out}")
        return
    fixed = {"rank": options.rank or 16, "repeats": options.repeats, "device": options.device}
    points = []
    for side in options.sides or SIDES:
        for frames in options.frames or FRAMES:
            points.append(measure(side, frames, **fixed, words=options.words))
            print(row(points[-1]), flush=True)
    picture = options.out.with_suffix(".png")
    save_figure(draw(points), picture)
    about = described(options.words, fixed["rank"], options.repeats)
    write_text(options.out, report(command, points, picture.name, options.device, about))
    print(f"written {options.out}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    command = " ".join(["python -m scripts.length_timing", *(sys.argv[1:] if argv is None else argv)])
    return exit_code(lambda: run(options, command), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
