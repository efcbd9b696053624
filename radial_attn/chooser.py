"""Chooses the backend of a shape by measurement: the fastest of those whose output is right.

Every backend that serves the calls attends over the same tensors, over a few of their heads if the sequence
is long. Its output, and in training its gradients, are compared with the definition on four query blocks.
Dense attention is timed too: if it is as fast, calls of this shape stay dense. If the density changes in a
run, only the first one is measured; for the others, the times of sparse backends are scaled in proportion.
The mask caches the choices of its shapes. A file keeps the times for later runs on the same device with the
same versions.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .attention import choose_backend
from .block_mask import BlockMask
from .dispatch import BACKENDS, kernel, obstacle, order, versions
from .files import whole_file
from .kernels.contract import Call
from .kernels.cpp.build import cache_folder, processor
from .kernels.flash4.exported import fingerprint
from .trial import DENSE, PASSING, Dense, Trial, reason_of, some_heads

TUNES = ("auto", "off", "once", "always")
TUNED_DEVICES = ("cuda",)  # on which "auto" is "once"
AS_FAST = 1.02  # up to this ratio of times dense attention is taken, as it is exact
QUADRATIC, MOST_TOKENS = ("reference",), 4096  # backends with memory quadratic in the tokens

Agree = Callable[[Any], Any]  # returns the first process's value in all processes


@dataclass(eq=False)
class Choice:
    """Holds the backend of all sparse calls of a shape, once it is known.

    Attributes:
        call: decides which backends serve; its mask is that of the calls, or stands for those of layers.
        size: `[B, S, H, D]`.
        density: of the calls.
        key: identifies the shape, the device and the versions.
        times: seconds of "dense" and of each backend that is right; of the others, why they were refused.
        measured_at: density of the calls that were timed, if it differs from `density`; else None.
        name: the backend, or "dense"; None until it is known.
        file: where the times are kept, None for nowhere.
        dense: computes dense attention as the model does.
        calls: about how many calls of this shape the run makes; spent: seconds that the run took so far.
    """

    call: Call
    size: tuple[int, ...]
    density: float
    key: str
    times: dict[str, float | str] = field(default_factory=dict)
    name: str | None = None
    file: Path | None = None
    measured_at: float | None = None
    dense: Dense | None = None
    calls: int = 1
    spent: float = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Returns the seconds by name at this density, the fastest first, of all but the refused backends."""
        scale = 1.0 if self.measured_at is None else self.density / self.measured_at
        times = {name: x for name, x in self.times.items() if isinstance(x, float)}
        seconds = {name: x if name == DENSE else scale * x for name, x in times.items()}
        return dict(sorted(seconds.items(), key=lambda entry: entry[1]))

    @property
    def refused(self) -> dict[str, str]:
        """Returns by name why backends were refused."""
        return {name: x for name, x in self.times.items() if isinstance(x, str)}

    @property
    def efficiency(self) -> float | None:
        """Returns dense seconds x density / seconds of the choice; None if they were not measured."""
        seconds = self.seconds
        if self.name == DENSE or not {DENSE, self.name} <= seconds.keys():
            return None
        return seconds[DENSE] * self.density / seconds[self.name]

    def report(self) -> dict[str, Any]:
        """Returns the results as values that JSON can hold."""
        names = ("density", "seconds", "refused", "efficiency")
        results = {name: getattr(self, name) for name in (*names, "measured_at")}
        return {"shape": list(self.size), "backend": self.name, **results}

    def candidates(self) -> list[str]:
        """Returns what is measured, in this order: the default, dense attention, all others that serve.

        Leaves out backends that multiply in fewer bits than asked for, those with memory quadratic in a long
        sequence, and on a CPU those outside the order that compile for each shape.
        """
        first, tried = choose_backend(self.call), order(self.call.device)
        names = []
        for name in (*tried, *BACKENDS[1:]):
            needs, long = kernel(name).NEEDS, name in QUADRATIC and self.size[1] > MOST_TOKENS
            slow = needs.compiles and self.call.device.type == "cpu" and name not in tried
            if needs.exact and not long and not slow and obstacle(name, self.call) is None:
                names.append(name)
        return list(dict.fromkeys([first, DENSE, *names]))

    def decide(self, remark: str = "") -> None:
        """Chooses the fastest that was measured, or the default if none was, and logs the choice."""
        seconds = self.seconds
        sparse = next((name for name in seconds if name != DENSE), None)
        if sparse is None:
            self.name = DENSE if DENSE in seconds else self.candidates()[0]
        else:
            self.name = DENSE if seconds.get(DENSE, math.inf) <= AS_FAST * seconds[sparse] else sparse
        calls = f"{list(self.size)} {self.call.dtype} on {self.call.device}, density {self.density:.3f}"
        logging.getLogger("radial_attn").info(
            "backend %s for %s: %s%s", self.name, calls, self._results(), remark
        )

    def _results(self) -> str:
        """Describes the times, the efficiency, why calls stay dense, and what was refused or left out."""
        seconds = self.seconds
        parts = [", ".join(f"{name} {1000 * x:.2f} ms" for name, x in seconds.items()) or "none was measured"]
        if self.efficiency is not None:
            parts.append(f"efficiency {self.efficiency:.2f}")
        if self.name == DENSE:
            reason = "dense attention is as fast" if len(seconds) > 1 else "no sparse backend is right"
            parts.append(f"{reason}, so these calls stay dense")
        parts += [f"{name} refused: {reason}" for name, reason in self.refused.items()]
        left = [name for name in self.candidates() if name not in self.times]
        return "; ".join([*parts, f"not measured: {', '.join(left)}"] if left else parts)


