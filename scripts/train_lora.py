"""LoRA training on longer video: `python -m scripts.train_lora CONFIG [key=value ...] [--dry-run] [--help]`.

On latents of scripts/prepare_latents.sh, with radial attention forward and backward. A run that was stopped,
however, goes on from its last checkpoint by the same command, to the same losses. Exit codes: 0 done; 2
stopped, one line on stderr says why; 130 interrupted.
"""

import sys
import time

import torch
from tqdm import tqdm

from models.adapter import FILE
from scripts.errors import GenerationError, UsageError, one_line
from scripts.lora.checkpoint import Checkpoints, Log
from scripts.lora.command import parse
from scripts.lora.run import Run, flow_loss, generator, learning_rate, noise_levels
from scripts.lora.state import keep, restore, save_best
from scripts.ranks import end_all, interrupted, no_reader, prepare, processes
from scripts.shortage import is_out_of_memory


def train(run: Run, checkpoints: Checkpoints) -> None:
    """All steps that are left; the adapter of the last one stands in the run's folder."""
    from scripts.lora.validation import validate

    config, main = run.config, run.accelerator.is_main_process
    first = restore(run, checkpoints)
    log = Log(checkpoints.folder, first) if main else None
    bar = tqdm(range(first, config.train.steps), initial=first, total=config.train.steps, disable=not main)
    for step in bar:
        values = train_step(run, step)
        done = step + 1
        if config.validation.every and (done % config.validation.every == 0 or done == config.train.steps):
            values |= validate(run, checkpoints.folder, done)
            save_best(run, checkpoints.folder, values["validation_loss"], done)
        if log:
            log.write(done, values)
            bar.set_postfix_str(progress(values), refresh=False)
        if done % config.train.save_every == 0 or done == config.train.steps:
            keep(run, checkpoints, done)
    if log:
        log.close()


def train_step(run: Run, step: int) -> dict[str, float]:
    """One update; its loss, gradient norm, learning rate, seconds and tokens a second.

    A loss or gradient that is not finite changes nothing and is counted; more than `train.most_skipped` such
    steps in a row end the run with GenerationError.
    """
    start, train = time.perf_counter(), run.config.train
    rate = learning_rate(run.config, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    losses, tokens, finite = [], 0, True
    for part in range(train.accumulate):
        last = part + 1 == train.accumulate
        with run.waiting(last):
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
        update_average(run)
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
    """Loss of one batch, and its tokens.

    What is drawn follows from the number of the batch alone: two processes draw what one does that
    accumulates two.
    """
    train = run.config.train
    number = (step * train.accumulate + part) * run.world + run.place
    indices = run.sampler.batch_at(number)
    random = generator(train.seed, number)
    torch.manual_seed(random.initial_seed())  # of the adapter's dropout
    sigma = noise_levels(len(indices), random, kind=train.timesteps, shift=train.flow_shift, span=run.span())
    loss = flow_loss(run, run.transformer, indices, sigma, random=random, drop=train.caption_dropout)
    return loss, run.tokens(indices)


def update_average(run: Run) -> None:
    """Exponential mean of the adapter's parameters, where one is kept."""
    if run.average is None:
        return
    with torch.no_grad():
        for name, value in run.trained.items():
            run.average[name].lerp_(value.detach(), 1 - run.config.train.ema)


def count_skipped(run: Run, finite: bool) -> None:
    """GenerationError after `train.most_skipped` steps in a row whose numbers were not finite."""
    run.skipped, run.in_a_row = run.skipped + (not finite), 0 if finite else run.in_a_row + 1
    if run.in_a_row > run.config.train.most_skipped:
        raise GenerationError(
            f"loss or gradient not finite in {run.in_a_row} steps in a row (train.most_skipped="
            f"{run.config.train.most_skipped}); the last checkpoint is as it was"
        )


def progress(values: dict[str, float]) -> str:
    """What the progress bar says beside the time that is left."""
    skipped = f", {values['skipped']:.0f} skipped" if values["skipped"] else ""
    return f"loss {values['loss']:.4f}, {values['tokens_per_second']:.0f} tokens/s{skipped}"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    prepare()
    try:
        return carry_out(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        return no_reader()
    except KeyboardInterrupt:
        return interrupted("the same command goes on from the last checkpoint")
    except Exception as error:
        if processes() > 1:  # whatever it is, the others must not wait for this process
            end_all(error if isinstance(error, UsageError) else GenerationError(as_line(error) or error))
        line = as_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2


def as_line(error: Exception) -> str | None:
    """What went wrong, in one line; None for what is no user's fault."""
    if is_out_of_memory(error):
        return f"out of memory while training ({one_line(error)}); the last checkpoint is whole"
    if isinstance(error, OSError):
        return f"output.path: cannot write {error.filename} ({error.strerror}); the last checkpoint is whole"
    return " ".join(str(error).split()) if isinstance(error, UsageError | GenerationError) else None


def carry_out(argv: list[str]) -> int:
    """Prints help or plan, or trains."""
    command = parse(argv)
    if command.text is not None:
        print(command.text)
        return 0
    from scripts.lora.setup import prepared

    with prepared(command.config) as (run, checkpoints):
        print("\n".join(announced(run)), flush=True)
        train(run, checkpoints)
        print(f"adapter    {checkpoints.folder / FILE}", flush=True)
    return 0


def announced(run: Run) -> list[str]:
    """What begins: samples, adapter, processes."""
    buckets = {bucket: len(members) for bucket, members in run.sampler.buckets.items()}
    sizes = ", ".join(f"{count} of {'x'.join(map(str, bucket))}" for bucket, count in buckets.items())
    left = len(run.store.samples) - sum(buckets.values()) - len(run.held_out)
    numbers = sum(value.numel() for value in run.trained.values())
    weights = "" if run.config.parallel.shard == "none" else "; all share the model's weights"
    return [
        f"data       {sizes} (latent frames x rows x columns)",
        f"           {len(run.held_out)} held out, {left} of other sizes left out",
        f"adapter    {numbers:,} parameters, rank {run.config.lora.rank}",
        f"processes  {run.accelerator.num_processes}, {run.world} with videos of their own{weights}",
    ]


if __name__ == "__main__":
    sys.exit(main())
