"""Loads the pipeline of a plan, and samples its videos."""

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from radial_attn.models import RadialAttentionHandle, apply_radial_attention
from radial_attn.models.pipeline.caches import cached
from radial_attn.models.pipeline.efficiency import economize, quantization_config
from radial_attn.models.pipeline.load import is_local, load_pipeline
from radial_attn.models.pipeline.rope_scaling import extend_positions
from radial_attn.models.runtime.observe import Seen
from radial_attn.models.runtime.output_check import CheckError
from scripts.run.attention import attention_arguments
from scripts.run.config import Config
from scripts.run.errors import GenerationError, UsageError, one_line, raised_in
from scripts.run.families import batch, pipeline_arguments, segments
from scripts.run.hub_models import hub_unreachable
from scripts.run.loras import put_in
from scripts.run.machine_checks import is_out_of_memory
from scripts.run.outputs import Sound, resolved, unwritable, write_pair
from scripts.run.plan import RunPlan
from scripts.run.process_groups import Groups, shared_decoding, shared_guidance, whole_tokens
from scripts.run.single_files import file_records
from scripts.run.summary import step_speed
from scripts.run.system import Clock, hardware, peak_memory, room, synchronizer, timed, versions

SHRINK = 0.8  # after a real shortage, a video that fits needs at most this share of the prediction
DISPATCH = "diffusers.models.attention_dispatch"
OP = ("radial_attn.attention", "radial_attn.kernels")


class Observer(Protocol):
    """Observes each call of the attention, and returns the seconds that this took since the last question."""

    def see(self, seen: Seen) -> None: ...

    def take_seconds(self) -> float: ...


@dataclass
class Sampler:
    """Makes the videos of a plan, one by one; `groups`: the processes that share the work.

    `sound`: that of the last video, None if its model makes none.
    """

    plan: RunPlan
    groups: Groups = field(default_factory=Groups)
    seconds: dict[str, float] = field(default_factory=dict)
    loras_in: list[dict[str, Any]] = field(default_factory=list)
    sound: Sound | None = None
    begun: set[str] = field(default_factory=set)  # the patterns of steps that were done, so compiled

    def load(self) -> Any:
        """Loads the pipeline; UsageError if weights are missing, broken, misshapen or out of reach."""
        quiet_libraries()
        model = self.plan.config.model
        dtype = getattr(torch, model.dtype)
        with timed(self.seconds, "load"), self.reporting_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations of one library in another
            try:
                pipeline = load_pipeline(
                    self.plan.path,
                    model.family,
                    dtype,
                    "cpu" if model.offload != "none" or model.quantization == "fp8" else self.plan.device,
                    flow_shift=self.plan.config.generation.flow_shift,
                    quantization_config=quantization_config(model.quantization, dtype),
                    files={name: found.file for name, found in self.plan.files.items()},
                    controlnet=model.controlnet,
                )
            except Exception as error:  # the libraries share no class for a folder that they cannot load
                if is_out_of_memory(error):
                    raise
                got = f"model.path: got {model.path!r}, which cannot be loaded: {one_line(error)}"
                local = is_local(self.plan.path)
                raise UsageError(got if local else hub_unreachable(self.plan.path, error)) from error
            with reported_choices():
                self.loras_in = put_in(pipeline, model, self.plan.loras)
            economize(pipeline, self.plan.device, dtype, **self.plan.efficiency_arguments())
            if model.positions != "plain":
                extend_positions(pipeline, **self.plan.position_arguments())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def make_video(self, pipeline: Any, prompt: str, path: Path) -> dict[str, Any] | None:
        """Generates one video, writes it with its JSON and returns the JSON's content.

        If several processes share the video, only the one that leads joins the tiles and writes; the others
        return None.

        Raises:
            GenerationError: non-finite or wrong values, out of memory, or any failure of the pipeline.
            UsageError: a backend is missing or refuses these shapes, or a file cannot be written.
        """
        seconds = dict(self.seconds)
        if self.plan.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the host's peak cannot be reset
        with self.reporting_memory():
            frames, run = self.sample_video(pipeline, prompt, seconds)
        if not self.groups.leads:
            return None
        record = self.record(prompt, run, seconds)
        try:
            write_pair(path, frames, self.plan.config.output.fps, record, self.sound)
        except OSError as error:
            raise unwritable(path, error) from error
        return record

    def sample_video(
        self,
        pipeline: Any,
        prompt: str,
        seconds: dict[str, float],
        *,
        bar: tqdm | None = None,
        observer: Observer | None = None,
        look: Callable[[RadialAttentionHandle], object] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns frames uint8 `[T, H, W, 3]`, and the reports of attention, cache and clock.

        Adds its stages to `seconds`, without the time of the attention's observer. `bar` counts the steps of
        several videos. `look` gets the handle of the attention once the video is made. Raises the errors of
        `make_video`, but leaves a shortage of memory as it is.
        """
        groups, config = self.groups, self.plan.config
        whole = whole_tokens(config.model.family, groups)
        options = attention_arguments(config.attention, self.plan.model.references)
        options |= {"parallel": groups.sequence, "agree": groups.agree_on_video}
        options["observe"] = observer and observer.see
        with (
            apply_radial_attention(pipeline, **options) as handle,
            shared_guidance(pipeline, config.model.family, groups),
            shared_decoding(pipeline, groups),
            cached(pipeline, **self.plan.cache_arguments(), gather=whole) as cache,
        ):
            clock = Clock(synchronizer(self.plan.device))
            first = getattr(pipeline, "controlnet", None) or pipeline.transformer
            hook = first.register_forward_pre_hook(clock.call, prepend=True)
            try:
                with reported_choices(), shown_steps(config, bar) as shown:
                    self._announce(shown, 0)
                    step_done = self._step_watcher(clock, shown, handle, observer)
                    frames = self._call(pipeline, prompt, step_done)
            finally:
                hook.remove()
            clock.end("decode")
            seconds |= clock.seconds
            run = {"attention": handle.report(), "cache": cache.report(), "step_seconds": clock.steps}
            if look is not None:
                look(handle)
            return to_bytes(frames) if groups.leads else frames, run

    def _call(self, pipeline: Any, prompt: str, step_done: Callable) -> np.ndarray:
        config, inputs = self.plan.config, self.plan.inputs.arguments
        try:
            with each_step(pipeline, step_done) as options:
                video = call(pipeline, config, [prompt], [config.generation.seed], **options | inputs)
                self.sound = sound_of(pipeline, video)
                return video.frames[0]
        except (UsageError, GenerationError):
            raise
        except CheckError as error:
            raise GenerationError(f"{error}; no video written") from error
        except Exception as error:  # of any kind: the other prompts of a file must not be lost
            if is_out_of_memory(error):
                raise
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> Exception:
        """Returns the error to raise; it names a backend only if the backend's op raised."""
        attention, reason = self.plan.config.attention, one_line(error)
        named = attention.dense_backend not in ("auto", "native")
        if named and raised_in(error, DISPATCH):
            got = attention.dense_backend
            return UsageError(f"attention.dense_backend: got {got!r}, which failed: {reason}")
        if raised_in(error, *OP):
            return UsageError(f"attention.backend: got {attention.backend!r}, which failed: {reason}")
        return GenerationError(f"the pipeline failed with {type(error).__name__}: {reason}")

    def _step_watcher(self, clock: Clock, bar: tqdm, handle: Any, observer: Observer | None) -> Callable:
        """Makes the pipeline's callback: clock, progress bar, a stop at the first non-finite latents."""
        config = self.plan.config

        def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
            if observer is not None:
                clock.leave_out(observer.take_seconds())
            clock.step_done(last=step + 1 == config.generation.steps)
            pattern = self.plan.pattern(step)
            if not torch.isfinite(tensors["latents"]).all():
                calls = handle.report()["calls"]
                backends = ", ".join(name for name in calls if name != "dense" and pattern != "dense")
                raise GenerationError(
                    f"non-finite latents after step {step + 1} of {config.generation.steps} (pattern "
                    f"{pattern}, backend {backends or 'dense'}, {config.model.dtype}); no video written"
                )
            self.begun.add(pattern)
            bar.set_postfix_str(pattern, refresh=False)
            bar.update()
            self._announce(bar, step + 1)
            if len(clock.steps) == bar.total:
                bar.close()
            return {}

        return step_done

    def _announce(self, bar: tqdm, step: int) -> None:
        """Shows on the bar that a step compiles the model first, which takes minutes."""
        if self.plan.config.model.compile == "none" or step >= self.plan.config.generation.steps:
            return
        if (pattern := self.plan.pattern(step)) not in self.begun:
            bar.set_postfix_str(f"compiling for {pattern} steps")

    def record(self, prompt: str, run: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        """Returns the content of a video's JSON, from what `sample_video` returned."""
        grid = self.plan.grid
        densities = {tuple(entry["grid"]): entry["density"] for entry in run["attention"]["grids"]}
        return {
            "prompt": prompt,
            "seed": self.plan.config.generation.seed,
            "config": resolved(self.plan.config, prompt),
            "processes": vars(self.groups.degrees),
            "model": {"sha256": self.plan.model_digest, "files": file_records(self.plan.files)},
            "loras": self.loras_in,
            "inputs": self.plan.inputs.files,
            "tokens": grid.tokens,
            "density": densities.get((grid.frames, grid.height, grid.width), run["attention"]["density"]),
            "mask": asdict(self.plan.mask),
            **run,
            "dense_steps": list(self.plan.dense_steps),
            "speed": step_speed(self.plan, run["step_seconds"]),
            "seconds": seconds,
            "peak_memory": peak_memory(self.plan.device),
            "predicted_memory": vars(self.plan.memory),
            "versions": versions(),
            "hardware": hardware(self.plan.device),
        }

    @contextmanager
    def reporting_memory(self) -> Iterator[None]:
        """Turns every kind of memory shortage into one line that names a video that would fit."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            free = room(self.plan.device)
            budget = min(SHRINK * self.plan.memory.total, free)
            raise GenerationError(self.plan.shortage(free, budget)) from error


def sample(pipeline: Any, config: Config, prompts: list[str], seeds: list[int], **options: Any) -> np.ndarray:
    """Samples a batch of videos with the pipeline's own attention: float `[B, T, H, W, 3]` in 0 .. 1.

    `options` are those of `call`; `output_type="latent"` returns latents `[B, C, frames, height, width]`.
    """
    return call(pipeline, config, prompts, seeds, **options).frames


def call(pipeline: Any, config: Config, prompts: list[str], seeds: list[int], **options: Any) -> Any:
    """Calls the pipeline, with its own attention, for a batch of videos; returns its output.

    The noise is drawn on the CPU, one seed a prompt, so it does not depend on device or batch. Only the noise
    on given frames of diffusion forcing is drawn on the device. The options go to the pipeline.
    """
    torch.manual_seed(seeds[0])  # diffusion forcing asks no generator
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    arguments = pipeline_arguments(config.model.family, config.generation, config.output.fps) | options
    if hasattr(pipeline, "guider"):
        pipeline.guider = pipeline.guider.new(guidance_scale=arguments.pop("guidance_scale"))
    return pipeline(**batch(config.model.family, prompts, generators), **arguments)


def sound_of(pipeline: Any, output: Any) -> Sound | None:
    """Returns the sound of the first video, None without one; GenerationError if it is not finite."""
    if getattr(output, "audio", None) is None:
        return None
    samples = output.audio[0].float().cpu().numpy()
    if not np.isfinite(samples).all():
        raise GenerationError("non-finite values in the decoded sound (audio VAE, vocoder); no video written")
    rate = getattr(output, "sampling_rate", None)
    return Sound(samples, pipeline.vocoder.config.output_sampling_rate if rate is None else rate)


@contextmanager
def each_step(pipeline: Any, step_done: Callable) -> Iterator[dict[str, Any]]:
    """Yields the options of a pipeline's call with which it calls `step_done` after each step.

    A pipeline without such an option has its scheduler call it.
    """
    if "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters:
        yield {"callback_on_step_end": step_done}
        return
    scheduler, steps = pipeline.scheduler, count()
    advance = scheduler.step

    def step(output: torch.Tensor, timestep: Any, *args: Any, **options: Any) -> Any:
        result = advance(output, timestep, *args, **options)
        step_done(pipeline, next(steps), timestep, {"latents": result[0]})
        return result

    scheduler.step = step
    try:
        yield {}
    finally:
        del scheduler.step


class LineHandler(logging.Handler):
    """Writes log records as lines to stdout, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(record.getMessage(), file=sys.stdout)


@contextmanager
def reported_choices() -> Iterator[None]:
    """Prints the choices that `auto` makes, and the results of checks."""
    logger, handler = logging.getLogger("radial_attn"), LineHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def shown_steps(config: Config, bar: tqdm | None = None) -> AbstractContextManager[tqdm]:
    """Returns a progress bar of one video, or `bar`, which stays open at the end."""
    if bar is not None:
        return nullcontext(bar)
    steps = config.generation.steps * len(segments(config.model.family, config.generation))
    return tqdm(total=steps, desc="denoising", unit="step", dynamic_ncols=True)


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Converts `[T, H, W, 3]` in 0 .. 1 to uint8; GenerationError if the decoder gave non-finite values."""
    if not np.isfinite(frames).all():
        raise GenerationError("non-finite values in the decoded frames (VAE, float32); no video written")
    return (frames * 255).round().astype(np.uint8)


def quiet_libraries() -> None:
    """Turns off warnings and loading bars of diffusers and transformers, which would mix with our lines."""
    # of Mochi, which asks for float32: a CPU has no such autocast, and computes in float32 without it
    warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
    import diffusers
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
