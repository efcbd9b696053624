"""Describes each family of pipelines that can be loaded and run by name, one row each."""

from dataclasses import dataclass, field

from ..runtime.transformers import WHOLE_GUIDANCE


@dataclass(frozen=True)
class Family:
    """Describes one pipeline class of diffusers.

    Attributes:
        pipeline: name of the class.
        transformer: name of the class of its transformer.
        also: name of another class whose folders may hold all of its parts, even if they name another class
            for its transformer.
        takes: the arguments of its call that not every pipeline has, and `flow_shift` if its scheduler has
            one. With `image` it needs an image, or a `video` to go on; with `controlnet` it needs a `video`
            of controls; with `true_cfg_scale` its `guidance_scale` is built in.
        text: tokens that each of its tokenizers passes on by default.
        noise: how the noise levels of a run are made, see `load.noise_levels`: "flow" by the pipeline, "own"
            and "minimax_h3" by the scheduler, "edm" as Karras. "unipc": UniPC on flow sigmas also replaces
            the scheduler.
        batched: one call of the transformer has both halves of guidance.
        single: a call makes one video, and takes no lists.
        tiled_vae: whether to turn on tiled decoding: by default the VAE decodes a whole video at once.
        sized_by_image: a call takes no height and width, and derives them from the image.
        image_tokens: of an image, in the sequence of self-attention; not counted for other families.
        frames: of a training video; None if positions cannot be extended.
        whole_in_fp8: share of the transformer's weights that stay whole with fp8: norms and embeddings.
        alone: whether it makes a video of text alone, too, although it takes an image.
        guided: whether `guidance_scale` and a negative prompt steer it.
        guarded: whether a safety checker reads prompts and sees videos: Cosmos Guardrail.
        overlap: frames of the segment before with which each further segment of a long video begins.
    """

    pipeline: str
    transformer: str
    also: str | None = None
    takes: tuple[str, ...] = ()
    text: dict[str, int] = field(default_factory=dict)
    noise: str = "flow"
    batched: bool = False
    single: bool = False
    tiled_vae: bool = False
    sized_by_image: bool = False
    image_tokens: int = 0
    frames: int | None = None
    whole_in_fp8: float = 0.02
    alone: bool = False
    guided: bool = True
    guarded: bool = False
    overlap: int = 0

    @property
    def guidance(self) -> str:
        """Names the scale above 1 at which a step needs a second pass, with the negative prompt."""
        return "true_cfg_scale" if "true_cfg_scale" in self.takes else "guidance_scale"

    @property
    def modular(self) -> bool:
        """Tells whether it is made of modular blocks alone."""
        return self.pipeline.endswith("ModularPipeline")

    @property
    def halves(self) -> bool:
        """Tells whether two processes can share guidance."""
        return self.transformer not in WHOLE_GUIDANCE


