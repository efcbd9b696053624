"""Measures attention of one case by one variant: its errors first, then time, memory and first calls.

Runs in the child process of the GPU benchmark. Inputs are random normal, the same for all variants of a case.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from radial_attn import BlockMask, TokenGrid, radial_attention
from radial_attn.analysis.sampled_error import (
    OutputError,
    output_error,
    sample_blocks,
    sampled_reference,
    sampled_rows,
)
from scripts.benchmarks.cases import DENSE, QUANTIZED, SPARSE, Case, Task
from scripts.benchmarks.timing import Timer
from scripts.run.errors import one_line

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "sdpa": None}
PACKAGES = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}
WHOLE_BLOCK = 128
SAMPLED = 4  # query blocks whose outputs are compared
TOLERANCE, QUANTIZED_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 0.1, 2e-2  # relative L2 norms
TEXT_LENGTHS = 0.3, 1.0  # of the two samples of a check, as shares of the text
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_attention(name: str) -> Attend:
    """Returns a dense kernel for `[B, S, H, D]`; ImportError if its package is missing."""
    if name in SDPA:
        backend = SDPA[name]

        def sdpa(*tensors: Tensor) -> Tensor:
            with sdpa_kernel(backend) if backend else nullcontext():
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)

        return sdpa
    if name == "flash4-dense":
        return lambda *tensors: radial_attention(*tensors, whole_mask(tensors[0].shape[1]), backend="flash4")
    package = PACKAGES[name]
    try:
        function = import_module(package).flash_attn_func
    except ImportError as error:
        raise ImportError(f"needs {package}: {error}") from error

    def flash(*tensors: Tensor) -> Tensor:
        out = function(*tensors)
        return out[0] if isinstance(out, tuple) else out

    return flash


@lru_cache
def whole_mask(tokens: int) -> BlockMask:
    """Returns the mask that keeps all pairs of a sequence."""
    grid = TokenGrid(1, 1, tokens)
    blocks = grid.num_blocks(WHOLE_BLOCK)
    return BlockMask(grid, WHOLE_BLOCK, torch.ones(blocks, blocks, dtype=torch.bool))


def attention(variant: str, mask: BlockMask, **options: Any) -> Attend:
    """Returns the call of a variant on `[B, S, H, D]` tensors; `options` go to `radial_attention`."""
    if variant in DENSE:
        return dense_attention(variant)
    return partial(radial_attention, mask=mask, **SPARSE[variant], **options)


def tolerance(variant: str) -> float:
    return QUANTIZED_TOLERANCE if variant in QUANTIZED else TOLERANCE


class AttentionBench:
    """Runs "check", "gradients", "forward" and "backward" tasks; keeps the tensors of the latest case."""

    def __init__(self, device: str, dtype: torch.dtype, profile: bool) -> None:
        self.device, self.dtype, self.profile = device, dtype, profile
        self.timer = Timer(device)
        self.forget()

    def forget(self) -> None:
        """Frees all tensors, and what masks hold on the device."""
        self._case: Case | None = None
        self._inputs: list[Tensor] = []
        self._truths: dict[bool, Tensor] = {}
        self._latest: tuple[Tensor, ...] = ()  # gradients of the latest call

    def run(self, task: Task) -> dict[str, Any]:
        """Returns what the report needs; for a wrong output `wrong` is true, and there are no times."""
        if task.kind in {"check", "gradients"}:
            return self.check(task)
        self._take(task.case)
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        # a new object, so that no variant finds lists or tables made by another
        attend = attention(task.variant, fresh(task.case.mask))
        call = self._gradients if task.kind == "backward" else self._forward
        run, partner = (
            partial(call, attend),
            partial(call, dense_attention(task.dense)) if task.dense else None,
        )
        # leaves NaN in the memory that the output is likely to get
        torch.full_like(self._inputs[0], float("nan"))
        once = task.is_dense and task.case.long
        out, first = (self.timer.behind_work if once else self.timer.once)(run)
        error = self._error(out, task.is_dense)
        del out
        result: dict[str, Any] = asdict(error)
        if not error.relative_l2 <= tolerance(task.variant):
            return result | {"wrong": True}
        result |= {"first_ms": first, "times_ms": [first], "ms": first}
        if once:
            return result
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run()
        if self.device == "cuda":
            inputs = 3 * self._inputs[0].nbytes
            result["peak_bytes"] = torch.cuda.max_memory_allocated() - before + inputs
        return result | self._times(run, partner) | self._extras(task, run)

    def compile(self, task: Task) -> dict[str, Any]:
        """Makes the kernels of a task by one call, which nothing checks."""
        if task.kind in {"check", "gradients"}:
            return {"seconds": self.timer.once(partial(self.check, task))[1] / 1e3}
        self._take(task.case)
        attend = attention(task.variant, fresh(task.case.mask))
        call = self._gradients if task.kind == "backward" else self._forward
        return {"seconds": self.timer.once(partial(call, attend))[1] / 1e3}

    def check(self, task: Task) -> dict[str, Any]:
        """Returns relative L2 errors on a small case: with full and padded text, or of the gradients.

        If the variant refuses a form, the reason replaces the error.
        """
        case, variant, limit = task.case, task.variant, tolerance(task.variant)
        self.forget()
        inputs = self._random(case, batch=len(TEXT_LENGTHS))
        if task.kind == "gradients":
            errors = _errors(variant, inputs, case.mask, gradients=True)
            return {"gradients": max(errors[1:]), "gradients_right": max(errors[1:]) <= GRADIENT_TOLERANCE}
        lengths = [round(share * case.grid.text) for share in TEXT_LENGTHS]
        (out,) = _errors(variant, inputs, case.mask)
        try:
            (padded,) = _errors(variant, inputs, case.mask, text_lengths=lengths)
        except (ValueError, ImportError) as error:  # how a backend refuses a call
            return {"out": out, "padded": one_line(error), "right": out <= limit}
        return {"out": out, "padded": padded, "right": max(out, padded) <= limit}

    def _take(self, case: Case) -> None:
        if case != self._case:
            self.forget()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self._inputs = self._random(case, batch=1)
            self._case = case

    def _random(self, case: Case, batch: int) -> list[Tensor]:
        return random_inputs((batch, case.grid.tokens, case.heads, case.width), self.device, self.dtype)

    @torch.no_grad()
    def _forward(self, attend: Attend) -> Tensor:
        return attend(*self._inputs[:3])

    def _gradients(self, attend: Attend) -> Tensor:
        """Returns the output; the gradients of query, key and value stay in `_latest`."""
        self._latest = ()  # frees the gradients of the call before
        leaves = [x.detach().requires_grad_() for x in self._inputs[:3]]
        out = attend(*leaves)
        self._latest = torch.autograd.grad(out, leaves, self._inputs[3])
        return out.detach()

    @torch.no_grad()
    def _error(self, out: Tensor, dense: bool) -> OutputError:
        """Compares with exact attention on some query blocks; NaN if any value is not finite."""
        mask = self._case.mask
        gradients, self._latest = self._latest, ()
        if not all(bool(torch.isfinite(x).all()) for x in (out, *gradients)):
            return OutputError(float("nan"), float("nan"))
        sample = sample_blocks(mask, SAMPLED)
        if dense not in self._truths:
            whole = BlockMask(mask.grid, mask.block_size, torch.ones_like(mask.blocks)) if dense else mask
            self._truths[dense] = sampled_reference(*self._inputs[:3], whole, sample)
        return output_error(sampled_rows(out, mask, sample), self._truths[dense])

    def _times(self, run: Callable[[], Any], partner: Callable[[], Any] | None) -> dict[str, Any]:
        """Returns milliseconds of some calls, of the partner's between them, and the clock after them."""
        result: dict[str, Any] = {}
        if partner is None:
            result["times_ms"] = self.timer.repeated(run)
        else:
            partner()
            result["times_ms"], result["dense_times_ms"] = self.timer.in_turn(run, partner)
            result["dense_ms"] = statistics.median(result["dense_times_ms"])
        result["ms"] = statistics.median(result["times_ms"])
        if self.device == "cuda":
            with suppress(Exception):  # needs an optional package
                result["clock_mhz"] = torch.cuda.clock_rate()
        self._latest = ()
        return result

    def _extras(self, task: Task, run: Callable[[], Any]) -> dict[str, Any]:
        """Returns what a new mask costs at its first call, and with `profile` the time of each kernel."""
        result: dict[str, Any] = {}
        left_out = task.is_dense or task.case.long or task.variant == "flex"  # which compiles again
        if task.kind == "forward" and not left_out:
            attend = attention(task.variant, fresh(task.case.mask))
            result["new_mask_ms"] = self.timer.once(partial(self._forward, attend))[1]
        if self.profile:
            result["kernels_ms"] = kernel_times(run, self.device)
        return result


