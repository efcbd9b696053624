"""Lists launch configurations of the Triton kernels by architecture and head width.

None has been timed yet: each is the largest tile that compiles without spilled registers and within the
shared memory of a multiprocessor. On sm90 and sm100 the forward
loads keys and values through tensor descriptors (TMA), which saves registers. Warp specialisation is not the
default on sm90: its compiler pass has been seen to misplace rows, and fails with a far field.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

LOG2E = 1.4426950408889634
FAR_TILE = 32  # mean keys of a tile of the far field; more of them cost registers
WIDTHS = (64, 96, 128)
BACKWARD = ("query gradient", "key gradients")
KINDS = ("forward", "far field", *BACKWARD, "int8", "fp8")


@dataclass(frozen=True)
class Launch:
    """Holds the tile of `rows` queries x `columns` keys, warps of a program, stages of the load pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int
    descriptors: str = ""  # TMA: "whole" tensors, made on the host; one "head", in the kernel
    specialize: bool = False  # warp specialisation
    fp8_values: bool = False  # in the quantised forward: weights x values in fp8


AMPERE = {
    ("int8", 64): Launch(128, 64, 8, 3),
    ("int8", 128): Launch(128, 32, 8, 3),
    ("forward", 64): Launch(128, 64, 8, 3),
    ("forward", 128): Launch(128, 32, 8, 3),
    ("far field", 64): Launch(128, 64, 8, 3),
    ("far field", 128): Launch(128, 32, 8, 3),
    ("query gradient", 64): Launch(64, 64, 4, 3),
    ("query gradient", 128): Launch(128, 32, 8, 3),
    ("key gradients", 64): Launch(32, 64, 4, 3),
    ("key gradients", 128): Launch(64, 32, 8, 3),
}
FP8_PRODUCTS = {
    ("int8", 64): Launch(128, 64, 4, 3, fp8_values=True),
    ("int8", 128): Launch(128, 32, 8, 3, fp8_values=True),
    ("fp8", 64): Launch(128, 64, 8, 3, fp8_values=True),
    ("fp8", 128): Launch(128, 32, 8, 3, fp8_values=True),
}
HOPPER = {
    ("forward", 64): Launch(128, 128, 8, 3, "whole"),
    ("forward", 128): Launch(128, 128, 8, 3, "whole"),
    ("far field", 64): Launch(128, 128, 8, 3, "whole"),
    ("far field", 128): Launch(128, 128, 8, 2, "whole"),
    ("query gradient", 64): Launch(128, 64, 8, 3),
    ("query gradient", 128): Launch(128, 64, 8, 3),
    ("key gradients", 64): Launch(64, 128, 8, 3),
    ("key gradients", 128): Launch(32, 128, 8, 3),
    ("int8", 64): Launch(128, 128, 8, 3, "whole", fp8_values=True),
    ("int8", 128): Launch(128, 128, 8, 3, "whole", fp8_values=True),
    ("fp8", 64): Launch(128, 128, 8, 3, "whole", fp8_values=True),
    ("fp8", 128): Launch(128, 128, 8, 3, "whole", fp8_values=True),
}
BLACKWELL = HOPPER | {
    ("forward", 64): Launch(128, 64, 8, 3, "whole"),
    ("forward", 128): Launch(128, 64, 8, 3, "whole"),
    ("far field", 64): Launch(128, 64, 8, 2, "whole"),
    ("far field", 128): Launch(128, 64, 8, 3, "whole"),
    ("query gradient", 64): Launch(64, 64, 8, 2),
    ("query gradient", 128): Launch(128, 32, 8, 2),
    ("key gradients", 64): Launch(64, 128, 8, 2),
    ("key gradients", 128): Launch(64, 128, 8, 2),
    ("int8", 128): Launch(128, 64, 8, 3, "whole", fp8_values=True),
}
GEFORCE_BLACKWELL = {
    **AMPERE,
    **FP8_PRODUCTS,
    ("int8", 64): Launch(128, 64, 8, 3, fp8_values=True),
    ("query gradient", 64): Launch(64, 64, 8, 3),
    ("key gradients", 64): Launch(64, 32, 8, 3),
}
SPECIALIZED = {  # for sm90: the first to try once a GPU has proved them right
    ("forward", 64): Launch(128, 128, 4, 3, "head", specialize=True),
    ("forward", 128): Launch(128, 128, 4, 2, "head", specialize=True),
}
CDNA = AMPERE | {
    ("query gradient", 128): Launch(64, 64, 4, 2),
    ("key gradients", 128): Launch(64, 32, 4, 1),
}
LAUNCHES = {
    "sm80": AMPERE,
    "sm86": AMPERE,
    "sm89": AMPERE | FP8_PRODUCTS,
    "sm90": HOPPER,
    "sm100": BLACKWELL,
    "sm120": GEFORCE_BLACKWELL,
    "gfx942": CDNA,
}
INTERPRETED = dict.fromkeys(KINDS, Launch(64, 32, 4, 1))  # for Triton's interpreter, on the CPU
INTERPRETED["fp8"] = Launch(64, 32, 4, 1, fp8_values=True)


@lru_cache
def launch(kind: str, device: torch.device, width: int) -> Launch:
    """Returns the configuration of one of `KINDS` for a head width of `WIDTHS` on a device."""
    if device.type == "cpu":
        return INTERPRETED[kind]
    return LAUNCHES[architecture(device)][kind, 64 if width <= 64 else 128]


def architecture(device: torch.device) -> str:
    """Returns the key of `LAUNCHES` for a GPU: its own architecture, or the nearest older one."""
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = [int(name[2:]) for name in LAUNCHES if name.startswith("sm")]
    older = [number for number in known if number <= 10 * major + minor]
    return f"sm{max(older, default=min(known))}"


def padded(width: int) -> int:
    """Returns the least power of two that holds a head's width."""
    return 1 << (width - 1).bit_length()
