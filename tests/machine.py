"""What "auto" takes for a sparse mask in float32 on this machine's CPU: `cpp` where it compiles."""

import torch

from radial_attn.backends import Call, obstacle, order

CPU = torch.device("cpu")
AUTO = next(name for name in order(CPU) if not obstacle(name, Call(CPU, torch.float32, 16, gradients=True)))
