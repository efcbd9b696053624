"""Holds the settings published for each model, and finds those nearest to a transformer.

The rows are for the default length of each model. Masks of longer video (decay_factor 1.0, 2 dense steps,
2 dense layers) need a model that was tuned to that length.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from radial_attn import RadialConfig, TokenGrid
from radial_attn.masks.radial import COMPAT

from .runtime.transformers import head_sizes

PAPER = "arXiv 2506.19852, default length"
NOT_PUBLISHED = "nothing published for this model, settings of"
SAME_SETTINGS = {"WanVACETransformer3DModel": "WanTransformer3DModel"}  # a class without rows of its own


@dataclass(frozen=True)
class ModelTraits:
    """Tells models apart.

    Attributes:
        transformer: name of the class.
        width: heads times channels of a head.
        layers: attention layers, Wan-VACE's control layers not counted.
        image: the latents of an image are a part of the input.
        a14b: built as Wan2.2 A14B: two experts, or image to video without embeddings of the image.
    """

    transformer: str
    width: int
    layers: int
    image: bool = False
    a14b: bool = False


@dataclass(frozen=True)
class PublishedSettings:
    """Holds the attention settings of one model.

    Attributes:
        model: name to print.
        traits: traits that a transformer is compared with.
        config: the mask.
        dense_steps: steps that are dense at the start of a run of `steps`.
        dense_layers: first layers that are dense at every step.
        source: where the settings come from.
        size: a usual video, `grid` its tokens; None if the number of text tokens is not fixed.
    """

    model: str
    traits: ModelTraits
    config: RadialConfig
    dense_steps: int
    steps: int
    dense_layers: int
    source: str
    size: str | None = None
    grid: TokenGrid | None = None

    @property
    def dense_share(self) -> int | float:
        """Returns the dense steps for `apply_radial_attention`: a share of the steps of the run, or 0."""
        return self.dense_steps / self.steps if self.dense_steps else 0

    def mask(self, given: Mapping[str, Any]) -> RadialConfig:
        """Returns the options of the mask: those given, and the published ones for the rest.

        With `compat`, only the published decay factor is used, if the program has none of its own. ValueError
        as in `RadialConfig`.
        """
        if given.get("compat", "none") == "none":
            return replace(self.config, **given)
        config = RadialConfig(**given)
        published = "decay_factor" not in given and COMPAT[config.compat].decay_factor is None
        return replace(config, decay_factor=self.config.decay_factor) if published else config


WAN = RadialConfig(decay_factor=0.2, neighbour="half")
WAN22 = RadialConfig(decay_factor=0.8, neighbour="half")
HUNYUAN = RadialConfig(decay_factor=0.95)
MOCHI = RadialConfig(decay_factor=1.0)
BUNDLED = RadialConfig(decay_factor=0.5, block_size=16, decimation_width=64)

WAN_14B = PublishedSettings(
    model="Wan2.1 T2V 14B",
    traits=ModelTraits("WanTransformer3DModel", width=5120, layers=40),
    config=WAN,
    dense_steps=12,
    steps=50,
    dense_layers=1,
    source=PAPER,
    size="69 frames of 768x1280",
    grid=TokenGrid(18, 48, 80),
)
WAN22_T2V = replace(
    WAN_14B,
    model="Wan2.2 T2V A14B",
    traits=replace(WAN_14B.traits, a14b=True),
    config=WAN22,
    dense_steps=11,
    steps=40,
    source="the authors' program for Wan2.2",
    size="77 frames of 720x1280",
    grid=TokenGrid(20, 45, 80),
)
HUNYUAN_T2V = PublishedSettings(
    model="HunyuanVideo",
    traits=ModelTraits("HunyuanVideoTransformer3DModel", width=3072, layers=60),
    config=HUNYUAN,
    dense_steps=12,
    steps=50,
    dense_layers=2,
    source=PAPER,
    size="117 frames of 768x1280",
    grid=TokenGrid(30, 48, 80, text=256),
)
MOCHI_1 = PublishedSettings(
    model="Mochi 1",
    traits=ModelTraits("MochiTransformer3DModel", width=3072, layers=48),
    config=MOCHI,
    dense_steps=12,
    steps=50,
    dense_layers=0,
    source=f"{PAPER}, with the decay factor of longer video",
    size="163 frames of 480x848",
    grid=TokenGrid(28, 30, 53, text=256),
)
LTX = replace(
    MOCHI_1,
    model="LTX-Video",
    traits=ModelTraits("LTXVideoTransformer3DModel", width=2048, layers=28),
    source=f"{NOT_PUBLISHED} Mochi 1, which has the largest decay factor",
    size="161 frames of 512x704",
    grid=TokenGrid(21, 16, 22),
)
KANDINSKY_LITE = replace(
    LTX,
    model="Kandinsky 5.0 Lite",
    traits=ModelTraits("Kandinsky5Transformer3DModel", width=1792, layers=32),
    size="121 frames of 512x768",
    grid=TokenGrid(31, 32, 48),
)
COSMOS_7B = replace(
    LTX,
    model="Cosmos 7B",
    traits=ModelTraits("CosmosTransformer3DModel", width=4096, layers=28),
    size="121 frames of 704x1280",
    grid=TokenGrid(16, 44, 80),
)
COSMOS_2B = replace(
    COSMOS_7B,
    model="Cosmos Predict 2B",
    traits=replace(COSMOS_7B.traits, width=2048, image=True),
    size="93 frames of 704x1280",
    grid=TokenGrid(24, 44, 80),
)
WAN_TINY = PublishedSettings(
    model="the bundled Wan",
    traits=ModelTraits("WanTransformer3DModel", width=192, layers=6),
    config=BUNDLED,
    dense_steps=0,
    steps=20,
    dense_layers=0,
    source="this repository",
    size="33 frames of 64x64",
    grid=TokenGrid(9, 8, 8),
)


def _like_wan(model: str, transformer: str, size: str, grid: TokenGrid, **traits: Any) -> PublishedSettings:
    """Returns the row of a copy of Wan2.1 14B but for `traits`: nothing is published for it."""
    changed = replace(WAN_14B.traits, transformer=transformer, **traits)
    source = f"{NOT_PUBLISHED} {WAN_14B.model}"
    return replace(WAN_14B, model=model, traits=changed, source=source, size=size, grid=grid)


SKYREELS, CHRONOEDIT, ANYFLOW, ANIMATE = (
    f"{name}Transformer3DModel" for name in ("SkyReelsV2", "ChronoEdit", "AnyFlow", "WanAnimate")
)
SMALLER = {"width": 1536, "layers": 30}  # a Wan of 1.3B
OF_540P, OF_480P = TokenGrid(25, 34, 60), TokenGrid(21, 30, 52)
WAN_RELATIVES = (
    _like_wan("SkyReels-V2 14B", SKYREELS, "97 frames of 544x960", OF_540P),
    _like_wan("SkyReels-V2 DF 1.3B", SKYREELS, "97 frames of 544x960", OF_540P, **SMALLER),
    _like_wan("SkyReels-V2 I2V 14B", SKYREELS, "97 frames of 544x960", OF_540P, image=True),
    _like_wan("SkyReels-V2 I2V 1.3B", SKYREELS, "97 frames of 544x960", OF_540P, image=True, **SMALLER),
    _like_wan("ChronoEdit 14B", CHRONOEDIT, "29 frames of 720x1280", TokenGrid(8, 45, 80), image=True),
    _like_wan("AnyFlow 14B", ANYFLOW, "81 frames of 480x832", OF_480P),
    _like_wan("AnyFlow 1.3B", ANYFLOW, "81 frames of 480x832", OF_480P, **SMALLER),
    _like_wan("Wan-Animate 14B", ANIMATE, "77 frames of 720x1280", TokenGrid(21, 45, 80), image=True),
)

PUBLISHED = (
    WAN_14B,
    replace(
        WAN_14B,
        model="Wan2.1 T2V 1.3B",
        traits=replace(WAN_14B.traits, width=1536, layers=30),
        source=f"{NOT_PUBLISHED} Wan2.1 T2V 14B",
        size="81 frames of 480x832",
        grid=TokenGrid(21, 30, 52),
    ),
    replace(
        WAN_14B,
        model="Wan2.1 I2V 14B",
        traits=replace(WAN_14B.traits, image=True),
        dense_steps=11,
        steps=40,
        source=f"{NOT_PUBLISHED} Wan2.1 T2V 14B, with the dense steps of Wan2.2",
        size="81 frames of 720x1280",
        grid=TokenGrid(21, 45, 80),
    ),
    WAN22_T2V,
    replace(
        WAN22_T2V,
        model="Wan2.2 I2V A14B",
        traits=replace(WAN22_T2V.traits, image=True),
        source=f"{NOT_PUBLISHED} Wan2.2 T2V A14B",
        size="81 frames of 720x1280",
        grid=TokenGrid(21, 45, 80),
    ),
    replace(
        WAN22_T2V,
        model="Wan2.2 TI2V 5B",
        traits=replace(WAN_14B.traits, width=3072, layers=30),
        source=f"{NOT_PUBLISHED} Wan2.2 T2V A14B",
        size="121 frames of 704x1280",
        grid=TokenGrid(31, 22, 40),
    ),
    *WAN_RELATIVES,
    HUNYUAN_T2V,
    replace(
        HUNYUAN_T2V,
        model="HunyuanVideo I2V",
        traits=replace(HUNYUAN_T2V.traits, image=True),
        source=f"{NOT_PUBLISHED} HunyuanVideo",
        size=None,
        grid=None,
    ),
    PublishedSettings(
        model="HunyuanVideo 1.5",
        traits=ModelTraits("HunyuanVideo15Transformer3DModel", width=2048, layers=54, image=True),
        config=HUNYUAN,
        dense_steps=12,
        steps=50,
        dense_layers=2,
        source=f"{NOT_PUBLISHED} HunyuanVideo",
    ),
    PublishedSettings(
        model="MotifVideo 2B",
        traits=ModelTraits("MotifVideoTransformer3DModel", width=1536, layers=36, image=True),
        config=HUNYUAN,
        dense_steps=12,
        steps=50,
        dense_layers=2,
        source=f"{NOT_PUBLISHED} HunyuanVideo, whose blocks it has",
    ),
    MOCHI_1,
    LTX,
    COSMOS_7B,
    replace(COSMOS_7B, model="Cosmos 14B", traits=replace(COSMOS_7B.traits, width=5120, layers=36)),
    COSMOS_2B,
    replace(COSMOS_2B, model="Cosmos Predict 14B", traits=replace(COSMOS_2B.traits, width=5120, layers=36)),
    replace(
        LTX,
        model="LTX-2",
        traits=ModelTraits("LTX2VideoTransformer3DModel", width=4096, layers=48),
        size="121 frames of 512x768",
        grid=TokenGrid(16, 16, 24),
    ),
    replace(
        LTX,
        model="MiniMax-H3",
        traits=ModelTraits("MiniMaxH3Transformer3DModel", width=7168, layers=50),
        size=None,
        grid=None,
    ),
    KANDINSKY_LITE,
    replace(
        KANDINSKY_LITE,
        model="Kandinsky 5.0 Pro",
        traits=ModelTraits("Kandinsky5Transformer3DModel", width=4096, layers=60),
    ),
    WAN_TINY,
    replace(
        WAN_TINY,
        model="the bundled Wan I2V",
        traits=replace(WAN_TINY.traits, layers=4, image=True, a14b=True),
        source="this repository",
    ),
    replace(
        WAN_TINY,
        model="the bundled HunyuanVideo",
        traits=ModelTraits("HunyuanVideoTransformer3DModel", width=144, layers=6),
        source="this repository",
        grid=TokenGrid(9, 8, 8, text=256),
    ),
    replace(
        WAN_TINY,
        model="the bundled Mochi",
        traits=ModelTraits("MochiTransformer3DModel", width=144, layers=5),
        source="this repository",
        size="31 frames of 64x64",
        grid=TokenGrid(6, 8, 8, text=256),
    ),
)


CLASSES = (*dict.fromkeys(row.traits.transformer for row in PUBLISHED), *SAME_SETTINGS)


def traits_of(transformer: torch.nn.Module, *, experts: bool = False) -> ModelTraits:
    """Reads the traits of a transformer from its class and configuration.

    `experts`: whether its pipeline has two. Raises ValueError for a class that has no settings.
    """
    name = next((cls.__name__ for cls in type(transformer).__mro__ if cls.__name__ in CLASSES), None)
    if name is None:
        raise ValueError(f"transformer must be one of {', '.join(CLASSES)}, got {type(transformer).__name__}")
    config: dict[str, Any] = transformer.config
    channels, (heads, width) = config.get("in_channels", 0), head_sizes(transformer)
    extra_channels = channels > (config.get("out_channels") or channels)
    image = extra_channels or config.get("image_condition_type") is not None
    return ModelTraits(
        transformer=name,
        width=heads * width,
        layers=config.get("num_visual_blocks") or config["num_layers"] + config.get("num_single_layers", 0),
        image=image,
        a14b=experts or (image and config.get("image_dim", 0) is None),
    )


def nearest_settings(traits: ModelTraits) -> PublishedSettings:
    """Returns the row of the same family whose width is nearest by ratio.

    Among rows with that width an equal `image` counts first, an equal `a14b` second, the number of layers
    last.
    """

    def distance(row: PublishedSettings) -> tuple[float, bool, bool, int]:
        ratio = abs(math.log(row.traits.width / traits.width))
        other = row.traits.image != traits.image, row.traits.a14b != traits.a14b
        return ratio, *other, abs(row.traits.layers - traits.layers)

    name = SAME_SETTINGS.get(traits.transformer, traits.transformer)
    return min((row for row in PUBLISHED if row.traits.transformer == name), key=distance)
