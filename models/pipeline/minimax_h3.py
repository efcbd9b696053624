"""Calls the modular blocks of MiniMax-H3, text or keyframes to video with sound, as other pipelines."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, MiniMaxH3Blocks, MiniMaxH3ModularPipeline
from diffusers.loaders import MiniMaxH3LoraLoaderMixin
from diffusers.modular_pipelines import ModularPipelineBlocks

from ..runtime.transformers import WITH_REFERENCES

IMAGE = "<|image_pad|>"  # the token that stands for a piece of an image


@dataclass
class VideoWithSound:
    """Holds what a call made.

    Attributes:
        frames: array `[1, T, H, W, 3]` in 0 .. 1, or what `output_type` asks for.
        audio: `[1, 2, samples]`, both channels.
        sampling_rate: samples a second.
    """

    frames: Any
    audio: torch.Tensor
    sampling_rate: int


class Presenter:
    """Does what MiniMax-H3 asks of Qwen3-VL's processor, which as a whole would need torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor = image_processor
        self.image_token = tokenizer.convert_tokens_to_ids(IMAGE)

    def create_mm_token_type_ids(self, input_ids: list[list[int]]) -> list[list[int]]:
        """Returns 1 for each token of an image, 0 for text."""
        return [[int(token == self.image_token) for token in tokens] for tokens in input_ids]


class MiniMaxH3Pipeline(DiffusionPipeline, MiniMaxH3LoraLoaderMixin):
    """Calls diffusers' blocks with the parts of this pipeline, so that its offload and LoRAs work on them."""

    model_cpu_offload_seq = "text_encoder->transformer->vae->audio_vae"
    # with sequential offload: its weight norms make weights before its layers would be loaded
    _exclude_from_cpu_offload = ["audio_vae"]  # noqa: RUF012 (the library's type)

    def __init__(
        self,
        *,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        processor: Any,
        transformer: torch.nn.Module,
        vae: torch.nn.Module,
        audio_vae: torch.nn.Module,
        scheduler: Any,
        audio_scheduler: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            processor=processor,
            transformer=transformer,
            vae=vae,
            audio_vae=audio_vae,
            scheduler=scheduler,
            audio_scheduler=audio_scheduler,
        )

    def __call__(self, prompt: str, num_inference_steps: int, **options: Any) -> VideoWithSound:
        """Makes one video; `options` are other inputs of `MiniMaxH3Blocks`, as `image` and `num_frames`.

        Runs the transformer `num_inference_steps` times: the blocks also count the level at the end.
        """
        blocks = MiniMaxH3Blocks()
        _set_progress(blocks, getattr(self, "_progress_bar_config", {}))
        pipeline, parts = MiniMaxH3ModularPipeline(blocks), dict(self.components)
        parts["processor"] = Presenter(parts["processor"], parts["tokenizer"])
        pipeline.register_components(**parts)
        state = pipeline(prompt=prompt, num_inference_steps=num_inference_steps + 1, **options)
        return VideoWithSound(*(state.get(name) for name in ("videos", "audio", "sampling_rate")))


def _set_progress(blocks: ModularPipelineBlocks, options: Mapping[str, Any]) -> None:
    """Gives the options of a progress bar to each loop among the blocks."""
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(**options)
        _set_progress(block, options)


def load_minimax_h3(
    path: str, parts: Mapping[str, Any], dtype: Mapping[str, torch.dtype], quantization_config: Any = None
) -> MiniMaxH3Pipeline:
    """Returns the pipeline at `path`, a folder or hub id, for all but references.

    Args:
        parts: components that are loaded already.
        dtype: of components by name, `default` for others.
        quantization_config: diffusers' configuration for some of the components.
    """
    from transformers import AutoImageProcessor

    chosen = quantization_config.quant_mapping if quantization_config else {}
    loaded = {"processor": AutoImageProcessor.from_pretrained(path, subfolder="processor")} | dict(parts)
    for spec in MiniMaxH3Blocks().expected_components:
        name, options = spec.name, {}
        if name in (*loaded, WITH_REFERENCES) or spec.default_creation_method == "from_config":
            continue
        if issubclass(spec.type_hint, torch.nn.Module):
            options = {"dtype": dtype.get(name, dtype["default"]), "use_safetensors": True}
            options |= {"quantization_config": chosen[name]} if name in chosen else {}
        loaded[name] = spec.type_hint.from_pretrained(path, subfolder=name, **options)
    return MiniMaxH3Pipeline(**loaded)
