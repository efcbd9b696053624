"""Measures what each head of a pipeline needs, on videos that it makes, for `selection="profile"`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from radial_attn import RadialConfig
from radial_attn.files import whole_file

from .apply import apply_radial_attention, family_of, measured_model
from .pipeline.rope_scaling import turns_of
from .profile import ModelProfile, Reading
from .published import nearest_settings, traits_of
from .runtime.observe import Seen
from .runtime.transformers import transformers_of

PARTS = 4  # of the schedule: more gave 0.5 dB on the bundled Wan, one lost 2.7 dB


@contextmanager
def calibrate(
    pipeline: Any, file: str | Path, *, block_size: int | None = None, parts: int = PARTS
) -> Iterator[None]:
    """Measures the videos that a pipeline makes in the `with` block, all dense, and writes their profile.

    Args:
        pipeline: of diffusers, without radial attention.
        file: of the profile, under 1 MB, for `enable(..., selection="profile", profile=file)`. A block that
            ends with an error writes none.
        block_size: tokens of a block; by default that of the settings published for the model.
        parts: of the schedule, each with maps of its own.

    Raises:
        ValueError: no pipeline that `enable` takes, no noise levels, videos of two sizes, or no video at all.
    """
    transformers = transformers_of(pipeline)
    family, first = family_of(transformers[0]), transformers[0]
    traits = traits_of(first, experts=len(transformers) > 1)
    config = RadialConfig(
        pattern="dense", block_size=block_size or nearest_settings(traits).config.block_size
    )
    readings: dict[Any, Reading] = {}
    edges: dict[int, float] = {}

    def see(seen: Seen) -> None:
        if seen.sigma is None:
            raise ValueError("calibrate needs the noise levels of a scheduler; give the pipeline")
        part = seen.step * parts // len(pipeline.scheduler.timesteps)
        edges[part] = min(edges.get(part, 1.0), seen.sigma)
        reading = readings.setdefault(seen.mask.grid, Reading(seen.mask.grid, config.block_size))
        if len(readings) > 1:
            raise ValueError(f"all videos of a calibration must have one size, got {[*map(str, readings)]}")
        reading.add(part, seen.layer, (seen.query, seen.key, seen.value), seen.text_lengths)

    with apply_radial_attention(pipeline, config, observe=see):
        yield
    if len(edges) < parts:
        raise ValueError(
            f"a calibration in {parts} parts needs videos of at least as many steps, got {len(edges)}; "
            "make more steps, or pass fewer parts"
        )
    levels = [edges[part] for part in range(parts)]
    model = measured_model(first, family)
    (reading,) = readings.values()
    profile = ModelProfile.of(reading, model, levels, frequencies=turns_of(getattr(first, "rope", None)))
    with whole_file(Path(file)) as part:
        part.write_bytes(profile.to_bytes())
