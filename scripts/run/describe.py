"""Describes a run: all the lines that it prints about itself."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from radial_attn.masks.density_curve import changes, curve_lines
from radial_attn.models.pipeline.rope_scaling import describe, temporal_frequencies
from scripts.run.attention import measured, radial_config, sparse_call
from scripts.run.config import Config, keys
from scripts.run.families import segments
from scripts.run.loras import FoundLora
from scripts.run.memory import Kept, Memory, decoded_tiles, gib, is_tiled
from scripts.run.plan import RunPlan

SHARED = {  # who shares the number of blocks
    "head": "equally many by each head",
    "layer": "their number shared by the heads of a layer",
    "model": "their number shared by all layers",
}
LITTLE = 0.5  # below this share of the operations, the cost of attention hardly matters


def describe_plan(plan: RunPlan) -> str:
    """Returns the table that `--dry-run` prints."""
    generation, attention, model = plan.config.generation, plan.config.attention, plan.config.model
    grid, flops = plan.grid, plan.flops
    blocks = f"{grid.num_blocks(attention.block_size)} blocks of {attention.block_size}"
    shift = "of the model" if generation.flow_shift is None else f"{generation.flow_shift:g}"
    true = f", true guidance {generation.true_cfg_scale:g}" if generation.true_cfg_scale > 1 else ""
    static = attention.selection == "static"
    kind = attention.pattern if attention.compat == "none" else attention.compat
    density = f"{plan.density:.4f} ({kind if static else 'chosen'})"
    whole = f"{_flops(flops.dense + flops.other)} dense, {_flops(flops.sparse + flops.other)} as configured"
    rows = {
        "model": f"{model.path} ({model.family}, {model.dtype}) on {plan.device}",
        "video": describe_size(plan),
        "steps": f"{generation.steps}, guidance {generation.guidance_scale:g}{true}, flow shift {shift}",
        "tokens": f"{grid.tokens} = {grid.frames} latent frames x {grid.height} x {grid.width}, {blocks}",
        "density": "; ".join([density, *describe_density(plan)]),
        "dense steps": _ranges(plan.dense_steps, generation.steps) + _noise(plan),
        "dense layers": _ranges(range(plan.dense_layers), plan.model.layers),
        "attention": f"{_flops(flops.dense)} dense, {_flops(flops.sparse)} as configured "
        f"({flops.dense / flops.sparse:.2f}x fewer)",
        "transformer": f"{whole} ({flops.fewer:.2f}x fewer)",
        "memory": _describe_memory(plan.memory),
    }
    if (count := len(plan.prompts) * len(generation.all_seeds)) > 1:
        seeds = ", ".join(map(str, generation.all_seeds))
        rows["videos"] = f"{count}: {len(plan.prompts)} prompts, seeds {seeds}"
    rows |= describe_adaptive(plan)
    call = sparse_call(attention, plan.block_mask, plan.device, model.dtype, plan.model.head_dim)
    if names := measured(attention, call, grid.tokens):
        rows["measured"] = f"at the first sparse call: {', '.join(names)}; tune={attention.tune}"
    lines = [_row(name, text) for name, text in rows.items()] + _memory_choices(plan)
    if attention.pattern != "dense" and static and attention.compat == "none":
        lines += [
            _row("curve", line) for line in curve_lines(grid, radial_config(attention, plan.model.references))
        ]
    lines += [_row("note", note) for note in notes(plan)]
    lines += [_row("note", f"not on this machine: {problem}") for problem in plan.missing]
    lines += [*_rank_lines(plan), *describe_decoding(plan), *describe_further(plan)]
    return "\n".join(lines)


def describe_size(plan: RunPlan) -> str:
    """Returns size, length and segments: `64x64, 33 frames at 16 per second`."""
    generation = plan.config.generation
    sizes = f"{generation.height}x{generation.width}, {generation.num_frames} frames"
    each = segments(plan.config.model.family, generation)
    shorter = f", the last of {each[-1]}" if each[-1] < each[0] else ""
    several = f", {len(each)} segments of {each[0]}{shorter}, one after the other" if len(each) > 1 else ""
    return f"{sizes} at {plan.config.output.fps} per second{several}"


def describe_start(plan: RunPlan) -> list[str]:
    """Returns the lines before a run: its processes, its density, warnings, notes, and the gain."""
    several = plan.degrees.processes > 1
    remarks = [*plan.warnings, *notes(plan), *gain(plan)]
    return [
        *([describe_degrees(plan), *describe_decoding(plan)] if several else []),
        *describe_density(plan),
        *(f"note: {remark}" for remark in remarks),
        *describe_further(plan),
    ]


def describe_further(plan: RunPlan) -> list[str]:
    """Returns the lines on positions, files of weights and LoRAs, if there are any."""
    return [*describe_positions(plan), *describe_files(plan), *describe_loras(plan), *training_notes(plan)]


def describe_density(plan: RunPlan) -> list[str]:
    """Returns how `attention.density` was solved, if given: `density 0.25: decay_factor 0.125, ...`."""
    wanted, densities = radial_config(plan.config.attention, plan.model.references), plan.densities.values()
    if len(set(densities)) > 1:
        return [", ".join(f"{density:.3f} at step {step}" for step, density in _changes(plan.densities))]
    if wanted.density is None or wanted.pattern == "dense" or plan.config.attention.selection != "static":
        return []
    return [f"density {wanted.density:g}: {changes(plan.mask, wanted)}"]


def _changes(densities: dict[int, float]) -> list[tuple[int, float]]:
    """Returns the steps at which the density changes, with the new one."""
    pairs = list(densities.items())
    return [pair for before, pair in zip([(None, None), *pairs], pairs, strict=False) if before[1] != pair[1]]


def _noise(plan: RunPlan) -> str:
    """Returns the noise levels of the dense steps: `, sigma 1 to 0.94`."""
    if not plan.dense_steps or plan.sigmas is None or len(plan.dense_steps) == len(plan.sigmas):
        return ""
    ends = [sorted({run[0], run[-1]}) for run in _runs(plan.dense_steps)]
    return ", sigma " + ", ".join(" to ".join(f"{plan.sigmas[step]:.3g}" for step in run) for run in ends)


def describe_adaptive(plan: RunPlan) -> dict[str, str]:
    """Returns rows on chosen blocks, far field and residual, with what they cost."""
    attention, rows, beyond = plan.config.attention, {}, plan.beyond
    if attention.pattern == "dense":
        return rows
    if attention.selection != "static":
        steps = ", ".join(map(str, plan.recording_steps))
        at = "at step" if len(plan.recording_steps) == 1 else "at steps"
        how = f"{at} {steps}" if attention.profile is None else f"by {attention.profile}"
        rows["selection"] = (
            f"blocks chosen {how}, {SHARED[attention.budget]}; masks of "
            f"{_places(plan.kept(residual='none'))}, {_share(beyond.measured * beyond.steps, plan)} of the "
            "operations"
        )
    if attention.far_field != "none":
        count = len(plan.densities)
        rows["far field"] = f"{attention.far_field}, {_share(beyond.sparse * count, plan)} of the operations"
    if attention.residual != "none":
        kept, share = plan.kept(selection="static"), _share(beyond.lacking * beyond.steps, plan)
        rows["residual"] = f"{attention.residual}, {_places(kept)}, {share} of the operations"
    return rows


def _places(kept: Kept) -> str:
    """Writes what is kept on the device, and in host memory: `0.52 GiB, 1.74 GiB of host memory`."""
    parts = {"": kept.device, " of host memory": kept.host}
    return ", ".join(f"{gib(size)}{place}" for place, size in parts.items() if size)


def _share(layer_calls: float, plan: RunPlan) -> str:
    """Writes dense self-attention calls of a layer as a share of the operations of the run."""
    generation = plan.config.generation
    steps = generation.steps * len(segments(plan.config.model.family, generation))
    one = plan.flops.dense / steps / plan.model.attention_layers()
    able = plan.model.attention_layers(plan.dense_layers)
    return f"{one * able * layer_calls / (plan.flops.sparse + plan.flops.other):.2%}"


def _memory_choices(plan: RunPlan) -> list[str]:
    """Returns lines with the predicted peak on a GPU for each quantization and offload."""
    if not sum(plan.model.parameters.values()):
        return []
    offloads, kinds = (keys()[f"model.{name}"].metadata["choices"] for name in ("offload", "quantization"))
    lines = []
    for kind in ("none",) if plan.model.packed else kinds:
        needs = (
            f"{offload} {gib(plan.memory_of(plan.size, 'cuda', quantization=kind, offload=offload).total)}"
            for offload in offloads
        )
        lines.append(_row("GPU memory", f"quantization {kind}: offload {', '.join(needs)}"))
    return lines


def gain(plan: RunPlan) -> list[str]:
    """Returns the share of attention and what the mask saves, if it is much; `notes` says if it is little."""
    if plan.flops.share < LITTLE or plan.config.attention.pattern == "dense":
        return []
    return [
        f"attention is {plan.flops.share:.0%} of the operations: {plan.flops.fewer:.2f}x fewer in all with "
        "this mask"
    ]


def notes(plan: RunPlan) -> list[str]:
    """Returns the plan's notes; warns of unknown weights, little gain, and a mask that keeps too little."""
    lines, attention = list(plan.notes), plan.config.attention
    if not sum(plan.model.parameters.values()):
        path = plan.config.model.path
        lines.append(f"memory: not checked, the size of the weights of {path} is unknown before loading")
    if attention.pattern == "dense":
        return lines
    frame, free = plan.grid.tokens_per_frame, attention.compat == "none"
    if free and 3 * frame < attention.block_size:
        lines.append(f"frames of {frame} tokens are under a third of a block: set attention.block_size=16")
    width = attention.block_size if attention.decimation_width == "block" else attention.decimation_width
    power = 1 << (frame.bit_length() - 1)
    if free and width // power > 1:  # the rule keeps distance 1 only if this is 1
        lines.append(
            f"frames of {frame} tokens lose their neighbours: set attention.decimation_width={power} or less"
        )
    share = plan.flops.share
    if share < LITTLE:
        lines.append(f"attention is {share:.0%} of the operations: at most {1 / (1 - share):.2f}x to gain")
    return lines


