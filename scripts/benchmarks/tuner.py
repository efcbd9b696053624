"""Times candidates for the launch table of the Triton kernels, each in a child process on a fresh mask."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from statistics import median_high
from typing import Any

import torch
from torch import Tensor

from radial_attn import BlockMask, radial_attention
from radial_attn.analysis.sampled_error import output_error, sample_blocks, sampled_reference, sampled_rows
from radial_attn.block_mask import Part
from radial_attn.kernels.reference import partial_attention
from radial_attn.kernels.triton import configs as triton_configs
from radial_attn.kernels.triton.configs import LAUNCHES, SPECIALIZED, Launch, architecture, launch
from scripts.benchmarks.attention import (
    GRADIENT_TOLERANCE,
    QUANTIZED_TOLERANCE,
    SAMPLED,
    TOLERANCE,
    fresh,
    random_inputs,
)
from scripts.benchmarks.cases import Case, Task
from scripts.benchmarks.timing import Timer
from scripts.benchmarks.worker import Worker
from scripts.run.files import write_text

GRADIENTS = ("query gradient", "key gradients")
TILES, WARPS, STAGES = (32, 64, 128), (4, 8), (1, 2, 3, 4, 5, 6)
MOST_REGISTERS = 200  # of a thread, for the accumulators alone
SHARED = 232_448  # bytes of a program on the largest GPUs; smaller ones refuse at launch
QUANTIZED = ("int8", "fp8")
FLAGS = {"descriptors": ("", "whole", "head"), "specialize": (False, True), "fp8_values": (False, True)}
NOT_FOR = {  # choices that a kind's kernel does not know
    **dict.fromkeys(GRADIENTS, ("descriptors", "specialize", "fp8_values")),
    **dict.fromkeys(QUANTIZED, ("specialize", "head")),
    "forward": ("fp8_values",),
    "far field": ("specialize", "fp8_values"),
}
COMPILE_SECONDS, LEAST_SECONDS, LSE_TOLERANCE = 60.0, 5.0, 0.02


@dataclass(frozen=True)
class Setting:
    """Says on what the candidates run: device, case and head width."""

    device: str
    case: Case
    width: int


def candidates(current: Launch, kind: str, width: int) -> list[Launch]:
    """Returns configurations worth a try, nearest to the current one first."""
    unknown = NOT_FOR[kind]
    flags = {name: [x for x in FLAGS[name] if x not in unknown] for name in FLAGS if name not in unknown}
    fitting = []
    for rows, columns, warps, stages in product(TILES[1:], TILES, WARPS, STAGES):
        for values in product(*flags.values()):
            options = dict(zip(flags, values, strict=True))
            shape = {"rows": rows, "columns": columns, "warps": warps, "stages": stages}
            candidate = replace(current, **shape, **options)
            if fits(candidate, kind, width):
                fitting.append(candidate)
    known = [SPECIALIZED[kind, width]] if kind == "forward" and (kind, width) in SPECIALIZED else []
    ordered = sorted({current, *fitting} - {*known}, key=partial(distance, current))
    return [ordered[0], *known, *ordered[1:]]


def fits(candidate: Launch, kind: str, width: int) -> bool:
    """Returns whether accumulators fit in registers and tiles in shared memory, roughly."""
    rows, columns = candidate.rows, candidate.columns
    if candidate.specialize and (candidate.descriptors, candidate.warps) != ("head", 4):
        return False  # the compiler fails, or ignores it
    if kind in QUANTIZED and candidate.descriptors and not candidate.fp8_values:
        return False
    kept = rows * columns + (2 * columns if kind == "key gradients" else rows) * width
    size = 1 if kind in QUANTIZED else 2
    staged = 2 * (rows if kind == "key gradients" else columns) * width * size * candidate.stages
    warps = candidate.warps * (2 if candidate.specialize else 1)  # two groups share the rows
    return kept / (32 * warps) <= MOST_REGISTERS and staged + rows * width * size <= SHARED


def distance(current: Launch, candidate: Launch) -> tuple[int, str]:
    """Counts the fields in which they differ; sorts by their text if the counts are equal."""
    names = [field.name for field in fields(current)]
    return sum(getattr(current, n) != getattr(candidate, n) for n in names), repr(candidate)


@contextmanager
def entry(kind: str, device: torch.device, width: int, candidate: Launch) -> Iterator[None]:
    """Changes an entry of the launch table for the block."""
    if device.type == "cpu":
        table, key = triton_configs.INTERPRETED, kind
    else:
        table, key = LAUNCHES[architecture(device)], (kind, width)
    before = table.get(key)
    table[key] = candidate
    launch.cache_clear()
    try:
        yield
    finally:
        table.pop(key)
        if before is not None:
            table[key] = before
        launch.cache_clear()


class TuneSession:
    """Times one candidate after the other on the same tensors, in the child process."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._timer = setting, Timer(setting.device)
        case, dtype = setting.case, torch.bfloat16 if setting.device == "cuda" else torch.float32
        shape = 1, case.grid.tokens, case.heads, setting.width
        self._inputs = random_inputs(shape, setting.device, dtype)
        self._sample = sample_blocks(case.mask, SAMPLED)
        self._truth = sampled_reference(*self._inputs[:3], case.mask, self._sample)
        self._far_truth: Tensor | None = None
        self._gradients: tuple[Tensor, ...] = ()
        self._lse: Tensor | None = None

    def run(self, task: Task) -> dict[str, Any]:
        """Returns milliseconds and relative L2 error; for "machine", architecture and GPU."""
        device = self._inputs[0].device
        if task.kind == "machine":
            if device.type == "cuda":
                return {"architecture": architecture(device), "gpu": torch.cuda.get_device_name(device)}
            return {"architecture": "interpreted", "gpu": "the CPU"}
        with entry(task.variant, device, self._setting.width, task.detail[0]):
            return self._backward() if task.variant in GRADIENTS else self._forward(task.variant)

    def _forward(self, kind: str) -> dict[str, Any]:
        bits, far = kind if kind in QUANTIZED else None, "linear" if kind == "far field" else "none"
        mask = fresh(self._setting.case.mask)
        run = partial(radial_attention, *self._inputs[:3], mask, quantize=bits, far_field=far)
        if kind == "forward":
            self._check_lse(mask)
        with torch.no_grad():
            truth = self._truth
            if kind == "far field":
                if self._far_truth is None:
                    self._far_truth = sampled_rows(run(backend="blocks"), mask, self._sample)
                truth = self._far_truth
            run = partial(run, backend="triton")
            out, _ = self._timer.once(run)
            error = output_error(sampled_rows(out, mask, self._sample), truth).relative_l2
            return self._timed(run, error, QUANTIZED_TOLERANCE if bits else TOLERANCE)

    def _backward(self) -> dict[str, Any]:
        run = self._gradient_call("triton")
        gradients, _ = self._timer.once(run)
        self._gradients = self._gradients or self._gradient_call("blocks")()
        pairs = zip(gradients, self._gradients, strict=True)
        error = max(output_error(got, want).relative_l2 for got, want in pairs)
        return self._timed(run, error, GRADIENT_TOLERANCE)

    def _gradient_call(self, backend: str) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [x.detach().requires_grad_() for x in self._inputs[:3]]
        out = radial_attention(*leaves, fresh(self._setting.case.mask), backend=backend)
        return partial(torch.autograd.grad, out, leaves, self._inputs[3], retain_graph=True)

    @torch.no_grad()
    def _check_lse(self, mask: BlockMask) -> None:
        """Raises ValueError for a wrong log-sum-exp, which the backward needs and no output shows."""
        from radial_attn.kernels.triton.op import triton_attention

        shape, scale = (mask.blocks, mask.block_size, mask.grid.video_tokens), self._setting.width**-0.5
        if self._lse is None:
            self._lse = sampled_lse(*self._inputs[:2], mask, self._sample, scale)
        lse = triton_attention(*self._inputs[:3], *shape, None, scale)[1].transpose(1, 2)
        error = (sampled_rows(lse, mask, self._sample) - self._lse).abs().max().item()
        if not error < LSE_TOLERANCE:
            raise ValueError(f"wrong log-sum-exp, off by {error:.1e}")

    def _timed(self, run: Callable[[], object], error: float, limit: float) -> dict[str, Any]:
        if not error <= limit:
            raise ValueError(f"wrong output, relative L2 {error:.1e}")
        return {"ms": median_high(self._timer.repeated(run)), "relative_l2": error}


