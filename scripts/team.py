"""Several processes under torchrun: who shares what, and what is refused before weights load."""

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from models.xdit import Degrees, import_xfuser, start, stop
from scripts.architecture import Architecture
from scripts.config import Config
from scripts.errors import UsageError
from scripts.ranks import end_all, local_processes, processes
from scripts.sampling import calls_per_step

ALONE = Degrees()
BATCHED = ("mochi",)  # families whose one call a step has both halves of guidance


@dataclass(frozen=True)
class Team:
    """What this process shares with which others.

    Attributes:
        degrees: of the whole run; everyone, replica: gloo groups of all processes, of those of one video.
        sequence: a `models.parallel.SequenceParallel`, None where alone.
        guidance: the group of the other half of guidance, None where alone.
        leads: whether this process decodes and writes; place: its number among those of `degrees.data`.
    """

    degrees: Degrees = ALONE
    everyone: Any = None
    replica: Any = None
    sequence: Any = None
    guidance: Any = None
    leads: bool = True
    place: int = 0

    def agree(self, value: Any) -> Any:
        """What the first process has for `value`."""
        values = [value]
        if self.everyone is not None:
            torch.distributed.broadcast_object_list(values, src=0, group=self.everyone)
        return values[0]

    def compare(self, value: Any) -> None:
        """Raises UsageError where another process has another `value`: files differ between machines."""
        if self.agree(value) != value:
            raise UsageError("configuration, prompts or input files differ from those of rank 0")

    def wait(self) -> None:
        """For the one that decodes and writes; in the next video's exchanges there is less patience."""
        if self.replica is not None:
            torch.distributed.barrier(group=self.replica)


def plan_degrees(config: Config, model: Architecture, count: int, prompts: int) -> Degrees:
    """The degrees of `count` processes: guidance first, then the largest Ulysses degree, then prompts.

    A Ulysses degree that is left out divides the heads; one that is given need not, heads of zeros fill up.

    Raises:
        UsageError: degrees that do not make up the processes, or that the run has no use for.
    """
    for name, most, reason in _uses(config, prompts):
        got = getattr(config.parallel, name)
        if got is not None and got > most:
            raise UsageError(f"parallel.{name}: got {got}, allowed {reason}: {most}")
    found = list(_fitting(config, model, count, prompts))
    if not found:
        raise UsageError(_nothing_fits(config, model, count, prompts))
    return max(found, key=lambda degrees: (degrees.cfg, degrees.ulysses))


def _uses(config: Config, prompts: int) -> Iterator[tuple[str, int, str]]:
    """The most that a degree can be, and why."""
    if calls_per_step(config) == 1:
        yield "cfg_degree", 1, "without two halves of guidance to share"
    yield "cfg_degree", 2, "for the two halves of guidance"
    yield "data_degree", prompts, "with this many prompts to share (generation.prompt_file)"


def _fitting(config: Config, model: Architecture, count: int, prompts: int) -> Iterator[Degrees]:
    """All degrees that make up `count` processes and agree with the configuration."""
    wanted = config.parallel
    cfgs = [wanted.cfg_degree] if wanted.cfg_degree else range(1, calls_per_step(config) + 1)
    shares = [wanted.data_degree] if wanted.data_degree else range(1, prompts + 1)
    for cfg, data in itertools.product(cfgs, shares):
        ulysses, rest = divmod(count, cfg * data)
        fits = (
            wanted.ulysses_degree == ulysses if wanted.ulysses_degree else model.heads % max(ulysses, 1) == 0
        )
        if rest == 0 and fits:
            yield Degrees(ulysses, wanted.ring_degree, cfg, data)


