"""Trains a LoRA for longer video: `python -m scripts.train_lora CONFIG [key=value ...] [--dry-run] [--help]`.

It trains on latents of scripts/prepare_latents.sh, with radial attention forward and backward. After any stop
the same command resumes from the last checkpoint, with the same losses. Exit codes: 0 done; 2 stopped, one
line on stderr says why; 130 interrupted.
"""

import sys
from typing import TYPE_CHECKING

from scripts.lora.config import read_arguments
from scripts.run.errors import GenerationError, UsageError, one_line
from scripts.run.processes import end_all, interrupted, no_reader, prepare, processes

if TYPE_CHECKING:
    from scripts.lora.step import Run

CALL = "bash scripts/wan_lora_train.sh CONFIG.yaml [key=value ...] [--dry-run] [--help]"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    prepare()
    try:
        run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        return no_reader()
    except KeyboardInterrupt:
        return interrupted("run the same command to resume from the last checkpoint")
    except Exception as error:
        line = as_line(error)
        if processes() > 1:  # of any kind: the others must not wait for this process
            end_all(error if isinstance(error, UsageError) else GenerationError(line or error))
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def as_line(error: Exception) -> str | None:
    """Returns the error message in one line; None for an error that no user can put right."""
    from scripts.run.machine_checks import is_out_of_memory

    if is_out_of_memory(error):
        return f"out of memory while training ({one_line(error)}); the last checkpoint is whole"
    if isinstance(error, OSError):
        file = f" {error.filename}" if error.filename else ""  # a write to an open file names none
        return f"output.path: cannot write{file} ({error.strerror or error}); the last checkpoint is whole"
    return " ".join(str(error).split()) if isinstance(error, UsageError | GenerationError) else None


def run(argv: list[str]) -> None:
    """Prints help or plan, or trains."""
    arguments = read_arguments(argv, CALL)
    if arguments is None:
        return
    from radial_attn.models.training.adapter import FILE
    from scripts.lora.plan import describe_training, plan_training
    from scripts.lora.setup import prepared
    from scripts.lora.train import train

    config, dry_run = arguments
    plan = plan_training(config, dry_run=dry_run)
    if dry_run:
        print(describe_training(plan))
        return
    for warning in plan.warnings:
        print(f"note: {warning}", flush=True)
    with prepared(plan) as (run, checkpoints):
        print("\n".join(announced(run)), flush=True)
        train(run, checkpoints)
        print(f"adapter    {checkpoints.folder / FILE}", flush=True)


def announced(run: "Run") -> list[str]:
    """Returns the lines at the start: samples, adapter, processes."""
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
