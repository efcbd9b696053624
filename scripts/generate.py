"""A prompt to a video: `python -m scripts.generate [CONFIG.yaml] [key=value ...] [--dry-run] [--help]`.

Exit codes: 0 done; 1 some prompts of a prompt file failed, the others are done; 2 stopped, one line on stderr
says why; 130 interrupted.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.run.command_line import FULL_PRESET, choose_config, parse
from scripts.run.config import Config, help_text, read_config
from scripts.run.errors import DiskFullError, GenerationError, UsageError
from scripts.run.processes import end_all, first_to_speak, interrupted, no_reader, prepare, processes, rank

if TYPE_CHECKING:
    from radial_attn.models.parallel.groups import Degrees

    from scripts.run.sampler import Job


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
    """Prints the help, or reads the configuration and carries it out."""
    command = parse(argv)
    if command.help:
        print(help_text())
        return 0
    if processes() > 1 and command.config_file is None:
        raise UsageError(
            f"several processes need a configuration by name, as {FULL_PRESET}; scripts/dist_*.sh choose one"
        )
    config_file, overrides, reason = choose_config(command)
    config = read_config(config_file, overrides)
    print(f"config: {config_file} ({reason})", flush=True)
    return carry_out(config, command.dry_run)


def carry_out(config: Config, dry_run: bool) -> int:
    """Checks everything that can be checked without weights, then plans or generates."""
    from scripts.run.validate import check_values, read_prompts, resolve_device, resolve_model

    check_values(config)
    prompts = read_prompts(config)
    device, path = resolve_device(config), resolve_model(config)
    from scripts.run.checked_job import open_job
    from scripts.run.loras import describe_loras, training_notes
    from scripts.run.machine_checks import check_backends
    from scripts.run.parallel import describe_degrees, plan_degrees, planned
    from scripts.run.parallel_work import lines
    from scripts.run.plan import describe, describe_density, gain, notes, solved_config
    from scripts.run.positions import describe_positions
    from scripts.run.process_groups import check_machine, describe_decoding
    from scripts.run.shortage import check_mask, check_memory

    job, remarks = open_job(config, device, path, dry_run)
    model = job.model
    further = [
        *describe_positions(config, model),
        *describe_loras(config, job.loras),
        *training_notes(config, model, job.loras),
    ]
    if dry_run:
        check_mask(config, model)
        solved_config(config, model)
        remarks = remarks + check_backends(config, model, device, dry_run)
        degrees = plan_degrees(config, model, planned(config), len(prompts))
        shared = [*lines(config, model, degrees, device), *describe_decoding(config, model, degrees)]
        print("\n".join([describe(config, model, device, remarks), *shared]))
        print("".join(f"{line}\n" for line in further), end="")
        return 0
    degrees = plan_degrees(config, model, processes(), len(prompts))
    if degrees.processes > 1:
        check_machine(config, device, degrees)
        for line in [describe_degrees(degrees, config, model), *describe_decoding(config, model, degrees)]:
            print(line, flush=True)
    check_memory(config, model, device, degrees)
    solved_config(config, model)
    for line in describe_density(config, model):
        print(line, flush=True)
    check_backends(config, model, device)
    for note in [*notes(config, model), *gain(config, model)]:
        print(f"note: {note}", flush=True)
    for line in further:
        print(line, flush=True)
    return generate(job, prompts, degrees)


def generate(job: "Job", prompts: dict[int, str], degrees: "Degrees") -> int:
    """Makes the videos of all prompts; those of a prompt file that are there already are left alone."""
    from scripts.run.outputs import resolved, video_path, writable_folder
    from scripts.run.process_groups import gathered

    from_file = job.config.generation.prompt_file is not None
    paths = {number: video_path(job.config, prompt, number) for number, prompt in prompts.items()}
    missing = [n for n in prompts if not (from_file and is_there(job, prompts[n], paths[n]))]
    if from_file:
        print(f"{len(missing)} of {len(prompts)} videos to make", flush=True)
    with gathered(degrees, job.device) as job.team:
        job.team.compare([resolved(job.config, ""), prompts, job.inputs.files])
        own = job.team.agree(missing)[job.team.place :: degrees.data]
        with writable_folder(job.config, from_file) if job.team.leads else nullcontext():
            pipeline = job.load() if own else None
            if from_file:
                return generate_missing(job, pipeline, {n: prompts[n] for n in own}, paths)
            make_one(job, pipeline, prompts[0], paths[0])
            return 0


def generate_missing(job: "Job", pipeline: Any, prompts: dict[int, str], paths: dict[int, Path]) -> int:
    """Makes the videos of these lines; 1 where any failed. Only a full disk stops the rest.

    With several processes any failure ends them all: what one lacks, the others would wait for.
    """
    failures: dict[int, str] = {}
    full = False
    for number, prompt in prompts.items():
        if full:
            failures[number] = "not tried, the disk is full; the same command goes on from here"
            continue
        print(f"line {number}: {prompt}", flush=True)
        try:
            make_one(job, pipeline, prompt, paths[number])
        except (UsageError, GenerationError) as error:
            if job.team.degrees.processes > 1:
                raise type(error)(f"line {number}: {error}") from error
            failures[number] = str(error)  # the exception would hold its frames' tensors
            full = isinstance(error, DiskFullError)
    for number, error in failures.items():
        print(f"error: line {number}: {error}", file=sys.stderr)
    return 1 if failures else 0


def make_one(job: "Job", pipeline: Any, prompt: str, path: Path) -> None:
    """One video, written and told of by the process that leads."""
    record = job.make_video(pipeline, prompt, path)
    job.team.wait()
    if record is not None:
        announce(record, path)


def is_there(job: "Job", prompt: str, path: Path) -> bool:
    """Whether the video was made with these settings; prints that, or which settings differ."""
    from scripts.run.outputs import finished

    done, changed = finished(path, job.config, prompt, job.inputs.files)
    if done:
        print(f"{path} is there already")
    elif changed:
        print(f"{path} was made with other settings ({', '.join(changed)}): made again")
    return done


def announce(record: dict[str, Any], path: Path) -> None:
    """The run's own benchmark, in a few lines."""
    seconds = {stage.replace("_", " "): f"{value:.2f}" for stage, value in record["seconds"].items()}
    calls = ", ".join(f"{count} {name}" for name, count in record["attention"]["calls"].items() if count)
    check = record["attention"]["check"]
    peak = {kind.split("_")[0]: f"{size / 2**30:.2f} GiB" for kind, size in record["peak_memory"].items()}
    print(f"video      {path} (its record beside it, .json)")
    print(f"seconds    {_pairs(seconds)}, total {sum(record['seconds'].values()):.2f}")
    print(f"a step     {_pairs(seconds_per_step(record))}")
    print(f"attention  {record['tokens']} tokens, density {record['density']:.3f}; calls: {calls}")
    if (cache := record["cache"])["kind"] != "none":
        print(f"cache      {cache['kind']}: {cache['computed']} of {cache['due']} of these calls were made")
    if "worst" in check:
        worst = "{where}: relative L2 {relative_l2:.2e}, cosine {cosine:.6f}".format(**check["worst"])
        print(f"check      {check['compared']} outputs against the reference, worst in {worst}")
    predicted = sum(record["predicted_memory"].values()) / 2**30
    print(f"memory     {_pairs(peak)} at the peak, {predicted:.2f} GiB predicted", flush=True)


def seconds_per_step(record: dict[str, Any]) -> dict[str, str]:
    """Median seconds of the steps of each pattern."""
    from statistics import median

    steps = record["step_seconds"]
    dense = set(record["dense_steps"])
    groups = {
        "dense": [t for step, t in enumerate(steps) if step in dense],
        record["config"]["attention"]["pattern"]: [t for step, t in enumerate(steps) if step not in dense],
    }
    return {
        name: f"{median(times):.3f} s (median of {len(times)})" for name, times in groups.items() if times
    }


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
