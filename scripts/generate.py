"""Makes videos of prompts: `python -m scripts.generate [CONFIG.yaml] [key=value ...] [--dry-run] [--help]`.

Exit codes: 0 done; 1 some prompts of a prompt file failed, the others are done; 2 stopped, one line on stderr
says why; 130 interrupted.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.run.command_line import FULL_PRESET, choose_config, parse
from scripts.run.config import help_text, read_config
from scripts.run.errors import DiskFullError, GenerationError, UsageError
from scripts.run.processes import end_all, first_to_speak, interrupted, no_reader, prepare, processes, rank

if TYPE_CHECKING:
    from scripts.run.plan import RunPlan
    from scripts.run.sampler import Sampler


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    prepare()
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (UsageError, GenerationError) as error:
        if rank() != 0:
            end_all(error)
        if first_to_speak():
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return no_reader()
    except KeyboardInterrupt:
        return interrupted("the files that were written are whole")


def run(argv: list[str]) -> int:
    """Prints the help, plans the run and prints the plan, or generates."""
    command = parse(argv)
    if command.help:
        print(help_text())
        return 0
    if processes() > 1 and command.config_file is None:
        raise UsageError(
            f"several processes need a configuration by name; name one, such as {FULL_PRESET}, or run a "
            "scripts/dist_*.sh, which chooses one"
        )
    config_file, overrides, reason = choose_config(command)
    config = read_config(config_file, overrides)
    print(f"config: {config_file} ({reason})", flush=True)
    from scripts.run.describe import describe_plan, describe_start  # imports torch, which --help must not
    from scripts.run.plan import make_plan

    plan = make_plan(config, processes=processes(), dry_run=command.dry_run)
    if command.dry_run:
        print(describe_plan(plan))
        return 0
    for line in describe_start(plan):
        print(line, flush=True)
    return generate(plan)


def generate(plan: "RunPlan") -> int:
    """Makes the videos of all prompts; with a prompt file, skips videos that are there already."""
    from scripts.run.outputs import resolved, video_path, writable_folder
    from scripts.run.process_groups import process_groups
    from scripts.run.sampler import Sampler

    config, from_file = plan.config, plan.config.generation.prompt_file is not None
    paths = {number: video_path(config, prompt, number) for number, prompt in plan.prompts.items()}
    missing = [n for n in plan.prompts if not (from_file and is_there(plan, n, paths[n]))]
    if from_file:
        print(f"{len(missing)} of {len(plan.prompts)} videos to make", flush=True)
    with process_groups(plan.degrees, plan.device) as groups:
        groups.compare([resolved(config, ""), plan.prompts, plan.inputs.files])
        mine = groups.agree(missing)[groups.share :: plan.degrees.data]
        sampler = Sampler(plan, groups)
        with writable_folder(config, from_file) if groups.leads else nullcontext():
            pipeline = sampler.load() if mine else None
            if from_file:
                return generate_missing(sampler, pipeline, {number: paths[number] for number in mine})
            make_one(sampler, pipeline, plan.prompts[0], paths[0])
            return 0


def generate_missing(sampler: "Sampler", pipeline: Any, paths: dict[int, Path]) -> int:
    """Makes the videos of these lines of the prompt file; returns 1 if any failed, else 0.

    Only a full disk stops the rest. With several processes any failure ends them all: the others would wait
    for the one that failed.
    """
    failures: dict[int, str] = {}
    full = False
    for number, path in paths.items():
        if full:
            failures[number] = "not tried, the disk is full; make room, then run the same command to resume"
            continue
        prompt = sampler.plan.prompts[number]
        print(f"line {number}: {prompt}", flush=True)
        try:
            make_one(sampler, pipeline, prompt, path)
        except (UsageError, GenerationError) as error:
            if sampler.plan.degrees.processes > 1:
                raise type(error)(f"line {number}: {error}") from error
            failures[number] = str(error)  # the exception would hold its frames' tensors
            full = isinstance(error, DiskFullError)
    for number, error in failures.items():
        print(f"error: line {number}: {error}", file=sys.stderr)
    return 1 if failures else 0


def make_one(sampler: "Sampler", pipeline: Any, prompt: str, path: Path) -> None:
    """Makes one video; the process that leads writes it and prints its times."""
    from scripts.run.describe import describe_video

    record = sampler.make_video(pipeline, prompt, path)
    sampler.groups.wait()
    if record is not None:
        print("\n".join(describe_video(record, path)), flush=True)


def is_there(plan: "RunPlan", number: int, path: Path) -> bool:
    """Returns whether the video was made with these settings; prints that, or which settings differ."""
    from scripts.run.outputs import finished

    done, changed = finished(path, plan.config, plan.prompts[number], plan.inputs.files)
    if done:
        print(f"{path} is there already")
    elif changed:
        print(f"{path} was made with other settings ({', '.join(changed)}): made again")
    return done


if __name__ == "__main__":
    sys.exit(main())
