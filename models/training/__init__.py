"""Provides flow matching and adapters for LoRA training."""
