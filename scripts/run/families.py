"""Maps each model family to the arguments of its pipeline and to the keys that it uses."""

from typing import Any

from scripts.run.config import AnyModelConfig, Config, GenerationConfig
from scripts.run.errors import UsageError
from scripts.run.model_info import ModelInfo
from scripts.run.schema import shown

WAN, HUNYUAN = ("wan", "wan_i2v", "wan_vace"), ("hunyuan_video", "hunyuan_video_i2v")
BATCHED = ("mochi",)  # one call has both halves of guidance
ONLY_WITH = {  # key -> the families that use it, and its value with all others
    "true_cfg_scale": (HUNYUAN, 1.0),
    "guidance_scale_2": (WAN, None),
    "flow_shift": ((*WAN, *HUNYUAN), None),  # Mochi has noise levels of its own
    "prompt_template": (("hunyuan_video",), "default"),  # the template of image to video holds the image
    "image": (("wan_i2v", "hunyuan_video_i2v"), None),
    "last_image": (("wan_i2v",), None),
    "video": (("wan_vace",), None),
    "mask": (("wan_vace",), None),
    "reference_images": (("wan_vace",), []),
}
PLAIN_TEMPLATE = {"template": "{}", "crop_start": 0}
USUAL_FRAMES = {"wan": 81, "hunyuan_video": 129, "mochi": 163}  # family -> frames of a training video


def pipeline_arguments(family: str, generation: GenerationConfig) -> dict[str, Any]:
    """Returns the keyword arguments of a pipeline, without prompt, generator and callback."""
    arguments = {
        "height": generation.height,
        "width": generation.width,
        "num_frames": generation.num_frames,
        "num_inference_steps": generation.steps,
        "guidance_scale": generation.guidance_scale,
        "output_type": "np",
    }
    if generation.guidance_scale_2 is not None:
        arguments["guidance_scale_2"] = generation.guidance_scale_2
    if family not in HUNYUAN:
        return arguments | {"negative_prompt": generation.negative_prompt}
    if generation.true_cfg_scale > 1:
        arguments |= {
            "true_cfg_scale": generation.true_cfg_scale,
            "negative_prompt": generation.negative_prompt,
        }
    return arguments | ({"prompt_template": PLAIN_TEMPLATE} if generation.prompt_template == "plain" else {})


def batch(family: str, prompts: list[str], generators: list) -> dict[str, Any]:
    """Returns prompts and generators as the pipeline takes them: VACE makes one video and takes no lists.

    Raises ValueError for more than one prompt with VACE.
    """
    if family != "wan_vace":
        return {"prompt": prompts, "generator": generators}
    if len(prompts) != 1:
        raise ValueError(f"family wan_vace makes one video at a time, got {len(prompts)} prompts")
    return {"prompt": prompts[0], "generator": generators[0]}


def calls_per_step(family: str, generation: GenerationConfig) -> int:
    """Counts a sample's passes through the transformer in a step, 2 with guidance that is not built in."""
    scale = generation.true_cfg_scale if family in HUNYUAN else generation.guidance_scale
    return 2 if scale > 1 else 1


def check_family(config: Config) -> None:
    """Raises UsageError for a key that the family would ignore."""
    family = config.model.family
    for name, (families, needed) in ONLY_WITH.items():
        value = getattr(config.generation, name)
        if family not in families and value != needed:
            key, remedy = f"generation.{name}", f"set generation.{name}={shown(needed)}"
            raise UsageError(f"{key}: got {value!r}, which family {family} does not use; {remedy}")
    negative = config.generation.negative_prompt
    if family in HUNYUAN and negative and config.generation.true_cfg_scale == 1:
        raise UsageError(
            f"generation.negative_prompt: got {negative!r}, which family {family} uses only with true "
            "guidance; set generation.true_cfg_scale above 1, or generation.negative_prompt=''"
        )
    if family == "mochi" and config.generation.steps < 2:
        raise UsageError("generation.steps: got 1, must be at least 2 with family mochi")


def position_arguments(options: AnyModelConfig, frames: int, model: ModelInfo) -> dict[str, Any]:
    """Returns the keyword arguments of `extend_positions` for a video of `frames` frames."""
    trained = options.positions_frames
    if trained is None:
        (trained,) = (usual for family, usual in USUAL_FRAMES.items() if options.family.startswith(family))
    return {
        "method": options.positions,
        "train_frames": model.latent_frames(trained),
        "frames": model.latent_frames(frames) + model.references,
    }
