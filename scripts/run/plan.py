"""What a run will cost, worked out before any weight is loaded: tokens, density, FLOPs, memory."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from radial_attn.models.runtime.schedule import Schedule

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.masks.density import resolve_density
from radial_attn.masks.density_curve import changes, curve_lines
from radial_attn.masks.patterns import COMPARED
from scripts.run.config import Config, keys
from scripts.run.errors import UsageError
from scripts.run.families import calls_per_step
from scripts.run.memory import GIB, HOST_BYTES, Memory, peak, whole_weights
from scripts.run.model_info import ModelInfo

LITTLE = 0.5  # share of attention below which its cost hardly matters


def radial_config(config: Config) -> RadialConfig:
    """The attention group as the method's own configuration."""
    names = ("decay_factor", "block_size", "sink", "neighbour", "decimation_width", "pattern", "density")
    return RadialConfig(**{name: getattr(config.attention, name) for name in names})


def solved_config(config: Config, model: ModelInfo) -> RadialConfig:
    """The same, with `attention.density` solved for.

    Raises UsageError where the grid has no mask of it, or none of another pattern about as dense.
    """
    grid = token_grid(config, model)
    try:
        solved = resolve_density(grid, radial_config(config))
        if solved.pattern in COMPARED:
            radial_mask(grid, solved)  # says whether there is one; it is kept
        return solved
    except ValueError as error:
        raise UsageError(f"attention.{error}") from error


def describe_density(config: Config, model: ModelInfo) -> list[str]:
    """What `attention.density` became, where there is one: `density 0.25: decay_factor 0.125, ...`."""
    wanted = radial_config(config)
    if wanted.density is None or wanted.pattern == "dense":
        return []
    return [f"density {wanted.density:g}: {changes(solved_config(config, model), wanted)}"]


def token_grid(config: Config, model: ModelInfo) -> TokenGrid:
    """Tokens of the transformer: latent frames and pixels over the patch size."""
    sizes = config.generation
    return TokenGrid(
        latent_frames(sizes.num_frames, model),
        sizes.height // model.vae_pixels // model.patch[1],
        sizes.width // model.vae_pixels // model.patch[2],
        model.joint_text,
    )


