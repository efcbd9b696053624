"""Times a call of a denoiser with random weights of the real shape, dense and radial, block by block.

Runs in the child process of the GPU benchmark. Dense self-attention goes to the fastest dense kernel of this
machine in both runs, without upstream's mask, which is true everywhere here: no baseline is faster.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import radial_attn
from scripts.benchmarks.attention import dense_attention
from scripts.benchmarks.cases import SPARSE, STEPS, Case, StepModel, Task
from scripts.benchmarks.timing import Stopwatch

WAN = "WanTransformer3DModel"
CHANNELS, WARM_FRAMES = 16, 2
TINY = {
    WAN: {"ffn_dim": 64, "text_dim": 32},
    "HunyuanVideoTransformer3DModel": {
        "num_refiner_layers": 1,
        "rope_axes_dim": (16, 24, 24),
        "text_embed_dim": 32,
        "pooled_projection_dim": 16,
    },
}


class StepBench:
    """Runs "step" tasks; keeps the model of the latest one."""

    def __init__(self, device: str, dtype: torch.dtype, tiny: bool) -> None:
        self.device, self.dtype, self.tiny = device, dtype, tiny
        self.forget()

    def forget(self) -> None:
        """Frees the model."""
        self._built = ""
        self._model: torch.nn.Module | None = None

    def run(self, task: Task) -> dict[str, Any]:
        """Returns milliseconds of the whole call, of each block and of self-attention.

        Raises ImportError without diffusers, and ValueError without a fork of the model.
        """
        if find_spec("diffusers") is None:
            raise ImportError("needs diffusers: pip install diffusers")
        spec, frames = STEPS[task.case.name], task.case.grid.frames
        apply = nullcontext if task.variant == "dense" else self._radial(spec, task)
        model = self._take(spec, task.case)
        inputs = self._inputs(task.case, model)
        short = inputs | {"hidden_states": inputs["hidden_states"][:, :, :WARM_FRAMES].contiguous()}
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad(), apply(model):
            # kernels are loaded and compiled on a short video, which costs next to nothing
            self._call(spec, model, short, task, WARM_FRAMES)
            if task.variant != "dense" or not task.case.long:
                # the blocks stand for many, so they must not contain what a new mask costs once
                self._call(spec, model, inputs, task, frames)
            watch = self._call(spec, model, inputs, task, frames)
        attention = watch.read("attention")
        result = {
            "ms": watch.read("step")[0],
            "blocks_ms": {where: watch.read(where) for _, where, _ in spec.blocks},
            "attention_ms": sum(attention),
            "attention_calls": len(attention),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        if self.device == "cuda":
            result["peak_bytes"] = torch.cuda.max_memory_allocated()
        return result | {"using": task.using or task.dense}

    def _radial(self, spec: StepModel, task: Task) -> Callable[[torch.nn.Module], Any]:
        """Returns what applies radial attention to the model; none of its layers is dense."""
        from radial_attn.models.apply import TRANSFORMERS, apply_radial_attention

        if spec.name not in TRANSFORMERS:
            raise ValueError(f"radial_attn.models has no fork of {spec.name}")
        options = {**SPARSE[task.using], "dense_backend": "native"}
        return partial(apply_radial_attention, config=task.case.config, **options)

    def _take(self, spec: StepModel, case: Case) -> torch.nn.Module:
        """Returns the model with a few blocks."""
        if self._built != spec.case:
            self.forget()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            counts = dict.fromkeys(spec.counts, spec.built)
            self._model, self._built = self._build(spec, case, counts), spec.case
        return self._model

    def _build(self, spec: StepModel, case: Case, counts: dict[str, int]) -> torch.nn.Module:
        """Builds the model on its device and in its dtype, so nothing is moved."""
        import diffusers

        options = {option: counts[where] for option, where, _ in spec.blocks}
        if self.tiny:
            heads = {"num_attention_heads": case.heads, "attention_head_dim": case.width}
            options |= TINY[spec.name] | heads
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return getattr(diffusers, spec.name)(**options).eval()
        finally:
            torch.set_default_dtype(before)

    def _inputs(self, case: Case, model: torch.nn.Module) -> dict[str, Tensor]:
        """Returns random latents and text of the real sizes; all text tokens are valid."""
        make = partial(torch.randn, device=self.device, dtype=self.dtype)
        full = partial(torch.full, device=self.device)
        grid, config = case.grid, model.config
        latents = make(1, CHANNELS, grid.frames, 2 * grid.height, 2 * grid.width)
        inputs = {"hidden_states": latents, "timestep": full((1,), 500)}
        if type(model).__name__ == WAN:
            return inputs | {"encoder_hidden_states": make(1, 512, config.text_dim)}
        return inputs | {
            "encoder_hidden_states": make(1, grid.text, config.text_embed_dim),
            "encoder_attention_mask": full((1, grid.text), 1.0, dtype=self.dtype),
            "pooled_projections": make(1, config.pooled_projection_dim),
            "guidance": full((1,), 6000.0, dtype=self.dtype),
        }

    def _call(
        self, spec: StepModel, model: torch.nn.Module, inputs: dict[str, Tensor], task: Task, frames: int
    ) -> Stopwatch:
        """Times one call; ValueError if a radial output is not finite."""
        watch = Stopwatch(self.device)
        tokens = min(frames, task.case.grid.frames) * task.case.grid.tokens_per_frame
        with watched_blocks(spec, model, watch), watched_attention(watch, tokens, task.dense):
            if self.device == "cuda":
                torch.cuda.synchronize()
            watch.start("step")
            (out,) = model(**inputs, return_dict=False)
            watch.stop("step")
        if task.variant != "dense" and not bool(torch.isfinite(out).all()):
            raise ValueError("the output of the model is not finite")
        return watch


@contextmanager
def watched_blocks(spec: StepModel, model: torch.nn.Module, watch: Stopwatch) -> Iterator[None]:
    """Times each transformer block under the name of its list."""

    def noting(note: Callable[[str], None], name: str) -> Callable[..., None]:
        return lambda *_: note(name)

    with ExitStack() as hooks:
        for _, where, _ in spec.blocks:
            for block in getattr(model, where):
                hooks.enter_context(block.register_forward_pre_hook(noting(watch.start, where)))
                hooks.enter_context(block.register_forward_hook(noting(watch.stop, where)))
        yield


@contextmanager
def watched_attention(watch: Stopwatch, tokens: int, dense: str) -> Iterator[None]:
    """Times self-attention of at least `tokens` tokens as "attention"; dense calls go to kernel `dense`.

    Timed functions replace the two functions in every loaded module of diffusers and radial_attn.models.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    run_dense = dense_attention(dense)

    def timed(function: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> Tensor:
        watch.start("attention")
        out = function(*tensors, **options)
        watch.stop("attention")
        return out

    def dispatch(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        if query.shape[1] != key.shape[1] or query.shape[1] < tokens:  # video to text, or text to text
            return dispatch_attention_fn(query, key, value, *rest, **options)
        return timed(run_dense, query, key, value)

    radial = radial_attn.radial_attention
    replaced = {
        "dispatch_attention_fn": (dispatch_attention_fn, dispatch),
        "radial_attention": (radial, partial(timed, radial)),
    }
    with ExitStack() as stack:
        for path, module in list(sys.modules.items()):
            if path.startswith(("diffusers.", "radial_attn.models.")):
                for name, (original, other) in replaced.items():
                    if getattr(module, "__dict__", {}).get(name) is original:
                        stack.enter_context(patch.object(module, name, other))
        yield
