"""Runs the training loop: steps, validation and checkpoints of one run."""

import math
import time
from contextlib import nullcontext

import torch
from tqdm import tqdm

from scripts.lora.checkpoint import Checkpoints, Log
from scripts.lora.step import Run, flow_loss, generator, learning_rate, noise_levels
from scripts.run.errors import GenerationError


def train(run: Run, checkpoints: Checkpoints) -> None:
    """Runs all remaining steps, and leaves the adapter in the run's folder."""
    from scripts.lora.validation import validate

    config, main = run.config, run.accelerator.is_main_process
    first = checkpoints.restore(run)
    log = Log(checkpoints.folder, first) if main else None
    bar = tqdm(range(first, config.train.steps), initial=first, total=config.train.steps, disable=not main)
    for step in bar:
        values = train_step(run, step)
        done = step + 1
        if config.validation.every and (done % config.validation.every == 0 or done == config.train.steps):
            values |= validate(run, checkpoints.folder, done)
            checkpoints.save_best(run, values["validation_loss"], done)
        if log:
            log.write(done, values)
            speed = f"{values['tokens_per_second']:.0f}"
            shown = {"loss": f"{values['loss']:.4f}", "tokens/s": speed, "skipped": run.skipped}
            bar.set_postfix(shown, refresh=False)
        if done % config.train.save_every == 0 or done == config.train.steps:
            checkpoints.save(run, done)
    if log:
        log.close()


def train_step(run: Run, step: int) -> dict[str, float]:
    """Makes one update; returns its loss, gradient norm, learning rate, seconds and tokens a second.

    A non-finite loss or gradient changes nothing and is counted. More than `train.most_skipped` such steps in
    a row end the run with GenerationError.
    """
    start, train = time.perf_counter(), run.config.train
    rate = learning_rate(run.config, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    losses, tokens, finite = [], 0, True
    for part in range(train.accumulate):
        is_last = part + 1 == train.accumulate  # processes share gradients then
        with nullcontext() if is_last else run.accelerator.no_sync(run.transformer):
            loss, count = sampled_loss(run, step, part)
            finite = finite and run.all_finite(loss)
            if finite:
                run.accelerator.backward(loss / train.accumulate)
        losses.append(loss.detach())
        tokens += count
    norm = torch.nn.utils.clip_grad_norm_(list(run.trained.values()), train.clip) if finite else loss.detach()
    finite = finite and run.all_finite(norm)
    if finite:
        run.optimizer.step()
        for name, mean in (run.average or {}).items():
            mean.lerp_(run.trained[name].detach(), 1 - train.ema)
    run.optimizer.zero_grad(set_to_none=True)
    count_skipped(run, finite)
    seconds = time.perf_counter() - start
    return {
        "loss": run.mean(torch.stack(losses).mean()),
        "gradient_norm": norm.item(),
        "learning_rate": rate,
        "skipped": run.skipped,
        "seconds": seconds,
        "tokens_per_second": tokens * run.world / seconds,
    }


def sampled_loss(run: Run, step: int, part: int) -> tuple[torch.Tensor, int]:
    """Returns the loss of one batch, and its tokens.

    Random numbers depend only on the number of the batch, so two processes draw the same as one process that
    accumulates two batches.
    """
    train = run.config.train
    number = (step * train.accumulate + part) * run.world + run.rank
    indices = run.sampler.batch_at(number)
    random = generator(train.seed, number)
    torch.manual_seed(random.initial_seed())  # for the adapter's dropout
    sigma = noise_levels(len(indices), random, kind=train.timesteps, shift=train.flow_shift, span=run.span())
    loss = flow_loss(run, run.transformer, indices, sigma, random=random, drop=train.caption_dropout)
    bucket = run.store.samples[indices[0]].bucket  # that of the whole batch
    sides = (size // side for size, side in zip(bucket, run.plan.model.patch, strict=True))
    return loss, len(indices) * math.prod(sides)


def count_skipped(run: Run, finite: bool) -> None:
    """Counts non-finite steps; raises GenerationError after more than `train.most_skipped` in a row."""
    run.skipped, run.in_a_row = run.skipped + (not finite), 0 if finite else run.in_a_row + 1
    if run.in_a_row > run.config.train.most_skipped:
        raise GenerationError(
            f"loss or gradient not finite in {run.in_a_row} steps in a row (train.most_skipped="
            f"{run.config.train.most_skipped}); the last checkpoint is unchanged"
        )
