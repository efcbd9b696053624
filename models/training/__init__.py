"""Flow matching and adapters for LoRA training."""