def sampled_lse(query: Tensor, key: Tensor, mask: BlockMask, blocks: Sequence[int], scale: float) -> Tensor:
    """Returns the log-sum-exp of the query tokens of some blocks by `reference`, float32 `[B, rows, H]`."""
    size, parts = mask.block_size, []
    for block in blocks:
        part = Part(mask.blocks[..., block : block + 1, :], size)
        rows = query[:, block * size : (block + 1) * size]
        options = {"text_lengths": None, "scale": scale}
        parts.append(partial_attention(rows, key, key, part, **options)[1])
    return torch.cat(parts, dim=1)


def row(kind: str, width: int, chosen: Launch) -> str:
    """Writes a line of the launch table."""
    shape = f"{chosen.rows}, {chosen.columns}, {chosen.warps}, {chosen.stages}"
    named = [(f.name, getattr(chosen, f.name)) for f in fields(chosen)[4:]]
    flags = (f', {name}="{x}"' if isinstance(x, str) else f", {name}={x}" for name, x in named if x)
    return f'("{kind}", {width}): Launch({shape}{"".join(flags)}),'


def plans(kinds: Sequence[str], arch: str, width: int) -> dict[str, list[Launch]]:
    """Returns the candidates of each kind that the launch table of an architecture has an entry for."""
    table = LAUNCHES.get(arch, {})
    if arch == "interpreted":
        table = {(kind, width): entry for kind, entry in triton_configs.INTERPRETED.items()}
    return {x: candidates(table[x, width], x, width) for x in kinds if (x, width) in table}


