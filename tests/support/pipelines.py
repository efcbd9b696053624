"""A tiny pipeline of every kind, and one short generation through any of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.support.tiny import wan_pipeline
from tests.support.tiny_hunyuan import TEMPLATE, hunyuan_image_pipeline, hunyuan_pipeline
from tests.support.tiny_kandinsky import kandinsky5_pipeline
from tests.support.tiny_ltx import ltx_image_pipeline, ltx_pipeline
from tests.support.tiny_mochi import mochi_pipeline
from tests.support.tiny_wan import a14b_i2v_pipeline, i2v_pipeline, ti2v_pipeline, vace_pipeline

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
CALL = {"prompt": "a red dot", "height": 64, "width": 96, "num_frames": 13, "max_sequence_length": 16}


@dataclass(frozen=True)
class Kind:
    """Holds a pipeline, further options of its call, its grid, and the transformer calls of a step."""

    make: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int, int] = (4, 4, 6)
    halves: int = 1

    def generate(self, pipeline: Any, steps: int = 3, **more: object) -> torch.Tensor:
        """Makes a video, by default its latents, from the same noise each time."""
        return generate(pipeline, steps, **self.options | more)


GUIDED = {"guidance_scale": 3.0}
EXPERTS = GUIDED | {"guidance_scale_2": 2.0}
TO_VIDEO = {"prompt_template": TEMPLATE, "image": IMAGE}
KINDS = {
    "wan": Kind(wan_pipeline, GUIDED, halves=2),
    "wan-a14b": Kind(partial(wan_pipeline, experts=2), EXPERTS, halves=2),
    "wan-i2v": Kind(i2v_pipeline, GUIDED | {"image": IMAGE}, halves=2),
    "wan-flf2v": Kind(
        partial(i2v_pipeline, last=True), GUIDED | {"image": IMAGE, "last_image": IMAGE}, halves=2
    ),
    "wan-i2v-a14b": Kind(a14b_i2v_pipeline, EXPERTS | {"image": IMAGE}, halves=2),
    "wan-ti2v": Kind(ti2v_pipeline, GUIDED, halves=2),
    "wan-ti2v-image": Kind(partial(ti2v_pipeline, image=True), GUIDED | {"image": IMAGE}, halves=2),
    "vace": Kind(vace_pipeline, GUIDED, halves=2),
    "vace-a14b": Kind(partial(vace_pipeline, experts=2), EXPERTS, halves=2),
    "vace-reference": Kind(vace_pipeline, GUIDED | {"reference_images": [IMAGE]}, (5, 4, 6), halves=2),
    "hunyuan_video": Kind(hunyuan_pipeline, {"prompt_template": TEMPLATE}),
    "hunyuan_video-i2v": Kind(partial(hunyuan_image_pipeline, "latent_concat"), TO_VIDEO),
    "hunyuan_video-i2v-replaced": Kind(partial(hunyuan_image_pipeline, "token_replace"), TO_VIDEO),
    "mochi": Kind(mochi_pipeline, GUIDED | {"num_frames": 19, "negative_prompt": "bad"}),
    "kandinsky5": Kind(kandinsky5_pipeline, GUIDED | {"max_sequence_length": 512}, halves=2),
    "ltx-i2v": Kind(
        ltx_image_pipeline,
        GUIDED | {"num_frames": 17, "height": 32, "width": 64, "image": IMAGE},
        (5, 8, 16),
    ),
    "ltx": Kind(ltx_pipeline, GUIDED | {"num_frames": 17, "height": 32, "width": 64}, (5, 8, 16)),
}


def generate(pipeline: Any, steps: int = 3, **more: object) -> torch.Tensor:
    """Makes a video without guidance, by default its latents, from the same noise each time."""
    options = CALL | {"guidance_scale": 1.0, "output_type": "latent"} | more
    noise = {"generator": torch.Generator().manual_seed(0)}
    return pipeline(num_inference_steps=steps, **noise | options).frames
