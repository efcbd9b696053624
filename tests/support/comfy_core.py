"""Loads the core of a real ComfyUI, `COMFYUI_PATH`, on the CPU; samples with tiny random models of it."""

import os
import re
import sys
from dataclasses import fields
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from radial_attn.models.pipeline.single_file import find_single_file
from tests.support.single_files import save
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
MINIMAX = {
    "image_model": "minimax_h3",
    "hidden_size": 32,
    "num_layers": 3,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_hidden_size": 32,
    "text_dim": TEXT,
    "timestep_input_dim": 32,
    "time_embed_hidden_size": 16,
    "time_embed_dim": 8,
    "rope_inv_freq_len": 2,
}
SOUND = 5  # tokens of a channel
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
    "minimax h3": ("MiniMaxH3", MINIMAX),
    "minimax h3 with a keyframe": ("MiniMaxH3", MINIMAX),
}
ORIGINAL = (  # names of HunyuanVideo's layers in the core -> in its authors' files
    (r"^(time_in|guidance_in|txt_in\.t_embedder)\.in_layer", r"\1.mlp.0"),
    (r"^(time_in|guidance_in|txt_in\.t_embedder)\.out_layer", r"\1.mlp.2"),
    (r"c_embedder\.in_layer", "c_embedder.linear_1"),
    (r"c_embedder\.out_layer", "c_embedder.linear_2"),
    (r"(_mod|modulation)\.lin\.", r"\1.linear."),
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"_attn\.norm\.(query|key)_norm\.(scale|weight)", lambda found: f"_attn_{found[1][0]}_norm.weight"),
    (r"\.norm\.(query|key)_norm\.(scale|weight)", lambda found: f".{found[1][0]}_norm.weight"),
    (r"mlp\.0\.(?=\w+$)(?<!in\.mlp\.0\.)(?<!embedder\.mlp\.0\.)", "mlp.fc1."),
    (r"mlp\.2\.(?=\w+$)(?<!in\.mlp\.2\.)(?<!embedder\.mlp\.2\.)", "mlp.fc2."),
)
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


def hunyuan_in_diffusers(model: Any) -> Any:
    """Returns diffusers' transformer with the weights of a patcher of HunyuanVideo."""
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    state = {}
    for key, value in model.model.diffusion_model.state_dict().items():
        for pattern, name in ORIGINAL:
            key = re.sub(pattern, name, key)  # noqa: PLW2901
        state[key] = value.clone()
    joined = {key: state.pop(key) for key in list(state) if "linear1" in key}
    state = convert_hunyuan_video_transformer_to_diffusers(state)
    for key, value in joined.items():  # diffusers' function knows one width alone
        block, kind = key.replace("single_blocks", "single_transformer_blocks").split(".linear1.")
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        parts = value.split([24, 24, 24, len(value) - 72])
        state |= {f"{block}.{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_axes_dim": (4, 4, 4), "mlp_ratio": 2.0}
    blocks = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2}
    text = {"text_embed_dim": TEXT, "pooled_projection_dim": 8}
    transformer = HunyuanVideoTransformer3DModel(**shape, **blocks, **text).eval()
    transformer.load_state_dict(state)
    return transformer


def minimax_in_diffusers(model: Any, folder: Path) -> Any:
    """Returns diffusers' transformer with the weights of a patcher of MiniMax-H3, written as a file."""
    from diffusers import MiniMaxH3Transformer3DModel

    sizes = {name: MINIMAX[name] for name in ("num_attention_heads", "attention_head_dim", "hidden_size")}
    sizes |= {name: MINIMAX[name] for name in ("num_layers", "text_dim", "time_embed_dim")}
    others = {"ffn_dim": "ffn_hidden_size", "num_refiner_layers": "token_refiner_num_layers"}
    others |= {"freq_dim": "timestep_input_dim", "time_embed_hidden_dim": "time_embed_hidden_size"}
    sizes |= {name: MINIMAX[key] for name, key in (others | {"rope_freq_dim": "rope_inv_freq_len"}).items()}
    MiniMaxH3Transformer3DModel(**sizes).save_config(folder / "transformer")
    inside = model.model.diffusion_model
    file = save(folder / "a.safetensors", inside.state_dict(), "model.diffusion_model.")
    made = find_single_file(file, str(folder), "transformer").load(str(folder), "transformer", torch.float32)
    inside.rope.inv_freq.copy_(made.rope.inv_freq)
    return made


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
    """Samples latents with the core's sampler; returns video and sound of MiniMax-H3 as one vector."""
    from comfy import sample

    start = noise(size, batch, channels=model.model.latent_format.latent_channels, seed=seed)
    if type(model.model.diffusion_model).__name__ == "MiniMaxH3Model":
        return _with_sound(model, start, steps, cfg, sampler, positive or condition(1))
    texts = positive or condition(1), condition(2)
    options = {"disable_pbar": True, "seed": 0}
    return sample.sample(
        model, start, steps, cfg, sampler, "simple", *texts, torch.zeros_like(start), **options
    )


def _with_sound(model: Any, video: Tensor, *options: Any) -> Tensor:
    """Samples MiniMax-H3's video, of 22 latent frames, and its sound; `options` as of the core's sampler."""
    from comfy import sample
    from comfy.nested_tensor import NestedTensor

    *how, text = options
    start = NestedTensor([noise((22, *video.shape[3:]), channels=24), randoms(1)(1, 32, 2, SOUND)])
    zeros = NestedTensor([torch.zeros_like(x) for x in start.unbind()])
    made = sample.sample(model, start, *how, "simple", text, text, zeros, disable_pbar=True, seed=0)
    return torch.cat([x.flatten() for x in made.unbind()])