def random_inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Returns query, key, value and a gradient of the output, `[B, S, H, D]`."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)]


def fresh(mask: BlockMask) -> BlockMask:
    """Returns an equal mask for which nothing has been prepared yet."""
    return BlockMask(mask.grid, mask.block_size, mask.blocks.clone())  # lists and plans belong to the tensor


def kernel_times(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Returns milliseconds of the eight longest kernels of a call; or one entry with the reason."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    try:
        with profile(activities=[kind]) as profiler:
            run()
            if device == "cuda":
                torch.cuda.synchronize()
        spent = {event.key[:80]: getattr(event, field) / 1e3 for event in profiler.key_averages()}
    except (RuntimeError, AttributeError) as error:
        return {f"no profile: {error}"[:80]: 0.0}
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:8])


def _errors(
    variant: str, inputs: list[Tensor], mask: BlockMask, *, gradients: bool = False, **options: Any
) -> list[float]:
    """Returns relative L2 errors against the definition in float32: of the output, then of gradients."""
    given = _call(attention(variant, fresh(mask), **options), inputs, gradients)
    exact = partial(radial_attention, mask=mask, backend="reference", **options)
    wanted = _call(exact, [x.float() for x in inputs], gradients)
    return [output_error(got, want).relative_l2 for got, want in zip(given, wanted, strict=True)]


def _call(attend: Attend, inputs: list[Tensor], gradients: bool) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(gradients) for x in inputs[:3]]
    out = attend(*leaves)
    return [out.detach(), *(torch.autograd.grad(out, leaves, inputs[3]) if gradients else ())]
