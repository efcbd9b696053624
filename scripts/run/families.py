"""Turns keys into the arguments of a family's pipeline, and refuses those that it does not use."""

import math
from dataclasses import replace
from typing import Any

from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.pipeline.load import CONTROLNETS
from scripts.run.config import AnyModelConfig, Config, GenerationConfig
from scripts.run.errors import UsageError
from scripts.run.model_info import ModelInfo
from scripts.run.schema import shown

DEFAULTS = {  # of the keys that not every family takes: their value with the others
    "true_cfg_scale": 1.0,
    "guidance_scale_2": None,
    "stg_scale": None,
    "modality_scale": 1.0,
    "flow_shift": None,
    "prompt_template": "default",
    "image": None,
    "last_image": None,
    "video": None,
    "mask": None,
    "pose_video": None,
    "face_video": None,
    "segment_frames": None,
    "reference_images": [],
}
# Frames below which, and above which, upstream fails or makes NaN. MiniMax-H3: 5 to 15 seconds
SHORTEST = {"wan_animate": 5, "cosmos_transfer25": 5, "skyreels_v2_df_i2v": 5, "kandinsky5_i2v": 17}
SHORTEST |= {"minimax_h3": 124}
LONGEST = {"minimax_h3": 345}
SYNCHRONOUS = {"ar_step": 0, "causal_block_size": 1, "addnoise_condition": 20}  # diffusion forcing
PLAIN_TEMPLATE = {"template": "{}", "crop_start": 0}


