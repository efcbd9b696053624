"""The numbers of a model that sizes, FLOPs and memory follow from, read without loading a weight."""

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

from scripts.errors import UsageError, one_line

PARTS = ("transformer", "text_encoder", "vae")
CONFIGURED = ("transformer", "vae")
PIPELINE_FACTOR = 16  # WanPipeline.check_inputs takes multiples of 16, whatever the patch size


@dataclass(frozen=True)
class Architecture:
    """A Wan pipeline's shape; `parameters` counts each component's weights, empty where unknown."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    patch: tuple[int, int, int] = (1, 2, 2)
    rope_length: int = 1024
    text_tokens: int = 512
    vae_base: int = 96
    vae_frames: int = 4
    vae_pixels: int = 8
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    def size_factor(self, axis: int) -> int:
        """Pixels that height (axis 1) or width (axis 2) must be a multiple of."""
        return math.lcm(PIPELINE_FACTOR, self.vae_pixels * self.patch[axis])


# Counted on these checkpoints' own config.json files (tests/test_plan.py builds them on the meta device).
_UMT5_XXL, _WAN_VAE = 5_680_910_336, 126_892_531
HUB_MODELS = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Architecture(
        layers=40,
        heads=40,
        head_dim=128,
        ffn=13824,
        parameters={"transformer": 14_288_491_584, "text_encoder": _UMT5_XXL, "vae": _WAN_VAE},
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Architecture(
        layers=30,
        heads=12,
        head_dim=128,
        ffn=8960,
        parameters={"transformer": 1_418_996_800, "text_encoder": _UMT5_XXL, "vae": _WAN_VAE},
    ),
}


def read_architecture(path: str) -> Architecture:
    """Architecture of a folder in diffusers format or of a hub id.

    Known hub ids need no network; of others the two config.json files are fetched.

    Raises:
        UsageError: a config.json that is missing, unreadable or out of reach.
    """
    if Path(path).is_dir():
        folder = Path(path)
        parameters = {part: _count_parameters(folder / part) for part in PARTS}
        return _from_configs(*(_read(folder / part / "config.json") for part in CONFIGURED), parameters)
    if path in HUB_MODELS:
        return HUB_MODELS[path]
    return _from_configs(*(_fetch(path, f"{part}/config.json") for part in CONFIGURED), {})


def _from_configs(transformer: dict, vae: dict, parameters: dict[str, int]) -> Architecture:
    try:
        return Architecture(
            layers=transformer["num_layers"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            ffn=transformer["ffn_dim"],
            patch=tuple(transformer["patch_size"]),
            rope_length=transformer.get("rope_max_seq_len", 1024),
            vae_base=vae.get("base_dim", 96),
            vae_frames=vae.get("scale_factor_temporal") or 4,
            vae_pixels=vae.get("scale_factor_spatial") or 8,
            parameters=parameters,
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"model.path: transformer/config.json has no usable {one_line(error)}") from error


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
