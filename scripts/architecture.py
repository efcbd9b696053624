"""The numbers of a model that sizes, FLOPs and memory follow from, read without loading a weight."""

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

from scripts.errors import UsageError, one_line

PARTS = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "image_encoder", "vae")
CONFIGURED = ("transformer", "vae")


@dataclass(frozen=True)
class Architecture:
    """A video pipeline's shape; `parameters` counts each component's weights, empty where unknown.

    Attributes:
        layers: with self-attention over the video, but for `control_layers`, those of VACE, each by the
            number of the layer that it feeds.
        ffn: hidden width of a feed-forward.
        patch: latent frames, rows and columns of a token.
        text_tokens: in cross-attention; `joint_text`: in the sequence of self-attention.
        token_macs: multiply-adds of a token in the matrices of a layer.
        rope_length: positions along an axis, None where any number will do.
        rope_time: channels and base of the rotary embedding in time, None where it is learned.
        vae_base: channels of the VAE's last layers a pixel; `vae_frames`, `vae_pixels`: its compression.
        vae_copies: float32 tensors of `vae_base` channels that decoding holds at once, measured.
        vae_chunk: frames that it decodes at once, None for all; `vae_stride`: from one to the next where
            they overlap and tiles are joined chunk by chunk; `vae_tile`: pixels a side, a quarter overlaps.
        pixel_factor: what the pipeline wants height and width to be multiples of.
        takes_guidance: False for a HunyuanVideo whose transformer has none built in.
    """

    layers: int
    heads: int
    head_dim: int
    ffn: int
    patch: tuple[int, int, int] = (1, 2, 2)
    text_tokens: int = 512
    joint_text: int = 0
    token_macs: int = 0
    rope_length: int | None = 1024
    rope_time: tuple[int, float] | None = None
    vae_base: int = 96
    vae_copies: float = 15
    vae_chunk: int | None = 4
    vae_stride: int | None = None
    vae_tile: int = 256
    vae_frames: int = 4
    vae_pixels: int = 8
    pixel_factor: int = 16
    takes_guidance: bool = True
    parameters: dict[str, int] = field(default_factory=dict)
    control_layers: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def macs(self) -> int:
        """Of a token in a layer: `token_macs`, or those of a Wan block."""
        return self.token_macs or 6 * self.width**2 + 2 * self.width * self.ffn

    def attention_layers(self, first: int = 0) -> int:
        """Self-attentions of the layers from `first` on, a control layer being the one that it feeds."""
        return self.layers - first + sum(layer >= first for layer in self.control_layers)

    def size_factor(self, axis: int) -> int:
        """Pixels that height (axis 1) or width (axis 2) must be a multiple of."""
        return math.lcm(self.pixel_factor, self.vae_pixels * self.patch[axis])


def read_architecture(path: str) -> Architecture:
    """Architecture of a folder in diffusers format or of a hub id.

    Known hub ids need no network; of others the two config.json files are fetched.

    Raises:
        UsageError: a config.json that is missing, unreadable, out of reach or of no family that is known.
    """
    from scripts.known_models import HUB_MODELS, from_configs

    if Path(path).is_dir():
        folder = Path(path)
        parameters = {part: _count_parameters(folder / part) for part in PARTS if (folder / part).is_dir()}
        return from_configs(*(_read(folder / part / "config.json") for part in CONFIGURED), parameters)
    if path in HUB_MODELS:
        return HUB_MODELS[path]
    return from_configs(*(_fetch(path, f"{part}/config.json") for part in CONFIGURED), {})


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"model.path: {file} is missing or no valid JSON ({one_line(error)})") from error


def _fetch(path: str, file: str) -> dict:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the retries are many lines, the failure is one
    try:
        return _read(Path(hf_hub_download(path, file)))
    except (OSError, ValueError) as error:
        raise UsageError(hub_unreachable(path, error)) from error


def hub_unreachable(path: str, error: BaseException) -> str:
    """The line for a hub id that cannot be read, with the remedy."""
    reason = one_line(error.__cause__ or error)
    return (
        f"model.path: got {path!r}, which is no folder here and cannot be read from the Hugging Face hub "
        f"({reason}); allowed: a folder in diffusers format, or a hub id within reach; "
        "configs/wan_tiny.yaml needs no download"
    )


def _count_parameters(folder: Path) -> int:
    return sum(_count_file(file) for file in sorted(folder.glob("*.safetensors")))


def _count_file(file: Path) -> int:
    """Elements in a safetensors file, from its header: 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, file.stat().st_size)))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UsageError(f"model.path: {file} is not a whole safetensors file ({one_line(error)})") from error
