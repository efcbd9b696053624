"""Matches LoRA files of any usual key format to diffusers' modules."""
