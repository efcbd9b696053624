"""Rotary embeddings of published models."""

from functools import partial

from tests.support.tiny import wan_transformer
from tests.support.tiny_hunyuan import hunyuan15_transformer, hunyuan_transformer

WIDE = {"attention_head_dim": 128, "num_attention_heads": 1}
REAL = {  # a transformer with the rotary embedding of the published one: channels in time, base, lengths, k
    "wan": (partial(wan_transformer, **WIDE, num_layers=1), 44, 10000.0, 21, 41, 4),
    "hunyuan_video": (partial(hunyuan_transformer, **WIDE, rope_axes_dim=(16, 56, 56)), 16, 256.0, 33, 64, 4),
    "hunyuan_video15": (
        partial(hunyuan15_transformer, **WIDE, rope_axes_dim=(16, 56, 56)),
        *(16, 256.0, 31, 61, 4),
    ),
}
