"""Predicts the peak of memory, stage by stage: encoding text, denoising, decoding."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from radial_attn import TokenGrid
from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.residual import residual_bytes
from scripts.run.config import AnyModelConfig, AttentionConfig, ModelConfig, VideoSize
from scripts.run.model_info import ModelInfo

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HOST_BYTES = 0.5 * GIB  # Python with torch and diffusers, measured with the model on the CPU
STORED_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5625}  # an element; nf4: with a float32 scale for each 64
ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder", "connectors")
TRANSFORMERS, SOUND = ("transformer", "transformer_2"), ("audio_vae", "vocoder")
LARGEST_LAYER = 0.2  # share of a text encoder in its embedding table; 18 % in UMT5-XXL
BLOCKS_AT_ONCE = 2  # with group offload: the block that runs and the next one
MASK_BYTES = 2  # for each pair of blocks of a chosen mask: in how many densities it is kept, and whether now
LISTED_BYTES = 4  # a number for each kept block
FLEX_BYTES = 17  # a pair: two lists of queries and two of keys, as long as if all were kept, and the table
MEASURED_BYTES = 12  # a pair: mass, pooled mass and loss of a layer that waits for the budget of the model


@dataclass(frozen=True)
class Memory:
    """Holds predicted bytes: weights of all components, activations at the peak, the program itself."""

    weights: float
    activations: float
    host: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.host


class Kept(NamedTuple):
    """Holds the bytes that adaptive attention keeps from a dense step on: on the device, and beside it."""

    device: float = 0.0
    host: float = 0.0


NOTHING = Kept()


def peak_memory(
    model: ModelInfo,
    size: VideoSize,
    options: ModelConfig,
    *,
    calls: int,
    block_size: int,
    device: str,
    tokens: int | None = None,
) -> Memory:
    """Predicts the peak of a run on `device`: the peak of the stage that needs the most.

    Without offload the weights of all parts stay, and `weights` counts them all. On the CPU, weights that are
    stored in fewer bits are first read whole.

    Args:
        calls: passes through the transformer in a step.
        tokens: video tokens of this process; by default the whole video's.
    """
    whole = model.grid(size)
    grid = TokenGrid(1, 1, tokens, model.joint_text) if tokens else whole
    if device == "cpu":
        options = replace(options, offload="none")
    text, transformer, vae = weights_on_device(model, options)
    decoded = size._replace(frames=size.frames + model.further_frames)
    denoising = transformer_bytes(model, grid, options) + cache_bytes(model, grid, options, calls)
    denoising, decoding = denoising + model.held, decoder_bytes(model, decoded, options) + model.held
    mask = mask_bytes(whole, block_size)
    stages = [(text, 0.0), (transformer, denoising + mask), (vae, decoding)]
    if options.offload == "none":
        stages = [(text + transformer + vae, max(denoising, decoding) + mask)]
    if device == "cpu":
        stages.append((sum(whole_weights(model, options).values()), 0.0))
    return Memory(*max(stages, key=sum), HOST_BYTES if device == "cpu" else 0.0)


def whole_weights(model: ModelInfo, options: AnyModelConfig) -> dict[str, float]:
    """Returns the bytes of each part as it is read."""
    size = DTYPE_BYTES[options.dtype]
    return {
        part: n * (4 if part == "vae" else size) + model.packed.get(part, 0)
        for part, n in model.parameters.items()
    }


def host_bytes(model: ModelInfo, options: AnyModelConfig, kept: Kept = NOTHING) -> float:
    """Returns the host memory of a run on a GPU: all weights are read into it before they move."""
    return sum(whole_weights(model, options).values()) + kept.host + HOST_BYTES


def mask_bytes(grid: TokenGrid, block_size: int) -> int:
    """Returns the memory of building the block mask: a byte for each pair of blocks, twice."""
    return 2 * grid.num_blocks(block_size) ** 2


def stored_weights(model: ModelInfo, options: ModelConfig) -> dict[str, float]:
    """Returns the bytes of each part as it is stored: transformers may use fewer bits."""
    kind = options.quantization
    whole = whole_weights(model, options)
    if kind == "none":
        return whole
    kept = FAMILIES[options.family].whole_in_fp8 if kind == "fp8" else 0.0
    size = STORED_BYTES[kind]
    stored = {name: size * (1 - kept) * model.parameters.get(name, 0) for name in TRANSFORMERS}
    return whole | {name: stored[name] + kept * whole[name] for name in TRANSFORMERS if name in whole}


def weights_on_device(model: ModelInfo, options: ModelConfig) -> tuple[float, float, float]:
    """Returns the bytes of weights on the device while text is read, while denoising, and while decoding."""
    parts = stored_weights(model, options)
    encoders = [parts.get(name, 0.0) for name in ENCODERS]
    transformers = [parts.get(name, 0.0) for name in TRANSFORMERS]
    controlnet = parts.get("controlnet", 0.0)
    vae, loras = parts.get("vae", 0.0), parts.get("loras", 0.0)
    sound = [parts.get(name, 0.0) for name in SOUND]
    match options.offload:
        case "model" if controlnet:  # it runs before the transformer, which sends the encoder away
            denoising = max(*encoders, max(transformers) + loras) + controlnet + vae
            return max(encoders), denoising, max(transformers) + loras + vae
        case "model":
            return max(encoders), max(transformers) + loras, max(vae, *sound)
        case "group":
            blocks = BLOCKS_AT_ONCE * (max(transformers) + loras) / model.layers
            return vae + LARGEST_LAYER * max(encoders), vae + blocks, vae
        case "sequential":
            return LARGEST_LAYER * max(encoders), max(transformers) / model.layers, vae / model.layers
    return sum(encoders), sum(transformers) + loras + controlnet, vae + sum(sound)


def transformer_bytes(model: ModelInfo, grid: TokenGrid, options: AnyModelConfig) -> float:
    """Predicts a block's feed-forward: two hidden tensors, residual stream, float32 temporaries; measured.

    Adds the outputs of a control net's layers in this pass and the one before, which stay until it ends. If
    frames have times of their own, there are also six modulations of each token, and in float32; measured.
    """
    size, copies = DTYPE_BYTES[options.dtype], 2 if model.decoder_layers else 1
    modulations = 6 * size + 24 if model.frame_times else 0
    controls = 2 * model.controlnet_layers * size
    width = (2 * size + 10 + modulations + controls) * model.width
    return copies * grid.tokens * (2 * size * model.ffn + width)


def cache_bytes(model: ModelInfo, grid: TokenGrid, options: ModelConfig, calls: int) -> float:
    """Predicts the bytes that a cache keeps of earlier steps, in copies of the residual stream."""
    copies = {"first_block": 3, "mag": 2, "pab": model.layers}.get(options.cache, 0)
    return copies * calls * DTYPE_BYTES[options.dtype] * grid.tokens * model.width


def kept_bytes(
    model: ModelInfo,
    grid: TokenGrid,
    attention: AttentionConfig,
    *,
    dtype: str,
    calls: int,
    density: float,
    device: str,
) -> Kept:
    """Predicts the chosen masks and the residuals of a video, with dense layers as in `attention`.

    Args:
        dtype: of the attention's output; calls: passes of a sample through the transformer in a step.
        density: of the masks.
    """
    layers = model.attention_layers(attention.dense_layers)
    on_host = attention.residual_memory == "host" and device != "cpu"
    tokens = grid.tokens if attention.residual == "output" else grid.video_tokens
    shape = tokens, model.heads, model.head_dim
    options = {"block_size": attention.block_size, "itemsize": DTYPE_BYTES[dtype], "pinned": on_host}
    residual = calls * layers * residual_bytes(attention.residual, *shape, **options)
    lists, masks = 0.0, 0.0
    if attention.selection != "static":
        pairs = layers * model.heads * grid.num_blocks(attention.block_size) ** 2
        times = 1 if attention.selection == "profile" else calls  # a profile serves all calls
        lists, masks = times * pairs * list_bytes(attention, density, device), times * pairs * MASK_BYTES
        if attention.budget == "model":
            lists = max(lists, pairs * MEASURED_BYTES)  # one call's at a time, at a dense step
    if device == "cpu":
        return Kept(residual + lists + masks)
    return Kept(lists + residual * (not on_host), masks + residual * on_host)


def list_bytes(attention: AttentionConfig, density: float, device: str) -> float:
    """Returns the bytes on the device for each pair of blocks of a chosen mask: the lists of its kernel."""
    far = attention.far_field != "none"
    if device == "cuda" and (attention.backend == "flex" or (attention.backend == "auto" and not far)):
        return FLEX_BYTES
    return LISTED_BYTES * density + (far and device == "cuda")


def is_tiled(options: ModelConfig) -> bool:
    """Returns whether the VAE decodes tile by tile."""
    if options.vae_tiling == "auto":
        return FAMILIES[options.family].tiled_vae
    return options.vae_tiling == "always"


def decoder_bytes(model: ModelInfo, size: VideoSize, options: ModelConfig) -> float:
    """Predicts decoding one chunk of frames, or one tile of it if the VAE is tiled, and the decoded video.

    Tiles stay until they are joined, first into rows, then into the video. Latents are left out: they have at
    most a sixteenth of the video's bytes.
    """
    tiled = is_tiled(options)
    sides = [min(side, model.vae_tile) if tiled else side for side in (size.height, size.width)]
    working = 4 * model.vae_copies * model.vae_base * chunk_frames(model, size) * sides[0] * sides[1]
    video = 4 * 3 * size.height * size.width * size.frames
    if not tiled:
        return working + 2 * video
    kept = kept_videos(model, size)
    return max(working + kept * video, (kept + 2) * video)


def decoded_tiles(model: ModelInfo, size: VideoSize, options: ModelConfig) -> int:
    """Counts the pieces that the VAE decodes one by one: in space, and in time if they overlap in time."""
    step, latents, count = model.vae_step, model.vae_latents(size.frames), 1
    if is_tiled(options) and max(size.height, size.width) > model.vae_tile:
        count = len(range(0, size.height, step)) * len(range(0, size.width, step))
    if model.vae_clip:
        count *= size.frames // model.vae_clip[0]
    elif model.vae_stride is not None and latents > model.vae_chunk // model.vae_frames:
        count *= len(range(0, latents, model.vae_stride // model.vae_frames))
    return count


def chunk_frames(model: ModelInfo, size: VideoSize) -> int:
    """Counts the frames that the VAE decodes at once, and those that it drops if it decodes all at once."""
    whole = model.vae_latents(size.frames) * model.vae_frames
    if model.vae_clip:
        return model.vae_chunk
    return whole if model.vae_chunk is None else min(model.vae_chunk, size.frames)


def kept_videos(model: ModelInfo, size: VideoSize) -> float:
    """Counts the tiles and chunks kept while the last tile is decoded, in sizes of the video."""
    tile, step = model.vae_tile, model.vae_step
    tiles = covered(size.height, tile, step) * covered(size.width, tile, step)
    if model.vae_stride is None:
        return tiles
    chunk = chunk_frames(model, size) / size.frames
    return covered(size.frames, model.vae_chunk, model.vae_stride) + (tiles - 1) * chunk


def covered(length: int, piece: int, stride: int) -> float:
    """Sums the pieces that start every `stride`, and divides by `length`: above 1 if they overlap."""
    return sum(min(piece, length - start) for start in range(0, length, stride)) / length


def nearest_fit(model: ModelInfo, size: VideoSize, fits: Callable[[VideoSize], bool]) -> str | None:
    """Returns the keys of the nearest video that fits: fewer frames, else a smaller size, else both."""
    (step, rest), chunks = model.frames_form, size.frames // model.frames_form[0]
    most = _largest(chunks, lambda k: fits(size._replace(frames=step * k + rest)))
    if most is not None and step * most + rest >= model.shortest:
        return f"generation.num_frames={step * most + rest}"
    most = _largest(63, lambda k: k == 0 or fits(_scaled(model, size, k)))
    if most:
        return _sides(_scaled(model, size, most))
    smallest = _scaled(model, size, 0)
    most = _largest(chunks, lambda k: fits(smallest._replace(frames=step * k + rest)))
    if most is None or step * most + rest < model.shortest:
        return None
    return f"{_sides(smallest)} generation.num_frames={step * most + rest}"


def _scaled(model: ModelInfo, size: VideoSize, sixty_fourths: int) -> VideoSize:
    """Shrinks height and width alike, to multiples that the model takes."""
    factors = {"height": model.size_factor(1), "width": model.size_factor(2)}
    shrunk = {name: getattr(size, name) * sixty_fourths // 64 // factor for name, factor in factors.items()}
    return size._replace(**{name: factors[name] * max(1, count) for name, count in shrunk.items()})


def _sides(size: VideoSize) -> str:
    return f"generation.height={size.height} generation.width={size.width}"


def _largest(limit: int, fits: Callable[[int], bool]) -> int | None:
    """Returns the largest k in 0 .. limit that fits; `fits` must be true up to some k and false above it."""
    low, high = -1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low if low >= 0 else None


def gib(size: float) -> str:
    """Writes bytes as GiB: `9.32 GiB`, `48 GiB`."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.0f} GiB"
