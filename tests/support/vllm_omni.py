"""vLLM-Omni's side of `vllm_omni.sparse_attn`, as far as a plugin sees it.

It was written from the contract in vllm_omni/diffusion/attention/backends/sparse_attn.py and abstract.py of
vllm-project/vllm-omni, pull request 4493, commit ef4a8b5886ef820416377bb97c326c18e5db3746, and from a later
revision of its documentation, in which frames and patches are whole numbers of Python.
"""

import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from torch import Tensor

GROUP = "vllm_omni.sparse_attn"
GUARDED = {"attn_mask": "supports_attention_mask", "full_attn_spans": "supports_full_attn_spans"}


def plugin(name: str) -> Callable[..., Tensor]:
    """Loads what pyproject.toml registers under a name."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    return EntryPoint(name, project["project"]["entry-points"][GROUP][name], GROUP).load()


def forward(
    kernel: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    static: dict[str, Any] | None = None,
    per_forward: dict[str, Any] | None = None,
    causal: bool = False,
    **inputs: Any,
) -> Tensor:
    """Calls a plugin as the dispatcher does: later tiers win, None is dropped, masks need a capability."""
    capabilities = getattr(kernel, "capabilities", {})
    merged = {**(static or {}), **(per_forward or {}), **inputs.pop("extra", {})}
    params = {name: value for name, value in merged.items() if value is not None}
    for name, value in inputs.items():
        if not capabilities.get(GUARDED[name], False):
            raise ValueError(f"the plugin received {name} but does not advertise {GUARDED[name]}")
        params[name] = value
    scale = tensors[0].shape[-1] ** -0.5
    return kernel(*tensors, params, is_causal=causal, softmax_scale=scale)
