"""Maps the HunyuanVideo authors' layer names to diffusers'; text to video, image to video, and 1.5.

`#` is the number of a block. A name with several layers holds their rows one after another.
"""

DOUBLE, SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
TEXT, REFINER = "context_embedder", "context_embedder.token_refiner.refiner_blocks.#"
TEXT_IN, REFINER_IN = "txt_in", "txt_in.individual_token_refiner.blocks.#"
NAMES = {
    "img_in.proj": ("x_embedder.proj",),
    "time_in.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.mlp.0": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.mlp.2": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    f"{TEXT_IN}.input_embedder": (f"{TEXT}.proj_in",),
    f"{TEXT_IN}.t_embedder.mlp.0": (f"{TEXT}.time_text_embed.timestep_embedder.linear_1",),
    f"{TEXT_IN}.t_embedder.mlp.2": (f"{TEXT}.time_text_embed.timestep_embedder.linear_2",),
    f"{TEXT_IN}.c_embedder.linear_1": (f"{TEXT}.time_text_embed.text_embedder.linear_1",),
    f"{TEXT_IN}.c_embedder.linear_2": (f"{TEXT}.time_text_embed.text_embedder.linear_2",),
    f"{REFINER_IN}.norm1": (f"{REFINER}.norm1",),
    f"{REFINER_IN}.norm2": (f"{REFINER}.norm2",),
    f"{REFINER_IN}.self_attn_qkv": tuple(f"{REFINER}.attn.to_{part}" for part in "qkv"),
    f"{REFINER_IN}.self_attn_proj": (f"{REFINER}.attn.to_out.0",),
    f"{REFINER_IN}.mlp.fc1": (f"{REFINER}.ff.net.0.proj",),
    f"{REFINER_IN}.mlp.fc2": (f"{REFINER}.ff.net.2",),
    f"{REFINER_IN}.adaLN_modulation.1": (f"{REFINER}.norm_out.linear",),
    "double_blocks.#.img_mod.linear": (f"{DOUBLE}.norm1.linear",),
    "double_blocks.#.img_attn_qkv": tuple(f"{DOUBLE}.attn.to_{part}" for part in "qkv"),
    "double_blocks.#.img_attn_q_norm": (f"{DOUBLE}.attn.norm_q",),
    "double_blocks.#.img_attn_k_norm": (f"{DOUBLE}.attn.norm_k",),
    "double_blocks.#.img_attn_proj": (f"{DOUBLE}.attn.to_out.0",),
    "double_blocks.#.img_mlp.fc1": (f"{DOUBLE}.ff.net.0.proj",),
    "double_blocks.#.img_mlp.fc2": (f"{DOUBLE}.ff.net.2",),
    "double_blocks.#.txt_mod.linear": (f"{DOUBLE}.norm1_context.linear",),
    "double_blocks.#.txt_attn_qkv": tuple(f"{DOUBLE}.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.#.txt_attn_q_norm": (f"{DOUBLE}.attn.norm_added_q",),
    "double_blocks.#.txt_attn_k_norm": (f"{DOUBLE}.attn.norm_added_k",),
    "double_blocks.#.txt_attn_proj": (f"{DOUBLE}.attn.to_add_out",),
    "double_blocks.#.txt_mlp.fc1": (f"{DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.fc2": (f"{DOUBLE}.ff_context.net.2",),
    "single_blocks.#.modulation.linear": (f"{SINGLE}.norm.linear",),
    "single_blocks.#.linear1": (*(f"{SINGLE}.attn.to_{part}" for part in "qkv"), f"{SINGLE}.proj_mlp"),
    "single_blocks.#.linear2": (f"{SINGLE}.proj_out",),
    "single_blocks.#.q_norm": (f"{SINGLE}.attn.norm_q",),
    "single_blocks.#.k_norm": (f"{SINGLE}.attn.norm_k",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
# HunyuanVideo 1.5. Its authors keep query, key and value apart; ComfyUI joins them.
NEWER = {
    **{f"double_blocks.#.img_attn_{part}": (f"{DOUBLE}.attn.to_{part}",) for part in "qkv"},
    **{f"double_blocks.#.txt_attn_{part}": (f"{DOUBLE}.attn.add_{part}_proj",) for part in "qkv"},
    **NAMES,
    "time_in.mlp.0": ("time_embed.timestep_embedder.linear_1",),
    "time_in.mlp.2": ("time_embed.timestep_embedder.linear_2",),
    "byt5_in.layernorm": ("context_embedder_2.norm",),
    **{f"byt5_in.fc{number}": (f"context_embedder_2.linear_{number}",) for number in (1, 2, 3)},
    "vision_in.proj.0": ("image_embedder.norm_in",),
    "vision_in.proj.1": ("image_embedder.linear_1",),
    "vision_in.proj.3": ("image_embedder.linear_2",),
    "vision_in.proj.4": ("image_embedder.norm_out",),
    "cond_type_embedding": ("cond_type_embed",),
}
# Rows of shift, then of scale; diffusers has them the other way around.
SWAPPED = ("final_layer.adaLN_modulation.1",)
# Patterns of ComfyUI's names, for files that were extracted there, if they differ from the authors'.
OTHERS = (
    (r"_attn_(qkv|proj)$", r"_attn.\1"),
    (r"_attn_q_norm$", "_attn.norm.query_norm"),
    (r"_attn_k_norm$", "_attn.norm.key_norm"),
    (r"#\.q_norm$", "#.norm.query_norm"),
    (r"#\.k_norm$", "#.norm.key_norm"),
    (r"(mod|modulation)\.linear$", r"\1.lin"),
    (r"mlp\.fc1$", "mlp.0"),
    (r"mlp\.fc2$", "mlp.2"),
    (r"(_in|t_embedder)\.mlp\.0$", r"\1.in_layer"),
    (r"(_in|t_embedder)\.mlp\.2$", r"\1.out_layer"),
    (r"c_embedder\.linear_1$", "c_embedder.in_layer"),
    (r"c_embedder\.linear_2$", "c_embedder.out_layer"),
)
