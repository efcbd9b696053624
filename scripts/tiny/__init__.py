"""The bundled models: what scripts/train_tiny.py is made of."""
