"""A tiny random Cosmos: transformer, arguments of a call, pipelines."""

import torch
from diffusers import (
    Cosmos2_5_PredictBasePipeline,
    Cosmos2_5_TransferPipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosControlNetModel,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from tests.support.tiny import (
    CHANNELS,
    HEADS,
    TEXT_DIM,
    first,
    quiet,
    randoms,
    seeded,
    t5_pipeline,
    wan_vae,
)
from tests.support.tiny_hunyuan import qwen_tokenizer, qwen_vl

IMAGE_DIM = 8
WIDTH = HEADS["num_attention_heads"] * HEADS["attention_head_dim"]
TRANSFER = {"controlnet_block_every_n": 2, "img_context_dim_in": IMAGE_DIM, "img_context_dim_out": WIDTH}
SETTINGS = {
    **HEADS,
    "in_channels": CHANNELS + 1,  # the mask of the given frames
    "out_channels": CHANNELS,
    "num_layers": 4,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIM,
    "adaln_lora_dim": 4,
    "max_size": (32, 64, 64),
    "concat_padding_mask": False,  # the mask of padded pixels, a channel that needs torchvision
}


def cosmos_transformer(seed: int = 0, **changes: object) -> CosmosTransformer3DModel:
    """Makes a random Cosmos transformer in eval mode: 4 layers, 2 heads of 12, patch 2, unless changed."""
    transformer = seeded(seed, CosmosTransformer3DModel, **SETTINGS | changes)
    for name, parameter in transformer.named_parameters():
        if name.startswith("learnable_pos_embed"):
            torch.nn.init.normal_(parameter)  # zeros, which add nothing, when made
    return transformer


def cosmos_inputs(
    frames: int = 6,
    height: int = 12,
    width: int = 16,
    *,
    batch: int = 1,
    timestep: float = 500.0,
    seed: int = 0,
) -> dict[str, object]:
    """Returns arguments of a call: the first frame is given, a timestep for each; 7 text tokens, 5 valid."""
    make, times = randoms(seed), torch.full((batch, 1, frames, 1, 1), timestep)
    given = torch.zeros(batch, 1, frames, height, width)
    given[:, :, 0], times[:, :, 0] = 1, times[:, :, 0] * (frames == 1)
    return {
        "hidden_states": make(batch, CHANNELS, frames, height, width),
        "timestep": times,
        "encoder_hidden_states": make(batch, 7, TEXT_DIM),
        "attention_mask": first(batch * [5], 7),
        "condition_mask": given,
        "fps": 16,
    }


def controlled_inputs(*sizes: int, **more: float) -> dict[str, object]:
    """Returns arguments of a call of Cosmos Transfer, whose transformer has `TRANSFER` for changes.

    A control net gave residuals for two blocks, and images a context of 3 tokens.
    """
    inputs, make = cosmos_inputs(*sizes, **more), randoms(1)
    batch, _, frames, height, width = inputs["hidden_states"].shape
    context = inputs["encoder_hidden_states"], make(batch, 3, IMAGE_DIM)
    residuals = [make(batch, frames * (height // 2) * (width // 2), WIDTH) for _ in range(2)]
    more = {"encoder_hidden_states": context, "block_controlnet_hidden_states": residuals}
    return inputs | more | {"attention_mask": None}


class Harmless(torch.nn.Module):
    """Finds every text and video safe: Cosmos Guardrail has large models."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: object) -> object:
        return frames


def cosmos_pipeline(seed: int = 0, **changes: object) -> Cosmos2VideoToWorldPipeline:
    """Makes a random pipeline of Cosmos Predict 2 with all parts; `changes` go to its transformer."""
    parts = {"vae": wan_vae(seed), "transformer": cosmos_transformer(seed, **changes)}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return t5_pipeline(Cosmos2VideoToWorldPipeline, seed, safety_checker=Harmless(), **parts)


def cosmos25_pipeline(seed: int = 0, **changes: object) -> Cosmos2_5_PredictBasePipeline:
    """Makes a random pipeline of Cosmos Predict 2.5 with all parts; `changes` go to its transformer.

    Its text is the outputs of all layers of the encoder, side by side.
    """
    parts, text = _parts25(seed)
    transformer = cosmos_transformer(seed, **text | changes)
    return quiet(Cosmos2_5_PredictBasePipeline(**parts, transformer=transformer))


def transfer_pipeline(seed: int = 0, **changes: object) -> Cosmos2_5_TransferPipeline:
    """Makes a random pipeline of Cosmos Transfer 2.5 with all parts; `changes` go to its transformer.

    Its control net has two layers, for the first and third of the transformer, and needs torchvision.
    """
    parts, text = _parts25(seed)
    transformer = cosmos_transformer(seed, **TRANSFER | {"img_context_num_tokens": 3} | text | changes)
    shared = ("attention_head_dim", "num_attention_heads", "patch_size", "mlp_ratio", "adaln_lora_dim")
    shared = {name: transformer.config[name] for name in (*shared, "max_size", "img_context_dim_in")}
    controlnet = seeded(
        seed,
        CosmosControlNetModel,
        **shared | text,
        n_controlnet_blocks=2,
        in_channels=CHANNELS + 2,  # masks of the given frames and of padded pixels
        latent_channels=CHANNELS + 2,
        model_channels=WIDTH,
        img_context_dim_out=WIDTH,
    )
    return quiet(Cosmos2_5_TransferPipeline(**parts, transformer=transformer, controlnet=controlnet))


def _parts25(seed: int) -> tuple[dict[str, object], dict[str, object]]:
    """Makes the other parts of a Cosmos 2.5, and what its transformer's configuration says of the text."""
    encoder = qwen_vl(seed)
    width = encoder.config.text_config.num_hidden_layers * TEXT_DIM
    text = {"use_crossattn_projection": True, "crossattn_proj_in_channels": width}
    text |= {"encoder_hidden_states_channels": TEXT_DIM, "text_embed_dim": TEXT_DIM}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_karras_sigmas": True}
    parts = {"vae": wan_vae(seed), "text_encoder": encoder, "tokenizer": qwen_tokenizer()}
    parts["scheduler"] = UniPCMultistepScheduler(**flow, sigma_max=200.0, sigma_min=0.01)
    return parts | {"safety_checker": Harmless()}, text
