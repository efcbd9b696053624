"""Turns keys into the arguments of a family's pipeline, and refuses those that it does not use."""

from dataclasses import replace
from typing import Any

from radial_attn.models.pipeline.families import FAMILIES
from scripts.run.config import AnyModelConfig, Config, GenerationConfig
from scripts.run.errors import UsageError
from scripts.run.model_info import ModelInfo
from scripts.run.schema import shown

DEFAULTS = {  # of the keys that not every family takes: their value with the others
    "true_cfg_scale": 1.0,
    "guidance_scale_2": None,
    "flow_shift": None,
    "prompt_template": "default",
    "image": None,
    "last_image": None,
    "video": None,
    "mask": None,
    "reference_images": [],
}
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
    if kind.guidance == "guidance_scale" or generation.true_cfg_scale > 1:
        arguments |= {
            kind.guidance: getattr(generation, kind.guidance),
            "negative_prompt": generation.negative_prompt,
        }
    if generation.guidance_scale_2 is not None:
        arguments["guidance_scale_2"] = generation.guidance_scale_2
    if "num_temporal_reasoning_steps" in kind.takes:
        # in all steps; a video of 5 frames has nothing to reason on
        arguments |= {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": generation.steps}
    arguments |= dict.fromkeys({"frame_rate", "fps"}.intersection(kind.takes), fps)
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


def calls_per_step(family: str, generation: GenerationConfig) -> int:
    """Counts a sample's passes through the transformer in a step, 2 with guidance that is not built in."""
    return 2 if getattr(generation, FAMILIES[family].guidance) > 1 else 1


def shared_calls(family: str, generation: GenerationConfig) -> int:
    """Counts the passes of a step that processes can share, 2 with halves of guidance."""
    return calls_per_step(family, generation) if FAMILIES[family].halves else 1


def check_family(config: Config) -> None:
    """Raises UsageError for a key that the family would ignore."""
    family, kind = config.model.family, FAMILIES[config.model.family]
    for name, needed in DEFAULTS.items():
        value = getattr(config.generation, name)
        if name not in kind.takes and value != needed:
            key, remedy = f"generation.{name}", f"set generation.{name}={shown(needed)}"
            raise UsageError(f"{key}: got {value!r}, which family {family} does not use; {remedy}")
    negative = config.generation.negative_prompt
    if kind.guidance == "true_cfg_scale" and negative and config.generation.true_cfg_scale == 1:
        raise UsageError(
            f"generation.negative_prompt: got {negative!r}, which family {family} uses only with true "
            "guidance; set generation.true_cfg_scale above 1, or generation.negative_prompt=''"
        )
    if kind.noise == "mochi" and config.generation.steps < 2:
        raise UsageError(f"generation.steps: got 1, must be at least 2 with family {family}")
    if kind.frames is None and config.model.positions != "plain":
        got = f"model.positions: got {config.model.positions!r}"
        raise UsageError(f"{got}, which family {family} does not support; allowed: plain")


def with_images(model: ModelInfo, family: str, generation: GenerationConfig) -> ModelInfo:
    """Returns the model with the tokens of the images of a run."""
    text = model.joint_text + FAMILIES[family].image_tokens
    return replace(model, joint_text=text, references=len(generation.reference_images))


def position_arguments(options: AnyModelConfig, frames: int, model: ModelInfo) -> dict[str, Any]:
    """Returns the keyword arguments of `extend_positions` for a video of `frames` frames."""
    trained = options.positions_frames or FAMILIES[options.family].frames
    return {
        "method": options.positions,
        "train_frames": model.latent_frames(trained),
        "frames": model.latent_frames(frames) + model.references,
    }
