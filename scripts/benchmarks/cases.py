"""Lists what the GPU benchmark measures, in its order: cases, variants, models."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask

DENSE = ("cudnn", "flash4-dense", "flash", "flash-attn", "flash-attn-3", "sdpa")  # sdpa chooses one of them
SPARSE = {  # the arguments of radial_attention
    "flash4": {"backend": "flash4"},
    "triton": {"backend": "triton"},
    "triton-int8": {"backend": "triton", "quantize": "int8"},
    "triton-fp8": {"backend": "triton", "quantize": "fp8"},
    "flashinfer": {"backend": "flashinfer"},
    "sage": {"backend": "sage"},
    "flex": {"backend": "flex"},
    "blocks": {"backend": "blocks"},
}
MEASURED = tuple(name for name in SPARSE if name != "blocks")  # by default
FIRST = ("cudnn", "flash4-dense", "sdpa", "flash4", "triton", "triton-int8", "blocks")  # the first numbers
TRAINABLE = ("flash4", "triton", "flex", "blocks")
QUANTIZED = ("triton-int8", "triton-fp8")
COMPILED = ("triton", "triton-int8", "triton-fp8", "flex", "flash4")
CANDIDATES = 6  # launch configurations that are timed beside the one of the table
ONE_DENSE_CALL = 400_000  # tokens from which dense attention is called once: seconds
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

    @property
    def long(self) -> bool:
        """Tells whether there is time for one dense call only."""
        return self.grid.tokens >= ONE_DENSE_CALL

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
        built: blocks of each kind that are timed, and stand for all.
        dense_steps, dense_layers: as in the paper; `calls`: of the transformer in one step.
        paper: end-to-end speed-up that the paper states.
    """

    case: str
    name: str
    blocks: tuple[tuple[str, str, int], ...]
    built: int
    dense_steps: int
    dense_layers: int
    calls: int
    paper: float

    @property
    def counts(self) -> dict[str, int]:
        """Returns the number of blocks of the whole model in each list of modules."""
        return {where: count for _, where, count in self.blocks}


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
        StepModel("hunyuan-117", HUNYUAN, HUNYUAN_BLOCKS, 1, 12, 2, 1, 1.88),
        StepModel("hunyuan-509", HUNYUAN, HUNYUAN_BLOCKS, 1, 2, 2, 1, 3.7),
    )
}
HEADLINES = ("wan-69", "hunyuan-509", "hunyuan-117")
FLEX = ("wan-69", "hunyuan-117"), ("wan-69",)  # forward, backward: it compiles anew for each length
BACKWARD_CASES = ("wan-69", "hunyuan-117", "mochi-163")


@dataclass(frozen=True)
class Task:
    """Describes one measurement, which the worker process makes.

    Attributes:
        kind: "machine", "compile", "check", "gradients" (a check too), "forward", "backward", "launch",
            "step", or "tune".
        variant: of `DENSE` or `SPARSE`; for a step "dense", "radial" or "radial 8 bit".
        using: for a step: the variant that attends.
        dense: for a step the variant of its dense layers; for attention the one that takes turns with it.
        limit: seconds after which it is given up.
        detail: for "compile" the task whose kernels are made, for "tune" the candidate, for "launch" its
            number.
    """

    kind: str
    case: Case | None = None
    variant: str = ""
    using: str = ""
    dense: str = ""
    limit: float = 45.0
    detail: tuple = ()

    @property
    def is_dense(self) -> bool:
        return self.variant in DENSE

    @property
    def title(self) -> str:
        if self.kind == "compile":
            return f"compile {self.detail[0].title}"
        case = self.case.name if self.case and self.kind not in {"check", "gradients"} else ""
        return " ".join(filter(None, (self.kind, case, self.variant, *map(str, self.detail))))


