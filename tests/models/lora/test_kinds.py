"""Adapters that are no plain LoRAs are refused by their names, and never run as plain ones."""

import re

import pytest
import torch

from radial_attn.models.lora.load import UNMATCHED, Lora, load_loras
from tests.support.tiny import wan_transformer
from tests.support.tiny_lora import random_pairs, spell, write

STEM = "diffusion_model.blocks.0.self_attn.q"
KEYS = {  # as LyCORIS, kohya, ComfyUI and peft write them
    f"{STEM}.dora_scale": "DoRA",
    f"{STEM}.lora_magnitude_vector": "DoRA",
    f"{STEM}.lora_magnitude_vector.default.weight": "DoRA",
    "lora_unet_blocks_0_self_attn_q.lokr_w1": "LoKr",
    "lora_unet_blocks_0_self_attn_q.lokr_w2_a": "LoKr",
    "lycoris_blocks_0_self_attn_q.hada_w1_b": "LoHa",
    f"{STEM}.oft_blocks": "OFT",
    f"{STEM}.oft_R.default.weight": "OFT",
    f"{STEM}.boft_R": "BOFT",
    f"{STEM}.on_input": "(IA)3",
    "base_model.model.blocks.0.attn1.to_q.ia3_l": "(IA)3",
    f"{STEM}.a1.weight": "GLoRA",
    f"{STEM}.lora_E": "AdaLoRA",
    "base_model.vera_lambda_b": "VeRA",
    f"{STEM}.lora_mid.weight": "LoCon with a Tucker core",
    f"{STEM}.set_weight": "set of whole weights",
    f"{STEM}.scale_weight": "LoRA of scaled 8-bit values",
    "scaled_fp8": "LoRA of scaled 8-bit values",
}
SETTINGS = {
    "DoRA (use_dora=true in its settings)": {"use_dora": True},
    "LOHA (peft_type in its settings)": {"peft_type": "LOHA"},
    "LoRA on other weights (init_lora_weights=pissa_niter_4 in its settings)": {
        "init_lora_weights": "pissa_niter_4"
    },
}


def refused(state, settings, kind, folder, unmatched):
    file = write(folder / "a.safetensors", state, settings)
    transformer = wan_transformer()
    message = rf"LoRA a\.safetensors is a {re.escape(kind)}, which is not supported; (?!.*unmatched)"
    with pytest.raises(ValueError, match=message):
        load_loras(transformer, [Lora(file)], unmatched=unmatched)
    assert not hasattr(transformer, "peft_config")


@pytest.mark.parametrize("unmatched", UNMATCHED)
@pytest.mark.parametrize("key", KEYS)
def test_kinds_by_their_keys(key, unmatched, tmp_path):
    state = spell(random_pairs(wan_transformer()), "original down") | {key: torch.ones(24)}
    refused(state, None, f"{KEYS[key]} ({key})", tmp_path, unmatched)


@pytest.mark.parametrize("kind", SETTINGS)
def test_kinds_by_the_settings_of_peft(kind, tmp_path):
    state = spell(random_pairs(wan_transformer()), "adapter")
    refused(state, SETTINGS[kind], kind, tmp_path, "warn")
    plain = {"peft_type": "LORA", "use_dora": False, "init_lora_weights": True}
    load_loras(wan_transformer(), [Lora(write(tmp_path / "a.safetensors", state, plain))])
