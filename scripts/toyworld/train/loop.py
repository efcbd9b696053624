"""Runs a training loop that can be stopped at any moment and resumes exactly, from atomic checkpoints."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scripts.run.errors import one_line
from scripts.run.files import replacing
from scripts.run.results import read_tensors


@dataclass(frozen=True)
class Stage:
    """Describes one training loop: `loss(step)` over the parameters of `model`."""

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]
    steps: int
    rate: float
    ema: float = 0.0  # decay of the averaged weights
    matrices: tuple[str, ...] = ()  # beginnings of names of matrices that Muon trains; AdamW trains the rest
    decay: float = 1.0  # last share of the steps, over which the rate falls


def learning_rate(stage: Stage, step: int) -> float:
    """Returns the rate: warm-up over 100 steps, and a cosine to 1 % over the last share `decay`."""
    done = max(0.0, 1 - (1 - step / stage.steps) / stage.decay)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return stage.rate * min(1, (step + 1) / 100) * (0.01 + 0.99 * cosine)


def build_optimizers(stage: Stage) -> list[torch.optim.Optimizer]:
    """Makes AdamW, and Muon if the stage names matrices; both take steps of the same size."""
    adamw, muon = [], []
    for name, p in stage.model.named_parameters():
        if p.requires_grad:
            (muon if p.ndim == 2 and name.startswith(stage.matrices) else adamw).append(p)
    optimizers = [torch.optim.AdamW(adamw, stage.rate, betas=(0.9, 0.99), weight_decay=0.01)]
    if muon:
        same_size = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(muon, stage.rate, **same_size))
    return optimizers


def run_stage(stage: Stage, work: Path, device: str, save_every: int) -> nn.Module:
    """Trains, from the checkpoint `work/<name>.pt` on if there is one; returns the averaged model."""
    path = work / f"{stage.name}.pt"
    optimizers = build_optimizers(stage)
    average, first = copy.deepcopy(stage.model), 0
    if path.exists():
        state = _read(path, device)
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
            state = {"model": stage.model.state_dict(), "average": average.state_dict(), "step": step + 1}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            with replacing(path) as part:
                torch.save(state, part)
            with open(work / "log.txt", "a") as log:
                log.write(f"{stage.name} {step + 1} {smooth:.5f} {time.time():.0f}\n")
    return average


def _read(path: Path, device: str) -> dict[str, Any]:
    try:
        state = read_tensors(path, device)
        if {"model", "average", "optimizers", "step"} <= state.keys():
            return state
        raise ValueError("it is no checkpoint")
    except ValueError as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({one_line(error)}); remove it to train this stage from its "
            "beginning"
        ) from error


def train_step(
    stage: Stage, optimizers: list[torch.optim.Optimizer], average: nn.Module, step: int, smooth: float | None
) -> float:
    """Makes one update; returns the running mean of the loss.

    The average of the weights is exponential, and shorter while few steps are done.
    """
    loss = stage.loss(step)
    stage.model.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        optimizer.step()
    decay = min(stage.ema, (1 + step) / (10 + step))
    with torch.no_grad():
        for target, source in zip(average.parameters(), stage.model.parameters(), strict=True):
            target.lerp_(source, 1 - decay)
    return loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
