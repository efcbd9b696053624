"""Computes speed-up, efficiency and 50 steps end to end from the results of a GPU benchmark."""

from dataclasses import dataclass
from typing import Any

from scripts.benchmarks.cases import DENSE, STEPS, StepModel

STEPS_OF_A_VIDEO = 50


@dataclass(frozen=True)
class EndToEnd:
    """Estimates 50 denoising steps of a video, without text encoder and VAE.

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
    """Looks up the results of a run, as its JSON holds them."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self._rows = {(row["stage"], row["case"], row["variant"]): row for row in data["rows"]}

    def row(self, stage: str, case: str, variant: str) -> dict[str, Any]:
        """Returns the row, empty if there is none."""
        return self._rows.get((stage, case, variant), {})

    def ms(self, stage: str, case: str, variant: str) -> float | None:
        return self.row(stage, case, variant).get("ms")

    def best_dense(self, stage: str, case: str) -> tuple[str, float] | None:
        """Returns name and milliseconds of the fastest dense kernel."""
        times = {name: self.ms(stage, case, name) for name in DENSE}
        return min(((name, ms) for name, ms in times.items() if ms), key=lambda pair: pair[1], default=None)

    def speedup(self, stage: str, case: str, variant: str) -> float | None:
        """Returns the speed-up over the fastest dense kernel of the same run."""
        ms, dense = self.ms(stage, case, variant), self.best_dense(stage, case)
        return dense[1] / ms if ms and dense else None

    def efficiency(self, stage: str, case: str, variant: str) -> float | None:
        """Returns speed-up x density: 1 if a kept block costs what it costs in dense attention."""
        speedup = self.speedup(stage, case, variant)
        return speedup and speedup * self.data["cases"][case]["density"]

    def steps(self, case: str) -> list[dict[str, Any]]:
        """Returns all rows of a case's denoising steps, failures too."""
        return [step for step in self.data["steps"] if step["case"] == case]

    def step(self, case: str, variant: str) -> dict[str, Any] | None:
        """Returns a denoising step that was measured."""
        steps = (step for step in self.steps(case) if step["variant"] == variant)
        return next((step for step in steps if "ms" in step), None)

    def end_to_end(self, case: str, variant: str = "radial") -> EndToEnd | None:
        """Returns 50 steps from one dense and one radial call, if both were measured alike."""
        dense, radial, spec = self.step(case, "dense"), self.step(case, variant), STEPS[case]
        if not dense or not radial or dense["reduced"] != radial["reduced"]:
            return None
        if not dense["reduced"]:
            return EndToEnd(spec, variant, dense["ms"], radial["ms"], False)
        return EndToEnd(spec, variant, whole_ms(spec, dense, dense), whole_ms(spec, radial, dense), True)


def whole_ms(spec: StepModel, measured: dict[str, Any], dense: dict[str, Any]) -> float:
    """Returns milliseconds of the whole model from a few blocks of each kind; its first layers are dense."""
    means, dense_means = (
        {where: sum(times) / len(times) for where, times in step["blocks_ms"].items()}
        for step in (measured, dense)
    )
    outside = measured["ms"] - sum(sum(times) for times in measured["blocks_ms"].values())
    first = spec.blocks[0][1]
    blocks = sum(count * means[where] for where, count in spec.counts(reduced=False).items())
    return outside + blocks + spec.dense_layers * (dense_means[first] - means[first])
