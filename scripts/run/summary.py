"""Summarizes a finished video: seconds, attention calls and why some were dense, speed-up, memory."""

from statistics import median
from typing import Any

from scripts.run.attention import sparse_name
from scripts.run.memory import GIB
from scripts.run.plan import RunPlan
from scripts.run.system import pairs


def step_speed(plan: RunPlan, seconds: list[float]) -> dict[str, float | None]:
    """Compares the sparse steps of a video with its dense ones.

    Args:
        seconds: of each step.

    Returns:
        Median seconds of a `dense_step` and of a `sparse_step`; their ratio, the `speedup`; `operations`,
        those of a sparse step over those of a dense one; and `efficiency`, the product of the last two. What
        is not known is None: a run may lack either kind of steps, and a cache skips some of their work.
    """
    steps = plan.config.generation.steps  # of each segment
    times = [
        [x for step, x in enumerate(seconds) if (step % steps in plan.dense_steps) is dense]
        for dense in (True, False)
    ]
    dense, sparse = (median(x) if x else None for x in times)
    known = None not in (dense, sparse) and plan.config.model.cache == "none"
    speedup = dense / sparse if known else None
    share = plan.flops.sparse_share(len(seconds), len(times[1])) if times[1] else None
    efficiency = speedup * share if known else None
    result = {"dense_step": dense, "sparse_step": sparse, "speedup": speedup}
    return result | {"operations": share, "efficiency": efficiency}


def describe_video(record: dict[str, Any], path: object) -> list[str]:
    """Returns the summary of a video: seconds, attention, checks, gain and memory."""
    sparse = sparse_name(record["config"]["attention"])
    seconds = {stage.replace("_", " "): f"{value:.2f}" for stage, value in record["seconds"].items()}
    speed, count = record["speed"], len(record["step_seconds"])
    steps = record["config"]["generation"]["steps"]
    dense = sum(step % steps in record["dense_steps"] for step in range(count))
    kinds = ("dense", dense, "dense_step"), (sparse, count - dense, "sparse_step")
    steps = {name: f"{speed[key]:.3f} s (median of {many})" for name, many, key in kinds if many}
    faster = f": {times_faster(speed['speedup'])}" if speed["speedup"] else ""
    faster += f", efficiency {speed['efficiency']:.2f}" if speed["efficiency"] else ""
    check = record["attention"]["check"]
    peak = {kind.split("_")[0]: f"{size / GIB:.2f} GiB" for kind, size in record["peak_memory"].items()}
    predicted = sum(record["predicted_memory"].values()) / GIB
    lines = [
        f"video      {path} (record: the .json of the same name)",
        f"seconds    {pairs(seconds)}, total {sum(record['seconds'].values()):.2f}",
        f"a step     {pairs(steps)}{faster}",
        f"attention  {record['tokens']} tokens, density {record['density']:.3f}; "
        f"calls: {describe_calls(record['attention'])}",
    ]
    if (cache := record["cache"])["kind"] != "none":
        skipped, has_threshold = cache["due"] - cache["computed"], cache["kind"] in ("first_block", "mag")
        hint = "; a larger model.cache_threshold skips more" if not skipped and has_threshold else ""
        lines.append(f"cache      {cache['kind']}: {skipped} of {cache['due']} attention calls skipped{hint}")
    if "worst" in check:
        worst = "{where}: relative L2 {relative_l2:.2e}, cosine {cosine:.6f}".format(**check["worst"])
        lines.append(f"check      {check['compared']} outputs against the reference, worst in {worst}")
    lines += _measured_gain(record)
    return [*lines, f"memory     {pairs(peak)} at the peak, {predicted:.2f} GiB predicted"]


def describe_calls(report: dict[str, Any]) -> str:
    """Counts attention calls by backend, and those with every block by reason: `8 cpp, 4 dense (4 mask)`."""
    calls = sorted(report["calls"].items(), key=lambda entry: entry[0] == "dense")
    texts = [f"{count} {name}" for name, count in calls] or ["none"]
    stayed = {name: count for name, count in report["stayed_dense"].items() if count}
    cross = stayed.pop("cross_attention", 0)
    reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in stayed.items())
    texts[-1] += f" ({reasons})" if reasons else ""
    return ", ".join([*texts, f"{cross} cross-attention"] if cross else texts)


def _measured_gain(record: dict[str, Any]) -> list[str]:
    """Estimates how long denoising would take with every step dense, from the median dense step."""
    speed, count = record["speed"], len(record["step_seconds"])
    if None in (speed["dense_step"], speed["sparse_step"]) or record["cache"]["kind"] != "none":
        return []
    took, steps = record["seconds"]["denoise"], record["config"]["generation"]["steps"]
    dense = all_dense(record["step_seconds"], steps, record["dense_steps"])
    typical = "median dense step" + " of a segment" * (count > steps)
    return [
        f"gain       denoising {took:.2f} s; with every step dense {dense:.2f} s ({count} x the {typical}): "
        f"{times_faster(dense / took)}"
    ]


def all_dense(seconds: list[float], steps: int, dense_steps: list[int]) -> float:
    """Estimates the seconds of a video whose `steps` steps are all dense, segment by segment."""
    parts = [seconds[start : start + steps] for start in range(0, len(seconds), steps)]
    return sum(steps * median(part[step] for step in dense_steps) for part in parts)


def times_faster(ratio: float) -> str:
    """Says how many times faster, or slower if the ratio of the seconds, old over new, is below 1."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
