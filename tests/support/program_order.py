"""A Triton kernel that writes which tile each program takes. Import it in a test alone: it needs Triton."""

import triton
import triton.language as tl

from radial_attn.kernels.triton.forward import program_tile


@triton.jit
def order_kernel(out, BY_KEY: tl.constexpr):
    """Writes the tile of each program, int32 `[programs]`."""
    tl.store(out + tl.program_id(0), program_tile(BY_KEY))
