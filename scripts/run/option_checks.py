"""Checks which keys work together, and refuses what no machine can run before any file is read."""

from collections.abc import Iterator
from operator import attrgetter

from radial_attn.dispatch import BACKENDS, kernel
from radial_attn.models.parallel.groups import Degrees, ring_refusal
from radial_attn.models.pipeline.caches import read_ratios
from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.runtime.schedule import read_dense_steps
from scripts.run.config import (
    SCHEMA,
    AttentionConfig,
    Config,
    GenerationConfig,
    MaskConfig,
    ModelConfig,
    VideoSize,
    keys,
)
from scripts.run.errors import UsageError, multiples_around
from scripts.run.families import calls_per_step, check_family, segments
from scripts.run.model_info import ModelInfo
from scripts.run.outputs import check_target

GENERATION_KEYS = ("generation.num_frames", "generation.height", "generation.width")
LOADED = ("int8", "nf4")  # weights that are never whole once they are loaded
CACHES = "first_block|taylorseer|mag|pab"
UNREGISTERED = "hunyuan_video15|hunyuan_video15_i2v|skyreels_v2|skyreels_v2_i2v|chronoedit"
COSMOS = "cosmos2|cosmos25|cosmos_transfer25"
CLASHES = {  # values of two keys that do not work together -> why
    "model.cache=pab model.compile=blocks": "pab counts steps inside the blocks, and each step would compile "
    "them again",
    f"model.cache={CACHES} model.family=wan_vace|wan_animate": "its control is added between the blocks",
    f"model.cache={CACHES} model.family=ltx2|ltx2_i2v|minimax_h3": "a block also has sound, which caches do "
    "not keep",
    "model.cache=first_block|mag model.family=motif_video|motif_video_i2v": "its decoder takes the video in "
    "place of the text",
    f"model.cache=first_block|mag model.family={UNREGISTERED}": "diffusers does not register its blocks",
    f"model.cache={CACHES} model.family=skyreels_v2_df|skyreels_v2_df_i2v": "a segment would begin with what "
    "is kept of the one before",
    f"model.cache={CACHES} model.family=anyflow": "diffusers gives it no caches",
    "model.cache=first_block|mag|pab model.family=kandinsky5|kandinsky5_i2v": "diffusers asks its blocks for "
    "other names",
    f"model.cache={CACHES} model.family={COSMOS}": "diffusers gives its transformer no caches",
    f"attention.check=reference model.cache={CACHES}": "a skipped layer has nothing to compare",
    "attention.far_field=mean|linear attention.quantize=int8|fp8": "no backend merges the two",
    "model.quantization=int8|nf4 model.offload=group": "such weights only move as whole parts",
    "model.quantization=fp8|int8|nf4 model.offload=sequential": "both replace a layer's weights as it runs",
    "model.quantization=fp8 model.compile=blocks": "each cast would break the graph",
    "model.offload=sequential model.compile=blocks": "moving a layer would break the graph",
}
UNSHARED = {  # families whose tokens stay in one process -> why
    "ltx_i2v": "tokens have timesteps of their own",
    "skyreels_v2_df": "tokens have timesteps of their own",
    "skyreels_v2_df_i2v": "tokens have timesteps of their own",
    "motif_video": "decoder needs all tokens",
    "motif_video_i2v": "decoder needs all tokens",
}


def check_options(config: Config) -> None:
    """Raises UsageError for a value that no model takes: outside its choices, too small or too large."""
    SCHEMA.check(config)
    attention, steps = config.attention, config.generation.steps
    width = attention.decimation_width
    if width != "block" and (isinstance(width, str) or width < 1):
        key = "attention.decimation_width"
        raise UsageError(f"{key}: got {width!r}, must be {SCHEMA.allowed(key)}")
    for name in ("dense_steps", "dense_last_steps"):
        value = getattr(attention, name)
        if isinstance(value, int) and value > steps:
            raise UsageError(f"attention.{name}: got {value}, must be 0 to {steps} (generation.steps)")
    listed = read_dense_steps(attention.dense_steps)
    if isinstance(listed, tuple) and listed[-1] >= steps:
        raise UsageError(
            f"attention.dense_steps: got {attention.dense_steps}, must be steps from 0 to {steps - 1} "
            "(generation.steps)"
        )
    check_adaptive(config)
    check_family(config)
    if (largest := max(config.generation.all_seeds)) >= 2**63:
        raise UsageError(f"generation.seeds: got {largest}, must be 0 to 2^63 - 1")
    if not config.output.path.strip():
        raise UsageError("output.path: got '', must be a folder, or a file name ending in .mp4")
    check_target(config)


