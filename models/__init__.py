"""Applies radial attention to the transformers of diffusers; import it as `radial_attn.models`."""

import sys

if __name__ == "models":  # `from models import ...` in a checkout
    from importlib import import_module
    from importlib.abc import Loader, MetaPathFinder
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    class _OneCopy(MetaPathFinder, Loader):
        """Loads `models.x` as `radial_attn.models.x`: each module exists once."""

        def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
            return ModuleSpec(fullname, self) if fullname.startswith("models.") else None

        def create_module(self, spec: ModuleSpec) -> ModuleType:
            module = import_module(f"radial_attn.{spec.name}")
            spec.loader_state = module.__spec__
            return module

        def exec_module(self, module: ModuleType) -> None:
            module.__spec__ = module.__spec__.loader_state

    sys.modules["models"] = import_module("radial_attn.models")
    sys.meta_path.insert(0, _OneCopy())
else:
    from .apply import RadialAttentionHandle, apply_radial_attention

    __all__ = ["RadialAttentionHandle", "apply_radial_attention"]
