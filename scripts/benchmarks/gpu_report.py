"""Writes what the GPU benchmark measured: the numbers as JSON, tables, a plot; whole files or none."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from radial_attn.masks.draw import save_figure
from scripts.benchmarks.cases import BACKWARD_CASES, CASES, DENSE, SPARSE, STEPS
from scripts.benchmarks.findings import STEPS_OF_A_VIDEO, Findings, verdict
from scripts.run.files import write_text
from scripts.run.results import number, subplots, table

GIB = 2**30
NOTES = """Inputs are random normal, batch 1; times are medians of up to 10 calls by events, after calls that
do not count; an output that is not right gets no time. Calls of a sparse kernel take turns with those of the
fastest dense one, so that heat slows both; at over 400,000 tokens there is one dense call, after a second of
other work. Speed-up is over the fastest dense kernel; one far behind in its first case is not timed again.
Efficiency is speed-up x density: 1 if a kept block costs what it costs in dense attention. TFLOP/s count the
kept token pairs alone, 4 x heads x width each, and 3.5 times that for forward + backward, which is measured
on the cases that leave time for it. Relative L2 is against exact attention in float32 on four query blocks.
Memory is the peak of a call with its inputs. Goals are for an H200."""


def write(path: Path, data: dict[str, Any], *, picture: bool) -> None:
    """Writes `path` (.md) and its .json, with `picture` also its .png."""
    if picture:
        try:
            plot(Findings(data), path.with_suffix(".png"))
        except ImportError as error:
            data["left_out"].append(f"plot: {error}")
    write_text(path.with_suffix(".json"), json.dumps(data, indent=1))
    write_text(path, report(data, path.with_suffix(".png")))


def report(data: dict[str, Any], picture: Path) -> str:
    """Returns the results file."""
    findings = Findings(data)
    lines = head(data)
    if picture.exists():
        lines += ["", f"![efficiency and rate]({picture.name})"]
    lines += ["", "## Attention", "", NOTES]
    lines += attention_section(findings, "Forward", "forward", CASES)
    lines += attention_section(findings, "Forward + backward", "backward", BACKWARD_CASES)
    lines += [*launch_section(findings), *step_section(findings), *video_section(findings)]
    lines += [*check_section(data), *mask_section(data), *kernel_section(data)]
    lines += [*compile_section(data), *test_section(data)]
    lines += ["", "## Left out", "", *(f"- {line}" for line in data["left_out"] or ["nothing"])]
    return "\n".join(lines) + "\n"


def head(data: dict[str, Any]) -> list[str]:
    about, smi = data["machine"], data["smi"]
    name = about.get("gpu", "the CPU")
    title = f"# Radial attention on {name}"
    if data["rehearsal"]:
        title = f"# Rehearsal on {name}: tiny shapes, no measurement of a GPU"
    state = "" if data["finished"] else " **The run is not over, or was cut off.**"
    known = about["versions"].items()
    installed = [f"{key} {value}" for key, value in known if value != "absent" and key != "radial-attention"]
    machine = f"{', '.join(installed)}."
    if "gpu" in about:
        memory = f"{about['gpu_memory_bytes'] / GIB:.0f} GiB, {about['multiprocessors']} multiprocessors"
        machine = f"{name}, {memory}, CUDA {about['cuda']}, cuDNN {about['cudnn']}; {machine}"
    return [
        title,
        "",
        f"`{data['command']}`, {data['date']}, {data['minutes']:.1f} minutes.{state}",
        "",
        machine,
        "",
        f"nvidia-smi ({smi['query']}): before {smi['before']}; after {smi['after']}",
    ]


def test_section(data: dict[str, Any]) -> list[str]:
    tests = data["tests"]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in tests.get("counts", {}).items())
    parts = [counts, *tests.get("failed", []), tests.get("note", "")]
    return ["", "## Kernel tests on this machine", "", "; ".join(filter(None, parts)) or "no test ran"]


def check_section(data: dict[str, Any]) -> list[str]:
    """Lists errors on the small case, or the reason if a form is refused."""
    rows = []
    for name, check in data["checks"].items():
        if "failure" in check:
            rows.append((name, "cannot run", check["failure"], "", ""))
            continue
        wrong = False in (check.get("right"), check.get("gradients_right"))
        outcome = "WRONG" if wrong else check.get("late", "right")
        errors = (check.get(key) for key in ("out", "padded", "gradients"))
        cells = (format(error, ".1e") if isinstance(error, float) else error for error in errors)
        rows.append((name, outcome, *cells))
    lines = ["", "## Correctness on a small odd grid with text", ""]
    lines.append("Relative L2 error against the definition in float32, or the reason if a form is refused.")
    return lines + table("variant | verdict | output | padded text | worst gradient", rows)


def attention_section(findings: Findings, title: str, stage: str, cases: Iterable[str]) -> list[str]:
    rows = [
        attention_row(findings, stage, case, variant)
        for case in cases
        for variant in (*DENSE, *SPARSE)
        if findings.row(stage, case, variant)
    ]
    titles = (
        "case | variant | density | ms | TFLOP/s | speed-up | efficiency | goal | relative L2 | peak, GiB"
    )
    return ["", f"### {title}", *table(f"{titles} | first call, ms | call with a new mask, ms", rows)]


def attention_row(findings: Findings, stage: str, case: str, variant: str) -> list[object]:
    row, about = findings.row(stage, case, variant), findings.data["cases"][case]
    dense = variant in DENSE
    density = 1.0 if dense else about["density"]
    start = [case, f"dense {variant}" if dense else variant, format(density, ".3f")]
    if "ms" not in row:
        wrong = row.get("wrong") and f"wrong output, relative L2 {row['relative_l2']:.1e}"
        return [*start, wrong or row.get("failure", "left out"), *[""] * 8]
    peak = row.get("peak_bytes")
    return [
        *start,
        format(row["ms"], ".2f"),
        format(row["tflops"], ".0f" if row["tflops"] >= 10 else ".3f"),
        number(findings.speedup(stage, case, variant), ".2f"),
        None if dense else number(findings.efficiency(stage, case, variant), ".2f"),
        findings.goal(stage, case, variant),
        format(row["relative_l2"], ".1e"),
        peak and format(peak / GIB, ".2f"),
        format(row["first_ms"], ".0f"),
        number(row.get("new_mask_ms"), ".1f"),
    ]


def launch_section(findings: Findings) -> list[str]:
    """Lists launch configurations of the Triton kernel, as lines of its table."""
    rows = [
        [
            row["case"],
            f"`{row['variant']}`",
            number(row.get("ms"), ".2f") or row.get("failure", "wrong output"),
            number(findings.efficiency("launch", row["case"], row["variant"]), ".2f"),
        ]
        for row in findings.data["rows"]
        if row["stage"] == "launch"
    ]
    titles = "case | line of the launch table | ms | efficiency"
    return ["", "### Other launch configurations of triton", *table(titles, rows)] if rows else []


def compile_section(data: dict[str, Any]) -> list[str]:
    """Lists what was compiled before anything was timed."""
    made = data["compiled"].items()
    rows = [(name, number(x.get("seconds"), ".1f") or x.get("failure")) for name, x in made]
    return ["", "## Compiled beforehand", *table("for | first call, s", rows)] if rows else []


def step_section(findings: Findings) -> list[str]:
    """Lists the calls of the denoisers."""
    rows = [step_row(case, step) for case in STEPS for step in findings.steps(case)]
    lines = ["", "## One call of a denoiser", ""]
    lines.append(
        "Random weights of the real shape, text of full length, dense attention by the fastest dense kernel. "
        "Few blocks were built, none of them dense; the figures for the whole model below are put together "
        "from the time of each kind."
    )
    titles = "case | run | attends with | blocks | ms | attention, ms | share | one block, ms | peak, GiB"
    return lines + table(titles, rows)


def step_row(case: str, step: dict[str, Any]) -> list[object]:
    if "failure" in step:
        return [case, step["variant"], step["failure"], *[""] * 6]
    kinds = step["blocks_ms"].items()
    spent = step["attention_ms"] if step["attention_calls"] else None
    peak = step.get("peak_bytes")
    return [
        case,
        step["variant"],
        step["using"],
        ", ".join(f"{len(times)} {kind}" for kind, times in kinds),
        format(step["ms"], ".1f"),
        number(spent, ".1f"),
        spent and format(spent / step["ms"], ".0%"),
        ", ".join(format(sum(times) / len(times), ".1f") for _, times in kinds),
        peak and format(peak / GIB, ".1f"),
    ]


def video_section(findings: Findings) -> list[str]:
    """Computes 50 steps of each video."""
    videos = [findings.end_to_end(case, run) for case in STEPS for run in ("radial", "radial 8 bit")]
    rows = []
    for video in filter(None, videos):
        spec = video.spec
        settings = f"{spec.dense_steps} of {STEPS_OF_A_VIDEO}", spec.dense_layers, spec.calls
        calls = (format(ms, ".1f") for ms in (video.dense_ms, video.radial_ms))
        seconds = (format(seconds, ".0f") for seconds in (video.dense_seconds, video.radial_seconds))
        gain = format(video.speedup, ".2f"), verdict(video.speedup, spec.paper, "")
        rows.append([spec.case, video.variant, *settings, *calls, *seconds, *gain])
    lines = ["", f"## {STEPS_OF_A_VIDEO} steps of a video", ""]
    lines.append("Denoising alone, without text encoder and VAE, extrapolated from the blocks above.")
    titles = (
        "case | run | dense steps | dense layers | calls a step | one call dense, ms | one call radial, ms | "
        "dense, s | radial, s | speed-up | goal, the paper's"
    )
    return lines + table(titles, rows)


def mask_section(data: dict[str, Any]) -> list[str]:
    """Compares sparsity with the paper's, and lists what a mask costs."""
    rows = []
    for case in data["cases"].values():
        shape = case["title"], f"{case['heads']} x {case['width']}", case["tokens"], case["mask"]
        times = format(case["mask_ms"], ".1f"), format(case["mask_again_ms"], ".4f")
        rows.append([*shape, format(1 - case["density"], ".3f"), case["paper_sparsity"], *times])
    titles = "case | heads | tokens | mask | sparsity | paper's | built in, ms | again, ms"
    return ["", "## Masks", *table(titles, rows)]


