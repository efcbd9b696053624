"""Every check of a configuration that needs no weights. A failure is one line: key, value, allowed values."""

from pathlib import Path

from scripts.run.config import ROOT, SCHEMA, Config, allowed, find_path
from scripts.run.errors import UsageError, multiples_around, one_line
from scripts.run.families import check_family
from scripts.run.model_info import ModelInfo


def check_values(config: Config) -> None:
    """Raises UsageError for a value outside its choices or below its smallest, whatever the model."""
    SCHEMA.check(config)
    _check_attention(config)
    check_family(config)
    if config.generation.seed >= 2**63:
        raise UsageError(f"generation.seed: got {config.generation.seed}, allowed: 0 to 2^63 - 1")
    if not config.output.path.strip():
        raise UsageError("output.path: got '', allowed: a folder, or a file name ending in .mp4")


def _check_attention(config: Config) -> None:
    attention, steps = config.attention, config.generation.steps
    width = attention.decimation_width
    if width != "block" and (isinstance(width, str) or width < 1):
        key = "attention.decimation_width"
        raise UsageError(f"{key}: got {width!r}, allowed: {allowed(key)}")
    for name in ("dense_steps", "dense_last_steps"):
        value = getattr(attention, name)
        if value > steps:
            raise UsageError(f"attention.{name}: got {value}, allowed: 0 to {steps} (generation.steps)")


def read_prompts(config: Config) -> dict[int, str]:
    """Prompts by number: `{0: prompt}`, or the non-empty lines of the prompt file by line number from 1."""
    name = config.generation.prompt_file
    if name is None:
        if not config.generation.prompt.strip():
            raise UsageError("generation.prompt: got '', allowed: text that is not empty")
        return {0: config.generation.prompt}
    if not name.strip():
        raise UsageError(f"generation.prompt_file: got {name!r}, allowed: a text file, or null")
    try:
        lines = Path(name).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"generation.prompt_file: got {name!r}, which cannot be read ({reason})") from error
    prompts = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not prompts:
        raise UsageError(f"generation.prompt_file: got {name!r}, which is empty; allowed: one prompt a line")
    return prompts


def check_sizes(config: Config, model: ModelInfo) -> None:
    """Raises UsageError for a size, length or number of dense layers that the model does not take."""
    for name, axis in (("height", 1), ("width", 2)):
        _check_side(f"generation.{name}", getattr(config.generation, name), model.size_factor(axis))
    _check_frames("generation.num_frames", config.generation.num_frames, model.vae_frames)
    if config.model.positions_frames is not None:
        _check_frames("model.positions_frames", config.model.positions_frames, model.vae_frames)
    if config.generation.guidance_scale_2 is not None and "transformer_2" not in model.parameters:
        got = config.generation.guidance_scale_2
        raise UsageError(f"generation.guidance_scale_2: got {got:g}, allowed: null, the model has one expert")
    guided = config.generation.guidance_scale != 1
    if config.model.family == "hunyuan_video" and guided and not model.takes_guidance:
        got = config.generation.guidance_scale
        raise UsageError(
            f"generation.guidance_scale: got {got:g}, allowed: 1, the model has no guidance in it"
        )
    if config.attention.dense_layers > model.layers:
        got = config.attention.dense_layers
        raise UsageError(
            f"attention.dense_layers: got {got}, allowed: 0 to {model.layers}, the model's layers"
        )
    _check_positions(config, model)


def _check_side(key: str, value: int, factor: int) -> None:
    if value % factor:
        below, above = multiples_around(value, factor)
        nearest = f"{below} or {above}" if below != above else str(above)
        raise UsageError(f"{key}: got {value}, allowed: multiples of {factor}, nearest: {nearest}")


def _check_frames(key: str, frames: int, step: int) -> None:
    if frames % step != 1:
        below, above = multiples_around(frames, step, offset=1)
        nearest = below if frames - below <= above - frames else above
        raise UsageError(f"{key}: got {frames}, allowed: {step}k + 1, nearest: {nearest}")


def _check_positions(config: Config, model: ModelInfo) -> None:
    """A rotary table ends at `rope_length` positions along each axis."""
    if model.rope_length is None:
        return
    longest = model.rope_length * model.patch[0] * model.vae_frames - model.vae_frames + 1
    limits = {
        "num_frames": longest,
        "height": model.rope_length * model.patch[1] * model.vae_pixels,
        "width": model.rope_length * model.patch[2] * model.vae_pixels,
    }
    for name, limit in limits.items():
        value = getattr(config.generation, name)
        if value > limit:
            raise UsageError(
                f"generation.{name}: got {value}, allowed: at most {limit}, the model's last position"
            )


def resolve_model(config: Config) -> str:
    """`model.path` as a folder that was checked (index, components, safetensors headers), or as a hub id.

    Raises:
        UsageError: missing, empty or foreign folder, broken file, hub id that cannot be read.
    """
    from radial_attn.models.pipeline.load import check_model, is_local

    path = str(find_path(config.model.path)) if config.model.path else ""
    local = is_local(path) or (ROOT / path).parent.is_dir()
    if not path or (local and not Path(path).is_dir()) or _is_empty(Path(path)):
        kind = "is an empty folder" if path and Path(path).is_dir() else "is no folder"
        raise UsageError(
            f"model.path: got {config.model.path!r}, which {kind}; allowed: a folder in diffusers format "
            "(with model_index.json), or a hub id owner/name"
        )
    if not local:
        return path
    try:
        check_model(path, config.model.family)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"model.path: got {config.model.path!r}: {one_line(error)}") from error
    return path


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def resolve_device(config: Config) -> str:
    """'cpu' or 'cuda'; UsageError where CUDA is asked for and absent."""
    import torch

    wanted, present = config.model.device, torch.cuda.is_available()
    if wanted == "cuda" and not present:
        raise UsageError(
            f"model.device: got 'cuda', but torch {torch.__version__} sees no CUDA device; allowed: auto, cpu"
        )
    return "cuda" if present and wanted != "cpu" else "cpu"