def pipeline_arguments(family: str, generation: GenerationConfig, fps: int | None = None) -> dict[str, Any]:
    """Returns the keyword arguments of a pipeline, without prompt, generator, files and callback.

    `fps`: for a pipeline that is told the frame rate.
    """
    kind = FAMILIES[family]
    arguments = {
        "height": generation.height,
        "width": generation.width,
        "num_frames": generation.num_frames,
        "num_inference_steps": generation.steps,
        "guidance_scale": generation.guidance_scale,
        "output_type": "np",
    }
    if not kind.guided:
        del arguments["guidance_scale"]
    elif kind.guidance == "guidance_scale" or generation.true_cfg_scale > 1:
        arguments |= {
            kind.guidance: getattr(generation, kind.guidance),
            "negative_prompt": generation.negative_prompt,
        }
    if generation.guidance_scale_2 is not None:
        arguments["guidance_scale_2"] = generation.guidance_scale_2
    if kind.sized_by_image:
        del arguments["height"], arguments["width"]
    if "controlnet" in kind.takes:
        arguments["num_frames_per_chunk"] = generation.size.frames
    elif "pose_video" in kind.takes:  # it makes as many frames as the poses have
        del arguments["num_frames"]
        arguments["segment_frame_length"] = generation.size.frames
    elif "segment_frames" in kind.takes:
        arguments |= {"base_num_frames": generation.size.frames, "overlap_history": kind.overlap}
        arguments |= SYNCHRONOUS
    if "num_temporal_reasoning_steps" in kind.takes:
        # in all steps; a video of 5 frames has nothing to reason on
        arguments |= {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": generation.steps}
    arguments |= dict.fromkeys({"frame_rate", "fps"}.intersection(kind.takes), fps)
    if "stg_scale" in kind.takes:  # None: as the video's; without guidance, no guidance of the sound either
        arguments |= {"stg_scale": generation.stg_scale or 0.0, "modality_scale": generation.modality_scale}
        arguments |= {"audio_stg_scale": None, "audio_modality_scale": None}
        arguments |= {} if generation.guidance_scale > 1 else {"audio_guidance_scale": None}
    return arguments | ({"prompt_template": PLAIN_TEMPLATE} if generation.prompt_template == "plain" else {})


def batch(family: str, prompts: list[str], generators: list) -> dict[str, Any]:
    """Returns prompts and generators as the pipeline takes them.

    Raises ValueError for more than one prompt with a pipeline that makes one video.
    """
    if not FAMILIES[family].single:
        return {"prompt": prompts, "generator": generators}
    if len(prompts) != 1:
        raise ValueError(f"family {family} makes one video at a time, got {len(prompts)} prompts")
    return {"prompt": prompts[0], "generator": generators[0]}


def segments(family: str, generation: GenerationConfig) -> tuple[int, ...]:
    """Returns the frames of each segment; the last is shorter, unless the pipeline has to fill it up."""
    kind, whole = FAMILIES[family], generation.size.frames
    step = max(1, whole - kind.overlap)
    further = max(0, math.ceil((generation.num_frames - whole) / step))
    fills = {"pose_video", "controlnet"}.intersection(kind.takes)
    surplus = 0 if fills else whole + further * step - generation.num_frames
    return (*[whole] * further, whole - surplus)


def calls_per_step(family: str, generation: GenerationConfig) -> int:
    """Counts a sample's passes through the transformer in a step, one more for each kind of guidance."""
    return halves(family, generation) + (generation.stg_scale is not None) + (generation.modality_scale > 1)


def halves(family: str, generation: GenerationConfig) -> int:
    """Counts the passes of guidance by the negative prompt, 2 if a step has it and it is not built in."""
    return 2 if getattr(generation, FAMILIES[family].guidance) > 1 else 1


def shared_calls(family: str, generation: GenerationConfig) -> int:
    """Counts the passes of a step that processes can share, 2 with halves of guidance."""
    return calls_per_step(family, generation) if FAMILIES[family].halves else 1


def check_family(config: Config) -> None:
    """Raises UsageError for a key that the family would ignore."""
    family, kind = config.model.family, FAMILIES[config.model.family]
    for name, needed in DEFAULTS.items():
        if name not in kind.takes and (value := getattr(config.generation, name)) != needed:
            key, remedy = f"generation.{name}", f"set generation.{name}={shown(needed)}"
            raise UsageError(f"{key}: got {value!r}, which family {family} does not use; {remedy}")
    if (control := config.model.controlnet) and config.model.path not in CONTROLNETS:
        got = f"model.controlnet: got {control!r}, which only {', '.join(CONTROLNETS)} has; a folder"
        raise UsageError(f"{got} has one control net, in controlnet/; set model.controlnet=null")
    for name, needed in () if kind.guided else (("guidance_scale", 1.0), ("negative_prompt", "")):
        if (value := getattr(config.generation, name)) != needed:
            got, remedy = f"generation.{name}: got {value!r}", f"set generation.{name}={shown(needed)}"
            raise UsageError(f"{got}, but family {family} has its guidance built in; {remedy}")
    negative = config.generation.negative_prompt
    if kind.guidance == "true_cfg_scale" and negative and config.generation.true_cfg_scale == 1:
        raise UsageError(
            f"generation.negative_prompt: got {negative!r}, which family {family} uses only with true "
            "guidance; set generation.true_cfg_scale above 1, or generation.negative_prompt=''"
        )
    if kind.noise == "mochi" and config.generation.steps < 2:
        raise UsageError(f"generation.steps: got 1, must be at least 2 with family {family}")
    _check_length(family, config.generation.num_frames)
    _check_segments(family, config.generation)
    if kind.frames is None and config.model.positions != "plain":
        got = f"model.positions: got {config.model.positions!r}"
        raise UsageError(f"{got}, which family {family} does not support; allowed: plain")


def _check_segments(family: str, generation: GenerationConfig) -> None:
    whole, overlap = generation.size.frames, FAMILIES[family].overlap
    if generation.num_frames > whole and whole <= overlap:
        raise UsageError(
            f"generation.segment_frames: got {whole}, must be above {overlap} with family {family}: a "
            f"further segment begins with the last {overlap} frames of the one before"
        )
    shorter = whole - segments(family, generation)[-1]
    if shorter and family == "skyreels_v2_df_i2v":  # its pipeline steps beyond the last frame of the last one
        above = generation.num_frames + shorter
        raise UsageError(
            f"generation.num_frames: got {generation.num_frames}, but family {family} makes whole segments "
            f"of {whole} frames, {overlap} of them from the one before; nearest: "
            f"{above - whole + overlap} or {above}"
        )


def _check_length(family: str, frames: int) -> None:
    got = f"generation.num_frames: got {frames}"
    if frames < (shortest := SHORTEST.get(family, 1)):
        raise UsageError(f"{got}, must be at least {shortest} with family {family}")
    if frames > (longest := LONGEST.get(family, frames)):
        raise UsageError(f"{got}, must be at most {longest} with family {family}")


def with_conditions(model: ModelInfo, family: str, generation: GenerationConfig) -> ModelInfo:
    """Returns the model with the images of a run, and the videos that it keeps on its device.

    Wan-Animate keeps all frames of poses, faces, background (float32 RGB) and mask (float32) in whole
    segments, and the decoded segments, which it joins in a copy. Cosmos Transfer keeps the controls of a
    segment, and its start, in float32 RGB. Diffusion forcing decodes all segments together.
    """
    references = model.references + len(generation.reference_images)
    text = model.joint_text + FAMILIES[family].image_tokens
    if model.sound:  # MiniMax-H3 has an image twice, as Qwen3-VL and as its VAE see it, in the text's place
        images = 2 - (generation.image, generation.last_image).count(None)
        text += images * 2 * (model.grid(generation.size).tokens_per_frame + 1)
    shortest = SHORTEST.get(family, 1)
    model = replace(model, joint_text=text, references=references, shortest=shortest)
    (frames, height, width), count = generation.size, len(segments(family, generation))
    if model.controlnet_layers:
        return replace(model, held=2 * 12 * height * width * frames)
    if "segment_frames" in FAMILIES[family].takes and not model.face:
        return replace(model, frame_times=True, further_frames=generation.num_frames - frames)
    if not model.face:
        return model
    padded = count * (frames - 1) + 1
    videos = padded * (1 if generation.video is None else 1 + 4 / 3) + 2 * (padded - frames)
    held = 12 * (height * width * videos + model.face**2 * padded)
    return replace(model, held=held)


def position_arguments(options: AnyModelConfig, frames: int, model: ModelInfo) -> dict[str, Any]:
    """Returns the keyword arguments of `extend_positions` for a video of `frames` frames."""
    trained = options.positions_frames or FAMILIES[options.family].frames
    return {
        "method": options.positions,
        "train_frames": model.latent_frames(trained),
        "frames": model.latent_frames(frames) + model.references,
    }
