"""Compares the known numbers of published models with those of models on the meta device."""

import json
import shutil
from functools import partial

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from radial_attn import RadialConfig
from radial_attn.models import apply_radial_attention
from scripts.run.config import ROOT, VideoSize, read_config
from scripts.run.errors import UsageError
from scripts.run.hub_models import HUB_MODELS, HUNYUAN_CONFIG, read_model_info
from scripts.run.model_info import ModelInfo
from scripts.run.model_readers import from_configs
from scripts.run.plan import check_model_options
from tests.support.tiny_wan import vace_transformer

WAN_INPUTS = {  # of the transformers that take more than the latents of a video
    "Wan2.1-I2V": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "Wan2.1-FLF2V": {
        "in_channels": 36,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
        "pos_embed_seq_len": 514,
    },
    "Wan2.2-Animate": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "Wan2.2-I2V": {"in_channels": 36},
    "SkyReels-V2-DF-1.3B": {"inject_sample_info": True},
    "Wan2.2-TI2V": {"in_channels": 48, "out_channels": 48},
}

RELATIVES = {
    "VACE": "WanVACE",
    "Animate": "WanAnimate",
    "SkyReels": "SkyReelsV2",
    "AnyFlow": "AnyFlow",
    "ChronoEdit": "ChronoEdit",
}
FROM_IMAGE = ("nvidia/ChronoEdit", "Skywork/SkyReels-V2-I2V")


def wan(name: str, model: ModelInfo) -> torch.nn.Module:
    start = next((start for start in RELATIVES if start in name), "")
    cls = getattr(diffusers, f"{RELATIVES.get(start, 'Wan')}Transformer3DModel")
    kind = "-".join(name.removeprefix("Wan-AI/").split("-")[:2])
    if name.startswith(FROM_IMAGE):
        kind = "Wan2.1-I2V"
    if "DF-1.3B" in name:
        kind = "SkyReels-V2-DF-1.3B"
    return cls(
        **{"text_dim": 4096} | WAN_INPUTS.get(kind, {}),
        num_layers=model.layers,
        num_attention_heads=model.heads,
        attention_head_dim=model.head_dim,
        ffn_dim=model.ffn,
    )


