"""What a run prints about itself."""

from dataclasses import asdict

from scripts.run.config import Config


def describe_settings(config: Config) -> str:
    """The settings of one configuration, as a list item."""
    sizes = config.generation
    numbers = f"guidance {sizes.guidance_scale}, shift {sizes.flow_shift}, seeds from {sizes.seed}"
    options = ", ".join(f"{k} {v}" for k, v in asdict(config.attention).items() if k != "pattern")
    return f"- {config.model.path}, {sizes.num_frames} frames: {sizes.steps} steps, {numbers}; {options}"
