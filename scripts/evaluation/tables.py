"""Makes the content of evaluation.json and the results file in Markdown from the videos of an evaluation."""

import os
from collections.abc import Iterable
from dataclasses import asdict
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.evaluation.metrics import no_lpips
from scripts.evaluation.recall import averaged
from scripts.evaluation.settings import DENSE
from scripts.evaluation.shown import shown
from scripts.evaluation.videos import Evaluation, Take, machine
from scripts.run import results
from scripts.run.describe import describe_settings
from scripts.run.results import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("psnr", "ssim", "lpips")
RADIAL = "radial"  # the curve that `gains` compares with
STAGES = ("encode_text", "denoise", "decode")  # of a video's seconds, without loading and saving
COLUMNS = {
    "psnr": ("PSNR, dB", ".2f"),
    "gain": ("gain, dB", "+.2f"),
    "gain_error": ("±", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "recall": ("recall", ".4f"),
    "mse": ("output MSE", ".2e"),
    "density": ("density", ".3f"),
    "density_with_warmup": ("with warm-up", ".3f"),
    "attention_flops": ("attention, FLOP", ".4g"),
    "seconds_step": ("s a step", ".3f"),
    "seconds_video": ("s a video", ".2f"),
    "attributes": ("attributes", ".3f"),
    "motion_throughout": ("motion", ".3f"),
    "speed_right": ("speed", ".3f"),
}
COSTS = ("density", "density_with_warmup", "attention_flops", "seconds_step", "seconds_video")


def content(evaluation: Evaluation, words: dict[str, list[str]]) -> dict[str, Any]:
    """Returns `settings`, `videos`, `attention` and `means`; `words` are those of each setting.

    `elsewhere` counts the videos whose seconds are left out because another machine made them.
    """
    records = {
        name: {take: evaluation.record(name, take) for take in evaluation.takes} for name in evaluation.plans
    }
    readings = [record["attention"] for record in records[DENSE].values()]
    attention = {name: averaged(x[name] for x in readings if name in x) for name in evaluation.masks}
    others = [name for name in evaluation.plans if name != DENSE]
    seen = shown(evaluation)
    here = {name: machine(plan.device) for name, plan in evaluation.plans.items()}
    timed = {
        name: [record for record in of_setting.values() if record["machine"] == here[name]]
        for name, of_setting in records.items()
    }
    data = {
        "reference": DENSE,
        "settings": [
            planned(evaluation, name)
            | {"words": words[name]}
            | _seconds(evaluation, name, timed[name])
            | seen.get(name, {})
            for name in evaluation.plans
        ],
        "elsewhere": sum(len(of_setting) - len(timed[name]) for name, of_setting in records.items()),
        "videos": [
            _video(evaluation, take, {name: records[name][take]["metrics"] for name in others})
            for take in evaluation.takes
        ],
        "attention": {name: table for name, table in attention.items() if table},
        "means": {
            name: means(record["metrics"] for record in records[name].values()) | _kept(attention.get(name))
            for name in others
        },
    }
    for name, gain in gains(data).items():
        data["means"][name] |= gain
    return data


def means(metrics: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    """Averages each metric over the videos that have it; None if none has."""
    entries = list(metrics)
    known = {name: [entry[name] for entry in entries if entry[name] is not None] for name in METRICS}
    return {name: mean(values) if values else None for name, values in known.items()}


def _kept(attention: dict[str, Any] | None) -> dict[str, float | None]:
    return {kind: float(np.mean(attention[kind])) if attention else None for kind in ("recall", "mse")}


def planned(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """Returns what is known of a setting before it runs: grid, density, attention FLOPs of a video, mask.

    With a cache, which skips calls, numbers that count all calls are None.
    """
    plan = evaluation.plans[name]
    grid, flops = plan.grid, plan.flops
    cached = plan.config.model.cache != "none"
    return {
        "name": name,
        "grid": [grid.frames, grid.height, grid.width, grid.text],
        "density": plan.density,
        "density_with_warmup": None if cached else flops.sparse / flops.dense,
        "attention_flops": None if cached else flops.sparse,
        "mask": asdict(plan.mask),
    }


def _seconds(evaluation: Evaluation, name: str, records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns medians of a step and of a video without loading and saving.

    Steps that are dense in all layers do not count if there are others.
    """
    if not records:
        return {"seconds_step": None, "seconds_video": None}
    plan = evaluation.plans[name]
    dense = set(plan.dense_steps)
    chosen = [step for step in range(plan.config.generation.steps) if step not in dense] or sorted(dense)
    return {
        "seconds_step": median(record["step_seconds"][step] for record in records for step in chosen),
        "seconds_video": median(sum(record["seconds"][x] for x in STAGES) for record in records),
    }


def _video(evaluation: Evaluation, take: Take, metrics: dict[str, Any]) -> dict[str, Any]:
    paths = {name: evaluation.path(name, take) for name in evaluation.plans}
    relative = {name: os.path.relpath(path, evaluation.work) for name, path in paths.items()}
    return {"prompt": take.prompt, "seed": take.seed, "files": relative, "metrics": metrics}


def table(data: dict[str, Any]) -> list[str]:
    """Returns an empty line and a line for each setting; columns that no setting has are left out."""
    rows = [setting | data["means"].get(setting["name"], {}) for setting in data["settings"]]
    columns = {key: value for key, value in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    titles = ["setting", *(title for title, _ in columns.values())]
    cells = (
        [row["name"], *(number(row.get(key), form) or "" for key, (_, form) in columns.items())]
        for row in rows
    )
    return results.table("|".join(titles), cells)


def points(data: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Returns share of the dense operations of attention, and PSNR, of each setting.

    Settings whose names differ in the number behind the last `_` alone are one curve.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for setting in data["settings"]:
        name, cost = setting["name"], setting.get("attention_flops")
        psnr = data["means"].get(name, {}).get("psnr")
        if cost is not None and psnr is not None:
            curves.setdefault(_curve(name), []).append((cost / data["settings"][0]["attention_flops"], psnr))
    return {name: sorted(curve) for name, curve in curves.items()}


def _curve(name: str) -> str:
    stem, _, last = name.rpartition("_")
    return stem if stem and last.isdecimal() else name


def gains(data: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Returns by setting `gain`, the mean PSNR over that of radial at the same operations, and `gain_error`.

    The curve is that of the settings `radial` and `radial_N`; {} for fewer than two. Each video is
    interpolated linearly in the operations. Beyond an end of the curve its last setting counts. The error is
    the standard error of the mean; None for a single video.
    """
    costs = {x["name"]: x["attention_flops"] for x in data["settings"] if x["attention_flops"] is not None}
    curve = sorted((name for name in costs if _curve(name) == RADIAL), key=costs.get)
    if len(curve) < 2:
        return {}
    result = {}
    for name in costs.keys() - {*curve, data["reference"]}:
        videos = [[v["metrics"][x]["psnr"] for x in (name, *curve)] for v in data["videos"]]
        known = [values for values in videos if None not in values]
        xs = [costs[x] for x in curve]
        values = [psnr - float(np.interp(costs[name], xs, radial)) for psnr, *radial in known]
        if values:
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            result[name] = {"gain": mean(values), "gain_error": error}
    return result


def draw(curves: dict[str, list[tuple[float, float]]]) -> "Figure":
    """Draws the PSNR over the operations of the whole run."""
    figure, axes = results.subplots((6.4, 4.2), 1, 1)
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(*zip(*curve, strict=True), label=name, **results.style(index))
    axes.set_xlabel("operations of attention in the whole run, share of dense")
    axes.set_ylabel("PSNR to the dense video, dB")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def markdown(data: dict[str, Any], evaluation: Evaluation | None, picture: str | None = None) -> str:
    """Returns the results file; `evaluation` is None for folders of videos, `picture` the file of curves."""
    title = "Fidelity to dense attention" if evaluation else f"Fidelity to the videos of {data['reference']}"
    made = settings(data, evaluation) if evaluation else []
    drawn = [f"![PSNR over operations]({picture})"] if picture else []
    lines = table(data), explained(data, evaluation), *drawn, scores(data.get("scores", {})), made
    return "\n".join(results.document(data, title, *lines)) + "\n"


def explained(data: dict[str, Any], evaluation: Evaluation | None) -> str:
    """Explains the columns."""
    count = _videos(len(data["videos"]))
    lines = [f"Means over {count} against those of {data['reference']} of the same name."]
    if evaluation is not None:
        lines = [
            f"Means over {count} against the dense one of the same prompt and seed. Density is that of the "
            "mask; with warm-up it counts dense steps and layers. A step is the median of those that are not "
            "dense, a video the median without loading and writing."
        ]
        lines += [_recall(data, evaluation)] if evaluation.rows else []
        if data["elsewhere"]:
            videos = _videos(data["elsewhere"])
            lines.append(
                f"The seconds of {videos}, made on another machine or with other threads, are left out."
            )
        lines += _gain(data)
        if any(x.get("attributes") is not None for x in data.get("settings", ())):
            lines.append(
                "The last columns are what the reader of the toy world finds in the videos: the share of the "
                "caption's attributes, and, if the videos are long enough to tell, the share with its motion "
                "in each part of the trained length, and the share that moves at a speed of the toy world."
            )
        if any(plan.config.model.cache != "none" for plan in evaluation.plans.values()):
            lines.append("Operations are not given with a cache, which skips calls.")
    compared = [metrics for video in data["videos"] for metrics in video["metrics"].values()]
    if equal := sum(metrics["psnr"] is None for metrics in compared):
        lines.append(f"PSNR of {equal} equal videos is infinite and not in the mean.")
    if no_lpips() and all(metrics["lpips"] is None for metrics in compared):
        lines.append(f"There is {no_lpips()}.")
    return " ".join(lines)


def _gain(data: dict[str, Any]) -> list[str]:
    """Explains the gain, and names the settings that radial is not compared with at the same operations."""
    known = [name for name, values in data["means"].items() if values.get("gain") is not None]
    if not known:
        return []
    costs = {setting["name"]: setting["attention_flops"] for setting in data["settings"]}
    curve = [cost for name, cost in costs.items() if _curve(name) == RADIAL and cost is not None]
    more = [name for name in known if costs[name] > max(curve)]
    fewer = [name for name in known if costs[name] < min(curve)]
    lines = [
        "Gain is PSNR over that of radial with as many operations, video by video, with the standard error: "
        "radial is interpolated linearly in its operations."
    ]
    if more:
        lines.append(f"For {', '.join(more)} it is at most this: every radial setting has fewer operations.")
    if fewer:
        lines.append(f"For {', '.join(fewer)} it is at least this: every radial setting has more operations.")
    return lines


def _videos(count: int) -> str:
    return f"{count} video{'s' * (count > 1)}"


def _recall(data: dict[str, Any], evaluation: Evaluation) -> str:
    if not data["attention"]:
        return "There is no recall: in every observed step the cache left out layers of some video."
    steps = ", ".join(map(str, next(iter(data["attention"].values()))["steps"]))
    return (
        "Recall, the share of the dense softmax mass on keys that the mask keeps, and the mean squared error "
        "of the attention's output are those of the mask itself in all layers and heads, of "
        f"{evaluation.rows} query tokens in the dense run at steps {steps}."
    )


def scores(by_setting: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Returns a line for each score of VBench and VisionReward, with a column for each setting."""
    if not by_setting:
        return []
    kinds = {(judge, name) for judges in by_setting.values() for judge in judges for name in judges[judge]}
    rows = (
        [f"{judge} {name}", *(number(x.get(judge, {}).get(name), ".4f") or "" for x in by_setting.values())]
        for judge, name in sorted(kinds)
    )
    return results.table("|".join(["score", *by_setting]), rows)


def settings(data: dict[str, Any], evaluation: Evaluation) -> list[str]:
    """Lists how the videos were made."""
    lines = [""]
    for entry in data["settings"]:
        described = describe_settings(evaluation.plans[entry["name"]].config).removeprefix("- ")
        lines.append(f"- {entry['name']} ({' '.join(entry['words']) or 'as configured'}): {described}")
    return lines
