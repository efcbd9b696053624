"""Trainers of the bundled models, a file each."""
