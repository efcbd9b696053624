"""Writes what `scripts.benchmark` measured: a table, a plot, and the numbers as JSON."""

import datetime
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask
from radial_attn.masks.draw import save_figure
from scripts.run.files import write_text
from scripts.run.results import number, subplots, table
from scripts.run.system import hardware

FRAME = TokenGrid(1, 32, 32)  # 1024 tokens
COLOURS = {"dense": "tab:gray", "cpp": "tab:green", "blocks": "tab:blue", "flex": "tab:orange"}
STYLES = {"float32": "-", "bfloat16": "--"}
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "sve", "bf16")


@dataclass(frozen=True)
class Case:
    """Holds the shape of a call: `frames` of the frame size, or the small shapes of the bundled model."""

    frames: int
    dtype: str
    height: int = FRAME.height
    width: int = FRAME.width
    block_size: int = 128
    batch: int = 1
    heads: int = 8
    head_width: int = 64
    device: str = "cpu"
    backward: bool = False

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(self.frames, self.height, self.width)

    @property
    def mask(self) -> BlockMask:
        decimation = 128 if self.block_size == 128 else 64
        return radial_mask(self.grid, RadialConfig(block_size=self.block_size, decimation_width=decimation))

    def inputs(self) -> list[Tensor]:
        """Returns query, key and value `[B, S, H, D]`, the same for every backend."""
        torch.manual_seed(0)
        shape = self.batch, self.grid.tokens, self.heads, self.head_width
        dtype = getattr(torch, self.dtype)
        return [torch.randn(shape).to(self.device, dtype).requires_grad_(self.backward) for _ in range(3)]


@dataclass(frozen=True)
class Row:
    """Holds a measured call; `seconds` is None if it was left out, and `note` says why."""

    backend: str
    case: Case
    density: float
    seconds: float | None
    note: str = ""


def write(
    folder: str,
    device: str,
    command: str,
    about: str,
    *,
    parts: dict[str, list[Row]],
    peaks: dict,
    tokens: int,
) -> Path:
    """Writes attention_<device>_<date>.md, .png and .json into a folder; returns the first one's path.

    `peaks` holds MiB by dtype and backend, at `tokens` tokens.
    """
    date = datetime.date.today().isoformat()
    path = Path(folder) / f"attention_{device}_{date}.md"
    data = {name: [asdict(row) for row in rows] for name, rows in parts.items()}
    numbers = {"command": command, "about": about, "memory_mib": peaks, **data}
    write_text(path.with_suffix(".json"), json.dumps(numbers, indent=1))
    plot(parts["growing"], path.with_suffix(".png"))
    lines = [
        f"# Attention on the {device.upper()}: dense SDPA, cpp, blocks, flex",
        f"\n`{command}`, {date}, {about}.",
        f"{machine(device)}; torch {torch.__version__}.",
        "Radial masks, decay factor 1, with sink, frames of 32 x 32 tokens, blocks of 128, 8 heads of 64,",
        "batch 1. Speed-up is dense time / time; efficiency = speed-up x density, 1 if every kept",
        "block costs what it costs in dense attention. Medians of up to 5 calls.",
        f"\n![times and efficiency]({path.with_suffix('.png').name})",
        *section("Forward, growing length", parts["growing"]),
        *section("Forward and backward", parts["training"]),
        *section("The bundled model's shapes: blocks of 16, 4 heads of 48, batch 2", parts["small"]),
        *memory_section(peaks, tokens),
    ]
    return write_text(path, "\n".join(lines) + "\n")


def machine(device: str) -> str:
    """Names the GPU, or the processor with the features that matter for its speed."""
    about = hardware(device)
    if device == "cuda":
        return about["gpu"]
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    features = ", ".join(name for name in FEATURES if name in flags)
    return f"{about['cpu']} with {features or 'unknown features'}, {about['threads']} threads"


def compared(rows: list[Row]) -> Iterator[tuple[Row, float | None, float | None]]:
    """Yields each row with its speed-up over the dense row of the same case, and its efficiency."""
    dense = {row.case: row.seconds for row in rows if row.backend == "dense"}
    for row in rows:
        speedup = dense[row.case] / row.seconds if row.seconds and row.case in dense else None
        yield row, speedup, speedup and speedup * row.density


def section(title: str, rows: list[Row]) -> list[str]:
    """Returns one table with a line for each call."""
    cells = []
    for row, speedup, efficiency in compared(rows):
        times = [f"left out: {row.note}", "", ""]
        if row.seconds is not None:
            times = [f"{row.seconds * 1e3:.1f}", number(speedup, ".2f"), number(efficiency, ".2f")]
        start = row.case.dtype, row.case.grid.tokens, row.backend, f"{row.density:.3f}"
        cells.append([*start, *times])
    titles = "dtype | tokens | backend | density | ms | speed-up | efficiency"
    return [f"\n## {title}", *table(titles, cells)]


def memory_section(peaks: dict, tokens: int) -> list[str]:
    """Returns the peak memory of a forward call."""
    cells = (
        (dtype, backend, f"{size:.1f}", f"{size / peak['dense']:.2f}")
        for dtype, peak in peaks.items()
        for backend, size in peak.items()
    )
    return [
        f"\n## Peak memory of a forward call, {tokens} tokens\n",
        "Growth of a fresh process by inputs and call, after a small call: on the CPU its peak resident",
        "size (VmHWM, reset before) less the resident size before, on CUDA torch's peak of allocations.",
        *table("dtype | backend | MiB | times dense", cells),
    ]


def plot(rows: list[Row], path: Path) -> None:
    """Draws milliseconds and efficiency over tokens."""
    figure, (left, right) = subplots((11, 4.5), 1, 2)
    for (dtype, line), (backend, colour) in product(STYLES.items(), COLOURS.items()):
        points = [
            (row.case.grid.tokens, row.seconds * 1e3, efficiency)
            for row, _, efficiency in compared(rows)
            if (row.backend, row.case.dtype) == (backend, dtype) and row.seconds
        ]
        if points:
            tokens, milliseconds, efficiency = zip(*points, strict=True)
            style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 4}
            left.plot(tokens, milliseconds, label=f"{backend} {dtype}", **style)
            if backend != "dense":
                right.plot(tokens, efficiency, label=f"{backend} {dtype}", **style)
    left.set(xscale="log", yscale="log", ylabel="milliseconds", title="Forward")
    right.set(xscale="log", ylabel="efficiency = speed-up x density", title="Efficiency (1 = dense rate)")
    ticks = sorted({row.case.grid.tokens for row in rows})
    for axes in (left, right):
        axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.legend()
    right.set_ylim(bottom=0)
    save_figure(figure, path)
