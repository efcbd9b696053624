"""How the processes of a run share its work: degrees that are given, and those that are left to choose."""

import itertools
import math
from collections.abc import Iterator

from radial_attn.models.parallel.groups import Degrees, ring_refusal

from radial_attn.dispatch import BACKENDS, kernel
from scripts.run.config import Config
from scripts.run.errors import UsageError
from scripts.run.families import calls_per_step
from scripts.run.model_info import ModelInfo
from scripts.run.processes import processes


def plan_degrees(config: Config, model: ModelInfo, count: int, prompts: int) -> Degrees:
    """The degrees of `count` processes: guidance first, the largest Ulysses degree, prompts, then a ring.

    A Ulysses degree that is left out divides the heads; one that is given need not, heads of zeros fill up.
    Where neither is given and nothing else fits, a ring takes what the heads leave.

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
    chosen = max(found, key=lambda degrees: (degrees.cfg, -degrees.ring, degrees.ulysses))
    if chosen.ring > 1:
        _check_ring(config)
    return chosen


def _check_ring(config: Config) -> None:
    attention = config.attention
    quantize = None if attention.quantize == "none" else attention.quantize
    reason = ring_refusal(quantize, attention.check, attention.dense_backend)
    if reason is not None:
        raise UsageError(f"attention.{reason}")
    if config.model.compile != "none":
        raise UsageError(
            f"model.compile: got {config.model.compile!r}, allowed in a ring: none; keys are passed on "
            "inside the blocks"
        )
    served = [name for name in BACKENDS if name == "auto" or kernel(name).NEEDS.partial]
    if attention.backend not in served:
        raise UsageError(
            f"attention.backend: got {attention.backend!r}, allowed in a ring: {', '.join(served)}; "
            "the others give no log-sum-exp of a part of the keys"
        )


def _uses(config: Config, prompts: int) -> Iterator[tuple[str, int, str]]:
    """The most that a degree can be, and why."""
    if calls_per_step(config) == 1:
        yield "cfg_degree", 1, "without two halves of guidance to share"
    yield "cfg_degree", 2, "for the two halves of guidance"
    yield "data_degree", prompts, "with this many prompts to share (generation.prompt_file)"


def _fitting(config: Config, model: ModelInfo, count: int, prompts: int) -> Iterator[Degrees]:
    """All degrees that make up `count` processes and agree with the configuration."""
    wanted = config.parallel
    cfgs = [wanted.cfg_degree] if wanted.cfg_degree else range(1, calls_per_step(config) + 1)
    shares = [wanted.data_degree] if wanted.data_degree else range(1, prompts + 1)
    for cfg, data in itertools.product(cfgs, shares):
        sequence, rest = divmod(count, cfg * data)
        for ring in range(1, sequence + 1) if rest == 0 else ():
            ulysses, rest = divmod(sequence, ring)
            if rest == 0 and _agrees(config, model, ulysses, ring):
                yield Degrees(ulysses, ring, cfg, data)


def _agrees(config: Config, model: ModelInfo, ulysses: int, ring: int) -> bool:
    """Whether a split of a sequence is the one that is given, or one to choose."""
    wanted = config.parallel
    if wanted.ulysses_degree is not None:
        return (ulysses, ring) == (wanted.ulysses_degree, wanted.ring_degree or 1)
    return model.heads % ulysses == 0 and ring == (wanted.ring_degree or ring)


def _nothing_fits(config: Config, model: ModelInfo, count: int, prompts: int) -> str:
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


def describe_degrees(degrees: Degrees, config: Config, model: ModelInfo) -> str:
    """One line: who shares what, and why."""
    named = vars(config.parallel)
    because = {
        "cfg": "the halves of guidance",
        "ulysses": f"{model.heads} heads",
        "ring": f"keys, where {degrees.ulysses * degrees.ring} do not divide the {model.heads} heads",
        "data": "the prompts",
    }
    parts = [
        f"{name} {getattr(degrees, name)} ({'given' if named[f'{name}_degree'] else f'shares {what}'})"
        for name, what in because.items()
        if getattr(degrees, name) > 1
    ]
    return f"{degrees.processes} processes: {', '.join(parts)}"
