"""Loads the core of a real ComfyUI, `COMFYUI_PATH`, on the CPU; samples with tiny random models of it."""

import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.support.tiny import randoms

CHANNELS, TEXT = 16, 16
SIZE = (6, 12, 16)  # of the latents
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 24,
    "num_heads": 2,
    "ffn_dim": 32,
    "freq_dim": 32,
    "text_dim": TEXT,
    "num_layers": 3,
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "vec_in_dim": 8,
    "context_in_dim": TEXT,
    "hidden_size": 24,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 4, 4],
    "theta": 256,
    "patch_size": [1, 2, 2],
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
}
FLUX = HUNYUAN | {"image_model": "flux", "patch_size": 2, "depth": 1, "depth_single_blocks": 1}
FLUX = {key: value for key, value in FLUX.items() if key not in {"byt5", "meanflow"}}


class _Absent(ModuleType):
    """Stands for a package that ComfyUI imports for models that are not used here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Absent(self.__name__)


def load() -> str:
    """Makes the core importable, and returns its version."""
    import diffusers.models  # noqa: F401 (looks for torchvision, so before there is a substitute)
    import transformers

    transformers.utils.is_torchvision_available()
    for name in ("torchvision", "torchaudio"):
        if importlib.util.find_spec(name) is None:
            for full in (name, f"{name}.transforms"):
                sys.modules[full] = _Absent(full)
                sys.modules[full].__spec__ = importlib.machinery.ModuleSpec(full, None)
                sys.modules[full].__path__ = []
    sys.path.append(os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True
    from comfyui_version import __version__

    return __version__


def patcher(config: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """Returns a model patcher of a random model of class `config` in the core's table of models."""
    from comfy import model_patcher, supported_models

    made = getattr(supported_models, config)(settings)
    made.set_inference_dtype(torch.float32, None)
    model = made.get_model({}, "").eval()
    make = randoms(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if parameter.ndim == 1 and name.endswith(("weight", "scale")) else 0.0
            parameter.copy_(make(*parameter.shape) * parameter.shape[-1] ** -0.5 + scale)
    device = torch.device("cpu")
    return model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def wan(**changes: Any) -> Any:
    return patcher("WAN21_T2V", WAN | changes)


def hunyuan(**changes: Any) -> Any:
    return patcher("HunyuanVideo", HUNYUAN | changes)


def noise(size: tuple[int, ...] = SIZE, batch: int = 1, seed: int = 0) -> Tensor:
    return randoms(seed)(batch, CHANNELS, *size)


def condition(seed: int, tokens: int = 7, valid: int | None = None) -> list[Any]:
    """Returns a condition as a text encoder makes it; `valid`: text tokens that are not padding."""
    make, extra = randoms(seed), {}
    if valid is not None:
        extra["attention_mask"] = (torch.arange(tokens) < valid).int()[None]
    return [[make(1, tokens, TEXT), {"pooled_output": make(1, 8), "guidance": 6.0, **extra}]]


def sample(
    model: Any,
    *,
    size: tuple[int, ...] = SIZE,
    steps: int = 4,
    cfg: float = 1.0,
    sampler: str = "euler",
    positive: list[Any] | None = None,
    batch: int = 1,
) -> Tensor:
    """Samples latents with the core's sampler."""
    from comfy import sample

    start = noise(size, batch)
    texts = positive or condition(1), condition(2)
    options = {"disable_pbar": True, "seed": 0}
    return sample.sample(
        model, start, steps, cfg, sampler, "simple", *texts, torch.zeros_like(start), **options
    )
