"""Applies radial attention to the transformers of diffusers; import it as `radial_attn.models`."""

import sys

if __name__ == "models":  # `from models import ...` in a checkout: one copy of everything
    import radial_attn.models

    sys.modules["models"] = radial_attn.models
else:
    from .apply import RadialAttentionHandle, apply_radial_attention

    __all__ = ["RadialAttentionHandle", "apply_radial_attention"]
