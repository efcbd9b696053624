"""Computes Radial Attention, O(n log n) sparse attention for long video (arXiv 2506.19852)."""

from importlib import import_module as _import_module
from pathlib import Path as _Path

from .attention import radial_attention
from .block_mask import BlockMask
from .grid import TokenGrid
from .masks.make import radial_mask
from .masks.radial import RadialConfig

__version__ = "0.2.0"
__all__ = [
    "BlockMask",
    "RadialConfig",
    "TokenGrid",
    "calibrate",
    "disable",
    "enable",
    "radial_attention",
    "radial_mask",
]
_LATER = {"calibrate": "calibration", "disable": "enable", "enable": "enable"}  # these need diffusers

_HERE = _Path(__file__).resolve().parent
if not (_HERE / "models").is_dir():  # in a checkout models/ is next to this folder
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> object:
    """Imports what needs diffusers on first use."""
    if name in _LATER:
        return getattr(_import_module(f".models.{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