def describe_degrees(plan: RunPlan) -> str:
    """Returns one line on the degrees: what processes share, and why."""
    degrees, given = plan.degrees, vars(plan.config.parallel)
    because = {
        "cfg": "the halves of guidance",
        "ulysses": f"{plan.model.heads} heads",
        "ring": f"keys, as {degrees.ulysses * degrees.ring} does not divide {plan.model.heads} heads",
        "data": "the prompts",
    }
    parts = [
        f"{name} {getattr(degrees, name)} ({'given' if given[f'{name}_degree'] else f'shares {what}'})"
        for name, what in because.items()
        if getattr(degrees, name) > 1
    ]
    return f"{degrees.processes} processes: {', '.join(parts)}"


def describe_decoding(plan: RunPlan) -> list[str]:
    """Returns one line on who decodes a video, if several processes make it."""
    count = plan.degrees.processes // plan.degrees.data
    pieces = decoded_tiles(plan.model, plan.size, plan.config.model)
    if count == 1:
        return []
    if pieces > 1:
        return [f"decoding: {pieces} tiles shared by {min(count, pieces)} processes"]
    hint = "" if is_tiled(plan.config.model) else "; set model.vae_tiling=always to share it as tiles"
    return [f"decoding: by one process, as one tile{hint}"]


