"""Plans a run once: `make_plan` is the only function that checks a configuration and derives from it."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask
from radial_attn.models.apply import TRANSFORMERS
from radial_attn.models.parallel.groups import Degrees
from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.pipeline.load import noise_levels
from radial_attn.models.pipeline.single_file import SingleFile
from radial_attn.models.profile import MeasuredModel
from radial_attn.residual import RESIDUALS
from scripts.run.attention import (
    adaptive_of,
    check_profile,
    dense_steps,
    solve_mask,
    sparse_call,
    sparse_name,
    step_densities,
)
from scripts.run.config import Config, VideoSize
from scripts.run.digest import model_digest
from scripts.run.errors import UsageError
from scripts.run.families import calls_per_step, position_arguments, segments, shared_calls, with_conditions
from scripts.run.files import sha256
from scripts.run.flops import Beyond, Flops, beyond_mask, count_flops
from scripts.run.hub_models import SHIFTS, expert_notes, find_model, planned_boundary, read_model_info
from scripts.run.inputs import Inputs, read_inputs, read_prompts
from scripts.run.loras import FoundLora, find_loras, with_loras
from scripts.run.machine_checks import (
    check_mask_memory,
    check_processes,
    find_device,
    missing_kernels,
    missing_libraries,
)
from scripts.run.memory import Kept, Memory, gib, host_bytes, kept_bytes, mask_bytes, nearest_fit, peak_memory
from scripts.run.model_info import ModelInfo
from scripts.run.option_checks import (
    check_frames,
    check_generation,
    check_layers,
    check_options,
    check_ring,
    check_shared,
    refusals,
)
from scripts.run.parallel import RankWork, plan_degrees, rank_work
from scripts.run.processes import local_processes
from scripts.run.prompt_notes import notes_of_run
from scripts.run.single_files import find_single_files, with_files
from scripts.run.system import room, total_memory


@dataclass(frozen=True)
class RunPlan:
    """Holds all that a generation run must know before weights are loaded. Read it, do not re-derive.

    Attributes:
        model: numbers of the model, with its LoRAs; path: its folder, or its hub id.
        device: "cpu" or "cuda".
        prompts: by the line of the prompt file, from 1; by 0 without one.
        files: those that hold the weights of a transformer, by its name.
        mask: the options of the mask, its density solved for this video.
        dense_steps: numbers, from 0, of the steps that are dense in every layer.
        densities: of the other steps, by number.
        sigmas: noise level of each step; None if no scheduler is at hand.
        dense_layers: how many layers, from the first, are dense at every step.
        degrees: how the processes share the run.
        missing: what this machine lacks; empty except in a dry run that may be for another machine.
        warnings: lines for the user before the run; notes: also for a dry run.
    """

    config: Config
    model: ModelInfo
    path: str
    device: str
    prompts: dict[int, str]
    inputs: Inputs
    loras: tuple[FoundLora, ...]
    files: dict[str, SingleFile]
    mask: RadialConfig
    dense_steps: tuple[int, ...]
    densities: dict[int, float]
    sigmas: list[float] | None
    dense_layers: int
    degrees: Degrees
    missing: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> VideoSize:
        return self.config.generation.size

    @property
    def calls(self) -> int:
        """Counts a sample's passes through the transformer in a step."""
        return calls_per_step(self.config.model.family, self.config.generation)

    @cached_property
    def grid(self) -> TokenGrid:
        """Returns the tokens of the transformer."""
        return self.model.grid(self.size)

    @property
    def block_mask(self) -> BlockMask:
        return radial_mask(self.grid, self.mask)

    @cached_property
    def flops(self) -> Flops:
        """Counts the operations of all segments of the run."""
        options = {"steps": self.config.generation.steps, "dense_steps": len(self.dense_steps)}
        options |= {"dense_layers": self.dense_layers, "beyond": self.beyond}
        parts = [
            count_flops(self.model, *self.segment(frames), calls=self.calls * count, **options)
            for frames, count in Counter(segments(self.config.model.family, self.config.generation)).items()
        ]
        return Flops(*map(sum, zip(*parts, strict=True)))

    def segment(self, frames: int) -> tuple[TokenGrid, float]:
        """Returns the tokens of a segment of so many frames, and the mean density of its sparse steps."""
        grid = self.model.grid(self.size._replace(frames=frames))
        same = grid == self.grid or self.config.attention.density is not None
        return grid, self.density if same else radial_mask(grid, self.mask).density

    @property
    def density(self) -> float:
        """Returns the mean density of the sparse steps; of the mask if there are none."""
        values = self.densities.values()
        return sum(values) / len(values) if values else self.block_mask.density

    @property
    def recording_steps(self) -> tuple[int, ...]:
        """Returns the dense steps at which layers choose blocks or keep residuals."""
        attention = self.config.attention
        if attention.pattern == "dense" or not adaptive_of(attention).records:
            return ()
        return tuple(step for step in self.dense_steps if step + 1 in self.densities)

    @cached_property
    def beyond(self) -> Beyond:
        """Counts what adaptive attention adds."""
        attention, steps = self.config.attention, self.recording_steps
        return beyond_mask(
            self.model,
            self.grid,
            attention.block_size,
            density=self.densities[steps[0] + 1] if steps else self.density,
            steps=len(steps),
            far_field="none" if attention.pattern == "dense" else attention.far_field,
            measures=adaptive_of(attention).measures,
            residual=attention.residual not in ("none", "output"),
        )

    def kept(self, size: VideoSize | None = None, device: str | None = None, **options: str) -> Kept:
        """Predicts what a process keeps of a dense step; for another size, device or keys of `attention`."""
        attention = replace(self.config.attention, dense_layers=self.dense_layers, **options)
        numbers = {"calls": self.calls, "density": self.density, "device": device or self.device}
        grid, dtype = self.model.grid(size or self.size), self.config.model.dtype
        return kept_bytes(self.model, grid, attention, dtype=dtype, **numbers)

    @cached_property
    def rank_work(self) -> RankWork:
        """Predicts the work of one process in a step."""
        return rank_work(
            self.model,
            self.grid,
            self.block_mask,
            self.config.model,
            calls=self.calls,
            dense_layers=self.dense_layers,
            degrees=self.degrees,
        )

    @cached_property
    def lora_digests(self) -> list[str]:
        """Returns the SHA-256 of the file of each LoRA."""
        return [sha256(lora.file) for lora in self.loras if lora.file is not None]

    @property
    def measured_model(self) -> MeasuredModel:
        """Returns what a profile of this model says of it."""
        model, kind = self.model, FAMILIES[self.config.model.family]
        shape = model.attention_layers(), model.heads, model.head_dim
        return MeasuredModel(TRANSFORMERS[kind.transformer], *shape, self.model_digest)

    @cached_property
    def model_digest(self) -> str | None:
        """Returns a digest of the model's files; None for a hub id."""
        return model_digest(self.path, {name: found.file for name, found in self.files.items()})

    def efficiency_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `models.pipeline.efficiency.economize`."""
        model, names = self.config.model, ("offload", "quantization", "compile", "vae_tiling")
        return {name: getattr(model, name) for name in names} | {"stream": model.cache == "none"}

    def position_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `models.pipeline.rope_scaling.extend_positions`."""
        return position_arguments(self.config.model, self.size.frames, self.model)

    def cache_arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `models.pipeline.caches.cached`."""
        model, attention, steps = self.config.model, self.config.attention, self.config.generation.steps
        return {
            "kind": model.cache,
            "steps": steps,
            "dense_steps": next((n for n, s in enumerate(self.dense_steps) if n != s), len(self.dense_steps)),
            "dense_last_steps": attention.dense_last_steps,
            "threshold": model.cache_threshold,
            "ratios": model.cache_ratios,
        }

    def pattern(self, step: int) -> str:
        """Returns "dense", or what runs in the layers that are not dense at every step."""
        return "dense" if step in self.dense_steps else sparse_name(vars(self.config.attention))

    @cached_property
    def memory(self) -> Memory:
        """Predicts the peak of one process that has the whole video."""
        return self.memory_of(self.size)

    @property
    def rank_memory(self) -> Memory:
        """Predicts the peak of one process: all weights, and its share of the tokens."""
        return self.memory_of(self.size, tokens=self.rank_work.tokens)

    def memory_of(
        self, size: VideoSize, device: str | None = None, tokens: int | None = None, **options: str
    ) -> Memory:
        """Predicts the peak of one process for another size, device, share or keys of the group `model`."""
        need = peak_memory(
            self.model,
            size,
            replace(self.config.model, **options),
            calls=self.calls,
            block_size=self.config.attention.block_size,
            device=device or self.device,
            tokens=tokens,
        )
        share = 1.0 if tokens is None else tokens / self.grid.video_tokens
        return replace(need, activations=need.activations + share * self.kept(size, device).device)

    def nearest_fit(self, budget: float) -> str:
        """Names the nearest video that would need at most `budget` bytes."""
        fit = nearest_fit(self.model, self.size, lambda size: self.memory_of(size).total <= budget)
        return f"would fit: {fit}" if fit else "no size of this model would fit; try configs/wan_tiny.yaml"

    def shortage(self, free: float, budget: float) -> str:
        """Returns the error message: video, need, and the nearest video that needs at most `budget` bytes."""
        kind, most = self.config.attention.residual, budget - self.memory.total + self.kept().device
        fitting = [x for x in RESIDUALS if x != "output" and self.kept(residual=x).device <= most]
        if kind != "none" and kind not in fitting and fitting:
            host = ", or attention.residual_memory=host" if self.device == "cuda" else ""
            return (
                f"out of memory: attention.residual={kind} takes {gib(self.kept().device)} of about "
                f"{gib(self.memory.total)} on {self.device}, but {gib(free)} are free; would fit: "
                f"{', '.join(fitting)}{host}"
            )
        return (
            f"out of memory: generation.height={self.size.height} generation.width={self.size.width} "
            f"generation.num_frames={self.size.frames} need about {gib(self.memory.total)} on {self.device}, "
            f"but {gib(free)} are free; {self.nearest_fit(budget)}"
        )


def make_plan(config: Config, *, processes: int = 1, dry_run: bool = False) -> RunPlan:
    """Plans a run: checks all that can be checked without weights, and derives all that follows from it.

    Args:
        processes: how many were started.
        dry_run: fetches nothing, plans for the processes that the degrees name, and ignores the memory of
            this machine. Without a GPU, and if none is asked for, problems of this machine go into `missing`
            and are not raised: the run may be for another machine.

    Raises:
        UsageError: something is wrong; one line with key, value and remedy.
    """
    check_options(config)
    family, generation = config.model.family, config.generation
    prompts = read_prompts(generation)
    device, path = find_device(config.model.device), find_model(config.model)
    files = find_single_files(config.model, path)
    model = with_files(read_model_info(path), files)
    check_model_options(config, model)
    inputs = read_inputs(generation, family, dry_run, model)
    _lacking(refusals(config, 1 + ("transformer_2" in model.parameters)))
    elsewhere = dry_run and device == "cpu" and config.model.device == "auto"
    missing = _lacking(missing_libraries(config.model, device), elsewhere)
    loras = find_loras(config.model, path, fetch=not dry_run)
    model = with_conditions(with_loras(model, loras), family, generation)
    attention, grid, steps = config.attention, model.grid(generation.size), generation.steps
    if dry_run:
        processes = max(processes, math.prod(degree or 1 for degree in vars(config.parallel).values()))
    options = {"heads": model.heads, "calls": shared_calls(family, generation)}
    options |= {"processes": processes, "prompts": len(prompts) * len(generation.all_seeds)}
    degrees = plan_degrees(config.parallel, **options)
    if degrees.ring > 1:
        check_ring(attention, config.model)
    if degrees.processes > 1 and not dry_run:
        check_processes(device, degrees)
        check_shared(config, degrees)
    check_mask_memory(mask_bytes(grid, attention.block_size), grid.tokens, attention)
    sigmas = noise_levels(path, family, steps, generation.flow_shift or SHIFTS.get(path), grid.video_tokens)
    boundary = planned_boundary(path) if "transformer_2" in model.parameters else None
    dense = dense_steps(attention, steps, sigmas, boundary)
    sizes = [generation.size._replace(frames=n) for n in dict.fromkeys(segments(family, generation))]
    grids = [model.grid(size) for size in sizes]  # the whole one first; a shorter one needs a mask, too
    masks = [solve_mask(attention, each, model.references) for each in grids]
    densities, *_ = [
        step_densities(attention, dense, each, steps=steps, sigmas=sigmas, mask=mask)
        for each, mask in zip(grids, masks, strict=True)
    ]
    plan = RunPlan(
        config=config,
        model=model,
        path=path,
        device=device,
        prompts=prompts,
        inputs=inputs,
        loras=tuple(loras),
        files=files,
        mask=masks[0],
        dense_steps=dense,
        densities=densities,
        sigmas=sigmas,
        dense_layers=model.layers if attention.pattern == "dense" else attention.dense_layers,
        degrees=degrees,
    )
    check_profile(attention, plan.measured_model)
    warnings = () if dry_run else _memory_warnings(plan)
    radial = len(dense) < steps and plan.dense_layers < model.layers
    call = sparse_call(attention, plan.block_mask, device, config.model.dtype, model.head_dim)
    missing += _lacking(missing_kernels(attention, call, config.model.compile, radial=radial), elsewhere)
    notes = *expert_notes(path, files), *notes_of_run(path, config, prompts, fetch=not dry_run)
    return replace(plan, missing=missing, warnings=warnings, notes=notes)


def _lacking(problems: Iterable[str], elsewhere: bool = False) -> tuple[str, ...]:
    """Returns the problems if the run may be for another machine; else raises UsageError with the first."""
    if not elsewhere:
        for problem in problems:
            raise UsageError(problem)
    return tuple(problems)


def check_model_options(config: Config, model: ModelInfo) -> None:
    """Raises UsageError for a size, length, guidance or number of dense layers that the model refuses."""
    check_generation(config.model.family, config.generation, model)
    if config.model.positions_frames is not None:
        check_frames("model.positions_frames", config.model.positions_frames, model)
    check_layers(config.attention, model)


def _memory_warnings(plan: RunPlan) -> tuple[str, ...]:
    """Compares the predicted peak with the memory of this machine, and returns warnings.

    On the CPU the prediction was measured, and a run that does not fit raises UsageError. On a GPU it only
    warns, unless the weights alone are larger than the card.
    """
    free, need, device = room(plan.device), plan.rank_memory.total, plan.device
    shared = plan.degrees.processes > 1
    if device == "cpu":
        need *= local_processes() if shared else 1
        if need > free and shared:
            raise UsageError(
                f"out of memory: the processes of this machine need about {gib(need)}, but the cpu has "
                f"{gib(free)} free; use more GPUs, or a smaller or shorter video"
            )
        if need > free:
            raise UsageError(plan.shortage(free, free))
        return ()
    weights, card = plan.memory.weights, total_memory("cuda")
    if weights > card:
        raise UsageError(
            f"out of memory: the weights of model.path={plan.config.model.path} take {gib(weights)} on the "
            f"GPU, but it has {gib(card)}; set model.offload=group, or use a smaller model"
        )
    host, host_free = host_bytes(plan.model, plan.config.model, plan.kept()), room("cpu") / local_processes()
    warnings = []
    if need > free:
        warnings.append(
            f"memory may be short: {gib(need)} predicted, {gib(free)} free; {plan.nearest_fit(free)}"
        )
    if host > host_free:
        warnings.append(
            f"host memory may be short: weights and residual take {gib(host)}, but {gib(host_free)} are free"
        )
    return tuple(warnings)