def latent_frames(frames: int, model: ModelInfo) -> int:
    """Tokens in time of so many video frames."""
    return ((frames - 1) // model.vae_frames + 1) // model.patch[0]


def dense_steps(config: Config) -> list[int]:
    """Numbers of the denoising steps, from 0, whose attention is dense in every layer."""
    attention, steps = config.attention, config.generation.steps
    schedule = Schedule(attention.dense_steps, attention.dense_layers, attention.dense_last_steps, steps)
    return [s for s in range(steps) if attention.pattern == "dense" or schedule.is_dense(s, None)]


def dense_layers(config: Config, model: ModelInfo) -> int:
    """How many layers, from the first, have dense attention at every step."""
    return model.layers if config.attention.pattern == "dense" else config.attention.dense_layers


def attention_options(config: Config) -> dict[str, Any]:
    """The attention group as the keyword arguments of `apply_radial_attention`."""
    names = ("dense_steps", "dense_layers", "dense_last_steps", "dense_backend", "backend", "check")
    options = {name: getattr(config.attention, name) for name in names}
    quantize = None if config.attention.quantize == "none" else config.attention.quantize
    return options | {"config": radial_config(config), "quantize": quantize}


def step_pattern(config: Config, step: int) -> str:
    """'dense', or the pattern of the layers that are not dense at every step."""
    return "dense" if step in dense_steps(config) else config.attention.pattern


def attention_flops(config: Config, model: ModelInfo, density: float) -> tuple[float, float]:
    """Floating-point operations of self-attention in the whole run: (all dense, as configured).

    4 n^2 d for one layer's scores and weighted sum, two calls a step where guidance is on.
    """
    calls = calls_per_step(config)
    one = 4.0 * token_grid(config, model).tokens ** 2 * model.width * calls
    steps, dense = config.generation.steps, len(dense_steps(config))
    sparse = (steps - dense) * model.attention_layers(dense_layers(config, model))
    everything = steps * model.attention_layers()
    return one * everything, one * (everything - sparse + sparse * density)


def other_flops(config: Config, model: ModelInfo) -> float:
    """Operations of the transformer outside self-attention: projections, feed-forward, cross-attention."""
    calls = config.generation.steps * calls_per_step(config)
    tokens, width = token_grid(config, model).tokens, model.width
    linear = 2.0 * tokens * model.macs + 4.0 * model.text_tokens * width**2
    return calls * model.attention_layers() * (linear + 4.0 * tokens * model.text_tokens * width)


def memory(config: Config, model: ModelInfo, device: str) -> Memory:
    """Predicted peak of a run on `device`."""
    return peak(config, model, token_grid(config, model), mask_bytes(config, model), device)


def host_bytes(config: Config, model: ModelInfo) -> float:
    """Host memory of a run on a GPU: all weights are read into it before they move."""
    return sum(whole_weights(config, model).values()) + HOST_BYTES


def mask_bytes(config: Config, model: ModelInfo) -> int:
    """Memory of building the block mask: a byte for each pair of blocks, twice."""
    return 2 * token_grid(config, model).num_blocks(config.attention.block_size) ** 2


def fitting(config: Config, model: ModelInfo, device: str, budget: float) -> str | None:
    """Keys whose run needs at most `budget` bytes: fewer frames, else a smaller size, else both."""

    def fits(**sizes: int) -> bool:
        smaller = replace(config, generation=replace(config.generation, **sizes))
        return memory(smaller, model, device).total <= budget

    size = config.generation
    step, chunks = model.vae_frames, (size.num_frames - 1) // model.vae_frames
    most = _largest(chunks, lambda k: fits(num_frames=step * k + 1))
    if most is not None:
        return f"generation.num_frames={step * most + 1}"
    most = _largest(63, lambda k: k == 0 or fits(**_scaled(config, model, k)))
    if most:
        return _as_keys(_scaled(config, model, most))
    smallest = _scaled(config, model, 0)
    most = _largest(chunks, lambda k: fits(num_frames=step * k + 1, **smallest))
    return None if most is None else _as_keys({**smallest, "num_frames": step * most + 1})


def _scaled(config: Config, model: ModelInfo, sixty_fourths: int) -> dict[str, int]:
    """Height and width shrunk alike, as multiples of what the model takes."""
    sides = {"height": (config.generation.height, 1), "width": (config.generation.width, 2)}
    factors = {name: model.size_factor(axis) for name, (_, axis) in sides.items()}
    shrunk = {name: side * sixty_fourths // 64 for name, (side, _) in sides.items()}
    return {name: max(factors[name], side // factors[name] * factors[name]) for name, side in shrunk.items()}


def _as_keys(sizes: dict[str, int]) -> str:
    return " ".join(f"generation.{name}={value}" for name, value in sizes.items())


def _largest(limit: int, fits: Callable[[int], bool]) -> int | None:
    """The largest k in 0 .. limit that fits, for a predicate that is true up to some k and false beyond."""
    low, high = -1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low if low >= 0 else None


def describe(config: Config, model: ModelInfo, device: str, remarks: Sequence[str] = ()) -> str:
    """The table that `--dry-run` prints, with notes and further remarks."""
    sizes, attention = config.generation, config.attention
    grid, need = token_grid(config, model), memory(config, model, device)
    mask = radial_mask(grid, radial_config(config))
    dense, radial = attention_flops(config, model, mask.density)
    other = other_flops(config, model)
    blocks = f"{grid.num_blocks(attention.block_size)} blocks of {attention.block_size}"
    rows = {
        "model": f"{config.model.path} ({config.model.family}, {config.model.dtype}) on {device}",
        "video": f"{sizes.height}x{sizes.width}, {sizes.num_frames} frames at {config.output.fps} per second",
        "steps": f"{sizes.steps}, guidance {sizes.guidance_scale:g}, flow shift {_shift(sizes.flow_shift)}",
        "tokens": f"{grid.tokens} = {grid.frames} latent frames x {grid.height} x {grid.width}, {blocks}",
        "density": "; ".join([f"{mask.density:.4f} ({attention.pattern})", *describe_density(config, model)]),
        "dense steps": _ranges(dense_steps(config), sizes.steps),
        "dense layers": _ranges(list(range(dense_layers(config, model))), model.layers),
        "attention": f"{_flops(dense)} dense, {_flops(radial)} as configured ({dense / radial:.2f}x fewer)",
        "transformer": f"{_flops(dense + other)} dense, {_flops(radial + other)} as configured "
        f"({(dense + other) / (radial + other):.2f}x fewer)",
        "memory": _describe_memory(need, model),
    }
    lines = [f"{name:<13} {text}" for name, text in rows.items()] + memory_choices(config, model)
    if attention.pattern != "dense":
        lines += [f"{'curve':<13} {line}" for line in curve_lines(grid, radial_config(config))]
    return "\n".join(lines + [f"{'note':<13} {note}" for note in [*notes(config, model), *remarks]])


def memory_choices(config: Config, model: ModelInfo) -> list[str]:
    """Lines of `--dry-run`: the predicted peak on a GPU for each quantization and offload."""
    offloads, kinds = (keys()[f"model.{name}"].metadata["choices"] for name in ("offload", "quantization"))
    lines = []
    for kind in kinds:
        choices = {name: replace(config.model, quantization=kind, offload=name) for name in offloads}
        needs = (
            f"{name} {gib(memory(replace(config, model=choice), model, 'cuda').total)}"
            for name, choice in choices.items()
        )
        lines.append(f"{'GPU memory':<13} quantization {kind}: offload {', '.join(needs)}")
    return lines if sum(model.parameters.values()) else []


def gain(config: Config, model: ModelInfo) -> list[str]:
    """The share of attention and what the mask saves of it, where that is much; `notes` says where little."""
    density = radial_mask(token_grid(config, model), radial_config(config)).density
    dense, radial = attention_flops(config, model, density)
    other = other_flops(config, model)
    share = dense / (dense + other)
    if share < LITTLE and config.attention.pattern != "dense":
        return []
    fewer = f"{(dense + other) / (radial + other):.2f}x fewer in all with this mask"
    return [f"attention is {share:.0%} of the operations: {fewer}"]


def notes(config: Config, model: ModelInfo) -> list[str]:
    """What a user should know first: unknown weights, little to gain, a mask that keeps too little."""
    found = []
    if not sum(model.parameters.values()):
        found.append(f"memory: the weights of {config.model.path} are unknown before loading and not checked")
    return found if config.attention.pattern == "dense" else found + _mask_notes(config, model)


def _mask_notes(config: Config, model: ModelInfo) -> list[str]:
    grid, found = token_grid(config, model), []
    options, frame = config.attention, grid.tokens_per_frame
    if 3 * frame < options.block_size:
        found.append(f"frames of {frame} tokens are under a third of a block: set attention.block_size=16")
    width = options.block_size if options.decimation_width == "block" else options.decimation_width
    power = 1 << (frame.bit_length() - 1)
    if width // power > 1:  # the rule keeps distance 1 only where this is 1
        found.append(
            f"frames of {frame} tokens lose their neighbours: set attention.decimation_width={power} or less"
        )
    dense, _ = attention_flops(config, model, 1.0)
    share = dense / (dense + other_flops(config, model))
    if share < LITTLE:
        found.append(f"attention is {share:.0%} of the operations: at most {1 / (1 - share):.2f}x to gain")
    return found


def _ranges(numbers: list[int], total: int) -> str:
    """'14 of 50 (0-11, 48-49)' for sorted numbers, counted from 0."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{len(numbers)} of {total} ({text})" if numbers else f"none of {total}"


def _shift(value: float | None) -> str:
    return "of the model" if value is None else f"{value:g}"


def _flops(value: float) -> str:
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value / 1e9:.4g} GFLOP"


def _describe_memory(need: Memory, model: ModelInfo) -> str:
    weights = gib(need.weights) if need.weights else "an unknown amount for"
    host = f" + {gib(need.host)} program" if need.host else ""
    return f"{gib(need.total)} predicted: {weights} weights + {gib(need.activations)} activations{host}"


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.0f} GiB"
