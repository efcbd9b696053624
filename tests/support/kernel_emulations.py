"""What optional CUDA libraries promise, in plain torch on the CPU: their signatures and their restrictions.

Each function below has the signature of the real one, with all defaults, and computes in float32 what its
source says. It raises if the library raises or would compute nonsense; rows that the library leaves
unwritten are NaN. The sources:

flashinfer-python 0.7.2.post1: flashinfer/sparse.py.
spas_sage_attn 0.1.0 (thu-ml/SpargeAttn bfd980b): spas_sage_attn/core.py and csrc/qattn/*.cuh.
sparse_sageattn 0.1.0 (jt-zhang/Sparse_SageAttention_API f8c55eb): sparse_sageattn/core.py and its kernels.
sageattention 1.0.6, 2.0.1 and 2.2.0: sageattention/core.py and its Triton kernels.
"""

import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

LIBRARIES = ("flashinfer", "spas_sage_attn", "sparse_sageattn", "sageattention")
HALF = (torch.float16, torch.bfloat16)


def install(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Makes exactly these libraries importable, whatever is installed."""
    output = {module.__name__: module for module in modules}
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, output.get(name))


def module(name: str, **contents: object) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__dict__.update(contents)
    return made


def softmax_attention(  # noqa: PLR0917
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, scale: float, zeros: Tensor | int = 0
) -> Tensor:
    """Float32 attention `[..., N, D]` over the keys in `keep` and `zeros` more of score and value 0.

    Rows without keys are NaN.
    """
    scores = query.float() @ key.float().mT * scale
    scores = scores.masked_fill(~keep, -torch.inf)
    top = scores.amax(dim=-1, keepdim=True)
    top = torch.where(torch.as_tensor(zeros) > 0, top.clamp(min=0), top)
    weights = (scores - top).exp()
    return weights @ value.float() / (weights.sum(dim=-1, keepdim=True) + zeros * (-top).exp())


def assert_promised(real: Callable, emulated: Callable) -> None:
    """Checks that every parameter of the emulation is one of the library's."""
    kept, promised = (set(inspect.signature(function).parameters) for function in (real, emulated))
    assert promised <= kept, real


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise AssertionError(reason)


def flashinfer() -> ModuleType:
    """Emulates FlashInfer's two block-sparse wrappers; `.workspaces` and `.plans` list what was made."""
    workspaces, plans = [], []

    class Wrapper:
        def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
            require(float_workspace_buffer.dtype == torch.uint8, "workspace")
            workspaces.append(float_workspace_buffer)

    class BlockSparseAttentionWrapper(Wrapper):
        def plan(  # noqa: PLR0917
            self, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, mask=None,
            packed_mask=None, causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False,
            logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None, q_data_type="float16",
            kv_data_type=None, o_data_type="float16", non_blocking=True, block_mask=None, kv_block_lens=None,
            q2k_indices=None, q2k_num=None, kv_splits=None, use_clc=None, q_scale=None, k_scale=None,
            v_scale=None,
        ) -> None:  # fmt: skip
            plans.append(dict(locals()))
            require(N % C == 0, "N should be divisible by C")
            require(indptr.dtype == indices.dtype == torch.int32, "int32 indices")
            require(len(indptr) == -(-M // R) + 1 and indptr[-1] == len(indices), "one row for each block")
            require(bool((indices < N // C).all()), "indices out of bound")
            keep = torch.zeros(len(indptr) - 1, N // C, dtype=torch.bool)
            for row in range(len(keep)):
                keep[row, indices[indptr[row] : indptr[row + 1]].long()] = True
            self.keep = keep.repeat_interleave(R, 0)[:M].repeat_interleave(C, 1)
            self.shape = num_qo_heads, head_dim
            self.scale, self.dtypes = sm_scale, (q_data_type, kv_data_type, o_data_type)

        def run(  # noqa: PLR0917
            self, q, k, v, scale_q=None, scale_k=None, scale_v=None, out=None, lse=None, return_lse=False,
            enable_pdl=None,
        ) -> Tensor:  # fmt: skip
            require((q.dtype, k.dtype) == self.dtypes[:2] and v.dtype == k.dtype, "planned data types")
            require(q.shape == (len(self.keep), *self.shape), "(M, heads, head_dim)")
            require(k.shape == v.shape == (self.keep.shape[1], *self.shape), "(N, heads, head_dim)")
            heads = (x.transpose(0, 1) for x in (q, k, v))
            output = softmax_attention(*heads, self.keep, self.scale).transpose(0, 1)
            return output.to(self.dtypes[2] if self.dtypes[2] != "float16" else torch.float16).contiguous()

    class VariableBlockSparseAttentionWrapper(Wrapper):
        def plan(  # noqa: PLR0917
            self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim,
            causal=False, pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None,
            sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True, q_data_type="float16",
            kv_data_type=None,
        ) -> None:  # fmt: skip
            plans.append(dict(locals()))
            require(block_mask_map.dtype == torch.bool, "boolean map")
            require(block_mask_map.shape[:2] == block_row_sz.shape, "a row size for each head and block")
            require(block_mask_map.shape[::2] == block_col_sz.shape, "a column size for each head and block")
            heads = zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
            self.keep = torch.stack([x.repeat_interleave(r, 0).repeat_interleave(c, 1) for x, r, c in heads])
            self.scale, self.dtypes = sm_scale, (q_data_type, kv_data_type)

        def run(  # noqa: PLR0917
            self, q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None
        ) -> Tensor:
            require((q.dtype, k.dtype) == self.dtypes and v.dtype == k.dtype, "planned data types")
            require(q.shape[:2] == self.keep.shape[:2], "(heads, M, head_dim)")
            require(k.shape[:2] == v.shape[:2] == self.keep.shape[::2], "(heads, N, head_dim)")
            return softmax_attention(q, k, v, self.keep, self.scale).to(q.dtype)

    wrappers = BlockSparseAttentionWrapper, VariableBlockSparseAttentionWrapper
    classes = {wrapper.__name__: wrapper for wrapper in wrappers}
    return module("flashinfer", **classes, workspaces=workspaces, plans=plans)


def to_heads(tensor_layout: str, *tensors: Tensor) -> list[Tensor]:
    """Swaps tokens and heads, or swaps them back, unless heads come first."""
    require(tensor_layout in ("HND", "NHD"), "tensor_layout")
    return [x.transpose(1, 2) if tensor_layout == "NHD" else x for x in tensors]


def dense(qkv: tuple[Tensor, ...], tensor_layout: str, scale: float, *, zeros: bool, smooth: bool) -> Tensor:
    """Attends to all keys, smoothed or not, and to as many `zeros` as fill up the last block of 64."""
    require(len({x.dtype for x in qkv}) == 1, "data types")
    require(all(x.stride(-1) == 1 for x in qkv), "Last dim of qkv must be contiguous.")
    query, key, value = to_heads(tensor_layout, *qkv)
    keep = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    key = key.float() - smooth * key.float().mean(dim=2, keepdim=True)
    output = softmax_attention(query, key, value, keep, scale, zeros * (-key.shape[-2] % 64)).to(query.dtype)
    return to_heads(tensor_layout, output)[0]


def spread(mask_id: Tensor, query: Tensor, key: Tensor, rows: int, columns: int) -> Tensor:
    """Expands a mask `[B, H, Q, K]` of kernel blocks to the tokens that exist."""
    (*pair, tokens, _), keys = query.shape, key.shape[2]
    require(mask_id.shape == (*pair, -(-tokens // rows), -(-keys // columns)), "shape of mask_id")
    require(mask_id.is_contiguous() and mask_id.dtype == torch.int8, "contiguous int8")
    wide = mask_id.bool().repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    return wide[:, :, :tokens, :keys]


def spas_sage_attn(rows: int = 128, columns: int = 64) -> ModuleType:
    """Emulates SpargeAttn with the kernel blocks of an architecture; `.calls` lists (mask_id, pvthreshd)."""
    calls = []

    def block_sparse_sage2_attn_cuda(  # noqa: PLR0917
        q, k, v, mask_id=None, dropout_p=0.0, scale=None, smooth_k=True, pvthreshd=50, attention_sink=False,
        tensor_layout="HND", output_dtype=torch.float16, return_sparsity=False,
    ) -> Tensor:  # fmt: skip
        calls.append((mask_id, pvthreshd))
        query, key, value = to_heads(tensor_layout, q, k, v)
        require(query.shape[-2] >= 128, "seq_len should be not less than 128.")
        require(query.shape[-1] in (64, 128), "headdim should be in [64, 128].")
        require(q.dtype == k.dtype == v.dtype and q.dtype in HALF and smooth_k, "data types")
        require(isinstance(pvthreshd, float) and pvthreshd > 0 and scale > 0, "the running maximum")
        keep = spread(mask_id, query, key, rows, columns)
        output = softmax_attention(query, key, value.to(torch.float16), keep, scale).to(q.dtype)
        return to_heads(tensor_layout, output)[0]

    return module("spas_sage_attn", block_sparse_sage2_attn_cuda=block_sparse_sage2_attn_cuda, calls=calls)


def sparse_sageattn() -> ModuleType:
    """Emulates the library that the authors of Radial Attention use; `.calls` lists mask_id."""
    calls = []

    def sparse_sageattn(  # noqa: PLR0917
        q, k, v, mask_id=None, is_causal=False, tensor_layout="HND"
    ) -> Tensor:
        calls.append(mask_id)
        require(all(x.stride(-1) == 1 for x in (q, k, v)), "unit strides")
        query, key, value = to_heads(tensor_layout, q, k, v)
        key = key.float() - key.float().mean(dim=2, keepdim=True)
        keep = spread(mask_id, query, key, 128, 64)
        zeros = keep[..., -1:] * (-key.shape[2] % 64)  # the tail of the last block is not masked
        scale = query.shape[-1] ** -0.5
        output = softmax_attention(query, key, value.to(torch.float16), keep, scale, zeros).to(q.dtype)
        return to_heads(tensor_layout, output)[0]

    return module("sparse_sageattn", sparse_sageattn=sparse_sageattn, calls=calls)


def sageattention_1() -> ModuleType:
    """Emulates 1.0.6, which smooths K in place and does not mask the tail of the last block of 64 keys."""

    def sageattn(  # noqa: PLR0917
        q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs
    ) -> Tensor:
        require(q.dtype in (*HALF, torch.float32) and not kwargs, "data types")
        require(q.shape[-1] in (64, 96, 128), "headdim should be in [64, 96, 128].")
        if smooth_k:
            k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
        return dense((q, k, v), tensor_layout, sm_scale, zeros=True, smooth=False)

    return module("sageattention", sageattn=sageattn)


def sageattention_2(masks_the_tail: bool = True) -> ModuleType:
    """Emulates 2.2.0; or 2.0.1, whose Triton kernel (sm86) has neither attn_mask nor a masked tail."""

    def sageattn(  # noqa: PLR0917
        q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs
    ) -> Tensor:
        require(q.dtype in HALF and q.shape[-1] <= 128 and not kwargs, "Unsupported head_dim")
        return dense((q, k, v), tensor_layout, sm_scale, zeros=not masks_the_tail, smooth=True)

    def with_mask(q, k, v, tensor_layout="HND", *, attn_mask=None) -> Tensor:
        raise NotImplementedError

    def without_mask(q, k, v, tensor_layout="HND") -> Tensor:
        raise NotImplementedError

    kernel: Callable[..., Tensor] = with_mask if masks_the_tail else without_mask
    return module("sageattention", sageattn=sageattn, sageattn_qk_int8_pv_fp16_triton=kernel)
