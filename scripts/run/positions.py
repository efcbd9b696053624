"""Video longer than those of the training: what `model.positions` comes to."""

from typing import Any

from radial_attn.models.pipeline.rope_scaling import describe, temporal_frequencies

from scripts.run.config import Config
from scripts.run.model_info import ModelInfo
from scripts.run.plan import latent_frames

USUAL_FRAMES = {"wan": 81, "hunyuan_video": 129, "mochi": 163}  # of a video in training, by family


def position_options(config: Config, model: ModelInfo) -> dict[str, Any]:
    """The keys as the keyword arguments of `radial_attn.models.pipeline.rope_scaling.extend_positions`."""
    family, trained = config.model.family, config.model.positions_frames
    if trained is None:
        (trained,) = (usual for name, usual in USUAL_FRAMES.items() if family.startswith(name))
    lengths = {"train_frames": trained, "frames": config.generation.num_frames}
    return {"method": config.model.positions} | {
        name: latent_frames(frames, model) for name, frames in lengths.items()
    }


def describe_positions(config: Config, model: ModelInfo) -> list[str]:
    """What is changed, where not plain: `positions: riflex, component 4 of 22 lowered to ...`."""
    if config.model.positions == "plain":
        return []
    frequencies = None if model.rope_time is None else temporal_frequencies(*model.rope_time)
    return [f"positions: {describe(**position_options(config, model), frequencies=frequencies)}"]
