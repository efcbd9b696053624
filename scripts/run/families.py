"""What a family's pipeline is called with, from the configuration."""

from typing import Any

from scripts.run.config import Config
from scripts.run.errors import UsageError

WAN, HUNYUAN = ("wan", "wan_i2v", "wan_vace"), ("hunyuan_video", "hunyuan_video_i2v")
ONLY_WITH = {  # families that a key means something to, and what it has to be with the others
    "negative_prompt": ((*WAN, "mochi"), ""),  # HunyuanVideo has its guidance built in
    "guidance_scale_2": (WAN, None),
    "flow_shift": ((*WAN, *HUNYUAN), None),  # Mochi has noise levels of its own
    "prompt_template": (("hunyuan_video",), "default"),  # that of image to video holds the image
    "image": (("wan_i2v", "hunyuan_video_i2v"), None),
    "video": (("wan_vace",), None),
    "mask": (("wan_vace",), None),
}
PLAIN_TEMPLATE = {"template": "{}", "crop_start": 0}


def settings(config: Config) -> dict[str, Any]:
    """Keyword arguments of the pipeline beside prompt, generator and callback."""
    sizes, family = config.generation, config.model.family
    common = {
        "height": sizes.height,
        "width": sizes.width,
        "num_frames": sizes.num_frames,
        "num_inference_steps": sizes.steps,
        "guidance_scale": sizes.guidance_scale,
        "output_type": "np",
    }
    if sizes.guidance_scale_2 is not None:
        common["guidance_scale_2"] = sizes.guidance_scale_2
    if family not in HUNYUAN:
        return common | {"negative_prompt": sizes.negative_prompt}
    return common | ({"prompt_template": PLAIN_TEMPLATE} if sizes.prompt_template == "plain" else {})


def batch(config: Config, prompts: list[str], generators: list) -> dict[str, Any]:
    """Prompts and generators as the pipeline takes them: that of VACE makes one video and takes no lists.

    Raises ValueError for more than one prompt with VACE.
    """
    if config.model.family != "wan_vace":
        return {"prompt": prompts, "generator": generators}
    if len(prompts) != 1:
        raise ValueError(f"family wan_vace makes one video at a time, got {len(prompts)} prompts")
    return {"prompt": prompts[0], "generator": generators[0]}


def calls_per_step(config: Config) -> int:
    """Passes of a sample through the transformer in one step: HunyuanVideo has its guidance built in."""
    guided = config.generation.guidance_scale > 1 and config.model.family not in HUNYUAN
    return 2 if guided else 1


def check_family(config: Config) -> None:
    """Raises UsageError for a key that the family would ignore."""
    family = config.model.family
    for name, (families, needed) in ONLY_WITH.items():
        value = getattr(config.generation, name)
        if family not in families and value != needed:
            shown = {None: "null", "": "''"}.get(needed, needed)
            raise UsageError(f"generation.{name}: got {value!r}, allowed with family {family}: {shown}")
    if family == "mochi" and config.generation.steps < 2:
        raise UsageError("generation.steps: got 1, allowed with family mochi: whole number of at least 2")
