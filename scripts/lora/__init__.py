"""LoRA training, used by scripts/train_lora.py and scripts/prepare_latents.py."""