def check_adaptive(config: Config) -> None:
    """Raises UsageError for options beyond the mask that do not work together."""
    attention, model = config.attention, config.model
    chosen, residual = attention.selection != "static", attention.residual != "none"
    if (attention.selection == "profile") != (attention.profile is not None):
        got = "null" if attention.profile is None else repr(attention.profile)
        raise UsageError(
            f"attention.profile: got {got} with attention.selection={attention.selection}; a file of "
            "scripts/calibrate.sh and attention.selection=profile need each other"
        )
    if chosen and attention.pattern not in ("radial", "dense"):
        raise UsageError(
            f"attention.pattern: got {attention.pattern!r}, which does not work with attention.selection="
            f"{attention.selection}: the heads choose their own blocks; set attention.pattern=radial"
        )
    if residual and chosen and attention.budget == "model":
        raise UsageError(
            "attention.budget: got 'model', which does not work with attention.residual: its masks are known "
            "only after the last layer of a dense step; allowed: head, layer"
        )
    if attention.residual == "output" and (chosen or attention.far_field != "none"):
        raise UsageError(
            "attention.residual: got 'output', which computes no attention at sparse steps; set "
            "attention.selection=static attention.far_field=none"
        )
    stateful = next((name for name, used in (("selection", chosen), ("residual", residual)) if used), None)
    got = f"attention.{stateful}: got {getattr(attention, stateful)!r}" if stateful else ""
    if stateful and model.cache != "none":
        raise UsageError(
            f"{got}, which does not work with model.cache={model.cache}: skipped calls would leave their "
            "layers without a state; set model.cache=none"
        )
    if stateful and model.compile != "none":
        raise UsageError(
            f"{got}, which does not work with model.compile={model.compile}: each layer has a mask of its "
            "own; set model.compile=none"
        )


def refusals(config: Config, experts: int = 1) -> Iterator[str]:
    """Yields a line for each pair of keys that does not work together on any machine, with the reason.

    `experts`: how many transformers the model has.
    """
    model = config.model
    for pair, reason in CLASHES.items():
        (key, values), (other, others) = (part.split("=") for part in pair.split())
        got, with_value = attrgetter(key)(config), attrgetter(other)(config)
        if got in values.split("|") and with_value in others.split("|"):
            free = [choice for choice in keys()[key].metadata["choices"] if choice not in values.split("|")]
            yield (
                f"{key}: got {got!r}, which does not work with {other}={with_value}: {reason}; "
                f"allowed: {', '.join(free)}"
            )
    kind = FAMILIES[model.family]
    if model.cache == "pab" and not kind.batched and calls_per_step(model.family, config.generation) > 1:
        yield (
            f"model.cache: got 'pab', which does not work with family {model.family} and guidance: pab keeps "
            "one output a layer and would mix the two calls of a step; set "
            f"generation.{kind.guidance}=1, or another cache; allowed: none, first_block, taylorseer, mag"
        )
    if model.cache == "mag" and experts > 1:
        yield (
            "model.cache: got 'mag', which does not work with two experts: mag counts the steps of one; "
            "allowed: none, first_block, taylorseer"
        )
    if model.quantization in LOADED and model.loras:
        yield (
            f"model.quantization: got {model.quantization!r}, which does not work with model.loras: LoRAs "
            "are checked against and added to whole weights; allowed: none, fp8"
        )
    yield from _ratio_refusals(model)


def _ratio_refusals(model: ModelConfig) -> Iterator[str]:
    ratios, wanted = model.cache_ratios, model.cache == "mag"
    if not wanted and ratios is not None:
        yield (
            f"model.cache_ratios: got {ratios!r}, but model.cache={model.cache} has no ratios; set "
            "model.cache=mag, or model.cache_ratios=null"
        )
    if wanted and not _are_ratios(ratios):
        yield (
            f"model.cache_ratios: got {ratios!r}, but model.cache=mag needs the model's own ratios, "
            "separated by commas; set it to calibrate, which prints them after a run that skips nothing"
        )


def _are_ratios(text: str | None) -> bool:
    if text == "calibrate":
        return True
    try:
        return bool(read_ratios(text))
    except ValueError:
        return False


def check_ring(attention: AttentionConfig, model: ModelConfig) -> None:
    """Raises UsageError for options that a ring of processes does not support."""
    quantize = None if attention.quantize == "none" else attention.quantize
    refused = ring_refusal(quantize, attention.check, attention.dense_backend)
    if refused is not None:
        got = getattr(attention, refused.option)
        raise UsageError(f"attention.{refused.option}: got {got!r}, but {refused.reason}")
    for name, plain in (("selection", "static"), ("far_field", "none"), ("residual", "none")):
        if (got := getattr(attention, name)) != plain:
            raise UsageError(
                f"attention.{name}: got {got!r}, but a ring does not support it: no process has all keys; "
                f"allowed: {plain}"
            )
    if model.compile != "none":
        raise UsageError(
            f"model.compile: got {model.compile!r}, but a ring does not support it: keys are passed on "
            "inside the blocks; allowed: none"
        )
    served = [name for name in BACKENDS if name == "auto" or kernel(name).NEEDS.partial]
    if attention.backend not in served:
        raise UsageError(
            f"attention.backend: got {attention.backend!r}, but a ring does not support it: it gives no "
            f"log-sum-exp of a part of the keys; allowed: {', '.join(served)}"
        )


