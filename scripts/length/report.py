"""Writes what `scripts.length_study` measured: table, goals and whether they are reached, two pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from radial_attn.masks.draw import save_figure
from scripts.evaluation.frame_sheet import read_frames, sheet
from scripts.length.runs import ROWS, Result, Study, title
from scripts.length.scores import SCORES, by_part, difference, parts, shares
from scripts.lora.latents import LatentStore
from scripts.lora.plan import as_generation, training_flops
from scripts.run.describe import describe_settings
from scripts.run.files import write_text
from scripts.run.hub_models import read_model_info
from scripts.run.plan import attention_flops, other_flops
from scripts.run.system import hardware, pairs, versions
from scripts.run.validate import resolve_device, resolve_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NEAR, AHEAD, FASTER = 2.0, 10.0, 1.5  # points behind the dense adapter, ahead of no adapter; speed-up
LOSS_NEAR = 1.02  # times the loss of the dense adapter
OTHERS = ("spatial_lora", "temporal_lora", "strided_lora", "random_lora")
JUDGED = ("attributes", "whole", "motion_throughout", "size_right", "speed_right")
SHEET_FRAMES = 9
MARKERS = "osD^v<>PX*"
Goal = tuple[str, str, bool, str]  # what is wanted, what was found, whether it is reached, why not


def write(out: Path, command: str, options: Study, results: dict[str, Result]) -> list[Path]:
    """Writes the table to `out` and the pictures beside it; their paths."""
    import imageio

    out.parent.mkdir(parents=True, exist_ok=True)
    curves, frames = out.with_suffix(".png"), out.with_name(f"{out.stem}_frames.png")
    save_figure(draw(results), curves)
    rows = [read_frames(result.shown, SHEET_FRAMES) for result in results.values()]
    imageio.imwrite(frames, sheet(rows, 1))
    write_text(out, report(command, options, results, (curves.name, frames.name)))
    return [out, curves, frames]


def report(command: str, options: Study, results: dict[str, Result], pictures: tuple[str, str]) -> str:
    """The Markdown file."""
    entries = next(iter(results.values())).entries
    device = resolve_device(next(iter(results.values())).config)
    machine = pairs(versions(), hardware(device))
    order = ", ".join(title(result.config, name) for name, result in results.items())
    text = [
        "# Length extension on the bundled Wan",
        "",
        f"    {command}",
        "",
        *table(results),
        "",
        *explained(len(entries)),
        "",
        *goal_lines(options, results),
        f"![accuracy of each part of the video]({pictures[0]})",
        "",
        f'"{entries[0]["caption"]}", one seed, {SHEET_FRAMES} frames of each run, from above: {order}.',
        "",
        f"![frames of each run]({pictures[1]})",
        "",
        *settings(options, results),
        "",
        machine,
        "",
    ]
    return "\n".join(text)


def table(results: dict[str, Result]) -> list[str]:
    """A line for each run."""
    head = ["run", "density", *SCORES.values(), "held-out loss", "training, s a step", "inference, s a step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, result in results.items():
        scores = ["" if value is None else f"{value:.1f}" for value in shares(result.entries).values()]
        numbers = (result.held_out_loss, result.training_seconds, result.step_seconds)
        shown = ["" if value is None else f"{value:.3f}" for value in numbers]
        cells = [title(result.config, name), f"{result.density:.3f}", *scores, *shown]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def explained(captions: int) -> list[str]:
    """What the columns mean."""
    return [
        f"Percent of the videos of {captions} captions, one seed a caption and the same in every run, as "
        "`toyworld.read` sees them. Colour, shape, motion, background: of the whole video; all attributes is "
        "their mean, a whole caption is right when all four are. Motion throughout: every part as long as "
        "the model's training, read by itself, shows the motion of the caption. Identity held: colour and "
        "shape can be read in the first and the last quarter of the video and are the same; held and right: "
        "and are those of the caption. Size and speed right: radius and period are among those of the toy "
        "world, 10 % more or less. Held-out loss: the trainer's mean squared error of the velocity on longer "
        "videos held out, at fixed noise. Training: median of the trainer's log; inference: median time of a "
        "denoising step (both halves of guidance) of one video, all runs in turn in one process, dense steps "
        "counted by their number.",
    ]


def goal_lines(options: Study, results: dict[str, Result]) -> list[str]:
    """A table of the goals whose runs are there."""
    goals = [*accuracy_goals(results), *loss_goals(results), *speed_goals(options, results)]
    if not goals:
        return ["The goals need the runs dense, dense_lora and radial_lora.", ""]
    head = ["| wanted | measured | reached | why not |", "|---|---|---|---|"]
    lines = [f"| {wanted} | {found} | {'yes' if ok else 'no'} | {why} |" for wanted, found, ok, why in goals]
    return [*head, *lines, "", "± is the standard error of the difference, caption by caption.", ""]


def accuracy_goals(results: dict[str, Result]) -> Iterator[Goal]:
    """Of radial + LoRA against dense + LoRA, dense alone, and the other masks, in each judged score."""
    if "radial_lora" not in results:
        return
    told = [score for score in JUDGED if shares(results["radial_lora"].entries)[score] is not None]
    for score in told:
        if "dense_lora" in results:
            wanted = f"{SCORES[score]}: within {NEAR:g} points of dense + LoRA"
            yield _gap_goal(wanted, score, results, "dense_lora", -NEAR)
        if "dense" in results:
            wanted = f"{SCORES[score]}: at least {AHEAD:g} points above dense without tuning"
            yield _gap_goal(wanted, score, results, "dense", AHEAD)
        for name in OTHERS:
            if name in results:
                wanted = f"{SCORES[score]}: ahead of {name.removesuffix('_lora')} + LoRA"
                yield _gap_goal(wanted, score, results, name, None)


def loss_goals(results: dict[str, Result]) -> Iterator[Goal]:
    """Of radial + LoRA against the others by the loss on the videos held out, where both have one."""
    ours = results["radial_lora"].held_out_loss if "radial_lora" in results else None
    for name, result in results.items() if ours is not None else ():
        if name == "radial_lora" or result.held_out_loss is None:
            continue
        limit = LOSS_NEAR if name == "dense_lora" else 1.0
        wanted = f"within {LOSS_NEAR - 1:.0%} of" if name == "dense_lora" else "below that of"
        ratio = ours / result.held_out_loss
        hidden = "the mask hides what the other attends to"
        pairs_kept = "at equal density the other keeps pairs that matter more here"
        why = "" if ratio <= limit else pairs_kept if name in OTHERS else hidden
        yield f"held-out loss: {wanted} {ROWS[name].title}", f"{ratio:.2f} times", ratio <= limit, why


def _gap_goal(wanted: str, score: str, results: dict[str, Result], other: str, least: float | None) -> Goal:
    """`least`: points by which radial + LoRA has to be ahead; None: by any."""
    ours, theirs = results["radial_lora"].entries, results[other].entries
    gap, error = difference(score, ours, theirs)
    reached = gap > 0 if least is None else gap >= least
    why = "" if reached else _why_not(gap, error, least or 0.0, shares(theirs)[score])
    return wanted, f"{gap:+.1f} ± {error:.1f}", reached, why


def _why_not(gap: float, error: float, least: float, theirs: float) -> str:
    """In words: no room above, too few captions to tell, or a clear difference."""
    if 100 - theirs < max(least, 0.1):
        return f"the other has {theirs:.1f} %, at most {100 - theirs:.1f} points are left"
    if abs(gap - least) <= 2 * error:
        return "the difference to the goal is within two standard errors: more captions would tell"
    return "the difference to the goal is beyond two standard errors"


def speed_goals(options: Study, results: dict[str, Result]) -> Iterator[Goal]:
    """Step times of radial against dense."""
    if not {"dense_lora", "radial_lora"} <= results.keys():
        return
    dense, radial = results["dense_lora"], results["radial_lora"]
    bounds = operation_bounds(options, radial)
    pairs = {
        "training": (dense.training_seconds, radial.training_seconds),
        "inference": (dense.step_seconds, radial.step_seconds),
    }
    for kind, (slow, fast) in pairs.items():
        bound, share = bounds[kind]
        ratio, wanted = slow / fast, f"{kind} step at least {FASTER:g}x faster than dense"
        why = f"attention is {share:.0%} of the operations: {bound:.2f}x fewer in all with this mask"
        yield wanted, f"{ratio:.2f}x", ratio >= FASTER, "" if ratio >= FASTER else why


def operation_bounds(options: Study, radial: Result) -> dict[str, tuple[float, float]]:
    """Of both kinds of step: how many times fewer operations with the mask, attention's share if dense."""
    config, model = radial.config, read_model_info(resolve_model(radial.config))
    training, sizes = options.training_config("radial_lora"), radial.config.generation
    run = as_generation(training, [sizes.num_frames, sizes.height, sizes.width])
    operations = {
        "training": training_flops(training, model, run, radial.density),
        "inference": [*attention_flops(config, model, radial.density), other_flops(config, model)],
    }
    return {
        kind: ((dense + other) / (sparse + other), dense / (dense + other))
        for kind, (dense, sparse, other) in operations.items()
    }


def settings(options: Study, results: dict[str, Result]) -> list[str]:
    """How the runs were made."""
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
    """Percent of the videos that show all of the caption in each part, and the step time beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    along, cost = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (name, result) in enumerate(results.items()):
        sizes, trained = result.config.generation, result.config.model.positions_frames
        middles = [(part.start + part.stop - 1) / 2 for part in parts(sizes.num_frames, trained)]
        style = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "alpha": 0.8}
        style["label"] = title(result.config, name)
        along.plot(middles, by_part(result.entries), **style)
        cost.plot([result.step_seconds], [shares(result.entries)["whole"]], linestyle="", **style)
    along.set(xlabel="frame in the middle of a part", ylabel="percent with all of the caption in the part")
    cost.set(xlabel="seconds a denoising step", ylabel="percent with the whole caption", xlim=(0, None))
    for axes in (along, cost):
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    figure.legend(*along.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
