"""Lists what the GPU benchmark measures, in its order: cases, variants, models."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask

DENSE = ("cudnn", "flash", "sdpa", "flash-attn", "flash-attn-3")
SPARSE = {  # the arguments of radial_attention
    "triton": {"backend": "triton"},
    "triton-int8": {"backend": "triton", "quantize": "int8"},
    "triton-fp8": {"backend": "triton", "quantize": "fp8"},
    "flashinfer": {"backend": "flashinfer"},
    "sage": {"backend": "sage"},
    "flex": {"backend": "flex"},
    "blocks": {"backend": "blocks"},
}
MEASURED = tuple(name for name in SPARSE if name != "blocks")  # by default
TRAINABLE = ("triton", "flex", "blocks")
QUANTIZED = ("triton-int8", "triton-fp8")
COMPILE_SECONDS = {"flex": 20, "flashinfer": 10}  # that a first call may take besides its kernel
GRADIENT_FLOPS = 3.5  # of forward and backward relative to a forward: seven products against two


@dataclass(frozen=True)
class Case:
    """Holds an attention shape with its mask, batch 1. `sparsity`: the paper's number, if it states one."""

    name: str
    title: str
    heads: int
    grid: TokenGrid
    config: RadialConfig
    sparsity: float | None = None
    width: int = 128

    @property
    def mask(self) -> BlockMask:
        return radial_mask(self.grid, self.config)

    def flops(self, dense: bool, backward: bool) -> float:
        """Counts FLOPs of the kept token pairs: `4 H D` each forward, 3.5 times that with the backward."""
        pairs = self.grid.tokens**2 if dense else self.mask.kept_pairs
        return 4 * self.heads * self.width * pairs * (GRADIENT_FLOPS if backward else 1)


WAN_RULE = RadialConfig(0.2, neighbour="half")
HUNYUAN_RULE = RadialConfig(0.95, sink=False)
LONG = RadialConfig()  # decay 1, with sink: the authors' rule for longer video
CASES = {
    case.name: case
    for case in (
        Case("wan-69", "Wan2.1-14B 69 frames 768x1280", 40, TokenGrid(18, 48, 80), WAN_RULE, 0.736),
        Case("wan-161", "Wan2.1-14B 161 frames 720x1280", 40, TokenGrid(41, 45, 80), LONG, 0.736),
        Case("hunyuan-117", "HunyuanVideo 117 frames 768x1280", 24, TokenGrid(30, 48, 80, 256), HUNYUAN_RULE),
        Case("hunyuan-253", "HunyuanVideo 253 frames 720x1280", 24, TokenGrid(64, 45, 80, 256), LONG, 0.808),
        Case("hunyuan-509", "HunyuanVideo 509 frames 720x1280", 24, TokenGrid(128, 45, 80, 256), LONG, 0.883),
        Case("mochi-163", "Mochi 163 frames 480x848", 24, TokenGrid(28, 30, 53, 256), LONG),
        Case("mochi-667", "Mochi 667 frames 480x848", 24, TokenGrid(112, 30, 53, 256), LONG, 0.855),
    )
}


@dataclass(frozen=True)
class StepModel:
    """Holds a denoiser and how a video calls it.

    Attributes:
        case: the video, a key of `CASES`.
        blocks: of the whole model, `(option of its configuration, list of modules, how many)` of each kind.
        reduced: blocks of each kind if the whole model takes too long or too much memory.
        dense_steps, dense_layers: as in the paper; `calls`: of the transformer in one step.
        paper: end-to-end speed-up that the paper states.
    """

    case: str
    name: str
    blocks: tuple[tuple[str, str, int], ...]
    reduced: int
    dense_steps: int
    dense_layers: int
    calls: int
    paper: float
    only_reduced: bool = False

    @property
    def depth(self) -> int:
        return sum(count for _, _, count in self.blocks)

    def counts(self, reduced: bool) -> dict[str, int]:
        """Returns the number of blocks in each list of modules."""
        return {where: self.reduced if reduced else count for _, where, count in self.blocks}


