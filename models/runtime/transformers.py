"""Finds the transformers of a model."""

from typing import Any

import torch

NAMES = ("transformer", "transformer_2")  # attributes of a pipeline
WITH_REFERENCES = "transformer_ref"  # MiniMax-H3's, in place of or beside `transformer`
WHOLE_GUIDANCE = (  # which two processes cannot share: more passes, or one half is read before the other
    "LTX2VideoTransformer3DModel",
    "MotifVideoTransformer3DModel",
    "Kandinsky5Transformer3DModel",
    "CosmosTransformer3DModel",
)


def parts_of(model: Any) -> list[torch.nn.Module]:
    """Returns the model if it is a module, else the transformers of a pipeline, as they are."""
    if isinstance(model, torch.nn.Module):
        return [model]
    names = *NAMES, WITH_REFERENCES
    return [part for name in names if (part := getattr(model, name, None)) is not None]


def transformers_of(model: Any) -> list[torch.nn.Module]:
    """Returns the transformers of a model without torch.compile's wrapper; ValueError if it has none."""
    transformers = [getattr(part, "_orig_mod", part) for part in parts_of(model)]
    if not transformers:
        raise ValueError(f"expected a transformer, or a pipeline that has one, got {type(model).__name__}")
    return transformers


def head_sizes(transformer: torch.nn.Module) -> tuple[int, int]:
    """Returns how many heads the self-attention of a transformer has, and their width."""
    config = transformer.config
    if "axes_dims" in config:  # Kandinsky 5: the channels that turn with time, height and width
        width = sum(config.axes_dims)
        return config.model_dim // width, width
    return config.num_attention_heads, config.attention_head_dim


def is_compiled(model: torch.nn.Module) -> bool:
    """Tells whether the forward pass of any part of a model was compiled.

    `module.compile()` leaves one mark, `module.forward = torch.compile(...)` another.
    """
    return any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )
