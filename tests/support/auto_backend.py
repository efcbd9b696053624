"""What "auto" takes for a sparse mask on this machine's CPU: `cpp` if it compiles and is faster."""

import torch

from radial_attn.dispatch import obstacle, order
from radial_attn.kernels.contract import Call

CPU = torch.device("cpu")


def automatic(dtype: torch.dtype) -> str:
    """For tensors of this type."""
    return next(name for name in order(CPU) if not obstacle(name, Call(CPU, dtype, 16, gradients=True)))


AUTO, AUTO_BFLOAT16 = automatic(torch.float32), automatic(torch.bfloat16)
