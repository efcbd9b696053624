"""Calls the package flash-attn-4, which compiles each kernel at its first call.

Both functions are private, so only one version of the package is accepted. Its kernels for compute capability
8.x silently ignore block lists, so the capability is always passed on.
"""

import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import metadata
from typing import Any

from torch import Tensor

from .lists import Lists

PACKAGE, VERSION = "flash-attn-4", "4.0.0b36"
INSTALL = f"pip install {PACKAGE}=={VERSION} 'nvidia-cutlass-dsl>=4.7,<5'"
COMPILER, LEAST_COMPILER = "nvidia-cutlass-dsl", (4, 7)  # 4.6 compiles a backward that may hang
ARCHITECTURE = "FLASH_ATTENTION_ARCH"  # overrides what the package reads from the GPU


@lru_cache
def problem() -> str | None:
    """Says why the package cannot be used, in words that follow the backend's name; None if it can."""
    version = _version(PACKAGE)
    if version is None:
        return f"needs {PACKAGE}: {INSTALL}"
    if version != VERSION:
        return f"needs {PACKAGE} {VERSION}, whose functions it calls, got {version}: {INSTALL}"
    compiler = _version(COMPILER) or "none"
    numbers = tuple(int(x) for x in re.findall(r"\d+", compiler)[:2])
    if numbers < LEAST_COMPILER:
        return f"needs {COMPILER} 4.7 or later, as gradients of 4.6 may hang, got {compiler}: {INSTALL}"
    if ARCHITECTURE in os.environ:
        return f"reads the architecture from the GPU, got {ARCHITECTURE}={os.environ[ARCHITECTURE]}: unset it"
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Library:
    """Runs the kernels that the package compiles for a compute capability, such as (9, 0)."""

    def __init__(self, capability: tuple[int, int]) -> None:
        major, minor = capability
        self._arch = 10 * major + minor

    def forward(
        self, tensors: Sequence[Tensor], out: Tensor, lse: Tensor, scale: float, lists: Lists | None
    ) -> None:
        """Writes attention of query, key and value, `[B, S, H, D]`, and its log-sum-exp, float32 `[B, H, S]`.

        Args:
            lists: the key tiles of each query tile; None to attend to all keys.
        """
        from flash_attn.cute.interface import _flash_attn_fwd

        _flash_attn_fwd(
            *(x.detach() for x in tensors),
            softmax_scale=scale,
            num_splits=1,
            pack_gqa=False,
            _arch=self._arch,
            out=out,
            lse=lse,
            return_lse=True,
            **_sparse(lists, out.shape[2]),
        )

    def backward(
        self,
        tensors: Sequence[Tensor],
        lse_grad: Tensor | None,
        grads: Sequence[Tensor],
        scale: float,
        lists: Lists | None,
    ) -> None:
        """Writes the gradients of query, key and value to `grads`, all `[B, S, H, D]`.

        Args:
            tensors: query, key, value, output, its gradient, and the log-sum-exp, float32 `[B, H, S]`.
            lse_grad: gradient of the log-sum-exp, or None.
            lists: the query tiles of each key tile; None if every key is attended to.
        """
        from flash_attn.cute.interface import _flash_attn_bwd

        query_grad, key_grad, value_grad = grads
        _flash_attn_bwd(
            *(x.detach() for x in tensors),
            softmax_scale=scale,
            deterministic=False,
            dq=query_grad,
            dk=key_grad,
            dv=value_grad,
            dlse=lse_grad,
            **_sparse(lists, query_grad.shape[2]),
        )


def _sparse(lists: Lists | None, heads: int) -> dict[str, Any]:
    """Returns the arguments that make a call sparse."""
    if lists is None:
        return {}
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    tensors = BlockSparseTensorsTorch(
        mask_block_cnt=lists.mixed_counts,
        mask_block_idx=lists.mixed_indices,
        full_block_cnt=lists.counts,
        full_block_idx=lists.indices,
        block_size=lists.tile,
    )
    if lists.table is None:
        return {"block_sparse_tensors": tensors}
    tables = [lists.table.expand(heads, -1, -1)]
    return {
        "block_sparse_tensors": tensors,
        "mask_mod": table_lookup(lists.block_size),
        "aux_tensors": tables,
    }


@lru_cache
def table_lookup(block_size: int) -> Callable[..., Any]:
    """Returns the function, compiled into a kernel, that says whether the block of a token pair is kept."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    bits = block_size.bit_length() - 1  # a division would spill registers at width 128

    @cute.jit
    def kept(sample, head, row, column, lengths, tables):  # noqa: ANN001
        block = tables[0][head[0], row[0] >> bits, column[0] >> bits]
        return scalar_to_ssa(cutlass.Int32(block), cutlass.Int32)

    return kept
