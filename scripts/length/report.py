"""Writes the results of `scripts.length_study`: two tables, two pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

from radial_attn.masks.draw import save_figure
from scripts.evaluation.frame_sheet import read_frames, sheet
from scripts.length.runs import Result, Study, title
from scripts.lora.latents import LatentStore
from scripts.run.describe import describe_settings
from scripts.run.files import write_text
from scripts.run.machine_checks import find_device
from scripts.run.results import number, style, table
from scripts.run.system import hardware, pairs, versions
from scripts.toyworld.scores import SCORES, by_part, difference, parts, shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = "radial_lora"  # the second table compares this run with the others
JUDGED = ("attributes", "whole", "motion_throughout", "size_right", "speed_right")
SHEET_FRAMES = 9
MEANING = (
    "Percent of the videos of {} captions, one seed a caption and the same in every run, as the toy world's "
    "reader sees them. Colour, shape, motion, background: of the whole video; all attributes is their mean, "
    "a whole caption is right when all four are. Motion throughout: every part as long as the model's "
    "training, read by itself, shows the motion of the caption. Identity held: colour and shape can be read "
    "in the first and the last quarter of the video and are the same; held and right: and are those of the "
    "caption. Size and speed right: radius and period are among those of the toy world, 10 % more or less. "
    "Held-out loss: the trainer's mean squared error of the velocity on longer videos held out, at fixed "
    "noise. Training: median of the trainer's log; inference: median time of a denoising step (both halves "
    "of guidance) of one video, all runs in turn in one process, dense steps counted by their number."
)


def write(out: Path, command: str, options: Study, results: dict[str, Result]) -> list[Path]:
    """Writes the table to `out` and two pictures next to it; returns their paths."""
    import imageio

    curves, frames = out.with_suffix(".png"), out.with_name(f"{out.stem}_frames.png")
    write_text(out, report(command, options, results, (curves.name, frames.name)))
    save_figure(draw(results), curves)
    rows = [read_frames(result.shown, SHEET_FRAMES) for result in results.values()]
    imageio.imwrite(frames, sheet(rows, 1))
    return [out, curves, frames]


def report(command: str, options: Study, results: dict[str, Result], pictures: tuple[str, str]) -> str:
    """Returns the Markdown file."""
    first = next(iter(results.values()))
    machine = pairs(versions(), hardware(find_device(first.config.model.device)))
    order = ", ".join(title(result.config, name) for name, result in results.items())
    text = [
        "# Length extension on the bundled Wan",
        "",
        f"    {command}",
        *run_table(results),
        "",
        MEANING.format(len(first.entries)),
        "",
        *differences(results),
        f"![accuracy of each part of the video]({pictures[0]})",
        "",
        f'"{first.entries[0]["caption"]}", one seed, {SHEET_FRAMES} frames of each run, from above: {order}.',
        "",
        f"![frames of each run]({pictures[1]})",
        "",
        *settings(options, results),
        "",
        machine,
        "",
    ]
    return "\n".join(text)


def run_table(results: dict[str, Result]) -> list[str]:
    """Returns a line for each run."""
    heads = ["run", "density", *SCORES.values(), "held-out loss", "training, s a step", "inference, s a step"]
    rows = []
    for name, result in results.items():
        scores = [number(value, ".1f") or "" for value in shares(result.entries).values()]
        numbers = (result.held_out_loss, result.training_seconds, result.step_seconds)
        measured = [number(value, ".3f") or "" for value in numbers]
        rows.append([title(result.config, name), f"{result.density:.3f}", *scores, *measured])
    return table("|".join(heads), rows)


def differences(results: dict[str, Result]) -> list[str]:
    """Returns the table of radial + LoRA against each other run; nothing without both."""
    others = {name: result for name, result in results.items() if name != COMPARED}
    if COMPARED not in results or not others:
        return []
    ours = results[COMPARED]
    scores = [score for score in JUDGED if shares(ours.entries)[score] is not None]
    rows = []
    for name, other in others.items():
        gaps = (difference(score, ours.entries, other.entries) for score in scores)
        ratios = (
            (ours.held_out_loss, other.held_out_loss),
            (other.training_seconds, ours.training_seconds),
            (other.step_seconds, ours.step_seconds),
        )
        cells = [f"{gap:+.1f} ± {error:.1f}" for gap, error in gaps]
        cells += ["" if None in ratio else f"{ratio[0] / ratio[1]:.2f}" for ratio in ratios]
        rows.append([title(other.config, name), *cells])
    heads = [SCORES[score] for score in scores]
    heads += ["held-out loss, times theirs", "training, times faster", "inference, times faster"]
    return [
        "## Radial + LoRA against the others",
        "",
        "Points ahead, caption by caption, and the standard error of the difference.",
        *table("|".join(["run", *heads]), rows),
        "",
    ]


def settings(options: Study, results: dict[str, Result]) -> list[str]:
    """Lists the settings of the runs and of their training."""
    lines = list(dict.fromkeys(describe_settings(result.config) for result in results.values()))
    tuned = [name for name, result in results.items() if result.training_seconds is not None]
    if tuned:
        config, clips = options.training_config(tuned[0]), len(LatentStore.open(options.latents).samples)
        train = config.train
        held = config.validation.samples if config.validation.every else 0
        layers = f"rank {config.lora.rank} on {', '.join(config.lora.targets)}"
        data = f"{clips} videos, {held} of them held out"
        steps = (
            f"{train.steps} steps of {train.batch * train.accumulate}, rate {train.rate:g}, {train.schedule}"
        )
        lines.append(f"- adapters: {layers}; {data}; {steps}, shift {train.flow_shift:g}, seed {train.seed}")
    return lines


def draw(results: dict[str, Result]) -> "Figure":
    """Draws the percentage of videos that show all of the caption in each part, and that over step time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    along, cost = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (name, result) in enumerate(results.items()):
        sizes, trained = result.config.generation, result.config.model.positions_frames
        middles = [(part.start + part.stop - 1) / 2 for part in parts(sizes.num_frames, trained)]
        look = style(i) | {"alpha": 0.8, "label": title(result.config, name)}
        along.plot(middles, by_part(result.entries), **look)
        cost.plot([result.step_seconds], [shares(result.entries)["whole"]], linestyle="", **look)
    along.set(xlabel="frame in the middle of a part", ylabel="percent with all of the caption in the part")
    cost.set(xlabel="seconds a denoising step", ylabel="percent with the whole caption", xlim=(0, None))
    for axes in (along, cost):
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    figure.legend(*along.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