def _rank_lines(plan: RunPlan) -> list[str]:
    """Returns lines on the work of each process, if there are several."""
    if plan.degrees.processes == 1:
        return []
    work = plan.rank_work
    dense, sparse = (f"{(work.other + flops) / 1e15:.3f}" for flops in (work.dense, work.sparse))
    lines = [
        f"each process  {work.sent.total / 1e9:.2f} GB sent a step, {dense} PFLOP in a dense step, {sparse} "
        f"in a radial one, {work.kept_blocks} kept blocks a layer"
    ]
    if plan.degrees.ring > 1:
        lines.append(
            f"ring          {work.sent.ring / 1e9:.2f} GB of that; kept blocks of the busiest process "
            f"{work.busiest:.3f} of the mean, {work.waiting:.3f} with waiting at each of {plan.degrees.ring} "
            "steps"
        )
    return [*lines, f"each process  {gib(plan.rank_memory.total)} of memory"]


def describe_positions(plan: RunPlan) -> list[str]:
    """Returns how positions are scaled, if not plain: `positions: riflex, component 4 of 22 lowered ...`."""
    if plan.config.model.positions == "plain":
        return []
    time = plan.model.rope_time
    frequencies = None if time is None else temporal_frequencies(*time)
    return [f"positions: {describe(**plan.position_arguments(), frequencies=frequencies)}"]


def describe_files(plan: RunPlan) -> list[str]:
    """Returns a line for each file of weights: `weights  transformer from a.gguf, 8.60 GiB, F32 and Q4_K`."""
    return [
        _row(
            "weights",
            f"{name} from {found.file}, {gib(found.file.stat().st_size)}, {' and '.join(found.types)}",
        )
        for name, found in plan.files.items()
    ]


