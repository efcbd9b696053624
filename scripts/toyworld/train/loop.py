"""A training loop that can be stopped at any moment: atomic checkpoints, exact continuation."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scripts.run.files import replacing


@dataclass(frozen=True)
class Stage:
    """One training loop: `loss(step)` over the parameters of `model`."""

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    steps: int
    rate: float
    ema: float = 0.0
    matrices: tuple[str, ...] = ()  # Muon trains the matrices whose names begin so; none: AdamW trains all
    decay: float = 1.0  # share of the steps, the last ones, over which the rate falls


def learning_rate(stage: Stage, step: int) -> float:
    """Warm-up over 100 steps; in the last share `decay` of the steps a cosine to 1 % of the rate."""
    done = max(0.0, 1 - (1 - step / stage.steps) / stage.decay)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return stage.rate * min(1, (step + 1) / 100) * (0.01 + 0.99 * cosine)


def build_optimizers(stage: Stage) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon beside it where the stage names matrices; both take steps of the same size."""
    named = [(name, p) for name, p in stage.model.named_parameters() if p.requires_grad]
    chosen = [p for name, p in named if p.ndim == 2 and name.startswith(stage.matrices)]
    taken = {id(p) for p in chosen}
    rest = [p for _, p in named if id(p) not in taken]
    optimizers = [torch.optim.AdamW(rest, stage.rate, betas=(0.9, 0.99), weight_decay=0.01)]
    if chosen:
        optimizers.append(
            torch.optim.Muon(chosen, stage.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def save_checkpoint(path: Path, state: dict) -> None:
    """Atomic: the old checkpoint stays until the new one is whole."""
    with replacing(path) as part:
        torch.save(state, part)


def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Exponential moving average of the weights, shorter while few steps are done."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for target, source in zip(average.parameters(), model.parameters(), strict=True):
            target.lerp_(source, 1 - decay)


def run_stage(stage: Stage, work: Path, device: str, save_every: int) -> nn.Module:
    """Trains, continuing from `work/<name>.pt` where it exists; returns the averaged model."""
    path = work / f"{stage.name}.pt"
    optimizers = build_optimizers(stage)
    average, first = copy.deepcopy(stage.model), 0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        stage.model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first = state["step"]
    bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=stage.name, mininterval=1)
    smooth = None
    for step in bar:
        smooth = train_step(stage, optimizers, average, step, smooth)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == stage.steps:
            save_checkpoint(path, checkpoint(stage, average, optimizers, step + 1))
            log(work / "log.txt", f"{stage.name} {step + 1} {smooth:.5f} {time.time():.0f}")
    return average


def checkpoint(stage: Stage, average: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> dict:
    """All that a run needs to continue."""
    return {
        "model": stage.model.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }


def train_step(
    stage: Stage,
    optimizers: list[torch.optim.Optimizer],
    average: nn.Module,
    step: int,
    smooth: float | None,
) -> float:
    """One update; returns the running mean of the loss."""
    loss = stage.loss(step)
    stage.model.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        optimizer.step()
    update_average(average, stage.model, stage.ema, step)
    return loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()


def log(path: Path, line: str) -> None:
    """Appends to the loss log."""
    with open(path, "a") as file:
        file.write(line + "\n")
