"""Holds LoRA training, which scripts/train_lora.py and scripts/prepare_latents.py run."""
