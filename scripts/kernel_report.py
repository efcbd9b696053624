"""Compiles every Triton kernel for every architecture of the launch table, on any machine, and reports it.

    python -m scripts.kernel_report [--out results/kernels_compiled.md] [--arch sm90 ...]

Exit code 1 where a kernel spills registers, needs more shared memory than the architecture has, or does
without the tensor cores.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from radial_attn.kernels.triton_configs import KINDS, LAUNCHES, Launch
from scripts.errors import OneLineParser

SHARED_BYTES = {  # the most that one program may have
    "sm80": 166_912,
    "sm86": 101_376,
    "sm89": 101_376,
    "sm90": 232_448,
    "sm100": 232_448,
    "sm120": 101_376,
    "gfx942": 65_536,
}
TENSOR_CORES = {"sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "gfx942": "v_mfma"}  # else mma.sync
POINTERS = {
    "lse": "fp32",
    "products": "fp32",
    "offsets": "i32",
    "starts": "i32",
    "lengths": "i32",
    "table": "i8",
}
TENSORS = ("query", "key", "value", "out", "grad", "result", "key_result", "value_result")
COUNTS = ("tokens", "heads", "blocks")
VARIANTS = {"whole blocks": {"SIZE": 128, "TABLE": False}, "mixed tiles": {"SIZE": 16, "TABLE": True}}
SPILLS_ALLOWED = "mixed tiles"  # tiles larger than the blocks: right, but not yet tuned


@dataclass(frozen=True)
class Compiled:
    """One kernel as the compiler left it."""

    kind: str
    arch: str
    width: int
    variant: str
    launch: Launch
    registers: int
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes
    instructions: int  # of the tensor cores

    @property
    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = [f"{self.spilled} B spilled"] if self.spilled and self.variant != SPILLS_ALLOWED else []
        if self.shared > SHARED_BYTES[self.arch]:
            found.append(f"shared memory over {SHARED_BYTES[self.arch]} B")
        return found if self.instructions else [*found, f"no {tensor_cores(self.arch)}"]


def tensor_cores(arch: str) -> str:
    """The matrix instruction that a kernel of this architecture has to use."""
    return TENSOR_CORES.get(arch, "mma.sync")


def kernel(kind: str) -> Any:
    """The Triton function of a kind."""
    from radial_attn.kernels.triton_backward import key_gradients_kernel, query_gradient_kernel
    from radial_attn.kernels.triton_forward import forward_kernel

    return dict(zip(KINDS, (forward_kernel, query_gradient_kernel, key_gradients_kernel), strict=True))[kind]


def source(kind: str, width: int, launch: Launch, variant: dict[str, Any]) -> Any:
    """What the JIT would compile at a call with bfloat16 tensors, every stride a multiple of 16."""
    from triton.compiler import ASTSource

    function, padded = kernel(kind), 1 << (width - 1).bit_length()
    constants = {"ROWS": launch.rows, "COLUMNS": launch.columns, "WIDTH": width, "PADDED": padded}
    constants |= {"PER_HEAD": False, "LENGTHS": True, **variant}
    if kind == "forward":
        constants |= {"DESCRIPTOR": launch.descriptors, "SPECIALIZE": launch.specialize}
    signature = {name: argument(name, launch, padded) for name in function.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    even = [
        (index,)
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in COUNTS)
    ]
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(
        function, signature, constexprs=places, attrs={place: [["tt.divisibility", 16]] for place in even}
    )


def argument(name: str, launch: Launch, padded: int) -> str:
    """The type of a kernel's argument."""
    if launch.descriptors and name in {"key", "value"}:
        return f"tensordesc<bf16[1,{launch.columns},1,{padded}]>"
    if name in TENSORS:
        return "*bf16"
    if name in POINTERS:
        return f"*{POINTERS[name]}"
    return "fp32" if name in {"scale", "factor"} else "i32"


def compile_kernel(kind: str, arch: str, width: int, variant: str) -> Compiled:
    """Compiles one kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    launch = LAUNCHES[arch][kind, 64 if width <= 64 else 128]
    cuda = arch.startswith("sm")
    target = GPUTarget("cuda", int(arch[2:]), 32) if cuda else GPUTarget("hip", arch, 64)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source(kind, width, launch, VARIANTS[variant]), target=target, options=options)
    registers, spilled = cuda_usage(made.asm["cubin"]) if cuda else amd_usage(made.asm["amdgcn"])
    code = made.asm["ptx" if cuda else "amdgcn"]
    count = code.count(tensor_cores(arch))
    return Compiled(kind, arch, width, variant, launch, registers, spilled, made.metadata.shared, count)


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as `cuobjdump -res-usage` of Triton's own toolchain says."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled bytes of a thread, from the metadata of the assembly."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]
    return int(registers), 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])


def compile_all(archs: list[str]) -> Iterator[Compiled]:
    """Every kernel, width and variant."""
    for arch in archs:
        for kind in KINDS:
            for width in (64, 128):
                for variant in VARIANTS:
                    yield compile_kernel(kind, arch, width, variant)


def report(rows: list[Compiled]) -> str:
    """The results file."""
    import triton

    lines = [
        "# The Triton kernels as compiled",
        "",
        "`python -m scripts.kernel_report`: compiled, not run, by Triton "
        f"{triton.__version__} from the launch table of radial_attn/kernels/triton_configs.py.",
        "",
        "| arch | kernel | head width | mask | tile | warps | stages | TMA | registers | spilled, B "
        "| shared, B (limit) | tensor core instructions |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        chosen = row.launch
        lines.append(
            f"| {row.arch} | {row.kind} | {row.width} | {row.variant} | {chosen.rows} x {chosen.columns} "
            f"| {chosen.warps} | {chosen.stages} | {'yes' if chosen.descriptors else ''} | {row.registers} "
            f"| {row.spilled} | {row.shared} ({SHARED_BYTES[row.arch]}) "
            f"| {row.instructions} {tensor_cores(row.arch)} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Writes the table; 1 where a kernel has a fault."""
    parser = OneLineParser(prog="python -m scripts.kernel_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/kernels_compiled.md"))
    parser.add_argument("--arch", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    options = parser.parse_args(argv)
    rows = list(compile_all(options.arch))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report(rows))
    for row in rows:
        for fault in row.faults:
            print(f"{row.arch} {row.kind} width {row.width}, {row.variant}: {fault}", file=sys.stderr)
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main())
