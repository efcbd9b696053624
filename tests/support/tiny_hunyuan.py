"""Tiny random models of HunyuanVideo and HunyuanVideo 1.5, built offline: for tests of any file."""

import string
from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from tests.support.tiny import CHANNELS, HEADS, T5, TEXT_DIM, first, quiet, randoms, seeded

TEXT = 11  # tokens
POOLED_DIM, GLYPH_DIM, IMAGE_DIM = 8, 8, 12
GLYPHS, IMAGE = 5, 3  # further text tokens of HunyuanVideo 1.5
SHAPE = {**HEADS, "rope_axes_dim": (4, 4, 4), "in_channels": CHANNELS}
LAYERS = {"out_channels": CHANNELS, "num_refiner_layers": 1, "text_embed_dim": TEXT_DIM}
ENCODER = {"intermediate_size": 16, "num_attention_heads": 2}
TEMPLATE = {"template": "{}", "crop_start": 0, "image_emb_len": 4, "image_emb_start": 1, "image_emb_end": 5}


def hunyuan_transformer(seed: int = 0, **changes: object) -> HunyuanVideoTransformer3DModel:
    """Makes a random transformer in eval mode: 2 double, 2 single layers, 2 heads of 12, patch 2."""
    blocks = {"num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": POOLED_DIM}
    settings = SHAPE | LAYERS | blocks | changes
    return with_own_norms(seeded(seed, HunyuanVideoTransformer3DModel, **settings))


def hunyuan15_transformer(seed: int = 0, **changes: object) -> HunyuanVideo15Transformer3DModel:
    """Makes a random HunyuanVideo 1.5 transformer in eval mode: 4 layers, 2 heads of 12, patch 1."""
    more = {"num_layers": 4, "text_embed_2_dim": GLYPH_DIM, "image_embed_dim": IMAGE_DIM}
    return with_own_norms(seeded(seed, HunyuanVideo15Transformer3DModel, **SHAPE | LAYERS | more | changes))


def with_own_norms(transformer: torch.nn.Module) -> torch.nn.Module:
    """Makes the norms of query and key differ: at first all are ones."""
    for name, parameter in transformer.named_parameters():
        if "attn.norm_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return transformer


def hunyuan_inputs(
    frames: int = 6,
    height: int = 12,
    width: int = 16,
    *,
    lengths: Sequence[int] = (TEXT,),
    timestep: float = 500.0,
    seed: int = 0,
    channels: int = CHANNELS,
) -> dict[str, torch.Tensor]:
    """Returns arguments of a call, a sample for each of `lengths`, its number of valid text tokens."""
    batch, make = len(lengths), randoms(seed)
    return {
        "hidden_states": make(batch, channels, frames, height, width),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": make(batch, TEXT, TEXT_DIM),
        "encoder_attention_mask": first(lengths, TEXT).float(),
        "pooled_projections": make(batch, POOLED_DIM),
        "guidance": torch.full((batch,), 6000.0),
    }


def hunyuan15_inputs(
    frames: int = 6,
    height: int = 6,
    width: int = 8,
    *,
    lengths: Sequence[int] = (TEXT,),
    image: bool = True,
    **more: float,
) -> dict[str, torch.Tensor]:
    """Returns arguments of a call; all but 2 glyph tokens are valid, and an `image`."""
    inputs = hunyuan_inputs(frames, height, width, lengths=lengths, **more)
    make, batch = randoms(1), len(lengths)
    del inputs["pooled_projections"], inputs["guidance"]
    return inputs | {
        "encoder_hidden_states_2": make(batch, GLYPHS, GLYPH_DIM),
        "encoder_attention_mask_2": first(batch * [GLYPHS - 2], GLYPHS).float(),
        "image_embeds": make(batch, IMAGE, IMAGE_DIM) * image,
    }


def llama_tokenizer() -> LlamaTokenizer:
    """Makes a Llama tokenizer of single letters, which pads at the end."""
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocab, merges=[], pad_token="<pad>", padding_side="right")


