"""Times training and inference steps at growing length, dense and radial.

`bash scripts/benchmark.sh --length`: the bundled Wan's transformer with random weights and inputs, and a LoRA
on its self-attention in training. Dense and radial take turns, medians are reported.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from radial_attn.models import apply_radial_attention
from radial_attn.models.training.adapter import add_adapter
from radial_attn.models.training.flow import predict_velocity
from scripts.benchmarks.timing import medians_in_turn
from scripts.lora.config import SCHEMA as TRAINING
from scripts.lora.plan import SizePlan, TrainPlan
from scripts.run.attention import attention_arguments
from scripts.run.config import read_config
from scripts.run.errors import UsageError, positive
from scripts.run.plan import RunPlan, make_plan
from scripts.run.results import document, subplots, table
from scripts.run.system import hardware, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "length_timing_{device}"
PRESET, TRAIN_PRESET = "configs/wan_tiny_4x.yaml", "configs/train/wan_tiny_4x.yaml"
SIDES, FRAMES = (64, 128), (33, 65, 129, 257)
KINDS = ("training", "inference")
FEWEST = 2  # steps that the schema takes
NEEDED = {"pattern": "radial", "dense_steps": 0, "dense_last_steps": 0}  # one step is timed, a radial one


@dataclass(frozen=True)
class Point:
    """Holds the measurements of one size.

    Attributes:
        seconds: of a dense and a radial step, by kind.
        bounds: how many times fewer operations a step has with the mask than dense, by kind.
    """

    plan: RunPlan
    seconds: dict[str, tuple[float, float]]
    bounds: dict[str, float]

    def ratio(self, kind: str) -> float:
        dense, radial = self.seconds[kind]
        return dense / radial

    def row(self) -> list[object]:
        """Returns the line of the table."""
        size, grid, mask = self.plan.size, self.plan.grid, self.plan.block_mask
        cells = [f"{size.height} x {size.width}", size.frames, grid.tokens, f"{mask.density:.3f}"]
        for kind in KINDS:
            cells += [f"{seconds:.3f}" for seconds in self.seconds[kind]]
            cells += [f"{self.ratio(kind):.2f}x", f"{self.bounds[kind]:.2f}x"]
        return cells


def plan_step(side: int, frames: int, words: list[str]) -> RunPlan:
    """Plans a step of the bundled model at one size; UsageError for keys and sizes that it does not take."""
    sizes = [f"generation.height={side}", f"generation.width={side}", f"generation.num_frames={frames}"]
    sizes += ["generation.guidance_scale=1", f"generation.steps={FEWEST}"]
    config = read_config(PRESET, ["attention.dense_steps=0", "model.loras=null", *words, *sizes])
    for name, needed in NEEDED.items():
        if (got := getattr(config.attention, name)) != needed:
            raise UsageError(f"attention.{name}: got {got!r}, must be {needed} here")
    return make_plan(config)


def measure(plan: RunPlan, *, rank: int, repeats: int, device: str) -> Point:
    """Times both kinds of step."""
    seconds = {}
    for kind in KINDS:
        call = step_call(plan, rank if kind == "training" else None, device)
        patterns = {"dense": lambda *_, **__: nullcontext(), "radial": apply_radial_attention}
        runs = {name: partial(call, apply) for name, apply in patterns.items()}
        seconds[kind] = tuple(medians_in_turn(runs, repeats, device).values())
    return Point(plan, seconds, bounds(plan, rank))


def step_call(plan: RunPlan, rank: int | None, device: str) -> Callable[[Callable], None]:
    """Returns a step with the attention that its argument applies.

    With a `rank` forward, backward and update of an adapter; else one call without gradients, in which a
    fused adapter costs nothing.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    options = WanTransformer3DModel.load_config(plan.path, subfolder="transformer")
    transformer = WanTransformer3DModel.from_config(options).to(device)
    size, model = plan.size, plan.model
    latents = model.vae_latents(size.frames), *(side // model.vae_pixels for side in size[1:])
    noisy = torch.randn(1, transformer.config.in_channels, *latents, device=device)
    text = {"prompt_embeds": torch.randn(1, model.text_tokens, transformer.config.text_dim, device=device)}
    sigma, arguments = torch.full((1,), 0.5, device=device), attention_arguments(plan.config.attention)

    trained = [] if rank is None else list(add_adapter(transformer, rank=rank, alpha=rank).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    transformer.train(bool(trained))

    def step(apply: Callable) -> None:
        with torch.set_grad_enabled(bool(trained)), apply(transformer, **arguments):
            velocity = predict_velocity(transformer, plan.config.model.family, noisy, sigma, text)
            if optimizer:
                (velocity - noisy).square().mean().backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def bounds(plan: RunPlan, rank: int) -> dict[str, float]:
    """Returns how many times fewer operations a step has with the mask than dense, by kind."""
    training = TRAINING.read(TRAIN_PRESET, [f"lora.rank={rank}"])
    training.attention = plan.config.attention
    trained = TrainPlan(training, plan.model, plan.path, plan.device, (), None)
    size = SizePlan(plan.size, plan.grid, plan.mask)
    return {"training": trained.flops(size).fewer, "inference": plan.flops.fewer}


def draw(points: list[Point]) -> "Figure":
    """Draws how many times faster radial is, over the length."""
    figure, axes = subplots((7, 4.5))
    for number, side in enumerate(sorted({point.plan.size.height for point in points})):
        line = [point for point in points if point.plan.size.height == side]
        for kind, style in zip(KINDS, ("-", "--"), strict=True):
            frames, ratios = zip(*((p.plan.size.frames, p.ratio(kind)) for p in line), strict=True)
            label = f"{side} x {side}, {kind}"
            axes.plot(frames, ratios, style, marker="o", color=f"C{number}", label=label)
    ticks = sorted({point.plan.size.frames for point in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set(xlabel="frames", ylabel="time of a dense step / time of a radial step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("words", nargs="*", metavar="attention.key=value", help="other keys of the mask")
    parser.add_argument("--sides", type=positive, nargs="+", default=SIDES, help="pixels a side")
    parser.add_argument("--frames", type=positive, nargs="+", default=FRAMES, help="lengths")
    parser.add_argument("--repeats", type=positive, default=3, help="counted turns")
    parser.add_argument("--rank", type=positive, default=16, help="of the adapter")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def measured(options: argparse.Namespace, command: str, picture: str) -> tuple[list[str], "Figure"]:
    """Measures, and returns the lines of the table and the picture."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device: got cuda, but torch {torch.__version__} sees no GPU; use --device cpu")
    for word in options.words:
        if not word.startswith("attention."):
            raise UsageError(f"got {word!r}; only keys of attention can be set")
    plans = [plan_step(side, frames, options.words) for side in options.sides for frames in options.frames]
    points = []
    for plan in plans:
        points.append(measure(plan, rank=options.rank, repeats=options.repeats, device=options.device))
        print(*points[-1].row(), sep=" | ", flush=True)
    columns = (f"{kind}, dense, s|radial, s|faster|by operations" for kind in KINDS)
    keys = f" with {' '.join(options.words)}" if options.words else ""
    data = {"command": command, "versions": versions(), "hardware": hardware(options.device)}
    meaning = f"""The bundled Wan's transformer with random weights, batch 1, float32, mask of {PRESET}{keys}.
        A training step is forward, backward and update of an adapter of rank {options.rank}, without
        checkpointing; an inference step is one call of the transformer. Medians of {options.repeats} turns.
        By operations: how many times fewer they are in all, which is what the mask could gain if a kept
        block cost what it costs when dense."""
    rows = table("|".join(["pixels|frames|tokens|density", *columns]), (point.row() for point in points))
    picture = f"![how many times faster]({picture})"
    return document(data, "Step times at growing length", rows, meaning, picture), draw(points)
