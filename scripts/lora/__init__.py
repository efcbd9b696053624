"""LoRA training: what scripts/train_lora.py and scripts/prepare_latents.py are made of."""