def tune(worker: Worker, kinds: Sequence[str], setting: Setting, seconds: float, out: Path) -> None:
    """Times candidates of all kinds in turn until the time is over; writes after each.

    The next one of a kind is the one most like the best so far. Raises ValueError if nothing can be measured.
    """
    deadline = time.monotonic() + seconds
    about = worker.ask(Task("machine"), seconds)
    if about.result is None:
        raise ValueError(about.failure)
    waiting, rows = plans(kinds, about.result["architecture"], setting.width), []
    best = {kind: (inf, listed[0]) for kind, listed in waiting.items()}
    while any(waiting.values()) and deadline - time.monotonic() > LEAST_SECONDS:
        for kind in [kind for kind, listed in waiting.items() if listed]:
            candidate = min(waiting[kind], key=partial(distance, best[kind][1]))
            waiting[kind].remove(candidate)
            limit = max(LEAST_SECONDS, min(COMPILE_SECONDS, deadline - time.monotonic()))
            answer = worker.ask(Task("tune", variant=kind, detail=(candidate,)), limit)
            result = answer.result or {"skipped": answer.failure}
            if result.get("ms", inf) < best[kind][0]:
                best[kind] = result["ms"], candidate
            rows.append({"kind": kind, "row": row(kind, setting.width, candidate), **result})
            outcome = f"{result['ms']:.3f} ms" if "ms" in result else result["skipped"]
            print(f"{rows[-1]['row']} {outcome}", flush=True)
            data = {**about.result, "case": setting.case.name, "heads": setting.case.heads, "rows": rows}
            write_text(out, json.dumps(data, indent=1))
    show(rows, about.result)


def show(rows: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Prints the best line of each kind, with the time of the table's current entry."""
    print(f"# {about['gpu']}, {about['architecture']}")
    for kind in dict.fromkeys(entry["kind"] for entry in rows):
        first, *rest = [entry for entry in rows if entry["kind"] == kind]
        best = min((first, *rest), key=lambda entry: entry.get("ms", inf))
        if "ms" not in best:
            print(f"# {kind}: none ran")
            continue
        now = f"{first['ms']:.3f} ms" if "ms" in first else "did not run"
        print(f"    {best['row']}  # {best['ms']:.3f} ms, before {now}")