def _nothing_fits(config: Config, model: Architecture, count: int, prompts: int) -> str:
    given = {name: value for name, value in vars(config.parallel).items() if value not in (None, 1)}
    if count == 1:
        name, value = next(iter(given.items()))
        launch = f"torchrun --nproc_per_node={math.prod(given.values())} -m scripts.generate"
        return f"parallel.{name}: got {value}, allowed in one process: 1; start several with {launch}"
    most = 2 * max(count, math.prod(given.values()))
    works = [n for n in range(1, most + 1) if any(_fitting(config, model, n, prompts))]
    shown = ", ".join(f"{name} {value}" for name, value in given.items()) or "all to be chosen"
    return (
        f"parallel: got {count} processes, but no degrees ({shown}) share {model.heads} heads and {prompts} "
        f"prompts among them; numbers of processes that work: {', '.join(map(str, works)) or 'none'}"
    )


def planned(config: Config) -> int:
    """Processes that a dry run plans for: what is given, the rest 1, or those that torchrun started."""
    return max(math.prod(value or 1 for value in vars(config.parallel).values()), processes())


def describe_degrees(degrees: Degrees, config: Config, model: Architecture) -> str:
    """One line: who shares what, and why."""
    named = vars(config.parallel)
    because = {
        "cfg": "the halves of guidance",
        "ulysses": f"{model.heads} heads",
        "data": "the prompts",
    }
    parts = [
        f"{name} {getattr(degrees, name)} ({'given' if named[f'{name}_degree'] else f'shares {what}'})"
        for name, what in because.items()
        if getattr(degrees, name) > 1
    ]
    return f"{degrees.processes} processes: {', '.join(parts)}"


def check_machine(config: Config, device: str, degrees: Degrees) -> None:
    """Raises UsageError where this machine cannot serve several processes, before any weight is loaded."""
    local = local_processes()
    if device == "cuda" and local > torch.cuda.device_count():
        raise UsageError(
            f"torchrun --nproc_per_node: got {local}, allowed on this machine: at most "
            f"{torch.cuda.device_count()}, one process a GPU"
        )
    if config.model.cache != "none":
        got = config.model.cache
        raise UsageError(
            f"model.cache: got {got!r}, allowed in several processes: none; each would skip other steps"
        )
    if config.model.compile != "none":
        raise UsageError(
            f"model.compile: got {config.model.compile!r}, allowed in several processes: none; tokens are "
            "exchanged inside the blocks, which has not been tried compiled"
        )
    if config.attention.check == "reference" and degrees.cfg > 1:
        raise UsageError(
            "attention.check: got 'reference', allowed with parallel.cfg_degree=2: auto, off, nan; each "
            "process would compare one half only"
        )
    try:
        import_xfuser(device)
    except ImportError as error:
        raise UsageError(str(error)) from error


@contextmanager
def gathered(degrees: Degrees, device: str) -> Iterator[Team]:
    """The team of this process, connected for as long as the block runs; the process alone where it is so.

    A failure in the block ends the process at once, with one line: torchrun then stops the others, which may
    be waiting for it.
    """
    if degrees.processes == 1:
        yield Team()
        return
    try:
        start(degrees, device)
        yield _team(degrees, device)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # whatever it is, the others must not wait for this process
        end_all(error)
    stop()


def _team(degrees: Degrees, device: str) -> Team:
    from models.parallel import SequenceParallel

    state = import_xfuser(device)
    sequence, guidance = state.get_sp_group(), state.get_cfg_group()
    return Team(
        degrees,
        state.get_world_group().cpu_group,
        state.get_model_replica_group().cpu_group,
        SequenceParallel(sequence.ulysses_group) if degrees.ulysses > 1 else None,
        guidance.device_group if degrees.cfg > 1 else None,
        leads=sequence.rank_in_group == 0 and guidance.rank_in_group == 0,
        place=state.get_dp_group().rank_in_group,
    )


def shared_guidance(pipeline: Any, family: str, team: Team) -> AbstractContextManager:
    """Guidance shared with the other half's process, where there is one."""
    if team.guidance is None:
        return nullcontext()
    from models.guidance import GuidanceParallel

    transformers = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    present = [transformer for transformer in transformers if transformer is not None]
    return GuidanceParallel(present, team.guidance, batched=family in BATCHED)
