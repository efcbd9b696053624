"""Options of a whole pipeline: loading, memory, caches, longer video."""
