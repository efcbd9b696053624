"""Adds radial attention to ComfyUI. This folder is the node pack: link or copy it into custom_nodes.

It needs the package radial_attn. A link into a checkout of the repository finds the package there.
"""

import logging
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent  # if this folder is in one


def _load_beside() -> None:
    """Loads radial_attn from the checkout around this folder, without its other folders in sys.path."""
    file = CHECKOUT / "radial_attn" / "__init__.py"
    spec = spec_from_file_location("radial_attn", file) if file.is_file() else None
    if spec is not None:
        module = sys.modules["radial_attn"] = module_from_spec(spec)
        spec.loader.exec_module(module)


try:
    if find_spec("radial_attn") is None:
        _load_beside()
    from . import nodes

    if find_spec("comfy_api") is None or find_spec("comfy_api.latest") is None:
        NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = nodes.classic_nodes()
    else:

        async def comfy_entrypoint() -> object:
            """Returns the nodes to ComfyUI's loader."""
            return nodes.v3_extension()

except ImportError as error:
    NODE_CLASS_MAPPINGS = {}
    logging.getLogger("radial_attn").error(
        "Radial Attention cannot load its nodes: %s; in a checkout of its repository run %s -m pip install .",
        *(error, sys.executable),
    )
