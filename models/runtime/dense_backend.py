"""Chooses the kernel of dense steps and layers: upstream's dispatch as it is, a named one, or the fastest.

Only the self-attention processors of one application are set; cross-attention stays as it is.
"""

import difflib
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from radial_attn import BlockMask
from radial_attn.dispatch import kernel, missing

OURS = ("sage", "flash4")  # kernels of `radial_attention`
CHOICES = ("auto", "native", *OURS)  # and every name of diffusers' dispatch
CANDIDATES = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3")
TIMED_DEVICES = ("cuda",)
ROWS = 4096  # query tokens that are timed
REPEATS = 3
Agree = Callable[[Any], Any]  # returns the first process's value in all processes


def check_dense_backend(name: str) -> None:
    """Raises an error for a name that cannot serve dense attention here, whatever the call.

    Raises:
        ValueError: the name is neither in `CHOICES` nor in diffusers' dispatch; the message has the nearest.
        ImportError: its library is missing; the message says what to install.
    """
    if name not in (known := known_backends()):
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"dense_backend must be one of {', '.join(known)}, got {name!r}; did you mean {near!r}?"
        )
    if (reason := dense_obstacle(name)) is not None:
        raise ImportError(f"dense_backend {name!r} {reason}; allowed here: auto, native")


def known_backends() -> list[str]:
    """Returns the names in `CHOICES` and in diffusers' dispatch."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return list(dict.fromkeys([*CHOICES, *(member.value for member in AttentionBackendName)]))


def dense_obstacle(name: str) -> str | None:
    """Says why a known backend cannot serve dense attention here, whatever the call; None if it can."""
    if name in CHOICES:
        return missing(kernel(name).NEEDS) if name in OURS else None
    from diffusers.models.attention_dispatch import attention_backend

    try:
        with attention_backend(name):
            return None
    except (RuntimeError, ImportError, OSError, ValueError) as error:
        return f"cannot be used here: {' '.join(str(error).split()).rstrip('.')}"


def measure(
    names: Sequence[str], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> dict[str, float | None]:
    """Returns seconds of dense attention on random `[B, S, H, D]` for each name of the dispatch.

    Each is the least of a few calls after a warm-up, of one sample and at most `ROWS` query tokens: a long
    video takes seconds a call. It is None if the backend does not suit this machine or these tensors, or if
    they do not fit in memory.
    """
    generator = torch.Generator(device).manual_seed(0)
    make = partial(torch.randn, generator=generator, dtype=dtype, device=device)
    _, tokens, *rest = shape
    try:
        tensors = [make((1, count, *rest)) for count in (min(tokens, ROWS), tokens, tokens)]
    except torch.OutOfMemoryError:
        return dict.fromkeys(names)
    return {name: _seconds(name, tensors) for name in names}


def _seconds(name: str, tensors: Sequence[Tensor]) -> float | None:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    device, times = tensors[0].device, []
    try:
        check_dense_backend(name)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(1 + REPEATS):
                start = time.perf_counter()
                dispatch_attention_fn(*tensors, backend=AttentionBackendName(name))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - start)
    except Exception:  # each library refuses in its own way
        return None
    return min(times[1:])


def choose(
    names: Sequence[str],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    mask: BlockMask,
    *,
    agree: Agree | None = None,
) -> tuple[str, dict[str, float | None]]:
    """Returns the fastest of `names` for `[B, S, H, D]`, and the times of `measure`.

    Measures and logs once for each mask. With `agree` the times of the first process hold for all, which then
    choose alike.
    """

    def build() -> tuple[str, dict[str, float | None]]:
        times = measure(names, shape, dtype, device)
        times = times if agree is None else agree(times)
        usable = {name: seconds for name, seconds in times.items() if seconds is not None}
        best = min(usable, key=usable.__getitem__, default="native")
        shown = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in usable.items())
        absent = ", ".join(name for name in times if name not in usable)
        logging.getLogger("radial_attn").info(
            "dense backend %s for %s %s on %s: %s%s%s",
            *(best, list(shape), dtype, device, shown or "none of them runs"),
            f" on {ROWS} query tokens" if shown and shape[1] > ROWS else "",
            absent and f"; not usable: {absent}",
        )
        return best, times

    return mask.cached(("dense backend", tuple(names), tuple(shape), dtype, device), build)


class DenseBackend:
    """Sets the dense backend of one application: the name that its processors give to diffusers' dispatch.

    `name` is one of these; `agree`: see `choose`.

    - "native": the user's `set_attention_backend` and similar calls decide.
    - A name in `OURS`: `radial_attention` with a dense mask.
    - "auto": on CUDA the fastest of `CANDIDATES` for the shape of the run if the user chose none, else
      "native".
    - Any other name of the dispatch.

    Raises the errors of `check_dense_backend`.
    """

    def __init__(self, name: str, agree: Agree | None = None) -> None:
        check_dense_backend(name)
        self.name, self._agree = name, agree
        self._given: dict[Any, Any] = {}
        self._free: list[Any] = []
        self._dispatched = True
        self._times: dict[str, float | None] = {}

    def install(self, processor: Any) -> None:
        """Sets a processor of the application, which has the choice of the one that it replaces.

        Raises ValueError if upstream does not dispatch (Mochi calls torch's SDPA) and another backend is
        named.
        """
        self._dispatched = hasattr(processor, "_attention_backend")
        if not self._dispatched:
            if self.name not in CHOICES:
                raise ValueError(
                    f"dense_backend must be one of {', '.join(CHOICES)} for a model whose dense attention is "
                    f"torch's own, got {self.name!r}"
                )
            return
        chosen = processor._attention_backend
        if self.name == "auto" and chosen is None:
            self._free.append(processor)
        self._give(processor, chosen if self.name in CHOICES else self.name)

    def remove(self, processor: Any, before: Any) -> None:
        """Passes the user's choice since then on to the original processor."""
        if processor in self._given and processor._attention_backend is not self._given[processor]:
            before._attention_backend = processor._attention_backend

    def prepare(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        mask: BlockMask,
    ) -> None:
        """Chooses a backend for the dense attention of a call, `[B, S, H, D]`; `mask` caches the times."""
        if device.type not in TIMED_DEVICES:
            return
        free = [
            p for p in self._free if p._attention_backend is self._given[p] and p._parallel_config is None
        ]
        if not free:
            return
        name = None
        if _active() == "native":
            name, self._times = choose(CANDIDATES, shape, dtype, device, mask, agree=self._agree)
        for processor in free:
            self._give(processor, None if name == "native" else name)

    @property
    def in_use(self) -> Any:
        """Returns what the processors name in the dispatch; None if they leave it to the dispatch."""
        return next((processor._attention_backend for processor in self._given), None)

    def report(self) -> dict[str, Any]:
        """Returns `name`, the `backend` in use, and the `seconds` of each candidate that "auto" timed."""
        chosen = self.in_use
        native = _active() if self._dispatched else "native"
        backend = self.name if self.name in OURS else chosen.value if chosen else native
        return {"name": self.name, "backend": backend, "seconds": self._times}

    def _give(self, processor: Any, name: str | None) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        chosen = None if name is None else AttentionBackendName(name)
        if processor._attention_backend is not chosen:
            processor._attention_backend = chosen
        self._given[processor] = chosen


def _active() -> str:
    """Returns the backend of processors that name none."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    return _AttentionBackendRegistry.get_active_backend()[0].value