WAN_BLOCKS = (("num_layers", "blocks", 40),)
HUNYUAN_BLOCKS = (
    ("num_layers", "transformer_blocks", 20),
    ("num_single_layers", "single_transformer_blocks", 40),
)
HUNYUAN = "HunyuanVideoTransformer3DModel"
STEPS = {
    step.case: step
    for step in (
        StepModel("wan-69", "WanTransformer3DModel", WAN_BLOCKS, 2, 12, 1, 2, 1.77),
        StepModel("hunyuan-117", HUNYUAN, HUNYUAN_BLOCKS, 2, 12, 2, 1, 1.88),
        StepModel("hunyuan-509", HUNYUAN, HUNYUAN_BLOCKS, 1, 2, 2, 1, 3.7, only_reduced=True),
    )
}
STAGES = (  # what matters most comes first: a run that is short of time drops the end
    ("forward", "wan-69"),
    ("forward", "hunyuan-117"),
    ("step", "wan-69"),
    ("step", "hunyuan-117"),
    ("backward", "wan-69"),
    ("forward", "hunyuan-509"),
    ("step", "hunyuan-509"),
    ("forward", "wan-161"),
    ("forward", "hunyuan-253"),
    ("forward", "mochi-163"),
    ("forward", "mochi-667"),
    ("backward", "hunyuan-117"),
    ("backward", "mochi-163"),
)
BACKWARD_CASES = tuple(case for stage, case in STAGES if stage == "backward")


@dataclass(frozen=True)
class Task:
    """Describes one measurement, which the worker process makes.

    Attributes:
        kind: "machine", "check", "forward", "backward", "step", or "tune".
        variant: of `DENSE` or `SPARSE`; for a step "dense", "radial" or "radial 8 bit".
        using: for a step: the variant that attends; `dense`: that of its dense layers.
        reduced: for a step: whether to build fewer blocks.
        least: seconds that must be left to begin it; `limit`: seconds after which it is given up.
        detail: for "tune", the candidate.
    """

    kind: str
    case: Case | None = None
    variant: str = ""
    using: str = ""
    dense: str = ""
    reduced: bool = False
    least: float = 3.0
    limit: float = 45.0
    detail: tuple = ()

    @property
    def is_dense(self) -> bool:
        return self.variant in DENSE

    @property
    def title(self) -> str:
        case = self.case.name if self.case and self.kind != "check" else ""
        return " ".join(filter(None, (self.kind, case, self.variant)))


def tasks(cases: Sequence[str], variants: Sequence[str], *, tiny: bool, steps: bool) -> Iterator[Task]:
    """Yields all measurements in their order: correctness on a small case first."""
    small = CHECK_TINY if tiny else CHECK
    for name in variants:
        yield Task("check", small, name, least=COMPILE_SECONDS.get(name, 5), limit=60)
    for stage, name in STAGES:
        if name not in cases:
            continue
        case = shrink(CASES[name]) if tiny else CASES[name]
        if stage == "step" and steps:
            for mode in ("dense", "radial", "radial 8 bit"):
                yield Task("step", case, mode, least=30, limit=150)
        elif stage != "step":
            factor = 2 if stage == "backward" else 1
            chosen = [variant for variant in variants if stage == "forward" or variant in TRAINABLE]
            for variant in (*DENSE, *chosen):
                yield Task(stage, case, variant, least=factor * COMPILE_SECONDS.get(variant, 3), limit=60)


ODD = RadialConfig(0.2, neighbour="half", sink=False, decimation_width="block")
CHECK = Case("check", "odd grid with text", 3, TokenGrid(7, 23, 25, 77), ODD)
TINY_GRID, TINY_ODD = TokenGrid(6, 7, 9, 11), replace(ODD, block_size=16)
CHECK_TINY = Case("check", "odd grid with text", 2, TINY_GRID, TINY_ODD, width=64)


def shrink(case: Case) -> Case:
    """Makes the case of a rehearsal: the same path, a few hundred tokens."""
    grid = case.grid
    small = TokenGrid(min(grid.frames, 6), 4, 6, min(grid.text, 8))
    config = replace(case.config, block_size=16, decimation_width="block")
    return replace(case, grid=small, config=config, heads=2, width=64)
