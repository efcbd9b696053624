"""What is known of published models, against models built on the meta device from the same numbers."""

import diffusers
import pytest
import torch
import transformers

from scripts.architecture import Architecture
from scripts.config import read_config
from scripts.errors import UsageError
from scripts.known_models import HUB_MODELS, from_configs
from scripts.plan import token_grid

T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def wan(model: Architecture) -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        num_layers=model.layers,
        num_attention_heads=model.heads,
        attention_head_dim=model.head_dim,
        ffn_dim=model.ffn,
    )


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


def parts(name: str, model: Architecture) -> dict[str, torch.nn.Module]:
    if name.startswith("Wan-AI"):
        found = {"transformer": wan(model), "text_encoder": umt5(), "vae": diffusers.AutoencoderKLWan()}
        return found | ({"transformer_2": wan(model)} if "Wan2.2" in name else {})
    if "Hunyuan" in name:
        return {
            "transformer": diffusers.HunyuanVideoTransformer3DModel(),
            "text_encoder": llama(),
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
    sizes = {"num_frames": frames, "height": size[0], "width": size[1]}
    keys = [f"generation.{key}={value}" for key, value in sizes.items()]
    config = read_config("configs/wan2.1_t2v_14b.yaml", keys)
    assert token_grid(config, HUB_MODELS[name]).tokens == tokens


def test_an_unknown_transformer_is_named():
    with pytest.raises(UsageError, match="transformer is a CogVideoXTransformer3DModel; known: Wan"):
        from_configs({"_class_name": "CogVideoXTransformer3DModel"}, {}, {})
