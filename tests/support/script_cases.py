"""Arguments that make a run small."""

SMALL = [
    "model.device=cpu",
    "model.dtype=float32",
    "attention.block_size=16",
    "attention.decimation_width=block",
    "attention.dense_steps=1",
    "generation.height=64",
    "generation.width=64",
    "generation.steps=3",
    "attention.check=reference",
]
