"""Computes speed-up, efficiency and 50 steps end to end from the results of a GPU benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scripts.benchmarks.cases import DENSE, QUANTIZED, STEPS, StepModel

STEPS_OF_A_VIDEO = 50
GOALS = ("flash4", "triton")  # variants that have one for their efficiency
FASTEST, EFFICIENCY, TRAINING, EIGHT_BITS = 0.9, 0.75, 0.8, 1.3  # goals on an H200, bfloat16, width 128


@dataclass(frozen=True)
class EndToEnd:
    """Estimates 50 denoising steps of a video, without text encoder and VAE.

    `dense_ms`, `radial_ms`: of one call of the transformer in a dense and a radial step.
    """

    spec: StepModel
    variant: str
    dense_ms: float
    radial_ms: float

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
        """Returns the speed-up over the fastest dense kernel, from times in turn with it if there are any."""
        row, best = self.row(stage, case, variant), self.best_dense(stage.replace("launch", "forward"), case)
        if best is None or "ms" not in row:
            return None
        name, ms = best
        return (row["dense_ms"] if row.get("dense") == name else ms) / row["ms"]

    def efficiency(self, stage: str, case: str, variant: str) -> float | None:
        """Returns speed-up x density: 1 if a kept block costs what it costs in dense attention."""
        speedup = self.speedup(stage, case, variant)
        return speedup and speedup * self.data["cases"][case]["density"]

    def goal(self, stage: str, case: str, variant: str) -> str | None:
        """Compares a row with the goal of its variant; None if it has none, or no number."""
        if variant in QUANTIZED:
            times = [self.ms(stage, case, name) for name in ("triton", variant)]
            return verdict(times[0] / times[1], EIGHT_BITS, "x of triton in 16 bits") if all(times) else None
        least = {"forward": EFFICIENCY if variant == "triton" else FASTEST, "backward": TRAINING}.get(stage)
        reached = self.efficiency(stage, case, variant)
        if reached is None or least is None or variant in DENSE or variant not in GOALS:
            return None
        return verdict(reached, least, "")

    def steps(self, case: str) -> list[dict[str, Any]]:
        """Returns all rows of a case's denoising steps, failures too."""
        return [step for step in self.data["steps"] if step["case"] == case]

    def step(self, case: str, variant: str) -> dict[str, Any] | None:
        """Returns a denoising step that was measured."""
        steps = (step for step in self.steps(case) if step["variant"] == variant)
        return next((step for step in steps if "ms" in step), None)

    def end_to_end(self, case: str, variant: str = "radial") -> EndToEnd | None:
        """Returns 50 steps from one dense and one radial call, if both were measured."""
        dense, radial, spec = self.step(case, "dense"), self.step(case, variant), STEPS[case]
        if not dense or not radial:
            return None
        return EndToEnd(spec, variant, whole_ms(spec, dense, dense), whole_ms(spec, radial, dense))


def verdict(reached: float, least: float, unit: str) -> str:
    """Compares a number, rounded to two digits, with its goal."""
    return f"{'met' if round(reached, 2) >= least else 'missed'}: {least:g}{unit}"


def whole_ms(spec: StepModel, measured: dict[str, Any], dense: dict[str, Any]) -> float:
    """Returns milliseconds of the whole model from a few blocks of each kind; its first layers are dense."""
    means, dense_means = (
        {where: sum(times) / len(times) for where, times in step["blocks_ms"].items()}
        for step in (measured, dense)
    )
    outside = measured["ms"] - sum(sum(times) for times in measured["blocks_ms"].values())
    first = spec.blocks[0][1]
    blocks = sum(count * means[where] for where, count in spec.counts.items())
    return outside + blocks + spec.dense_layers * (dense_means[first] - means[first])


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the results of several runs on one GPU; if two have measured the same, the first counts.

    Versions that differ are all listed. Raises ValueError for different GPUs or masks, or a rehearsal among
    measurements.
    """
    names = {data["machine"].get("gpu", "the CPU") for data in parts}
    if len(names) > 1:
        raise ValueError(f"results of different machines: {', '.join(sorted(names))}")
    if len({data["rehearsal"] for data in parts}) > 1:
        raise ValueError("a rehearsal among measurements")
    densities = {(name, case["density"]) for data in parts for name, case in data["cases"].items()}
    if len(densities) > len(dict(densities)):
        raise ValueError("the same case with masks of different densities")
    libraries = [data["machine"]["versions"] for data in parts]
    listed = {name: dict.fromkeys(x.get(name, "absent") for x in libraries) for x in libraries for name in x}
    joined = parts[0] | {
        "command": "; ".join(data["command"] for data in parts),
        "machine": parts[0]["machine"] | {"versions": {name: " or ".join(x) for name, x in listed.items()}},
        "minutes": sum(data["minutes"] for data in parts),
        "finished": all(data["finished"] for data in parts),
        "smi": parts[0]["smi"] | {"after": parts[-1]["smi"]["after"]},
        "tests": next((x["tests"] for x in parts if "counts" in x["tests"]), parts[-1]["tests"]),
        "left_out": [line for data in parts for line in data["left_out"]],
    }
    for name in ("cases", "compiled"):
        joined[name] = {key: value for data in reversed(parts) for key, value in data[name].items()}
    joined["checks"] = {}
    for variant in dict.fromkeys(variant for data in parts for variant in data["checks"]):
        checks = [data["checks"].get(variant, {}) for data in reversed(parts)]
        joined["checks"][variant] = {key: value for check in checks for key, value in check.items()}
    for name in ("rows", "steps"):
        rows = sorted((row for data in parts for row in data[name]), key=lambda row: "ms" not in row)
        first: dict[tuple, dict] = {}
        for row in rows:
            first.setdefault((row.get("stage"), row["case"], row["variant"]), row)
        joined[name] = list(first.values())
    return joined