def clip_tokenizer() -> CLIPTokenizer:
    """Makes a CLIP tokenizer of single letters."""
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocab = {piece: i for i, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def hunyuan_vae(seed: int = 0) -> AutoencoderKLHunyuanVideo:
    """Makes a random VAE with 4 latent channels, 8 times smaller in space, 4 times in time, in eval mode."""
    blocks = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    attention = {"mid_block_add_attention": False}
    return seeded(seed, AutoencoderKLHunyuanVideo, latent_channels=CHANNELS, **blocks, **attention)


def clip() -> CLIPTextConfig:
    """Makes the configuration of a one-layer CLIP for `clip_tokenizer`."""
    ends = {"eos_token_id": 1, "bos_token_id": 0}
    return CLIPTextConfig(vocab_size=64, hidden_size=POOLED_DIM, num_hidden_layers=1, **ends, **ENCODER)


def hunyuan_pipeline(seed: int = 0, **changes: object) -> HunyuanVideoPipeline:
    """Makes a random HunyuanVideoPipeline with all parts; `changes` go to its transformer."""
    llama = LlamaConfig(vocab_size=64, hidden_size=TEXT_DIM, num_hidden_layers=4, pad_token_id=0, **ENCODER)
    pipeline = HunyuanVideoPipeline(
        text_encoder=seeded(seed, LlamaModel, llama),
        tokenizer=llama_tokenizer(),
        transformer=hunyuan_transformer(seed, **changes),
        vae=hunyuan_vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(clip()).eval(),
        tokenizer_2=clip_tokenizer(),
    )
    return quiet(pipeline)


def hunyuan_image_pipeline(
    kind: str, seed: int = 0, image_size: int = 28
) -> HunyuanVideoImageToVideoPipeline:
    """Makes a random image-to-video pipeline; `kind` of condition: "latent_concat" or "token_replace".

    With images of 336 it takes upstream's own prompt template, whose special tokens its tokenizer knows.
    """
    replace = kind == "token_replace"
    changes = {"image_condition_type": kind, "guidance_embeds": replace}
    channels = CHANNELS if replace else 2 * CHANNELS + 1
    parts = hunyuan_pipeline(seed, in_channels=channels, **changes).components
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "patch_size": 14, "projection_dim": 8}
    vision = CLIPVisionConfig(image_size=image_size, **sizes, **ENCODER)
    text, tokenizer = parts["text_encoder"].config, parts["tokenizer"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|end_header_id|>"]})
    image = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": 0}
    llava = LlavaConfig(vision_config=vision, text_config=text, **image)
    parts["text_encoder"] = seeded(seed, LlavaForConditionalGeneration, llava)
    processor = CLIPImageProcessorPil(size=image_size, crop_size=image_size)
    return quiet(HunyuanVideoImageToVideoPipeline(image_processor=processor, **parts))


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Makes a Qwen2 tokenizer of single bytes."""
    pieces = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    text = "(x['content'] if x['content'] is string else x['content'][0]['text'])"
    template = "{% for x in messages %}{{ x['role'] + ':' + " + text + " }}{% endfor %}"
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=template, padding_side="right")


def qwen(vocabulary: int = 257) -> Qwen2_5_VLTextConfig:
    """Makes the configuration of a Qwen2.5-VL of text with four layers."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    layers = {"num_hidden_layers": 4, "num_key_value_heads": 1, "rope_parameters": rope, **ENCODER}
    return Qwen2_5_VLTextConfig(vocab_size=vocabulary, hidden_size=TEXT_DIM, pad_token_id=0, **layers)


def qwen_vl(seed: int = 0, vocabulary: int = 257) -> Qwen2_5_VLForConditionalGeneration:
    """Makes a random Qwen2.5-VL, in eval mode."""
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    vision = {"vision_config": vision | {"out_hidden_size": TEXT_DIM}, "tie_word_embeddings": False}
    config = Qwen2_5_VLConfig(text_config=qwen(vocabulary).to_dict(), **vision)
    return seeded(seed, Qwen2_5_VLForConditionalGeneration, config)


def hunyuan15_vae(seed: int = 0) -> AutoencoderKLHunyuanVideo15:
    """Makes a random VAE with 4 latent channels, 16 times smaller in space, 4 times in time, in eval mode."""
    sizes = {"latent_channels": CHANNELS, "block_out_channels": (16,) * 5, "layers_per_block": 1}
    return seeded(seed, AutoencoderKLHunyuanVideo15, **sizes)


def hunyuan15_pipeline(
    seed: int = 0, cls: type = HunyuanVideo15Pipeline, parts: dict | None = None, **changes: object
) -> DiffusionPipeline:
    """Makes a random HunyuanVideo15Pipeline, or another `cls`; `changes` go to its transformer."""
    byt5 = T5Config(**T5 | {"vocab_size": 384, "d_model": GLYPH_DIM})
    channels = {"in_channels": 2 * CHANNELS + 1}  # noise, an image, and where it is
    pipeline = cls(
        text_encoder=seeded(seed, Qwen2_5_VLTextModel, qwen()),
        tokenizer=qwen_tokenizer(),
        transformer=hunyuan15_transformer(seed, **channels | changes),
        vae=hunyuan15_vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=seeded(seed, T5EncoderModel, byt5),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **(parts or {}),
    )
    return quiet(pipeline)


def hunyuan15_image_pipeline(seed: int = 0) -> DiffusionPipeline:
    """Makes a random HunyuanVideo15ImageToVideoPipeline: 729 tokens of an image, videos of 64 x 64 pixels."""
    vision = SiglipVisionConfig(
        hidden_size=IMAGE_DIM, image_size=54, patch_size=2, num_hidden_layers=1, **ENCODER
    )
    parts = {
        "image_encoder": seeded(seed, SiglipVisionModel, vision),
        "feature_extractor": SiglipImageProcessor(size={"height": 54, "width": 54}),
    }
    return hunyuan15_pipeline(seed, HunyuanVideo15ImageToVideoPipeline, parts, target_size=64)
