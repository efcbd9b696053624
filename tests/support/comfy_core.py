"""Loads the core of a real ComfyUI, `COMFYUI_PATH`, on the CPU; samples with tiny random models of it."""

import os
import sys
from dataclasses import fields
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
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
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
HUNYUAN15 = HUNYUAN | {
    "image_model": "hunyuan_video",
    "in_channels": 65,
    "out_channels": 32,
    "patch_size": [1, 1, 1],
    "vec_in_dim": None,
    "guidance_embed": False,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
}
FLUX = HUNYUAN | {"patch_size": 2, "depth": 1, "depth_single_blocks": 1, "txt_ids_dims": []}
MOCHI = {
    "image_model": "mochi_preview",
    "patch_size": 2,
    "in_channels": 12,
    "hidden_size_x": 24,
    "hidden_size_y": 16,
    "mlp_ratio_x": 512.0,  # the core fixes the product
    "depth": 3,
    "num_heads": 2,
    "use_t5": True,
    "t5_feat_dim": TEXT,
    "qkv_bias": False,
    "out_bias": True,
    "qk_norm": True,
    "learn_sigma": False,
    "patch_embed_bias": True,
    "timestep_mlp_bias": True,
    "timestep_scale": 1000.0,
}
LTX = {
    "image_model": "ltxv",
    "in_channels": 128,
    "cross_attention_dim": 24,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "caption_channels": TEXT,
    "num_layers": 3,
}
KINDS = {  # class in the core's table of models, settings
    "wan i2v": ("WAN21_I2V", WAN | {"model_type": "i2v", "in_dim": 36}),
    "wan2.2 5b": ("WAN22_T2V", WAN | {"in_dim": 48, "out_dim": 48}),
    "wan with a reference": ("WAN21_T2V", WAN | {"in_dim_ref_conv": CHANNELS}),
    "wan vace": (
        "WAN21_Vace",
        WAN | {"model_type": "vace", "vace_layers": 2, "vace_in_dim": 96, "num_layers": 4},
    ),
    "wan animate": ("WAN22_Animate", WAN | {"model_type": "animate", "in_dim": 36, "num_layers": 5}),
    "hunyuan 1.5": ("HunyuanVideo15", HUNYUAN15),
    "mochi": ("GenmoMochi", MOCHI),
    "ltx": ("LTXV", LTX),
}
ABSENT = ("torchvision", "torchaudio")  # of images and sounds, which no model here looks at


class _Absent(ModuleType):
    """Stands for a package that ComfyUI imports for other models."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Absent(self.__name__)


class _Substitutes(MetaPathFinder, Loader):
    """Finds substitutes for the packages that are absent, and for all of their modules."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return (
            ModuleSpec(fullname, self, is_package=True)
            if fullname.split(".", maxsplit=1)[0] in ABSENT
            else None
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def load() -> str:
    """Makes the core importable, and returns its version."""
    import diffusers.models  # noqa: F401 (looks for torchvision, so before there is a substitute)
    import transformers

    transformers.utils.is_torchvision_available()
    sys.meta_path.append(_Substitutes())
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


def kind(name: str) -> Any:
    """Returns a patcher of one of `KINDS`."""
    return patcher(*KINDS[name])


def hunyuan() -> Any:
    from comfy.ldm.hunyuan_video.model import HunyuanVideoParams

    return patcher("HunyuanVideo", {"image_model": "hunyuan_video", **_known(HunyuanVideoParams, HUNYUAN)})


def flux() -> Any:
    from comfy.ldm.flux.model import FluxParams

    return patcher("Flux", {"image_model": "flux", **_known(FluxParams, FLUX)})


def _known(params: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that this version of the core knows."""
    return {entry.name: settings[entry.name] for entry in fields(params) if entry.name in settings}


def noise(size: tuple[int, ...] = SIZE, batch: int = 1, *, channels: int = CHANNELS, seed: int = 0) -> Tensor:
    return randoms(seed)(batch, channels, *size)


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
    seed: int = 0,
) -> Tensor:
    """Samples latents with the core's sampler."""
    from comfy import sample

    start = noise(size, batch, channels=model.model.latent_format.latent_channels, seed=seed)
    texts = positive or condition(1), condition(2)
    options = {"disable_pbar": True, "seed": 0}
    return sample.sample(
        model, start, steps, cfg, sampler, "simple", *texts, torch.zeros_like(start), **options
    )
