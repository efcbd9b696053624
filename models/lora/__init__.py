"""LoRA files of any usual key format, matched to diffusers' modules."""