class Chooser:
    """Makes the choices of one application.

    Args:
        tune: "off" takes the first backend of the device's order that serves a call. "always" measures in
            every run. "once" keeps the times in the folder of the C++ library for other runs. "auto" is
            "once" on a GPU and "off" elsewhere.
        agree: returns the first process's value in all of several processes, so its times hold for all.

    Raises ValueError for another `tune`.
    """

    def __init__(self, tune: str = "auto", agree: Agree | None = None) -> None:
        if tune not in TUNES:
            raise ValueError(f"tune must be one of {', '.join(TUNES)}, got {tune!r}")
        self.tune, self._agree = tune, agree
        self.agrees = agree is not None
        self._choices: dict[str, Choice] = {}  # by key

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a copy or a pickle, without the choices, which hold masks."""
        return vars(self) | {"_choices": {}}

    def measures(self, device: torch.device) -> bool:
        """Tells whether backends are measured on a device."""
        return self.tune in {"once", "always"} or (self.tune == "auto" and device.type in TUNED_DEVICES)

    def report(self) -> list[dict[str, Any]]:
        """Returns `Choice.report` of each shape that is decided."""
        return [choice.report() for choice in self._choices.values() if choice.name is not None]

    def open(
        self,
        call: Call,
        size: Sequence[int],
        density: float,
        *,
        about: Mapping[str, Any],
        dense: Dense,
        calls: int,
        spent: float = 0.0,
    ) -> Choice:
        """Returns the choice of a shape, with what is known of it.

        `about`: what else tells calls apart, in values that JSON can hold; the other arguments are as in
        `Choice`.
        """
        key = _key(call, size, density, about)
        if key not in self._choices:
            choice = Choice(call, tuple(size), density, key)
            if (other := self._at_other_density(key)) is not None:
                choice.times, choice.measured_at = other.times, other.density
                choice.decide(f"; scaled from the times at density {other.density:.3f}")
            else:
                choice = call.mask.cached(("choice", key), lambda: self._recalled(choice))
            self._choices[key] = choice
        choice = self._choices[key]
        choice.dense, choice.calls, choice.spent = dense, calls, spent
        return choice

    def _at_other_density(self, key: str) -> Choice | None:
        """Returns a choice that was measured and whose key differs in the density alone."""
        about = json.loads(key)
        for other in self._choices.values():
            alike = json.loads(other.key) | {"density": about["density"]} == about
            if alike and other.name is not None and other.measured_at is None:
                return other
        return None

    def _recalled(self, choice: Choice) -> Choice:
        """Returns a choice with what other runs have measured."""
        if self.tune == "always":
            return choice
        with suppress(RuntimeError):  # the user has no home
            digest = hashlib.sha256(choice.key.encode()).hexdigest()
            choice.file = cache_folder() / f"choice-{digest[:16]}.json"
        kept, names = _read(choice), choice.candidates()
        known = {name: kept[name] for name in names if name in kept}  # others do not serve here any more
        choice.times, is_whole = self._of_first((known, len(known) == len(names)))
        if is_whole:
            choice.decide("; measured before")
        return choice

    def settle(
        self,
        choice: Choice,
        tensors: Sequence[Tensor],
        mask: BlockMask,
        *,
        text_lengths: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> str:
        """Returns the name of a choice; measures first if it is not known.

        Args:
            tensors: query, key and value of a call, `[B, S, H, D]`.
            mask: of that call.
            text_lengths, bias: as in `radial_attention`, of that call.
        """
        if choice.name is None:
            self._measure(choice, lambda: Trial(choice.call, tensors, mask, text_lengths, bias))
        return choice.name

    def settle_alone(self, choice: Choice, text_lengths: Tensor | None = None) -> str:
        """Returns the name of a choice; measures first, on normal random values, if it is not known."""
        call, mask, (batch, tokens, heads, width) = choice.call, choice.call.mask, choice.size

        def trial() -> Trial:
            options = {"dtype": call.dtype, "device": call.device}
            options["generator"] = torch.Generator(call.device).manual_seed(0)
            some = some_heads(choice.size) if mask.heads is None else heads
            tensors = [torch.randn(batch, tokens, some, width, **options) for _ in range(3)]
            return Trial(call, tensors, mask, text_lengths)

        if choice.name is None:
            self._measure(choice, trial)
        return choice.name

    def _measure(self, choice: Choice, make: Callable[[], Trial]) -> None:
        times, is_measured = choice.times, True
        try:
            options = {"calls": choice.calls, "spent": choice.spent}
            times = make().measure(choice.candidates(), times, choice.dense, **options)
        except Exception as error:  # as no memory for the definition; other processes wait for the times
            times, is_measured = times | {choose_backend(choice.call): reason_of(error)}, False
        choice.times, is_measured = self._of_first((times, is_measured))
        choice.decide(_write(choice) if is_measured else "")

    def _of_first(self, value: Any) -> Any:
        return value if self._agree is None else self._agree(value)


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or of the processor with the number of threads."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    names = (line.split(":", 1)[1].strip() for line in processor() if line.startswith("model name"))
    return f"{next(names, device.type)}, {torch.get_num_threads()} threads"


@lru_cache
def installed() -> dict[str, str]:
    """Returns the versions of this project, torch and the libraries of all backends."""
    libraries = {name: versions(kernel(name).NEEDS.modules) for name in BACKENDS[1:]}
    exported = {"exported kernels": fingerprint()}
    return {"radial-attention": __version__, "torch": torch.__version__, **libraries, **exported}


def _key(call: Call, size: Sequence[int], density: float, about: Mapping[str, Any]) -> str:
    """Returns everything on which the times depend, as JSON."""
    options = {name: getattr(call, name) for name in ("gradients", "quantize", "far_field")}
    every = options | {
        "device": device_name(call.device),
        "versions": installed(),
        "shape": list(size),
        "block_size": call.mask.block_size,
        "heads_alike": call.mask.heads is None,
        "dtype": str(call.dtype).removeprefix("torch."),
        "density": round(density, 2),
    }
    return json.dumps(every | dict(about), sort_keys=True)


def _read(choice: Choice) -> dict[str, float | str]:
    """Returns the times that another run kept; {} if there are none, or if they are damaged (logged)."""
    if choice.file is None:
        return {}
    try:
        content = json.loads(choice.file.read_bytes())
        times = content["times"]
        are_times = (
            isinstance(x, str) or (isinstance(x, float) and 0 < x < math.inf) for x in times.values()
        )
        if content["key"] == json.loads(choice.key) and all(are_times):
            return times
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    logging.getLogger("radial_attn").warning(
        "%s is damaged or cannot be read; backends are measured again", choice.file
    )
    return {}


def _write(choice: Choice) -> str:
    """Keeps the times, but no failure that may pass, whole or not at all; returns a remark if that fails."""
    if choice.file is None:
        return ""
    times = {name: x for name, x in choice.times.items() if not str(x).startswith(PASSING)}
    text = json.dumps({"key": json.loads(choice.key), "times": times}, indent=1)
    try:
        choice.file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(choice.file) as part:
            part.write_text(text + "\n")
    except OSError as error:
        return f"; not kept, as {choice.file} cannot be written ({error.strerror})"
    return ""
