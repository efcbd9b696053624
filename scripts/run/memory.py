"""The predicted peak of a run, stage by stage: reading text, denoising, decoding."""

from dataclasses import dataclass, replace

from radial_attn.models.pipeline.load import FAMILIES

from radial_attn import TokenGrid
from scripts.run.config import Config
from scripts.run.families import calls_per_step
from scripts.run.model_info import ModelInfo

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HOST_BYTES = 0.5 * GIB  # of Python with torch and diffusers, measured; where the model is on the CPU
STORED_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5625}  # an element; nf4: with a float32 scale for each 64
WHOLE_IN_FP8 = {"hunyuan_video": 0.29, "mochi": 0.27}  # share of norms and embeddings, counted; of Wan 0.016
ENCODERS, TRANSFORMERS = ("text_encoder", "text_encoder_2", "image_encoder"), ("transformer", "transformer_2")
LARGEST_LAYER = 0.2  # of a text encoder: its table of words, 18 % of UMT5-XXL
BLOCKS_AT_ONCE = 2  # of group offload: the one that runs and the one that comes


@dataclass(frozen=True)
class Memory:
    """Predicted bytes: weights of all components, activations at the peak, the program itself."""

    weights: float
    activations: float
    host: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.host


def peak(config: Config, model: ModelInfo, grid: TokenGrid, mask_bytes: int, device: str) -> Memory:
    """The stage of a run on `device` that needs the most.

    Without offload all weights stay, and `weights` are those of all parts. On the CPU weights that are
    stored in fewer bits were read whole first.
    """
    if device == "cpu":
        config = replace(config, model=replace(config.model, offload="none"))
    text, transformer, vae = weights_on_device(config, model)
    denoising = transformer_bytes(config, model, grid) + cache_bytes(config, model, grid)
    stages = [(text, 0.0), (transformer, denoising + mask_bytes), (vae, decoder_bytes(config, model))]
    if config.model.offload == "none":
        most = max(denoising, decoder_bytes(config, model)) + mask_bytes
        stages = [(text + transformer + vae, most)]
    if device == "cpu":
        stages.append((sum(whole_weights(config, model).values()), 0.0))
    return Memory(*max(stages, key=sum), HOST_BYTES if device == "cpu" else 0.0)


def whole_weights(config: Config, model: ModelInfo) -> dict[str, float]:
    """Bytes of each part as it is read."""
    size = DTYPE_BYTES[config.model.dtype]
    return {part: n * (4 if part == "vae" else size) for part, n in model.parameters.items()}


def stored_weights(config: Config, model: ModelInfo) -> dict[str, float]:
    """Bytes of each part as it is kept: transformers may be in fewer bits."""
    kind, family = config.model.quantization, config.model.family.removesuffix("_i2v")
    whole = whole_weights(config, model)
    if kind == "none":
        return whole
    kept = WHOLE_IN_FP8.get(family, 0.02) if kind == "fp8" else 0.0
    size = STORED_BYTES[kind]
    stored = {name: size * (1 - kept) * model.parameters.get(name, 0) for name in TRANSFORMERS}
    return whole | {name: stored[name] + kept * whole[name] for name in TRANSFORMERS if name in whole}


def weights_on_device(config: Config, model: ModelInfo) -> tuple[float, float, float]:
    """Bytes of weights on the device while text is read, latents are denoised, latents are decoded."""
    parts, offload = stored_weights(config, model), config.model.offload
    encoders = [parts.get(name, 0.0) for name in ENCODERS]
    transformers = [parts.get(name, 0.0) for name in TRANSFORMERS]
    vae, loras = parts.get("vae", 0.0), parts.get("loras", 0.0)
    match offload:
        case "model":
            return max(encoders), max(transformers) + loras, vae
        case "group":
            blocks = BLOCKS_AT_ONCE * (max(transformers) + loras) / model.layers
            return vae + LARGEST_LAYER * max(encoders), vae + blocks, vae
        case "sequential":
            return LARGEST_LAYER * max(encoders), max(transformers) / model.layers, vae / model.layers
    return sum(encoders), sum(transformers) + loras, vae


def transformer_bytes(config: Config, model: ModelInfo, grid: TokenGrid) -> float:
    """A block's feed-forward: two hidden tensors, the residual stream and float32 temporaries, measured."""
    size = DTYPE_BYTES[config.model.dtype]
    return grid.tokens * (2 * size * model.ffn + (2 * size + 10) * model.width)


def cache_bytes(config: Config, model: ModelInfo, grid: TokenGrid) -> float:
    """What a cache keeps of the steps before, in copies of the residual stream."""
    copies = {"first_block": 3, "mag": 2, "pab": model.layers}.get(config.model.cache, 0)
    return copies * calls_per_step(config) * DTYPE_BYTES[config.model.dtype] * grid.tokens * model.width


def is_tiled(config: Config) -> bool:
    """Whether the VAE decodes tile by tile."""
    if config.model.vae_tiling == "auto":
        return FAMILIES[config.model.family].tiled_vae
    return config.model.vae_tiling == "always"


def decoder_bytes(config: Config, model: ModelInfo) -> float:
    """Decoding one chunk of frames, or one tile of it where the VAE is tiled, and the decoded video.

    Tiles stay until they are put together, first into rows, then into the video. Latents, of which a video
    has a sixteenth or less as many bytes, are left out.
    """
    sizes, tiled = config.generation, is_tiled(config)
    sides = [min(side, model.vae_tile) if tiled else side for side in (sizes.height, sizes.width)]
    working = 4 * model.vae_copies * model.vae_base * chunk_frames(config, model) * sides[0] * sides[1]
    video = 4 * 3 * sizes.height * sizes.width * sizes.num_frames
    if not tiled:
        return working + 2 * video
    kept = kept_videos(config, model)
    return max(working + kept * video, (kept + 2) * video)


def decoded_tiles(config: Config, model: ModelInfo) -> int:
    """Pieces in which the VAE decodes one after the other: in space, and in time where they overlap there."""
    sizes, step = config.generation, model.vae_tile * 3 // 4
    latents, count = (sizes.num_frames - 1) // model.vae_frames + 1, 1
    if is_tiled(config) and max(sizes.height, sizes.width) > model.vae_tile:
        count = len(range(0, sizes.height, step)) * len(range(0, sizes.width, step))
    if model.vae_stride is not None and latents > model.vae_chunk // model.vae_frames:
        count *= len(range(0, latents, model.vae_stride // model.vae_frames))
    return count


def chunk_frames(config: Config, model: ModelInfo) -> int:
    """Frames that the VAE decodes at once, with those that it drops where it takes all."""
    frames = config.generation.num_frames
    whole = ((frames - 1) // model.vae_frames + 1) * model.vae_frames
    return whole if model.vae_chunk is None else min(model.vae_chunk, frames)


def kept_videos(config: Config, model: ModelInfo) -> float:
    """Decoded tiles and chunks kept while the last tile is decoded, in sizes of the video: they overlap."""
    sizes, tile = config.generation, model.vae_tile
    tiles = covered(sizes.height, tile, tile * 3 // 4) * covered(sizes.width, tile, tile * 3 // 4)
    if model.vae_stride is None:
        return tiles
    chunk = chunk_frames(config, model) / sizes.num_frames
    return covered(sizes.num_frames, model.vae_chunk, model.vae_stride) + (tiles - 1) * chunk


def covered(length: int, piece: int, stride: int) -> float:
    """Sum of the pieces that start every `stride` along `length`, over it: more than 1 where they overlap."""
    return sum(min(piece, length - start) for start in range(0, length, stride)) / length