def kernel_section(data: dict[str, Any]) -> list[str]:
    """Lists the kernels of each call, if the run has them."""
    rows = [
        (row["stage"], row["case"], row["variant"], name, format(ms, ".3f"))
        for row in data["rows"]
        for name, ms in row.get("kernels_ms", {}).items()
    ]
    return ["", "## Kernels of a call", *table("run | case | variant | kernel | ms", rows)] if rows else []


def plot(findings: Findings, path: Path) -> None:
    """Draws bars of efficiency and of TFLOP/s for each case."""
    cases = [case for case in CASES if findings.best_dense("forward", case)]
    variants = [name for name in SPARSE if any(findings.ms("forward", case, name) for case in cases)]
    figure, (upper, lower) = subplots((12, 8), 2, 1)
    count = len(variants) + 1
    for index, name in enumerate(["dense", *variants]):
        at = [x + 0.8 * index / count for x in range(len(cases))]
        names = [findings.best_dense("forward", case)[0] if name == "dense" else name for case in cases]
        pairs = list(zip(cases, names, strict=True))
        rates = [findings.row("forward", *pair).get("tflops", 0) for pair in pairs]
        lower.bar(at, rates, width=0.75 / count, label=name)
        if name != "dense":
            heights = [findings.efficiency("forward", *pair) or 0 for pair in pairs]
            upper.bar(at, heights, width=0.75 / count, label=name, color=f"C{index}")
    upper.axhline(1, color="black", linewidth=0.8)
    upper.set(title=f"{findings.data['machine'].get('gpu', 'CPU rehearsal')}, forward", ylabel="efficiency")
    lower.set(ylabel="TFLOP/s of kept pairs")
    for axes in (upper, lower):
        axes.set_xticks([x + 0.35 for x in range(len(cases))], cases)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    save_figure(figure, path)
