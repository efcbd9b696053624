"""Radial Attention: O(n log n) sparse attention for long video (arXiv 2506.19852)."""

from importlib import import_module

_HOMES = {
    "TokenGrid": "grid",
    "RadialConfig": "mask",
    "BlockMask": "block_mask",
    "radial_mask": "mask",
    "radial_attention": "attention",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports the public name on first use, so that `python -m radial_attn.mask` finds a fresh module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
