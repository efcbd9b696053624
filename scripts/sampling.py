"""What a family's pipeline is called with, from the configuration."""

from typing import Any

from scripts.config import Config
from scripts.errors import UsageError

ONLY_WITH = {  # families that a key means something to, and what it has to be with the others
    "negative_prompt": (("wan", "mochi"), ""),  # HunyuanVideo has its guidance built in
    "guidance_scale_2": (("wan",), None),
    "flow_shift": (("wan", "hunyuan_video"), None),  # Mochi has noise levels of its own
    "prompt_template": (("hunyuan_video",), "default"),
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
    if family != "hunyuan_video":
        return common | {"negative_prompt": sizes.negative_prompt}
    return common | ({"prompt_template": PLAIN_TEMPLATE} if sizes.prompt_template == "plain" else {})


def calls_per_step(config: Config) -> int:
    """Passes of a sample through the transformer in one step: HunyuanVideo has its guidance built in."""
    guided = config.generation.guidance_scale > 1 and config.model.family != "hunyuan_video"
    return 2 if guided else 1


def check_family(config: Config) -> None:
    """Raises UsageError for a key that the family would ignore."""
    family = config.model.family
    for name, (families, needed) in ONLY_WITH.items():
        value = getattr(config.generation, name)
        if family not in families and value != needed:
            shown = {None: "null", "": "''"}.get(needed, needed)
            raise UsageError(f"generation.{name}: got {value!r}, allowed with family {family}: {shown}")
