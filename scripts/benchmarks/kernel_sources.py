"""Specialises the Triton kernels as calls with bfloat16 tensors and even strides do, for any architecture."""

from dataclasses import dataclass
from typing import Any

from radial_attn.kernels.triton import configs
from radial_attn.kernels.triton.configs import KINDS, LAUNCHES, SPECIALIZED, WIDTHS, Launch, padded

VARIANTS = {
    "whole tiles": {"SIZE": 128, "MIXED": False, "BLOCKS": False},
    "text": {"SIZE": 128, "MIXED": True, "BLOCKS": False},
    "small blocks": {"SIZE": 16, "MIXED": True, "BLOCKS": True},
}
FLOATS = ("lse", "far_bias", "products", "scales", "shifts", "query_scales", "key_scales", "mean")
POINTERS = dict.fromkeys(("offsets", "starts", "lengths", "row_lengths"), "i32")
POINTERS |= {"patterns": "i64", "tops": "bf16"} | dict.fromkeys(FLOATS, "fp32")
KEYS = ("key", "value", "far_key", "far_value")
TENSORS = (*KEYS, "query", "far_slope", "out", "grad", "result", "key_result", "value_result")
COUNTS = ("tokens", "key_tokens", "far_tokens", "bias_batch", "bias_head", "heads")
FAR = ("far_key", "far_value", "far_bias", "far_slope", "far_tokens", "bias_batch", "bias_head")
BITS = {"int8": "i8", "fp8": "fp8e4nv"}


@dataclass(frozen=True)
class Variant:
    """Names a kernel to compile: its kind, head width, launch, and the masks it serves ("" for all)."""

    kind: str
    width: int
    launch: Launch
    masks: str = ""


def variants(arch: str) -> list[Variant]:
    """Lists all that the launch table of an architecture can ask for, at each head width."""
    table = LAUNCHES[arch]
    kinds = [(kind, width) for kind in KINDS for width in WIDTHS if (kind, 64) in table]
    launches = [(kind, width, table[kind, 64 if width == 64 else 128]) for kind, width in kinds]
    if arch == "sm90":
        launches += [("forward", width, launch) for (_, width), launch in SPECIALIZED.items()]
    listed = [Variant(*launch, masks) for launch in launches for masks in VARIANTS]
    # the linear far field alone, which holds the mean one, at its largest
    listed = [x for x in listed if x.kind != "far field" or (x.width != 96 and x.masks != "whole tiles")]
    listed += [Variant("row products", width, Launch(64, 1, 8, 1)) for width in (64, 128)]
    columns = [(w, table[bits, w].columns, bits) for w in (64, 128) for bits in BITS if (bits, w) in table]
    for width, tokens, bits in sorted(columns):
        listed.append(Variant(f"quantize queries {bits}", width, Launch(128, 1, 8, 1)))
        listed.append(Variant(f"quantize keys {bits}", width, Launch(tokens, 1, 8, 1)))
        if bits == "fp8":
            listed.append(Variant("quantize values fp8", width, Launch(128, 1, 8, 1)))
    return listed


def function(kind: str) -> Any:
    """Returns the Triton function of a kind."""
    from radial_attn.kernels.triton import backward, forward, quantize, quantized_forward

    if kind in BITS:
        return quantized_forward.quantized_forward_kernel
    if kind.startswith("quantize"):
        return getattr(quantize, "_".join(kind.split()[:2]) + "_kernel")
    if kind in {"forward", "far field"}:
        return forward.forward_kernel
    return getattr(backward, kind.replace(" ", "_") + "_kernel")


def source(variant: Variant) -> Any:
    """Returns what the JIT would compile."""
    from triton.compiler import ASTSource

    made, constants = function(variant.kind), constants_of(variant)
    signature = {name: argument(name, variant) for name in made.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    even = [
        (index,)
        for index, name in enumerate(made.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in COUNTS)
    ]
    values = {(made.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(made, signature, constexprs=values, attrs={at: [["tt.divisibility", 16]] for at in even})


def constants_of(variant: Variant) -> dict[str, Any]:
    """Returns the values that the kernel is specialised on."""
    kind, launch = variant.kind, variant.launch
    values = {"ROWS": launch.rows, "WIDTH": variant.width, "PADDED": padded(variant.width)}
    if kind in KINDS:
        values |= {"COLUMNS": launch.columns, "PER_HEAD": False, "LENGTHS": True, **VARIANTS[variant.masks]}
    if kind == "forward":
        values |= dict.fromkeys(FAR)
    if kind in {"forward", "far field"}:
        values |= {"DESCRIPTOR": launch.descriptors, "SPECIALIZE": launch.specialize}
    if kind in BITS:
        values |= {"DESCRIPTOR": bool(launch.descriptors), "FP8_VALUES": launch.fp8_values}
    if kind in BITS or kind.startswith("quantize"):
        values["TOP"] = 127.0 if kind.startswith("quantize") and kind.endswith("int8") else 448.0
    return values


def argument(name: str, variant: Variant) -> str:
    """Returns the type of a kernel's argument."""
    if name in TENSORS:
        return tensor(name, variant)
    if name in POINTERS:
        return f"*{POINTERS[name]}"
    return "fp32" if name in {"scale", "factor"} else "i32"


def tensor(name: str, variant: Variant) -> str:
    """Returns the type of a tensor argument: pointer or descriptor, to 16 or 8 bits."""
    kind, launch, lanes = variant.kind, variant.launch, padded(variant.width)
    if kind.startswith("quantize") and name == "out":
        return f"*{BITS[kind.split()[2]]}"
    if kind not in BITS:
        columns = configs.FAR_TILE if name.startswith("far") else launch.columns
        descriptor = launch.descriptors == "whole" and name in KEYS
        return f"tensordesc<bf16[1,{columns},1,{lanes}]>" if descriptor else "*bf16"
    if name == "out" or (name == "value" and not launch.fp8_values):
        return "*bf16"
    element = BITS["fp8" if name == "value" else kind]
    if not launch.descriptors or name == "query":
        return f"*{element}"
    sides = (lanes, launch.columns) if name == "value" else (launch.columns, lanes)
    return f"tensordesc<{element}[{sides[0]},{sides[1]}]>"