def check_shared(config: Config, degrees: Degrees) -> None:
    """Raises UsageError for options that several processes do not support."""
    family = config.model.family
    if family in UNSHARED and degrees.ulysses * degrees.ring > 1:
        raise UsageError(
            f"model.family: got {family!r}, whose {UNSHARED[family]}, so they stay in one process; set "
            "parallel.ulysses_degree=1 parallel.ring_degree=1"
        )
    decoded = "pose_video" in FAMILIES[family].takes and len(segments(family, config.generation)) > 1
    if decoded and degrees.processes > degrees.data:
        raise UsageError(
            f"generation.segment_frames: got {config.generation.segment_frames}, but a segment begins with a "
            "decoded frame of the one before, which only one of several processes has; make one video a "
            "process (parallel.data_degree), or generation.num_frames at most generation.segment_frames"
        )
    if config.model.cache_ratios == "calibrate":
        raise UsageError(
            "model.cache_ratios: got 'calibrate', which does not work with several processes: each would "
            "measure its own tokens only; give numbers separated by commas"
        )
    if config.attention.check == "reference" and degrees.cfg > 1:
        raise UsageError(
            "attention.check: got 'reference', which does not work with parallel.cfg_degree=2: each process "
            "would compare one half only; allowed: auto, off, nan"
        )


def check_layers(attention: MaskConfig, model: ModelInfo) -> None:
    """Raises UsageError for more dense layers than the model has."""
    if attention.dense_layers > model.layers:
        raise UsageError(
            f"attention.dense_layers: got {attention.dense_layers}, must be 0 to {model.layers}, the number "
            "of the model's layers"
        )


def check_generation(family: str, generation: GenerationConfig, model: ModelInfo) -> None:
    """Raises UsageError for a size, guidance or last image that the model does not take."""
    check_video(family, generation, model)
    if generation.guidance_scale_2 is not None and "transformer_2" not in model.parameters:
        got = generation.guidance_scale_2
        raise UsageError(f"generation.guidance_scale_2: got {got:g}, must be null: the model has one expert")
    if generation.last_image is not None and model.last_image == "none":
        raise UsageError(
            f"generation.last_image: got {generation.last_image!r}, but this model takes no last image; set "
            "generation.last_image=null, or use Wan2.2-I2V-A14B or Wan2.1-FLF2V-14B"
        )
    if family == "hunyuan_video" and generation.guidance_scale != 1 and not model.takes_guidance:
        got = generation.guidance_scale
        raise UsageError(
            f"generation.guidance_scale: got {got:g}, must be 1: the model has no guidance built in"
        )


def check_video(family: str, generation: GenerationConfig, model: ModelInfo) -> None:
    """Raises UsageError for a size of a video, or of its segments, that the model does not take."""
    each = segments(family, generation)
    frames = GENERATION_KEYS[0] if len(each) == 1 else "generation.segment_frames"
    check_size(generation.size, model, (frames, *GENERATION_KEYS[1:]))
    if each[-1] < each[0]:
        check_frames(GENERATION_KEYS[0], generation.num_frames, model)
    if model.controlnet_layers and generation.size.frames > model.rope_length:
        most = (model.rope_length - 1) // model.vae_frames * model.vae_frames + 1
        got = f"{frames}: got {generation.size.frames}, but diffusers makes at most {most} frames"
        raise UsageError(f"{got} of Cosmos Transfer at once; set generation.segment_frames={most} or less")


def check_size(size: VideoSize, model: ModelInfo, keys: tuple[str, str, str] = GENERATION_KEYS) -> None:
    """Raises UsageError for a size that the model does not take; `keys` name frames, height and width."""
    for axis in (1, 2):
        factor = model.size_factor(axis)
        if size[axis] % factor:
            below, above = multiples_around(size[axis], factor)
            nearest = f"{below} or {above}" if below != above else str(above)
            raise UsageError(
                f"{keys[axis]}: got {size[axis]}, must be a multiple of {factor}; nearest: {nearest}"
            )
    check_frames(keys[0], size.frames, model)
    if model.rope_length is None:
        return
    most = VideoSize(  # the rotary table ends there
        model.rope_length * model.patch[0] * model.vae_frames - model.vae_frames + 1,
        model.rope_length * model.patch[1] * model.vae_pixels,
        model.rope_length * model.patch[2] * model.vae_pixels,
    )
    for key, value, limit in zip(keys, size, most, strict=True):
        if value > limit:
            raise UsageError(f"{key}: got {value}, must be at most {limit}, the model's last position")


def check_frames(key: str, frames: int, model: ModelInfo) -> None:
    """Raises UsageError for a number of frames that the VAE does not take."""
    step, rest = model.frames_form
    if frames % step != rest:
        below, above = multiples_around(frames, step, offset=rest)
        nearest = below if frames - below <= above - frames else above
        raise UsageError(f"{key}: got {frames}, must be {step}k + {rest}; nearest: {nearest}")