def wan_vae(name: str) -> torch.nn.Module:
    if "TI2V" not in name:
        return diffusers.AutoencoderKLWan()
    patch = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    latents = {"z_dim": 48, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    widths = {"base_dim": 160, "decoder_base_dim": 256}
    return diffusers.AutoencoderKLWan(is_residual=True, **widths, **patch, **latents)


def clip_vision(width: int = 1280, layers: int = 32, **sizes: int) -> transformers.CLIPVisionConfig:
    sizes |= {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return transformers.CLIPVisionConfig(num_attention_heads=16, patch_size=14, **sizes)


def llama() -> torch.nn.Module:
    """Builds Llama 3 8B with the vocabulary of HunyuanVideo's text encoder."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=128320, **sizes))


def llava() -> torch.nn.Module:
    """Builds Llava on Llama 3 8B and CLIP-L of 336 pixels."""
    vision = clip_vision(1024, 24, image_size=336)
    config = transformers.LlavaConfig(vision_config=vision, text_config=llama().config)
    return transformers.LlavaForConditionalGeneration(config)


def t5(kind: str, vocabulary: int) -> torch.nn.Module:
    """Builds the encoder of T5 or UMT5 of the size XXL."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, is_gated_act=True, **sizes)
    config.feed_forward_proj = "gated-gelu"
    return getattr(transformers, f"{kind}EncoderModel")(config)


def qwen() -> torch.nn.Module:
    """Builds the language model of Qwen2.5-VL-7B."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    return transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**sizes, **heads))


def gemma() -> torch.nn.Module:
    """Builds Gemma 3 12B, with its encoder of images."""
    text = {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 896}
    vision |= {"num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen_vl() -> torch.nn.Module:
    """Builds Qwen2.5-VL-7B with its eyes and its head."""
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    text, sizes = qwen().config.to_dict(), {"vision_config": vision, "tie_word_embeddings": False}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, **sizes)
    )


def clip_text() -> torch.nn.Module:
    """Builds the text encoder of CLIP-L."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))


def byt5() -> torch.nn.Module:
    """Builds the encoder of ByT5 small, with the colours and fonts of Glyph-SDXL among its tokens."""
    sizes = {"vocab_size": 1510, "d_model": 1472, "d_ff": 3584, "num_layers": 12, "num_heads": 6}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


def t5_gemma() -> torch.nn.Module:
    """Builds the encoder of T5Gemma 2 with 4B weights, SigLIP's vision tower included."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "vocab_size": 262144}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 896}
    vision |= {"num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
    config = transformers.T5Gemma2EncoderConfig(
        text_config=heads | text | {"dropout_rate": 0.0}, vision_config=vision, dropout_rate=0.0
    )
    return transformers.T5Gemma2Encoder(config)


def minimax() -> dict[str, torch.nn.Module]:
    """Builds the parts of MiniMax-H3, with Qwen3-VL-32B as text encoder."""
    text = {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "vocab_size": 151936}
    text |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 5120}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return {
        "transformer": diffusers.MiniMaxH3Transformer3DModel(),
        "text_encoder": transformers.Qwen3VLForConditionalGeneration(config),
        "vae": diffusers.AutoencoderKLMiniMaxH3(),
        "audio_vae": diffusers.AutoencoderKLMiniMaxH3Audio(),
    }


def motif() -> dict[str, torch.nn.Module]:
    """Builds the parts of MotifVideo 2B."""
    layers = {"num_attention_heads": 12, "num_layers": 12, "num_single_layers": 24, "num_decoder_layers": 8}
    texts = {"text_embed_dim": 2560, "image_embed_dim": 1152, "enable_text_cross_attention_single": True}
    transformer = diffusers.MotifVideoTransformer3DModel(**layers, **texts)
    return {"transformer": transformer, "text_encoder": t5_gemma(), "vae": diffusers.AutoencoderKLWan()}


def kandinsky() -> dict[str, torch.nn.Module]:
    """Builds the parts of Kandinsky 5.0 Lite."""
    channels = {"in_visual_dim": 16, "out_visual_dim": 16, "visual_cond": True}
    return {
        "transformer": diffusers.Kandinsky5Transformer3DModel(model_dim=1792, ff_dim=7168, **channels),
        "text_encoder": qwen_vl(),
        "text_encoder_2": clip_text(),
        "vae": diffusers.AutoencoderKLHunyuanVideo(),
    }


def cosmos(model: ModelInfo, newer: bool) -> dict[str, torch.nn.Module]:
    """Builds the parts of a Cosmos 2 with T5-11B as encoder, or of 2.5 with Qwen2.5-VL, and a control net."""
    text = {"use_crossattn_projection": newer, "crossattn_proj_in_channels": 28 * 3584 if newer else 1024}
    sizes = {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128}
    heads, built = {"num_attention_heads": model.heads}, {}
    layers = {"num_layers": model.layers, "extra_pos_embed_type": None}
    if model.controlnet_layers:
        text["img_context_dim_in"], layers["controlnet_block_every_n"] = 1152, 7
        built["controlnet"] = diffusers.CosmosControlNetModel(model.controlnet_layers, **heads, **text)
    return built | {
        "transformer": diffusers.CosmosTransformer3DModel(17, **layers, **heads, **text),
        "text_encoder": qwen_vl()
        if newer
        else transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **sizes)),
        "vae": diffusers.AutoencoderKLWan(),
    }


def siglip() -> torch.nn.Module:
    """Builds SigLIP so400m of 384 pixels, as FLUX.1 Redux has it."""
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 384}
    config = transformers.SiglipVisionConfig(num_attention_heads=16, patch_size=14, **sizes)
    return transformers.SiglipVisionModel(config)


def ltx(name: str) -> dict[str, torch.nn.Module]:
    """Builds LTX-2, or LTX-Video."""
    if "LTX-2" not in name:
        encoder, vae = t5("T5", 32128), diffusers.AutoencoderKLLTXVideo()
        return {"transformer": diffusers.LTXVideoTransformer3DModel(), "text_encoder": encoder, "vae": vae}
    ratios = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    return {
        "transformer": diffusers.LTX2VideoTransformer3DModel(),
        "text_encoder": gemma(),
        "connectors": LTX2TextConnectors(),
        "vae": diffusers.AutoencoderKLLTX2Video(**ratios),
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(),
        "vocoder": LTX2Vocoder(),
    }


def parts(name: str, model: ModelInfo) -> dict[str, torch.nn.Module]:
    makers = {
        "Kandinsky": kandinsky,
        "MiniMax": minimax,
        "Motif": motif,
        "Cosmos": partial(cosmos, model, "2.5" in name),
    }
    for kind, make in makers.items():
        if kind in name:
            return make()
    if name.startswith(("Wan-AI", "nvidia", "Skywork")):
        built = {"transformer": wan(name, model), "text_encoder": t5("UMT5", 256384), "vae": wan_vae(name)}
        if any(kind in name for kind in ("Wan2.1-I2V", "FLF2V", "Animate", *FROM_IMAGE)):
            kind = "CLIPVisionModelWithProjection" if "SkyReels" in name else "CLIPVisionModel"
            vision = clip_vision(image_size=224, projection_dim=1024)
            built["image_encoder"] = getattr(transformers, kind)(vision)
        return built | ({"transformer_2": wan(name, model)} if "A14B" in name else {})
    if "HunyuanVideo-1.5" in name:
        return {
            "transformer": diffusers.HunyuanVideo15Transformer3DModel(target_size=model.target_size),
            "text_encoder": qwen(),
            "text_encoder_2": byt5(),
            "vae": diffusers.AutoencoderKLHunyuanVideo15(),
            **({"image_encoder": siglip()} if "i2v" in name else {}),
        }
    if "Hunyuan" in name:
        image = "I2V" in name
        condition = "token_replace" if image else None
        return {
            "transformer": diffusers.HunyuanVideoTransformer3DModel(image_condition_type=condition),
            "text_encoder": llava() if image else llama(),
            "text_encoder_2": clip_text(),
            "vae": diffusers.AutoencoderKLHunyuanVideo(),
        }
    if "LTX" in name:
        return ltx(name)
    return {
        "transformer": diffusers.MochiTransformer3DModel(),
        "text_encoder": t5("T5", 32128),
        "vae": diffusers.AutoencoderKLMochi(),
    }


@pytest.mark.parametrize("name", HUB_MODELS)
def test_numbers_of_the_known_hub_models(name):
    model = HUB_MODELS[name]
    with torch.device("meta"):
        built = parts(name, model)
    assert {part: module.num_parameters() for part, module in built.items()} == model.parameters
    transformer = {"_class_name": type(built["transformer"]).__name__, **built["transformer"].config}
    assert from_configs(transformer, dict(built["vae"].config), model.parameters) == model


@pytest.mark.parametrize(
    "name", ["genmo/mochi-1-preview", "hunyuanvideo-community/HunyuanVideo", "MiniMaxAI/MiniMax-H3"]
)
def test_multiply_adds_of_a_layer_are_those_of_its_matrices(name):
    """Counts the matrices that a video token meets in the last kind of block, without norms."""
    with torch.device("meta"):
        transformer = parts(name, HUB_MODELS[name])["transformer"]
    blocks = getattr(transformer, "single_transformer_blocks", None) or transformer.transformer_blocks
    matrices = [(n, p) for n, p in blocks[0].named_parameters() if p.ndim == 2]
    met = sum(
        p.numel() for n, p in matrices if not any(part in n for part in ("add_", "context", "norm", "adaln"))
    )
    assert HUB_MODELS[name].macs == pytest.approx(met, rel=0.01)


@pytest.mark.parametrize(
    ("name", "frames", "size", "tokens"),
    [
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 69, (768, 1280), 69_120),
        ("hunyuanvideo-community/HunyuanVideo", 117, (768, 1280), 115_456),
        ("genmo/mochi-1-preview", 163, (480, 848), 44_776),
        ("MiniMaxAI/MiniMax-H3", 124, (768, 1344), 37 * 1008 + 2 * 207 + 256),
    ],
)
def test_tokens_of_the_papers_videos(name, frames, size, tokens):
    assert HUB_MODELS[name].grid(VideoSize(frames, *size)).tokens == tokens


@pytest.mark.parametrize("dense_layers", [0, 1, 3])
def test_control_layers_are_counted_as_they_are_applied(dense_layers):
    """There are six attentions in four layers: a control layer counts as the layer that it feeds."""
    transformer = vace_transformer()
    config = {"_class_name": type(transformer).__name__, **transformer.config}
    model = from_configs(config, {}, {})
    with apply_radial_attention(transformer, RadialConfig(), dense_layers=dense_layers) as handle:
        report = handle.report()
    assert (model.layers, model.attention_layers()) == (4, report["layers"])
    assert model.attention_layers(dense_layers) == report["layers"] - report["dense_layers"]


@pytest.mark.parametrize(
    ("name", "text", "joint", "factor"),
    [
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 769, 0, 16),
        ("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", 1026, 0, 16),
        ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", 512, 0, 16),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 512, 0, 32),
        ("hunyuanvideo-community/HunyuanVideo-I2V", 0, 396, 16),
    ],
)
def test_text_and_image_tokens_and_sizes_of_image_to_video(name, text, joint, factor):
    model = HUB_MODELS[name]
    assert (model.text_tokens, model.joint_text, model.size_factor(1)) == (text, joint, factor)


def test_an_unknown_transformer_is_named():
    with pytest.raises(UsageError, match=r"model\.path: .*CogVideoXTransformer3DModel; allowed: Wan"):
        from_configs({"_class_name": "CogVideoXTransformer3DModel"}, {}, {})


def test_guidance_that_a_model_has_no_place_for_is_refused():
    """A HunyuanVideo that was not distilled has none, like the image-to-video kind of 33 channels."""
    named = HUNYUAN_CONFIG | {"_class_name": "HunyuanVideoTransformer3DModel", "guidance_embeds": False}
    model = from_configs(named, {"block_out_channels": [128]}, {})
    guided, alone = ["generation.guidance_scale=6"], ["generation.guidance_scale=1"]
    with pytest.raises(UsageError, match=r"generation\.guidance_scale: got 6, must be 1"):
        check_model_options(read_config("configs/hunyuan_t2v.yaml", guided), model)
    check_model_options(read_config("configs/hunyuan_t2v.yaml", alone), model)
    check_model_options(read_config("configs/hunyuan_i2v.yaml", guided), model)


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("vae", "[1]", r"vae/config.json .* holds no JSON object"),
        ("transformer", '"x"', r"transformer/config.json .* holds no JSON object"),
        ("transformer", {"ffn_dim": {"a": 1}}, r"give \{'a': 1\} as `ffn`"),
        ("transformer", {"num_layers": -1}, r"give -1 as `layers`"),
        ("transformer", {"patch_size": [1, 0, 2]}, r"give \(1, 0, 2\) as `patch`"),
        ("vae", {"decoder_base_dim": "96"}, r"no usable"),
    ],
)
def test_a_damaged_configuration_is_one_line(part, content, message, tmp_path):
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "assets" / "wan-tiny" / name / "config.json", tmp_path / name)
    file = tmp_path / part / "config.json"
    new = content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content)
    file.write_text(new)
    with pytest.raises(UsageError, match=f"^model.path: .*{message}"):
        read_model_info(str(tmp_path))
