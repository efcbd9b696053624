"""Computes a step of LoRA training: noise levels, loss and learning rate of a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from radial_attn.models.training.flow import Text, predict_velocity, stack_text
from scripts.lora.config import LoraTrainConfig
from scripts.lora.latents import BucketSampler, LatentStore
from scripts.lora.plan import TrainPlan


@dataclass
class Run:
    """Holds all that a step needs.

    Attributes:
        transformer: as `accelerate` wraps it; plain: the same without its wrapper.
        trained: the adapter's parameters by name; average: their exponential mean, None without one.
        held_out: the samples that only validation sees.
        rank, world: the number of this process among those with different samples, and their count.
        skipped, in_a_row: counts of steps with non-finite numbers, in all and in a row up to now.
        best: the lowest validation loss so far.
        leads: whether this process writes for all that share its videos.
        boundary: the lowest noise level of the first of two experts; None if there is one expert.
    """

    plan: TrainPlan
    accelerator: Accelerator
    transformer: torch.nn.Module
    plain: torch.nn.Module
    trained: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    store: LatentStore
    sampler: BucketSampler
    held_out: list[int]
    rank: int = 0
    world: int = 1
    average: dict[str, Tensor] | None = None
    skipped: int = 0
    in_a_row: int = 0
    best: float = math.inf
    boundary: float | None = None
    leads: bool = True

    @property
    def config(self) -> LoraTrainConfig:
        return self.plan.config

    def span(self) -> tuple[float, float]:
        """Returns the range of noise levels of the trained transformer: all, or one expert's."""
        if self.boundary is None:
            return 0.0, 1.0
        return (self.boundary, 1.0) if self.config.model.expert == 1 else (0.0, self.boundary)

    def placed(self, texts: Sequence[Text]) -> Text:
        """Moves the prompts of a batch to the device, in the transformer's dtype."""
        device, dtype = self.accelerator.device, self.plain.dtype
        stacked = stack_text(texts).items()
        return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in stacked}

    def set_adapter(self, values: Mapping[str, Tensor]) -> None:
        """Sets the adapter's parameters by name."""
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(values[name])

    def all_finite(self, value: Tensor) -> bool:
        """Returns whether a number is finite in every process."""
        bad = (~torch.isfinite(value.detach())).float().to(self.accelerator.device)
        return self.accelerator.reduce(bad, "sum").item() == 0

    def mean(self, value: Tensor) -> float:
        """Returns the mean of a number over all processes."""
        return self.accelerator.reduce(value.detach(), "mean").item()


def noise_levels(
    count: int, random: torch.Generator, *, kind: str, shift: float, span: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Draws noise levels sigma, float32 `[count]`.

    Args:
        kind: "uniform" or "logit_normal", the distribution before the shift.
        shift: sigma = shift t / (1 + (shift - 1) t), towards noise if above 1.
        span: the range of sigma within 0 ... 1, for one of two experts.
    """
    least, most = (_quantile(edge / (shift - (shift - 1) * edge), kind) for edge in span)
    share = least + (most - least) * torch.rand(count, generator=random)
    level = share if kind == "uniform" else torch.special.ndtri(share.clamp(1e-5, 1 - 1e-5)).sigmoid()
    return shift * level / (1 + (shift - 1) * level)


def _quantile(level: float, kind: str) -> float:
    """Returns the share of the distribution below a level."""
    if kind == "uniform" or level in (0.0, 1.0):
        return level
    return torch.special.ndtr(torch.logit(torch.tensor(level))).item()


def generator(seed: int, *numbers: int) -> torch.Generator:
    """Makes a generator whose random numbers depend on the seed and these numbers alone."""
    mixed = seed
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**62
    return torch.Generator().manual_seed(mixed)


def flow_loss(
    run: Run,
    transformer: torch.nn.Module,
    indices: list[int],
    sigma: Tensor,
    *,
    random: torch.Generator,
    drop: float,
) -> Tensor:
    """Returns the mean squared error of the transformer's velocity for these samples at noise levels `[B]`.

    `drop`: the probability that the empty caption replaces a caption, which guidance needs.
    """
    loaded = [run.store.load(index) for index in indices]
    dropped = torch.rand(len(loaded), generator=random) < drop
    pairs = zip(loaded, dropped.tolist(), strict=True)
    texts = [run.store.empty_text if gone else text for (_, text), gone in pairs]
    video = torch.stack([latents.float() for latents, _ in loaded])
    noise = torch.randn(video.shape, generator=random)
    mix = sigma.view(-1, 1, 1, 1, 1)
    noisy, target = (1 - mix) * video + mix * noise, noise - video
    device, dtype = run.accelerator.device, run.plain.dtype
    family, guidance = run.config.model.family, run.config.train.guidance
    inputs = noisy.to(device, dtype), sigma.to(device), run.placed(texts)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        velocity = predict_velocity(transformer, family, *inputs, guidance=guidance)
    return (velocity.float() - target.to(device)).square().mean()


def learning_rate(config: LoraTrainConfig, step: int) -> float:
    """Returns the learning rate of step `step`, from 0: warm-up, then constant or a cosine to zero."""
    train = config.train
    warm = min(1.0, (step + 1) / max(1, train.warmup))
    if train.schedule == "constant":
        return train.rate * warm
    done = max(0, step - train.warmup) / max(1, train.steps - train.warmup)
    return train.rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
