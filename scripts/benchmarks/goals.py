"""What the numbers of a GPU benchmark amount to: speed-up, efficiency, end to end, and the goals."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scripts.benchmarks.cases import BACKWARD_CASES, CASES, DENSE, QUANTIZED, STEPS, StepModel

STEPS_OF_A_VIDEO = 50
FORWARD_GOAL, BACKWARD_GOAL, QUANTIZED_GOAL = 0.9, 0.8, 1.4
RIVALS = ("flex", "flashinfer")


@dataclass(frozen=True)
class Goal:
    """A figure to be reached; `found` is None where it was not measured, and `note` says more."""

    name: str
    wanted: float
    found: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Met, missed and by how much, or not measured."""
        if self.found is None:
            return "not measured"
        if self.found >= self.wanted:
            return "met"
        short = self.wanted - self.found
        return f"missed by {short:.2f} ({short / self.wanted:.0%})"


@dataclass(frozen=True)
class EndToEnd:
    """50 denoising steps of a video, without text encoder and VAE.

    `dense_ms`, `radial_ms`: of one call of the transformer in a dense and a radial step.
    """

    spec: StepModel
    variant: str
    dense_ms: float
    radial_ms: float
    extrapolated: bool

    @property
    def dense_seconds(self) -> float:
        return STEPS_OF_A_VIDEO * self.spec.calls * self.dense_ms / 1e3

    @property
    def radial_seconds(self) -> float:
        sparse = STEPS_OF_A_VIDEO - self.spec.dense_steps
        total = self.spec.dense_steps * self.dense_ms + sparse * self.radial_ms
        return self.spec.calls * total / 1e3

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.radial_seconds


