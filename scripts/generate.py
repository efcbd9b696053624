"""Makes videos of prompts: `python -m scripts.generate [CONFIG.yaml] [key=value ...] [--dry-run] [--help]`.

Exit codes: 0 done; 1 some prompts of a prompt file failed, the others are done; 2 stopped, one line on stderr
says why; 130 interrupted.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from scripts.run.command_line import FULL_PRESET, choose_config, parse
from scripts.run.config import Config, help_text, read_config
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
    for note in record_notes(plan, config_file):
        print(f"note: {note}", flush=True)
    if command.dry_run:
        print(describe_plan(plan))
        return 0
    for line in describe_start(plan):
        print(line, flush=True)
    return generate(plan)


def record_notes(plan: "RunPlan", config_file: str) -> list[str]:
    """Names the files that are others than those with which the record that is the configuration was made."""
    from scripts.run.config import find_path
    from scripts.run.outputs import INPUTS, Contents, differing, of_video

    if not config_file.lower().endswith(".json"):
        return []
    prompt, seed = next(iter(plan.prompts.values())), plan.config.generation.all_seeds[0]
    loras = None if any(lora.file is None for lora in plan.loras) else plan.lora_digests  # not fetched
    contents = Contents(plan.inputs.files, loras, plan.model_digest)
    changed = differing(find_path(config_file), of_video(plan.config, prompt, seed), prompt, contents)
    files = [key for key in changed if key.startswith((*INPUTS, "content of "))]
    return [f"{', '.join(files)}: not the files that {config_file} was made with"] if files else []


@dataclass(frozen=True)
class Video:
    """Holds one video of a run: its line of the prompt file (0: none), its own configuration, its file."""

    number: int
    config: Config
    path: Path

    @property
    def prompt(self) -> str:
        return self.config.generation.prompt


def videos_of(plan: "RunPlan") -> list[Video]:
    """Lists every prompt with every seed."""
    from scripts.run.outputs import of_video, video_path

    videos = []
    for number, prompt in plan.prompts.items():
        for seed in plan.config.generation.all_seeds:
            config = of_video(plan.config, prompt, seed)
            videos.append(Video(number, config, video_path(config, prompt, number)))
    return videos


def generate(plan: "RunPlan") -> int:
    """Makes the videos of all prompts and seeds; if there are several, skips those that are there already."""
    from scripts.run.outputs import resolved, writable_folder
    from scripts.run.process_groups import process_groups
    from scripts.run.sampler import Sampler

    videos, config = videos_of(plan), plan.config
    several = config.generation.prompt_file is not None or len(videos) > 1
    missing = missing_videos(plan, videos, again=not several)
    if several:
        print(f"{len(missing)} of {len(videos)} videos to make", flush=True)
    with process_groups(plan.degrees, plan.device) as groups:
        groups.compare([resolved(config, ""), plan.prompts, plan.inputs.files])
        mine = [videos[n] for n in groups.agree(missing)[groups.share :: plan.degrees.data]]
        sampler = Sampler(plan, groups)
        with writable_folder(config) if groups.leads else nullcontext():
            pipeline = sampler.load() if mine else None
            if several:
                return generate_missing(sampler, pipeline, mine)
            make_one(sampler, pipeline, mine[0], again=True)
            return 0


def missing_videos(plan: "RunPlan", videos: Sequence[Video], *, again: bool) -> list[int]:
    """Returns the numbers of the videos to make, and prints which are there; `again`: makes those too.

    Raises UsageError if one was made with other settings and `output.overwrite` is false.
    """
    from scripts.run.outputs import refuse_other_settings

    missing, others = [], {}
    for number, video in enumerate(videos):
        done, changed = made_before(plan, video)
        if done:
            end = "was made with these settings: made again" if again else "is there already"
            print(f"{video.path} {end}", flush=True)
        there, recorded = video.path.is_file(), video.path.with_suffix(".json").is_file()
        if there and recorded and not (done or changed):
            print(f"{video.path} is damaged: made again", flush=True)
        unknown = there and not recorded and again
        if changed or (unknown and plan.config.output.path.endswith(".mp4")):
            others[video.path] = changed
        elif there and not recorded:
            print(f"{video.path} has no record of its settings: made again", flush=True)
        if again or not done:
            missing.append(number)
    refuse_other_settings(plan.config, others)
    for path, changed in others.items():
        print(f"{path} was made with other settings ({', '.join(changed) or 'unknown'}): made again")
    return missing


def made_before(plan: "RunPlan", video: Video) -> tuple[bool, list[str]]:
    """Returns whether a video was made with these settings and is whole, and the keys that differ."""
    from scripts.run.outputs import Contents, finished, is_whole

    contents = Contents(plan.inputs.files, plan.lora_digests, plan.model_digest)
    done, changed = finished(video.path, video.config, video.prompt, contents)
    return done and is_whole(video.path), changed


def generate_missing(sampler: "Sampler", pipeline: Any, videos: Sequence[Video]) -> int:
    """Makes these videos, unless another run makes them; returns 1 if any failed, else 0.

    Only a full disk stops the rest. With several processes any failure ends them all: the others would wait
    for the one that failed.
    """
    from scripts.run.describe import duration

    failures: dict[str, str] = {}
    seconds: list[float] = []
    waiting, full, moved = list(videos), False, True
    while waiting and moved:  # what another run made, or left, is looked at once more
        elsewhere, moved = [], False
        for number, video in enumerate(waiting):
            title, left = title_of(sampler.plan, video), len(waiting) - number + len(elsewhere)
            if full:
                failures[title] = (
                    "not tried, the disk is full; make room, then run the same command to resume"
                )
                continue
            time_left = f", about {duration(median(seconds) * left)} left" if seconds else ""
            count = f"video {len(videos) - left + 1} of {len(videos)}{time_left}"
            print(f"{count}: {title}: {video.prompt}", flush=True)
            start = time.monotonic()
            try:
                if make_one(sampler, pipeline, video):
                    seconds.append(time.monotonic() - start)
                    moved = True
                else:
                    elsewhere.append(video)
            except (UsageError, GenerationError) as error:
                if sampler.plan.degrees.processes > 1:
                    raise type(error)(f"{title}: {error}") from error
                failures[title] = str(error)  # the exception would hold its frames' tensors
                full = isinstance(error, DiskFullError)
        waiting = elsewhere
    if waiting:
        print(f"videos that another run makes: {len(waiting)}; this one has no more to make")
    for title, error in failures.items():
        print(f"error: {title}: {error}", file=sys.stderr)
    return 1 if failures else 0


def title_of(plan: "RunPlan", video: Video) -> str:
    """Names a video by line and seed, whichever has several."""
    line = [f"line {video.number}"] if plan.config.generation.prompt_file is not None else []
    seed = [f"seed {video.config.generation.seed}"] if plan.config.generation.seeds else []
    return ", ".join([*line, *seed])


def make_one(sampler: "Sampler", pipeline: Any, video: Video, *, again: bool = False) -> bool:
    """Makes one video; the process that leads writes it and prints its times.

    Returns False, and makes nothing, if another run makes it. Unless `again`, keeps one that another run has
    made since this one began.
    """
    from scripts.run.files import claim
    from scripts.run.outputs import refuse_other_settings, unwritable
    from scripts.run.summary import describe_video

    path, groups = video.path, sampler.groups
    try:
        with claim(path) if groups.leads else nullcontext(True) as claimed:
            if not groups.agree_on_video(claimed):
                print(f"{path} is being made by another run", flush=True)
                return False
            done, changed = (False, []) if again else made_before(sampler.plan, video)
            refuse_other_settings(sampler.plan.config, {path: changed} if changed else {})
            if groups.agree_on_video(done):
                print(f"{path} is there already: another run made it", flush=True)
                return True
            maker = replace(sampler, plan=replace(sampler.plan, config=video.config))
            record = maker.make_video(pipeline, video.prompt, path)
            groups.wait()
            if record is not None:
                print("\n".join(describe_video(record, path)), flush=True)
            return True
    except OSError as error:
        raise unwritable(path, error) from error


if __name__ == "__main__":
    sys.exit(main())