def describe_loras(plan: RunPlan) -> list[str]:
    """Returns a line for each LoRA."""
    return [_row("lora", f"{_lora(lora)}, {plan.config.model.lora_mode}") for lora in plan.loras]


def _lora(lora: FoundLora) -> str:
    entry = lora.entry
    text = f"{f'{entry.path} {entry.weight_name or str()}'.strip()}, scale {entry.scale:g}"
    if entry.transformer != "both":
        text += f", transformer {entry.transformer}"
    if lora.match is None:
        return f"{text}, not checked ({'the model' if lora.file else 'the file'} is not downloaded yet)"
    left_out = len(lora.match.unmatched) + len(lora.match.misfits)
    lost = f", {left_out} left out" if left_out else ""
    return f"{text}, {len(lora.match.pairs)} layers, {len(lora.match.deltas)} other changes{lost}"


def training_notes(plan: RunPlan) -> list[str]:
    """Returns a note for each adapter of scripts/train_lora.py that was trained for other settings."""
    lines = []
    for lora in plan.loras:
        trained = lora.header.trained if lora.header else {}
        if trained and (differences := list(_differences(plan, lora, trained))):
            lines.append(f"note: LoRA {lora.entry.path} was trained with {', '.join(differences)}")
    return lines


def _differences(plan: RunPlan, lora: FoundLora, trained: dict[str, Any]) -> Iterator[str]:
    """Yields `key=value (here value)` for each setting in the file's header that differs from the run's."""
    model = plan.config.model
    sizes = {name: getattr(plan.config.generation, name) for name in ("num_frames", "height", "width")}
    fitting = [size for size in trained["sizes"] if all(size[name] == x for name, x in sizes.items())]
    if not fitting:
        others = ", ".join(
            f"{size['num_frames']}x{size['height']}x{size['width']}" for size in trained["sizes"]
        )
        yield f"videos of {others} (here {'x'.join(map(str, sizes.values()))})"
    size = (fitting or trained["sizes"])[0]
    names = ("dense_layers", "far_field")
    here = asdict(plan.mask) | {name: getattr(plan.config.attention, name) for name in names}
    for name, value in (size["mask"] | {name: size.get(name, "none") for name in names}).items():
        if here.get(name) != value:
            yield f"attention.{name}={value} (here {here.get(name)})"
    name = "positions" if trained["positions"] != model.positions else "positions_frames"
    now = getattr(model, name)
    if trained[name] != now and not trained["positions"] == model.positions == "plain":
        yield f"model.{name}={trained[name]} (here {now})"
    two = "transformer_2" in plan.model.parameters
    if two and lora.entry.transformer != str(trained["expert"]):
        yield f"transformer {trained['expert']} alone (here {lora.entry.transformer})"


def describe_settings(config: Config) -> str:
    """Returns the settings of one configuration as a list item in Markdown."""
    sizes = config.generation
    numbers = f"guidance {sizes.guidance_scale}, shift {sizes.flow_shift}, seeds from {sizes.seed}"
    options = ", ".join(f"{k} {v}" for k, v in asdict(config.attention).items() if k != "pattern")
    return f"- {config.model.path}, {sizes.num_frames} frames: {sizes.steps} steps, {numbers}; {options}"


def duration(seconds: float) -> str:
    """Writes a time to wait in the unit that fits it: `40 s`, `12 min`, `2 h`, `3 days`."""
    for limit, size, unit in ((90, 1, "s"), (90 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{max(1, round(seconds / size))} {unit}"
    return f"{round(seconds / 86400)} days"


def _row(name: str, text: str) -> str:
    return f"{name:<13} {text}"


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Groups sorted numbers that follow each other."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _ranges(numbers: range | tuple[int, ...], total: int) -> str:
    """Writes sorted numbers, counted from 0, as '14 of 50 (0-11, 48-49)'."""
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in _runs(numbers))
    return f"{len(numbers)} of {total} ({text})" if numbers else f"none of {total}"


def _flops(value: float) -> str:
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value / 1e9:.4g} GFLOP"


def _describe_memory(need: Memory) -> str:
    weights = gib(need.weights) if need.weights else "an unknown amount for"
    host = f" + {gib(need.host)} program" if need.host else ""
    return f"{gib(need.total)} predicted: {weights} weights + {gib(need.activations)} activations{host}"