HUNYUAN = {"transformer": "HunyuanVideoTransformer3DModel", "text": {"tokenizer": 256, "tokenizer_2": 77}}
HUNYUAN |= {"tiled_vae": True, "frames": 129, "whole_in_fp8": 0.29}
WAN = {"transformer": "WanTransformer3DModel", "text": {"tokenizer": 512}, "noise": "unipc", "frames": 81}
HUNYUAN15 = {"transformer": "HunyuanVideo15Transformer3DModel", "text": {"tokenizer": 1000}}
HUNYUAN15 |= {"tiled_vae": True, "frames": 121, "whole_in_fp8": 0.35}
LTX = {"transformer": "LTXVideoTransformer3DModel", "text": {"tokenizer": 128}, "batched": True}
LTX2 = {"transformer": "LTX2VideoTransformer3DModel", "text": {"tokenizer": 1024}, "batched": True}
LTX2 |= {"whole_in_fp8": 0.0}
LTX2_SCALES = ("frame_rate", "stg_scale", "modality_scale")
MOTIF = {"transformer": "MotifVideoTransformer3DModel", "text": {"tokenizer": 512}}
MOTIF |= {"frames": 121, "whole_in_fp8": 0.26}
SKYREELS = WAN | {"transformer": "SkyReelsV2Transformer3DModel", "frames": None}
FORCING = SKYREELS | {"single": True, "overlap": 17}
CHRONOEDIT = SKYREELS | {"transformer": "ChronoEditTransformer3DModel"}
KANDINSKY = {"transformer": "Kandinsky5Transformer3DModel", "text": {"tokenizer": 512, "tokenizer_2": 77}}
KANDINSKY |= {"noise": "own", "tiled_vae": True, "whole_in_fp8": 0.14}
COSMOS = {"transformer": "CosmosTransformer3DModel", "single": True, "whole_in_fp8": 0.09, "guarded": True}
SCALES, TRUE = ("guidance_scale_2", "flow_shift"), ("true_cfg_scale", "flow_shift")
FAMILIES = {
    "wan": Family("WanPipeline", **WAN, takes=SCALES),
    "hunyuan_video": Family("HunyuanVideoPipeline", **HUNYUAN, takes=(*TRUE, "prompt_template")),
    "mochi": Family(
        "MochiPipeline",
        "MochiTransformer3DModel",
        text={"tokenizer": 256},
        noise="mochi",
        batched=True,
        tiled_vae=True,
        frames=163,
        whole_in_fp8=0.27,
    ),
    "wan_i2v": Family(
        "WanImageToVideoPipeline", **WAN, also="WanPipeline", takes=(*SCALES, "image", "last_image")
    ),
    "ltx": Family("LTXPipeline", **LTX, takes=("frame_rate",)),
    "ltx_i2v": Family("LTXImageToVideoPipeline", **LTX, also="LTXPipeline", takes=("frame_rate", "image")),
    "ltx2": Family("LTX2Pipeline", **LTX2, takes=LTX2_SCALES),
    "ltx2_i2v": Family(
        "LTX2ImageToVideoPipeline", **LTX2, also="LTX2Pipeline", takes=(*LTX2_SCALES, "image")
    ),
    "hunyuan_video15": Family("HunyuanVideo15Pipeline", **HUNYUAN15, takes=("flow_shift",)),
    "hunyuan_video15_i2v": Family(
        "HunyuanVideo15ImageToVideoPipeline",
        **HUNYUAN15,
        takes=("flow_shift", "image"),
        sized_by_image=True,
    ),
    "motif_video": Family("MotifVideoPipeline", **MOTIF, takes=("flow_shift",)),
    "motif_video_i2v": Family(
        "MotifVideoImage2VideoPipeline",
        **MOTIF,
        also="MotifVideoPipeline",
        takes=("flow_shift", "image"),
        image_tokens=4096,  # patches of 14 pixels in 896 x 896
    ),
    "kandinsky5": Family("Kandinsky5T2VPipeline", **KANDINSKY, takes=("flow_shift",)),
    "kandinsky5_i2v": Family(
        "Kandinsky5I2VPipeline", **KANDINSKY, also="Kandinsky5T2VPipeline", takes=("flow_shift", "image")
    ),
    "cosmos2": Family(
        "Cosmos2VideoToWorldPipeline",
        **COSMOS,
        takes=("image", "video", "fps"),
        text={"tokenizer": 512},
        noise="edm",
    ),
    "cosmos25": Family(
        "Cosmos2_5_PredictBasePipeline", **COSMOS, takes=("image", "video"), noise="unipc", alone=True
    ),
    "cosmos_transfer25": Family(
        "Cosmos2_5_TransferPipeline",
        **COSMOS,
        takes=("video", "segment_frames", "controlnet"),
        noise="unipc",
        overlap=1,
    ),
    "minimax_h3": Family(
        "MiniMaxH3ModularPipeline",
        "MiniMaxH3Transformer3DModel",
        takes=("flow_shift", "image", "last_image"),
        noise="minimax_h3",
        single=True,
        tiled_vae=True,
        alone=True,
        guided=False,
    ),
    # its prompt template holds the image, so that no other can be given
    "hunyuan_video_i2v": Family("HunyuanVideoImageToVideoPipeline", **HUNYUAN, takes=(*TRUE, "image")),
    "wan_vace": Family(
        "WanVACEPipeline",
        **WAN | {"transformer": "WanVACETransformer3DModel"},
        takes=(*SCALES, "video", "mask", "reference_images"),
        single=True,
    ),
    "wan_animate": Family(
        "WanAnimatePipeline",
        **WAN | {"transformer": "WanAnimateTransformer3DModel", "frames": None},
        takes=("flow_shift", "image", "pose_video", "face_video", "video", "mask", "segment_frames"),
        single=True,
        overlap=1,
    ),
    "skyreels_v2": Family("SkyReelsV2Pipeline", **SKYREELS, takes=("flow_shift",)),
    "skyreels_v2_i2v": Family("SkyReelsV2ImageToVideoPipeline", **SKYREELS, takes=("flow_shift", "image")),
    "skyreels_v2_df": Family(
        "SkyReelsV2DiffusionForcingPipeline", **FORCING, takes=("flow_shift", "fps", "segment_frames")
    ),
    "skyreels_v2_df_i2v": Family(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        **FORCING,
        also="SkyReelsV2DiffusionForcingPipeline",
        takes=("flow_shift", "fps", "segment_frames", "image"),
    ),
    "anyflow": Family(
        "AnyFlowPipeline",
        "AnyFlowTransformer3DModel",
        takes=("flow_shift",),
        text={"tokenizer": 512},
        batched=True,
    ),
    # its published files are those of a Wan
    "chronoedit": Family(
        "ChronoEditPipeline",
        **CHRONOEDIT,
        also="WanImageToVideoPipeline",
        takes=("flow_shift", "image", "num_temporal_reasoning_steps"),
    ),
}