def tasks(part: int, cases: Sequence[str], variants: Sequence[str], *, tiny: bool) -> Iterator[Task]:
    """Yields the measurements of a part in their order; some are in both parts.

    Part 1 has the goals: kernels at two lengths, launch configurations, whole steps. Part 2 has the rest.
    """
    made = {name: shrink(case) if tiny else case for name, case in CASES.items() if name in cases}
    listed = first_part if part == 1 else second_part
    return listed(made, variants, CHECK_TINY if tiny else CHECK)


def first_part(cases: Mapping[str, Case], variants: Sequence[str], small: Case) -> Iterator[Task]:
    """Yields checks, attention at the lengths of the goals, launch configurations and steps."""
    first = [name for name in variants if name in FIRST]
    yield from (Task("check", small, name, limit=30) for name in first)
    for case in (cases[name] for name in HEADLINES if name in cases):
        yield from (Task("forward", case, name) for name in FIRST if name in {*DENSE, *first})
        if case.name == HEADLINES[1] and "triton" in first and "wan-69" in cases:
            numbers = range(1, CANDIDATES + 1)
            yield from (Task("launch", cases["wan-69"], "triton", detail=(number,)) for number in numbers)
    for case in (cases[name] for name in STEPS if name in cases):
        yield from (Task("step", case, run, limit=60) for run in ("dense", "radial"))
    if "wan-69" in cases:
        yield Task("step", cases["wan-69"], "radial 8 bit", limit=60)


def second_part(cases: Mapping[str, Case], variants: Sequence[str], small: Case) -> Iterator[Task]:
    """Yields FlexAttention, gradients, the other lengths, and what is left of the variants."""
    flex_forward, flex_backward = ([x for x in names if x in cases] or [*cases] for names in FLEX)
    for case in (cases[name] for name in flex_forward):
        yield from (Task("forward", case, name) for name in DENSE)
        if "flex" in variants:
            yield from (Task("check", small, "flex"), Task("forward", case, "flex"))
    trained = [name for name in TRAINABLE if name in variants]
    yield from (Task("gradients", small, name) for name in trained)
    for case in (cases[name] for name in BACKWARD_CASES if name in cases):
        usual = [name for name in trained if name != "flex" or case.name in flex_backward]
        yield from (Task("backward", case, name) for name in (*DENSE, *usual))
    first = [name for name in variants if name in FIRST]
    yield from (Task("check", small, name, limit=30) for name in first)
    for case in (case for name, case in cases.items() if name not in HEADLINES):
        yield from (Task("forward", case, name) for name in (*DENSE, *first))
    rest = [name for name in variants if name not in {*first, "flex"}]
    for name in rest:
        yield Task("check", small, name)
        yield from (Task("forward", cases[case], name) for case in flex_forward[:1])


def compilations(listed: Iterable[Task]) -> list[Task]:
    """Returns tasks that make every kernel of the listed ones, once each, the slow ones first.

    FlexAttention compiles for one length, Triton for whole or cut tiles and even strides, FlashAttention-4
    for a direction.
    """
    seen: dict[tuple, Task] = {}
    for task in listed:
        if task.variant not in COMPILED or task.kind == "step":
            continue
        tokens, small = task.case.grid.tokens, task.case.name == CHECK.name
        key = task.kind, small, tokens % 128 == 0, tokens % 16 == 0, task.detail
        if task.variant == "flash4":
            key = task.kind in {"gradients", "backward"}
        elif task.variant == "flex":
            key = task.kind, task.case.name
        short = task.case if small or task.variant == "flex" else shorten(task.case)
        made = Task("compile", None, task.variant, detail=(replace(task, case=short),))
        seen.setdefault((task.variant, key), made)
    return sorted(seen.values(), key=lambda task: task.variant != "flex")


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


def shorten(case: Case) -> Case:
    """Makes a short video for which Triton compiles the same kernels as for the case.

    Its tokens have the same remainder by 128, so the same last tile, and by 16, on which launches are
    specialised.
    """
    grid = case.grid
    alike = (replace(grid, frames=frames) for frames in range(2, grid.frames))
    grid = next((short for short in alike if (grid.tokens - short.tokens) % 128 == 0), grid)
    return replace(case, grid=grid)
