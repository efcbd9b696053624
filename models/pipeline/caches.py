"""The caches of diffusers around the blocks of a transformer: what a step takes over from those before."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .efficiency import blocks_of, transformers_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CACHES = ("none", "first_block", "taylorseer", "mag", "pab")
HOOK_FILES = ("first_block_cache", "taylorseer_cache", "mag_cache", "pyramid_attention_broadcast")
NAMELESS = ("HunyuanVideoImageToVideoPipeline",)  # does not say which call of a step it makes
WARM_UP = 3  # first steps that TaylorSeer computes at least
Gather = Callable[[Tensor], Tensor]  # `[B, N, C]` of all processes from the `[b, n, C]` of this one


class CacheUse:
    """How many attention calls of the video there would have been (`due`), and how many there were.

    Of several processes, those of this one.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.due, self.computed = kind, 0, 0
        self._undo: list[Any] = []

    def report(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {"kind": self.kind, "due": self.due, "computed": self.computed}

    def watch(self, transformer: torch.nn.Module) -> None:
        """Counts calls of the parts that the cache's hooks lie on, blocks or their attention."""
        hooks = _hooks_of_blocks(transformer)
        if not hooks:
            raise ValueError(f"cache {self.kind!r} finds no block of {type(transformer).__name__}")

        def call_begins(*_: Any) -> None:
            self.due += 1

        for part, hook in hooks:
            self._count(hook.fn_ref)
            self._undo.append(part.register_forward_pre_hook(call_begins).remove)

    def name_calls(self, transformer: torch.nn.Module) -> None:
        """Names calls as caches want it, for a pipeline that does not: "cond", then "uncond" if any."""
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
        """Takes the counting back."""
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
    """Has the first block's change judged by the tokens of all processes, so that all skip the same steps."""
    for _, hook in _hooks_of_blocks(transformer):
        if hasattr(hook, "_should_compute_remaining_blocks"):
            hook._should_compute_remaining_blocks = partial(_whole_change, hook, gather)


def _whole_change(hook: Any, gather: Gather, residual: Tensor) -> bool:
    """The hook's own judgement, of both residuals `[B, n, C]` made whole."""
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
    """The caches' hooks with the parts that they lie on."""
    parts = [part for block in blocks_of(transformer) for part in block.modules()]
    return [(part, hook) for part in parts for hook in _cache_hooks(part)]


def _cache_hooks(part: torch.nn.Module) -> list[Any]:
    """The caches among the hooks of diffusers on a module."""
    registry = vars(part).get("_diffusers_hook")
    hooks = [] if registry is None else registry.hooks.values()
    return [hook for hook in hooks if type(hook).__module__.endswith(HOOK_FILES)]


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
    """A cache of one of `CACHES` around the transformers of a pipeline, for one video of `steps` steps.

    Args:
        dense_steps, dense_last_steps: at both ends TaylorSeer computes at least these.
        threshold: change below which first_block and mag skip.
        ratios: of mag, numbers with commas, or "calibrate", which skips nothing and prints them at the end.
        gather: of several processes that share a call, its video tokens from those of each. The other caches
            go by the step alone, and skip the same in every process.

    Raises ValueError for a transformer on which the cache finds nothing to lie on.
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
    """TaylorSeer in its light form: blocks give nothing and the last projection is extrapolated.

    From float32, which is little beside the blocks' tensors: rounded, processes would differ.
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
    """Positive numbers with commas between them; ValueError for anything else."""
    try:
        found = [float(word) for word in (text or "").split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < ratio < float("inf") for ratio in found):
        raise ValueError(f"ratios must be positive numbers with commas between them, got {text!r}")
    return found
