"""Maps the Mochi authors' layer names to diffusers', and reads the settings of their fine-tuner.

`#` is the number of a block. A name with several layers holds their rows one after another.
"""

from collections.abc import Mapping
from typing import Any

BLOCK = "transformer_blocks.#"
NAMES = {
    "x_embedder.proj": ("patch_embed.proj",),
    "t_embedder.mlp.0": ("time_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_embed.timestep_embedder.linear_2",),
    "t5_y_embedder.to_kv": ("time_embed.pooler.to_kv",),
    "t5_y_embedder.to_q": ("time_embed.pooler.to_q",),
    "t5_y_embedder.to_out": ("time_embed.pooler.to_out",),
    "t5_yproj": ("time_embed.caption_proj",),
    "blocks.#.mod_x": (f"{BLOCK}.norm1.linear",),
    "blocks.#.mod_y": (f"{BLOCK}.norm1_context.linear",),
    "blocks.#.attn.qkv_x": tuple(f"{BLOCK}.attn1.to_{part}" for part in "qkv"),
    "blocks.#.attn.qkv_y": tuple(f"{BLOCK}.attn1.add_{part}_proj" for part in "qkv"),
    "blocks.#.attn.q_norm_x": (f"{BLOCK}.attn1.norm_q",),
    "blocks.#.attn.k_norm_x": (f"{BLOCK}.attn1.norm_k",),
    "blocks.#.attn.q_norm_y": (f"{BLOCK}.attn1.norm_added_q",),
    "blocks.#.attn.k_norm_y": (f"{BLOCK}.attn1.norm_added_k",),
    "blocks.#.attn.proj_x": (f"{BLOCK}.attn1.to_out.0",),
    "blocks.#.attn.proj_y": (f"{BLOCK}.attn1.to_add_out",),
    "blocks.#.mlp_x.w1": (f"{BLOCK}.ff.net.0.proj",),
    "blocks.#.mlp_x.w2": (f"{BLOCK}.ff.net.2",),
    "blocks.#.mlp_y.w1": (f"{BLOCK}.ff_context.net.0.proj",),
    "blocks.#.mlp_y.w2": (f"{BLOCK}.ff_context.net.2",),
    "final_layer.mod": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
LAST_BLOCK = {"blocks.#.mod_y": (f"{BLOCK}.norm1_context.linear_1",)}
# Rows of gate, then of value, or of shift, then of scale; diffusers has them the other way around.
SWAPPED = ("blocks.#.mlp_x.w1", "blocks.#.mlp_y.w1", "final_layer.mod")
ALPHAS = {  # setting of the fine-tuner: peft's pattern of its layers
    "qkv_proj_lora_alpha": r"attn1\.(to_[qkv]|add_[qkv]_proj)",
    "out_proj_lora_alpha": r"attn1\.(to_out\.0|to_add_out)",
}


def peft_settings(written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fine-tuner's settings in peft's form; {} if the file has none of them."""
    alphas = {pattern: written[name] for name, pattern in ALPHAS.items() if name in written}
    return {"alpha_pattern": alphas} if alphas else {}
