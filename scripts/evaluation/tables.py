"""What an evaluation found, as the content of evaluation.json and as a Markdown table."""

import os
from collections.abc import Iterable
from dataclasses import asdict
from statistics import mean, median
from typing import Any

from scripts.evaluation.metrics import no_lpips
from scripts.evaluation.recall import averaged, overall
from scripts.evaluation.settings import DENSE
from scripts.evaluation.videos import Evaluation, Take, machine
from scripts.run.describe import describe_settings
from scripts.run.system import pairs

METRICS = ("psnr", "ssim", "lpips")
COLUMNS = {
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "recall": ("recall", "{:.4f}"),
    "mse": ("output MSE", "{:.2e}"),
    "density": ("density", "{:.3f}"),
    "density_with_warmup": ("with warm-up", "{:.3f}"),
    "attention_flops": ("attention, FLOP", "{:.4g}"),
    "seconds_step": ("s a step", "{:.3f}"),
    "seconds_video": ("s a video", "{:.2f}"),
}


def content(evaluation: Evaluation, words: dict[str, list[str]]) -> dict[str, Any]:
    """`settings`, `videos`, `attention` and `means`; `words` are those of each setting.

    `elsewhere` counts the videos whose seconds are left out, since they are of another machine.
    """
    records = {
        name: {take: evaluation.record(name, take) for take in evaluation.takes} for name in evaluation.plans
    }
    attention = {name: _attention(records[DENSE].values(), name) for name in evaluation.masks}
    others = [name for name in evaluation.plans if name != DENSE]
    here = {name: machine(plan.device) for name, plan in evaluation.plans.items()}
    timed = {
        name: [record for record in own.values() if record["machine"] == here[name]]
        for name, own in records.items()
    }
    return {
        "reference": DENSE,
        "settings": [_setting(evaluation, name, words[name], timed[name]) for name in evaluation.plans],
        "elsewhere": sum(len(own) - len(timed[name]) for name, own in records.items()),
        "videos": [
            _video(evaluation, take, {name: records[name][take]["metrics"] for name in others})
            for take in evaluation.takes
        ],
        "attention": {name: found for name, found in attention.items() if found},
        "means": {
            name: means(record["metrics"] for record in records[name].values()) | _kept(attention.get(name))
            for name in others
        },
    }


def means(metrics: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each metric over the videos that have it; None without any."""
    found = {name: [] for name in METRICS}
    for entry in metrics:
        for name in METRICS:
            found[name] += [] if entry[name] is None else [entry[name]]
    return {name: mean(values) if values else None for name, values in found.items()}


def _attention(records: Iterable[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return averaged(record["attention"][name] for record in records if name in record["attention"])


def _kept(attention: dict[str, Any] | None) -> dict[str, float | None]:
    return {kind: overall(attention[kind]) if attention else None for kind in ("recall", "mse")}


def _setting(
    evaluation: Evaluation, name: str, words: list[str], records: list[dict[str, Any]]
) -> dict[str, Any]:
    return planned(evaluation, name) | {"words": words} | _seconds(evaluation, name, records)


def planned(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """What is known of a setting before it runs: grid, density, FLOPs of attention in a video, mask.

    With a cache, which skips calls, None stands for what counts all of them.
    """
    plan = evaluation.plans[name]
    grid, flops = plan.grid, plan.flops
    cached = plan.config.model.cache != "none"
    return {
        "name": name,
        "grid": [grid.frames, grid.height, grid.width, grid.text],
        "density": plan.block_mask.density,
        "density_with_warmup": None if cached else flops.sparse / flops.dense,
        "attention_flops": None if cached else flops.sparse,
        "mask": asdict(plan.mask),
    }


def _seconds(evaluation: Evaluation, name: str, records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians of a step that is not dense in all layers (if any is not), and of a video without loading."""
    if not records:
        return {"seconds_step": None, "seconds_video": None}
    plan = evaluation.plans[name]
    dense = set(plan.dense_steps)
    chosen = [step for step in range(plan.config.generation.steps) if step not in dense] or sorted(dense)
    return {
        "seconds_step": median(record["step_seconds"][step] for record in records for step in chosen),
        "seconds_video": median(
            sum(record["seconds"][stage] for stage in ("encode_text", "denoise", "decode"))
            for record in records
        ),
    }


def _video(evaluation: Evaluation, take: Take, metrics: dict[str, Any]) -> dict[str, Any]:
    paths = {name: evaluation.path(name, take) for name in evaluation.plans}
    files = {name: os.path.relpath(path, evaluation.work) for name, path in paths.items()}
    return {"prompt": take.prompt, "seed": take.seed, "files": files, "metrics": metrics}


def table(found: dict[str, Any]) -> list[str]:
    """A line for each setting, the columns that no setting has left out."""
    rows = [setting | found["means"].get(setting["name"], {}) for setting in found["settings"]]
    columns = {key: value for key, value in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    lines = [
        "| setting | " + " | ".join(head for head, _ in columns.values()) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = ["" if row.get(key) is None else form.format(row[key]) for key, (_, form) in columns.items()]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return lines


def markdown(data: dict[str, Any], evaluation: Evaluation | None) -> str:
    """The results file; `evaluation` is None for folders of videos."""
    text = [
        "# Fidelity to dense attention" if evaluation else f"# Fidelity to the videos of {data['reference']}",
        "",
        f"    {data['command']}",
        "",
        *table(data),
        "",
        explained(data, evaluation),
        "",
        *scores(data.get("scores", {})),
        *([] if evaluation is None else [*settings(data, evaluation), ""]),
        pairs(data["versions"], data["hardware"]),
        "",
    ]
    return "\n".join(text)


def explained(data: dict[str, Any], evaluation: Evaluation | None) -> str:
    """What the columns mean."""
    count = f"{len(data['videos'])} video{'s' * (len(data['videos']) > 1)}"
    lines = [f"Means over {count} against those of {data['reference']} of the same name."]
    if evaluation is not None:
        lines = [
            f"Means over {count} against the dense one of the same prompt and seed. Density is that of the "
            "mask; with warm-up it counts dense steps and layers. A step is the median of those that are not "
            "dense, a video the median without loading and writing."
        ]
        lines += [
            *([_recall(data, evaluation)] if evaluation.rows else []),
            *([_elsewhere(data["elsewhere"])] if data["elsewhere"] else []),
        ]
        if any(job.config.model.cache != "none" for job in evaluation.plans.values()):
            lines.append("Operations are not given with a cache, which skips calls.")
    compared = [metrics for video in data["videos"] for metrics in video["metrics"].values()]
    equal = sum(metrics["psnr"] is None for metrics in compared)
    if equal:
        lines.append(f"PSNR of {equal} equal videos is infinite and not in the mean.")
    if no_lpips() and all(metrics["lpips"] is None for metrics in compared):
        lines.append(f"There is {no_lpips()}.")
    return " ".join(lines)


def _recall(data: dict[str, Any], evaluation: Evaluation) -> str:
    if not data["attention"]:
        return "There is no recall: in no step that was looked at the cache left all layers in all videos."
    steps = ", ".join(map(str, next(iter(data["attention"].values()))["steps"]))
    return (
        "Recall, the share of the dense softmax mass on keys that the mask keeps, and the mean squared error "
        "of the attention's output are those of the mask itself in all layers and heads, of "
        f"{evaluation.rows} query tokens in the dense run at steps {steps}."
    )


def _elsewhere(count: int) -> str:
    videos = f"{count} video{'s' * (count > 1)}"
    return f"The seconds of {videos}, made on another machine or with other threads, are left out."


def scores(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """A line for each score of VBench and VisionReward, a column for each setting."""
    if not found:
        return []
    kinds = {(judge, name) for judges in found.values() for judge, own in judges.items() for name in own}
    lines = ["| score | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for judge, name in sorted(kinds):
        values = [judges.get(judge, {}).get(name) for judges in found.values()]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        lines.append("| " + " | ".join([f"{judge} {name}", *cells]) + " |")
    return [*lines, ""]


def settings(data: dict[str, Any], evaluation: Evaluation) -> list[str]:
    """How the videos were made."""
    return [
        f"- {entry['name']} ({' '.join(entry['words']) or 'as configured'}): "
        + describe_settings(evaluation.plans[entry["name"]].config).removeprefix("- ")
        for entry in data["settings"]
    ]