class Findings:
    """Look-ups in the results of a run, as its JSON holds them."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self._rows = {(row["stage"], row["case"], row["variant"]): row for row in data["rows"]}

    def row(self, stage: str, case: str, variant: str) -> dict[str, Any]:
        """The row, empty where there is none."""
        return self._rows.get((stage, case, variant), {})

    def ms(self, stage: str, case: str, variant: str) -> float | None:
        return self.row(stage, case, variant).get("ms")

    def best_dense(self, stage: str, case: str) -> tuple[str, float] | None:
        """Name and milliseconds of the fastest dense kernel."""
        times = {name: self.ms(stage, case, name) for name in DENSE}
        return min(((name, ms) for name, ms in times.items() if ms), key=lambda pair: pair[1], default=None)

    def speedup(self, stage: str, case: str, variant: str) -> float | None:
        """Over the fastest dense kernel of the same run."""
        ms, dense = self.ms(stage, case, variant), self.best_dense(stage, case)
        return dense[1] / ms if ms and dense else None

    def efficiency(self, stage: str, case: str, variant: str) -> float | None:
        """Speed-up x density: 1 where a kept block costs what it costs in dense attention."""
        speedup = self.speedup(stage, case, variant)
        return speedup and speedup * self.data["cases"][case]["density"]

    def ratio(self, stage: str, case: str, slower: str, faster: str) -> float | None:
        """How many times as long one variant takes as another."""
        long, short = self.ms(stage, case, slower), self.ms(stage, case, faster)
        return long / short if long and short else None

    def reason(self, stage: str, case: str, variant: str) -> str:
        """Why there is no time."""
        row = self.row(stage, case, variant)
        if row.get("wrong"):
            return f"wrong output, relative L2 {row['relative_l2']:.1e}"
        return row.get("failure", "left out")

    def step(self, case: str, variant: str) -> dict[str, Any] | None:
        """A denoising step that was measured."""
        steps = (step for step in self.data["steps"] if (step["case"], step["variant"]) == (case, variant))
        return next((step for step in steps if "ms" in step), None)

    def end_to_end(self, case: str, variant: str = "radial") -> EndToEnd | None:
        """50 steps from one dense and one radial call, where both were measured alike."""
        dense, radial = self.step(case, "dense"), self.step(case, variant)
        if not dense or not radial or dense["reduced"] != radial["reduced"]:
            return None
        spec = STEPS[case]
        if not dense["reduced"]:
            return EndToEnd(spec, variant, dense["ms"], radial["ms"], False)
        whole = whole_ms(spec, dense, dense), whole_ms(spec, radial, dense)
        return EndToEnd(spec, variant, *whole, True)


def whole_ms(spec: StepModel, measured: dict[str, Any], dense: dict[str, Any]) -> float:
    """Milliseconds of the whole model from a few blocks of each kind; its first layers are dense."""
    means, dense_means = (
        {where: sum(times) / len(times) for where, times in step["blocks_ms"].items()}
        for step in (measured, dense)
    )
    outside = measured["ms"] - sum(sum(times) for times in measured["blocks_ms"].values())
    first = spec.blocks[0][1]
    blocks = sum(count * means[where] for where, count in spec.counts(reduced=False).items())
    return outside + blocks + spec.dense_layers * (dense_means[first] - means[first])


def goals(data: dict[str, Any]) -> list[Goal]:
    """Every goal with what was found."""
    found = Findings(data)
    return [*_forward(found), *_rivals(found), *_quantized(found), *_backward(found), *_videos(found)]


def _forward(found: Findings) -> Iterator[Goal]:
    for case in CASES:
        value = found.efficiency("forward", case, "triton")
        yield Goal(f"triton forward, efficiency, {case}", FORWARD_GOAL, value, _why(found, "forward", case))


def _why(found: Findings, stage: str, case: str) -> str:
    """What the efficiency is taken against, or why there is none."""
    dense = found.best_dense(stage, case)
    if found.ms(stage, case, "triton") is None:
        return found.reason(stage, case, "triton")
    return f"against {dense[0]}" if dense else "no dense kernel was timed"


def _rivals(found: Findings) -> Iterator[Goal]:
    for case in CASES:
        ratios = {name: found.ratio("forward", case, name, "triton") for name in RIVALS}
        notes = [
            f"{name} takes {ratio:.2f}x as long"
            if ratio
            else f"{name}: {found.reason('forward', case, name)}"
            for name, ratio in ratios.items()
        ]
        least = min((ratio for ratio in ratios.values() if ratio), default=None)
        yield Goal(f"triton ahead of flex and flashinfer, {case}", 1.0, least, "; ".join(notes))


def _quantized(found: Findings) -> Iterator[Goal]:
    for case in CASES:
        ratios = {name: found.ratio("forward", case, "triton", name) for name in QUANTIZED}
        notes = [
            f"{name} {ratio:.2f}x" if ratio else f"{name}: {found.reason('forward', case, name)}"
            for name, ratio in ratios.items()
        ]
        most = max((ratio for ratio in ratios.values() if ratio), default=None)
        yield Goal(f"int8 or fp8 over bf16, {case}", QUANTIZED_GOAL, most, "; ".join(notes))


def _backward(found: Findings) -> Iterator[Goal]:
    for case in BACKWARD_CASES:
        value = found.efficiency("backward", case, "triton")
        name = f"triton forward + backward, efficiency, {case}"
        yield Goal(name, BACKWARD_GOAL, value, _why(found, "backward", case))


def _videos(found: Findings) -> Iterator[Goal]:
    for case, spec in STEPS.items():
        video = found.end_to_end(case)
        note = "from blocks, see below" if video and video.extrapolated else ""
        if video is None:
            failed = [step["failure"] for step in data_steps(found, case) if "failure" in step]
            note = failed[0] if failed else "left out"
        yield Goal(f"50 steps end to end, {case}", spec.paper, video and video.speedup, note)


def data_steps(found: Findings, case: str) -> list[dict[str, Any]]:
    """All rows of a case's denoising steps, failures too."""
    return [step for step in found.data["steps"] if step["case"] == case]
