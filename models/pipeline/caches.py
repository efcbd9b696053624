"""Puts diffusers' caches around the blocks of a transformer: a step reuses results of the steps before."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.transformers import transformers_of
from .efficiency import blocks_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CACHES = ("none", "first_block", "taylorseer", "mag", "pab")
HOOK_FILES = ("first_block_cache", "taylorseer_cache", "mag_cache", "pyramid_attention_broadcast")
# pipelines that do not name the calls of a step
NAMELESS = ("HunyuanVideoImageToVideoPipeline", "ChronoEditPipeline", "Kandinsky5T2VPipeline")
WARM_UP = 3  # first steps that TaylorSeer computes at least
Gather = Callable[[Tensor], Tensor]  # `[B, N, C]` of all processes from the `[b, n, C]` of this one


class CacheUse:
    """Counts attention calls of a video: `due` without a cache, `computed` with it.

    With several processes it counts the calls of this one.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.due, self.computed = kind, 0, 0
        self._undo: list[Any] = []

    def report(self) -> dict[str, Any]:
        """Returns the counts as values that JSON can hold."""
        return {"kind": self.kind, "due": self.due, "computed": self.computed}

    def watch(self, transformer: torch.nn.Module) -> None:
        """Counts calls of the parts that carry the cache's hooks, blocks or their attention.

        Raises ValueError if the cache has put no hook on the transformer.
        """
        hooks = _hooks_of_blocks(transformer)
        if not hooks:
            name = type(transformer).__name__
            raise ValueError(f"cache {self.kind!r} does not support {name}; use cache 'none'")

        def call_begins(*_: Any) -> None:
            self.due += 1

        for part, hook in hooks:
            self._count(hook.fn_ref)
            self._undo.append(part.register_forward_pre_hook(call_begins).remove)

    def name_calls(self, transformer: torch.nn.Module) -> None:
        """Names calls as caches need it, if a pipeline does not: "cond", then "uncond" if there is one."""
        running, last = ExitStack(), None

        def call_begins(part: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal last
            time = float(kwargs["timestep"].flatten()[0])
            name, last = ("uncond", None) if time == last else ("cond", time)
            running.enter_context(part.cache_context(name))

        def call_ends(*_: Any) -> None:
            running.close()

        self._undo.append(transformer.register_forward_pre_hook(call_begins, with_kwargs=True).remove)
        self._undo.append(transformer.register_forward_hook(call_ends, always_call=True).remove)

    def unwatch(self) -> None:
        """Stops counting and naming."""
        for undo in self._undo:
            undo()
        self._undo = []

    def _count(self, reference: Any) -> None:
        forward = reference.original_forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.computed += 1
            return forward(*args, **kwargs)

        reference.original_forward = counted
        self._undo.append(lambda: setattr(reference, "original_forward", forward))


def decide_together(transformer: torch.nn.Module, gather: Gather) -> None:
    """Judges the first block's change by the tokens of all processes: all of them skip the same steps."""
    for _, hook in _hooks_of_blocks(transformer):
        if hasattr(hook, "_should_compute_remaining_blocks"):
            hook._should_compute_remaining_blocks = partial(_whole_change, hook, gather)


def _whole_change(hook: Any, gather: Gather, residual: Tensor) -> bool:
    """Returns the hook's own decision for both residuals `[B, n, C]`, gathered from all processes."""
    state, judge = hook.state_manager.get_state(), type(hook)._should_compute_remaining_blocks
    before = state.head_block_residual
    if before is None:
        return judge(hook, residual)
    state.head_block_residual = gather(before)
    try:
        return judge(hook, gather(residual))
    finally:
        state.head_block_residual = before


def _hooks_of_blocks(transformer: torch.nn.Module) -> list[tuple[torch.nn.Module, Any]]:
    """Returns the caches' hooks with the parts that carry them."""
    parts = [part for block in blocks_of(transformer) for part in block.modules()]
    return [
        (part, hook)
        for part in parts
        if "_diffusers_hook" in vars(part)
        for hook in part._diffusers_hook.hooks.values()
        if type(hook).__module__.endswith(HOOK_FILES)
    ]


@contextmanager
def cached(
    pipeline: "DiffusionPipeline",
    kind: str,
    steps: int,
    *,
    dense_steps: int = 0,
    dense_last_steps: int = 0,
    threshold: float = 0.05,
    ratios: str | None = None,
    gather: Gather | None = None,
) -> Iterator[CacheUse]:
    """Puts one of `CACHES` around the transformers of a pipeline, for one video of `steps` steps.

    Args:
        dense_steps, dense_last_steps: steps at both ends that TaylorSeer computes at least.
        threshold: change below which first_block and mag skip.
        ratios: for mag, numbers with commas, or "calibrate", which skips nothing and prints them at the end.
        gather: returns the video tokens of all processes that share a call, given one's own. Caches other
            than first_block decide by the step alone, and skip the same in every process.

    Raises ValueError if the cache supports no part of a transformer.
    """
    use = CacheUse(kind)
    transformers = [] if kind == "none" else transformers_of(pipeline)
    settings = {"steps": steps, "ends": (dense_steps, dense_last_steps)}
    settings |= {"threshold": threshold, "ratios": ratios}
    try:
        for transformer in transformers:
            transformer.enable_cache(_settings(pipeline, kind, **settings))
            if gather is not None:
                decide_together(transformer, gather)
            use.watch(transformer)
            if type(pipeline).__name__ in NAMELESS:
                use.name_calls(transformer)
        yield use
    finally:
        use.unwatch()
        for transformer in transformers:
            if transformer.is_cache_enabled:
                transformer.disable_cache()


def _settings(
    pipeline: "DiffusionPipeline",
    kind: str,
    *,
    steps: int,
    ends: tuple[int, int],
    threshold: float,
    ratios: str | None,
) -> Any:
    """Returns diffusers' settings of a cache.

    TaylorSeer runs in its light form: blocks return nothing and the last projection is extrapolated. It does
    so in float32, which is small next to the blocks' tensors; rounded, processes would differ.
    """
    import diffusers

    match kind:
        case "first_block":
            return diffusers.FirstBlockCacheConfig(threshold=threshold)
        case "taylorseer":
            return diffusers.TaylorSeerCacheConfig(
                use_lite_mode=True,
                disable_cache_before_step=max(WARM_UP, ends[0]),
                disable_cache_after_step=steps - ends[1],
                taylor_factors_dtype=torch.float32,
            )
        case "mag":
            given = {"calibrate": True} if ratios == "calibrate" else {"mag_ratios": read_ratios(ratios)}
            return diffusers.MagCacheConfig(threshold=threshold, num_inference_steps=steps, **given)
        case "pab":
            return diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                current_timestep_callback=lambda: pipeline.current_timestep,
            )
    raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {kind!r}")


def read_ratios(text: str | None) -> list[float]:
    """Returns positive numbers, separated by commas; ValueError for anything else."""
    try:
        ratios = [float(number) for number in (text or "").split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio < float("inf") for ratio in ratios):
        raise ValueError(f"ratios must be positive numbers separated by commas, got {text!r}")
    return ratios
