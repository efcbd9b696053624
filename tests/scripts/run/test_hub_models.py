"""What is known of published models, against models built on the meta device from the same numbers."""

import diffusers
import pytest
import torch
import transformers

from radial_attn import RadialConfig
from radial_attn.models import apply_radial_attention
from scripts.run.config import VideoSize, read_config
from scripts.run.errors import UsageError
from scripts.run.hub_models import HUB_MODELS, HUNYUAN_CONFIG
from scripts.run.model_info import ModelInfo, from_configs
from scripts.run.plan import check_model_options
from tests.support.tiny_wan import vace_transformer

T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


WAN_INPUTS = {  # of the transformers that take more than the latents of a video
    "Wan2.1-I2V": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "Wan2.2-I2V": {"in_channels": 36},
    "Wan2.2-TI2V": {"in_channels": 48, "out_channels": 48},
}


def wan(name: str, model: ModelInfo) -> torch.nn.Module:
    cls = diffusers.WanVACETransformer3DModel if "VACE" in name else diffusers.WanTransformer3DModel
    kind = "-".join(name.removeprefix("Wan-AI/").split("-")[:2])
    return cls(
        **WAN_INPUTS.get(kind, {}),
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
    return diffusers.AutoencoderKLWan(
        base_dim=160, decoder_base_dim=256, is_residual=True, **patch, **latents
    )


def clip_vision(width: int = 1280, layers: int = 32, **sizes: int) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        patch_size=14,
        **sizes,
    )


def llava() -> torch.nn.Module:
    """Llava on Llama 3 8B and CLIP-L of 336 pixels."""
    vision = clip_vision(1024, 24, image_size=336)
    config = transformers.LlavaConfig(vision_config=vision, text_config=llama().config)
    return transformers.LlavaForConditionalGeneration(config)


def umt5() -> torch.nn.Module:
    config = transformers.UMT5Config(vocab_size=256384, is_gated_act=True, **T5)
    config.feed_forward_proj = "gated-gelu"
    return transformers.UMT5EncoderModel(config)


def t5() -> torch.nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5)
    )


def llama() -> torch.nn.Module:
    """Llama 3 8B with the vocabulary of HunyuanVideo's text encoder."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=128320, **sizes))


def clip() -> torch.nn.Module:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))


def parts(name: str, model: ModelInfo) -> dict[str, torch.nn.Module]:
    if name.startswith("Wan-AI"):
        found = {"transformer": wan(name, model), "text_encoder": umt5(), "vae": wan_vae(name)}
        if "Wan2.1-I2V" in name:
            found["image_encoder"] = transformers.CLIPVisionModel(clip_vision(image_size=224))
        return found | ({"transformer_2": wan(name, model)} if "A14B" in name else {})
    if "Hunyuan" in name:
        return {
            "transformer": diffusers.HunyuanVideoTransformer3DModel(
                image_condition_type="token_replace" if "I2V" in name else None
            ),
            "text_encoder": llava() if "I2V" in name else llama(),
            "text_encoder_2": clip(),
            "vae": diffusers.AutoencoderKLHunyuanVideo(),
        }
    return {
        "transformer": diffusers.MochiTransformer3DModel(),
        "text_encoder": t5(),
        "vae": diffusers.AutoencoderKLMochi(),
    }


@pytest.mark.parametrize("name", HUB_MODELS)
def test_numbers_of_the_known_hub_models(name):
    model = HUB_MODELS[name]
    with torch.device("meta"):
        built = parts(name, model)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in built.items()}
    assert counts == model.parameters
    transformer = {"_class_name": type(built["transformer"]).__name__, **built["transformer"].config}
    assert from_configs(transformer, dict(built["vae"].config), model.parameters) == model


def test_multiply_adds_of_a_layer_are_those_of_its_matrices():
    """All parameters of the blocks' matrices that a token meets, but for those of norms and modulation."""
    for name, tolerance in (("genmo/mochi-1-preview", 0.01), ("hunyuanvideo-community/HunyuanVideo", 0.01)):
        model = HUB_MODELS[name]
        with torch.device("meta"):
            block = matrices(parts(name, model)["transformer"])
        assert model.macs == pytest.approx(block, rel=tolerance)


def matrices(transformer: torch.nn.Module) -> int:
    """Elements of the matrices on a video token's way through the last kind of block."""
    blocks = getattr(transformer, "single_transformer_blocks", None) or transformer.transformer_blocks
    text = ("add_", "context", "norm")
    return sum(
        p.numel() for n, p in blocks[0].named_parameters() if p.ndim == 2 and not any(t in n for t in text)
    )


@pytest.mark.parametrize(
    ("name", "frames", "size", "tokens"),
    [
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 69, (768, 1280), 69_120),
        ("hunyuanvideo-community/HunyuanVideo", 117, (768, 1280), 115_456),
        ("genmo/mochi-1-preview", 163, (480, 848), 44_776),
    ],
)
def test_tokens_of_the_papers_videos(name, frames, size, tokens):
    assert HUB_MODELS[name].grid(VideoSize(frames, *size)).tokens == tokens


@pytest.mark.parametrize("dense_layers", [0, 1, 3])
def test_control_layers_are_counted_as_they_are_applied(dense_layers):
    """Six attentions in four layers: a control layer has the number of the layer that it feeds."""
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
    """Of a HunyuanVideo that was not distilled; the image-to-video kind of 33 channels is one too."""
    named = HUNYUAN_CONFIG | {"_class_name": "HunyuanVideoTransformer3DModel", "guidance_embeds": False}
    model = from_configs(named, {"block_out_channels": [128]}, {})
    words = ["generation.guidance_scale=6"]
    with pytest.raises(UsageError, match=r"generation\.guidance_scale: got 6, must be 1"):
        check_model_options(read_config("configs/hunyuan_t2v.yaml", words), model)
    check_model_options(read_config("configs/hunyuan_t2v.yaml", ["generation.guidance_scale=1"]), model)
    check_model_options(read_config("configs/hunyuan_i2v.yaml", words), model)
