"""Saves memory and time by diffusers' own means: weights in 8 or 4 bits, offload, compiling, tiles.

Blocks are compiled before any hook is put around them, so offload and caches stay outside the graphs.
"""

from typing import TYPE_CHECKING, Any

import torch

from ..runtime.transformers import NAMES, transformers_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.quantizers import PipelineQuantizationConfig


def quantization_config(kind: str, dtype: torch.dtype) -> "PipelineQuantizationConfig | None":
    """Returns how `from_pretrained` stores the transformers' weights: "int8" or "nf4"; None for other kinds.

    Raises ImportError if torchao (int8) or bitsandbytes (nf4) is missing.
    """
    from diffusers.quantizers import PipelineQuantizationConfig

    if kind == "int8":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        chosen: Any = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "nf4":
        import bitsandbytes  # noqa: F401 (diffusers would report only while loading that it is missing)
        from diffusers import BitsAndBytesConfig

        chosen = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    else:
        return None
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(NAMES, chosen))


def economize(
    pipeline: "DiffusionPipeline",
    device: str,
    dtype: torch.dtype,
    *,
    offload: str = "none",
    quantization: str = "none",
    compile: str = "none",
    vae_tiling: str = "auto",
    stream: bool = False,
) -> None:
    """Makes a loaded pipeline, with its LoRAs, smaller or faster, and moves it to `device`.

    Args:
        vae_tiling: "always", "never", or "auto", which leaves it as the pipeline was loaded.
        stream: see `place`.
    """
    if vae_tiling != "auto":
        (pipeline.vae.enable_tiling if vae_tiling == "always" else pipeline.vae.disable_tiling)()
    if quantization == "fp8":
        store_in_fp8(pipeline, dtype)
    if compile == "blocks":
        compile_blocks(pipeline)
    place(pipeline, device, offload, stream=stream)


def store_in_fp8(pipeline: "DiffusionPipeline", dtype: torch.dtype) -> None:
    """Keeps the transformers' matrices in float8_e4m3fn and converts each to `dtype` for its product.

    Norms, patch embedding, output projection and LoRAs stay as they are.
    """
    for transformer in transformers_of(pipeline):
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        for weight in transformer.parameters():
            if weight.dtype != torch.float8_e4m3fn:
                weight.data = weight.data.clone()  # else these few keep the whole file in memory


def compile_blocks(pipeline: "DiffusionPipeline", **options: Any) -> None:
    """Compiles the forward of every block of the transformers; `options` go to `torch.compile`."""
    for transformer in transformers_of(pipeline):
        for block in blocks_of(transformer):
            block.forward = torch.compile(block.forward, **options)


def blocks_of(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the blocks in the lists of a transformer, which repeat the same code."""
    lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def place(pipeline: "DiffusionPipeline", device: str, offload: str, *, stream: bool = False) -> None:
    """Moves a pipeline from the host to `device`: all of it or, with offload, what is needed at the time.

    Args:
        offload: "none"; "model", one part at a time; "group", the transformers block by block and the text
            encoders layer by layer, with the VAE on the device; "sequential", everything layer by layer.
        stream: for "group", load the next block while one runs. Turn it off if a cache skips blocks.
    """
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=_with_number(device))
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=_with_number(device))
    elif offload == "group":
        _place_groups(pipeline, device, stream)
    else:
        pipeline.to(device)


def _with_number(device: str) -> str:
    """Adds the number of this process's GPU, since diffusers takes a bare "cuda" for the first."""
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def _place_groups(pipeline: "DiffusionPipeline", device: str, stream: bool) -> None:
    from diffusers.hooks import apply_group_offloading

    options = {"onload_device": torch.device(device), "use_stream": stream and device == "cuda"}
    for name, part in pipeline.components.items():
        if name == "vae" or not getattr(part, "_supports_group_offloading", True):
            part.to(device)
        elif name in NAMES and part is not None:
            part.enable_group_offload(**options, offload_type="block_level", num_blocks_per_group=1)
        elif isinstance(part, torch.nn.Module) and name != "safety_checker":  # the pipeline moves it
            apply_group_offloading(part, **options, offload_type="leaf_level")
