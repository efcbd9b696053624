"""Loads a whole pipeline and sets its options: memory, caches, longer video."""
