"""Compares and times backends on the tensors of one call."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from .analysis.sampled_error import (
    SAMPLED_BLOCKS,
    output_error,
    sample_blocks,
    sampled_reference,
    sampled_rows,
)
from .attention import radial_attention
from .block_mask import BlockMask
from .far_field import Far
from .kernels.contract import Call

REPEATS = 3
ROWS = 1 << 18  # query rows, of all heads together, that are enough to time
LIMITS = {torch.float32: 5e-3}  # relative L2 error; TF32 stays below
HALF_LIMIT, QUANTIZED_LIMIT = 1e-2, 0.2
SHARE, LEAST_SECONDS = 0.02, 0.1  # of the run that measuring may take; seconds that it may always take
DENSE = "dense"
OUT_OF_MEMORY, SYSTEM_ERROR = "out of memory", "system error"
PASSING = OUT_OF_MEMORY, SYSTEM_ERROR  # how reasons begin that another run may not meet
clock = time.perf_counter

Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # of query, key, value and text lengths


class Trial:
    """Holds a call whose backends are compared: some heads of its tensors, and the definition's result.

    `share`: heads of the call divided by those that are compared.

    Raises FloatingPointError if the definition's result is not finite.
    """

    def __init__(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        mask: BlockMask,
        lengths: Tensor | None,
        bias: Tensor | None = None,
    ) -> None:
        heads = tensors[0].shape[2]
        count = some_heads(tensors[0].shape)
        self.share = heads / count
        cut = slice(0, heads // count * count, heads // count)  # evenly spaced
        if mask.heads is not None and count < heads:
            mask = BlockMask(mask.grid, mask.block_size, mask.blocks[cut].contiguous())
        if bias is not None and bias.shape[1] == heads:
            bias = bias[:, cut]
        self._call, self._mask, self.lengths, self._bias = call, mask, lengths, bias
        self._tensors = [x.detach()[:, :, cut].to(call.dtype) for x in tensors]
        self._sample = sample_blocks(mask, SAMPLED_BLOCKS)
        self._grad = self._sampled_gradient() if call.gradients else None
        self._limit = QUANTIZED_LIMIT if call.quantize else LIMITS.get(call.dtype, HALF_LIMIT)
        self._wanted = self._differentiated(self._definition)
        if not all(x.isfinite().all() for x in self._wanted):
            raise FloatingPointError("query, key or value is not finite, so nothing can be compared")

    def measure(
        self,
        names: Sequence[str],
        known: dict[str, float | str],
        dense: Dense,
        *,
        calls: int,
        spent: float = 0.0,
    ) -> dict[str, float | str]:
        """Returns seconds of each name, or why it was refused, until `SHARE` of the run is spent.

        Args:
            names: backends, the default first, and "dense".
            known: what is not measured again.
            dense: dense attention.
            calls: how many the run makes; it takes at least their time.
            spent: seconds that the run has taken so far.
        """
        times, start = dict(known), clock()
        for name in (name for name in names if name not in known):
            sparse = [x for other, x in times.items() if other != DENSE and isinstance(x, float)]
            least = min(sparse, default=math.inf)
            if clock() - start > max(LEAST_SECONDS, SHARE * (spent + calls * self.share * least)):
                break
            run = partial(self.run, partial(dense, text_lengths=self.lengths) if name == DENSE else name)
            times[name] = self.seconds_of(run, least, compared=name != DENSE)
            if name == names[0]:
                start = clock()  # the run compiles the default in any case, so it does not count
        return times

    def run(self, backend: str | Dense) -> list[Tensor]:
        """Returns the output of a backend, or of dense attention, and the gradients of query, key, value."""
        if callable(backend):
            return self._differentiated(backend)
        options = {"text_lengths": self.lengths, "backend": backend, "quantize": self._call.quantize}
        options |= {"far_field": self._call.far_field, "far_bias": self._bias}
        return self._differentiated(lambda *tensors: radial_attention(*tensors, self._mask, **options))

    def seconds_of(self, run: Callable[[], list[Tensor]], least: float, *, compared: bool) -> float | str:
        """Returns the least seconds of a few calls after a first one, or why it is refused.

        A call that takes twice the `least` so far is not repeated.
        """
        try:
            outputs = run()
            error = self._error(outputs) if compared else 0.0
            if not error <= self._limit:
                return f"relative L2 error {error:.2g}"
            times: list[float] = []
            while len(times) < REPEATS and max(times, default=0.0) <= 2 * least:
                self._wait()
                start = clock()
                run()
                self._wait()
                times.append(clock() - start)
            return max(min(times), sys.float_info.min)
        except Exception as error:  # each library fails in its own way
            return reason_of(error)

    def _wait(self) -> None:
        if self._call.device.type == "cuda":
            torch.cuda.synchronize(self._call.device)

    def _definition(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the output `[B, S, H, D]`, zeros outside the sampled blocks."""
        kind, options = self._call.far_field, {"text_lengths": self.lengths}
        if kind != "none" and not self._mask.is_dense:
            options["far"] = Far.of(key, value, self._mask, kind, self._bias)
        rows = sampled_reference(query, key, value, self._mask, self._sample, **options)
        return torch.zeros_like(query, dtype=torch.float32).index_copy(1, self._rows(), rows)

    def _rows(self) -> Tensor:
        """Returns the numbers of the sampled tokens."""
        every = torch.arange(self._mask.grid.tokens, device=self._call.device).view(1, -1)
        return sampled_rows(every, self._mask, self._sample).flatten()

    def _sampled_gradient(self) -> Tensor:
        """Returns a gradient of the output that is zero outside the sampled blocks, like the definition's."""
        query, rows = self._tensors[0], self._rows()
        generator = torch.Generator(query.device).manual_seed(1)
        values = torch.randn(query[:, rows].shape, generator=generator, device=query.device)
        return torch.zeros_like(query).index_copy(1, rows, values.to(query.dtype))

    def _differentiated(self, attend: Callable[..., Tensor]) -> list[Tensor]:
        kind = self._call.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            if self._grad is None:
                with torch.no_grad():
                    return [attend(*self._tensors)]
            with torch.enable_grad():
                leaves = [x.clone().requires_grad_() for x in self._tensors]
                out = attend(*leaves)
            grads = torch.autograd.grad(out, leaves, self._grad.to(out.dtype))
            return [out.detach(), *grads]

    def _error(self, outputs: Sequence[Tensor]) -> float:
        """Returns the largest relative L2 error of the sampled output and of the gradients."""
        cut = partial(sampled_rows, mask=self._mask, blocks=self._sample)
        pairs = [(cut(outputs[0]), cut(self._wanted[0])), *zip(outputs[1:], self._wanted[1:], strict=True)]
        errors = [output_error(got, want).relative_l2 for got, want in pairs]
        return math.nan if any(map(math.isnan, errors)) else max(errors)


def some_heads(size: Sequence[int]) -> int:
    """Returns how many heads of `[B, S, H, D]` together have `ROWS` query rows."""
    batch, tokens, heads, _ = size
    return min(heads, -(-ROWS // (batch * tokens)))


def reason_of(error: Exception) -> str:
    """Describes a failure in one line."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error):
        return OUT_OF_MEMORY
    if isinstance(error, OSError) or "No space left" in str(error):
        return f"{SYSTEM_ERROR}: {' '.join(str(error).split())[:80]}"
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:80]}"
