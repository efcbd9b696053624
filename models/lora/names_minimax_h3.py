"""Maps MiniMax-H3's own layer names to diffusers'; `#` is the number of a block.

A name with several layers holds their rows one after another, as in ComfyUI's files and LoRAs for them. In
LoRAs of DiffSynth-Studio, and in the authors' own weights, the rows of a head's query, key and value follow
those of the head before: BY_HEAD marks the name of such a layer.
"""

from collections.abc import Mapping

BLOCKS = {"blocks.#": "transformer_blocks.#", "token_refiner.blocks.#": "token_refiner.refiner_blocks.#"}
FUSED, BY_HEAD = ".attn.qkv_proj", " by head"
DIFFSYNTH = r".+\.attn\.qkv_proj\.lora_[AB]\.default\.weight"
NAMES = {
    "video_patch_proj": ("proj_in",),
    "audio_patch_proj": ("audio_proj_in",),
    "condition_proj": ("context_embedder",),
    "time_embedder.proj_in": ("time_embedder.linear_1",),
    "time_embedder.proj_out": ("time_embedder.linear_2",),
    "final_layer.norm": ("norm_out.norm",),
    "final_layer.adaln_proj.linear": ("norm_out.linear",),
    "final_layer.video_out": ("proj_out",),
    "final_layer.audio_out": ("audio_proj_out",),
}
for _name, _block in BLOCKS.items():
    NAMES |= {
        f"{_name}{FUSED}": tuple(f"{_block}.attn.to_{part}" for part in "qkv"),
        f"{_name}.attn.out_proj": (f"{_block}.attn.to_out.0",),
        f"{_name}.attn.q_norm": (f"{_block}.attn.norm_q",),
        f"{_name}.attn.k_norm": (f"{_block}.attn.norm_k",),
        f"{_name}.mlp.fc1": (f"{_block}.ff.net.0.proj",),
        f"{_name}.mlp.fc2": (f"{_block}.ff.net.2",),
        f"{_name}.norm1": (f"{_block}.norm1",),
        f"{_name}.norm2": (f"{_block}.norm2",),
        f"{_name}.adaln_proj.linear": (f"{_block}.adaln_proj.linear",),
    }
SWAPPED = tuple(f"{name}.mlp.fc1" for name in BLOCKS)  # rows of gate, then of value; diffusers: the other way


def rows_by_head(part: int, rows: Mapping[str, int], layer: str) -> tuple[tuple[int, int], ...]:
    """Returns the rows of query (`part` 0), key (1) or value (2) if each head has its own three together."""
    width = rows[f"{layer.rpartition('.')[0]}.norm_q"]
    return tuple((start, start + width) for start in range(part * width, 3 * rows[layer], 3 * width))
