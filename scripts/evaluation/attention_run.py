"""Runs a model and gathers profiles and tails of the attention of each layer.

The run is dense at every step, so query and key are those of the model and not of a mask. The mask of the
configuration only says what it would keep.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from radial_attn.analysis.bound import Tail, measure_tails
from radial_attn.analysis.decay import Profile, measure
from radial_attn.analysis.recall import sample_rows
from radial_attn.models import apply_radial_attention
from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.profile import Reading
from radial_attn.models.runtime.observe import Seen
from scripts.run.attention import attention_arguments
from scripts.run.config import Config
from scripts.run.digest import digest
from scripts.run.files import replacing
from scripts.run.plan import RunPlan
from scripts.run.results import note_damage, read_tensors
from scripts.run.sampler import Sampler, reported_choices, sample


class Enough(Exception):
    """Ends the pipeline's run: everything that was asked for has been observed."""


@dataclass(frozen=True)
class Looks:
    """Says which calls and rows to observe.

    Attributes:
        steps: denoising steps from 1; empty if `timestep` is given, at which noise is observed.
        timestep: in the model's own units.
        rows: query tokens of each call; tail_rows: how many of them get a bound.
        layers: by order of execution from 0; empty for all.
    """

    steps: tuple[int, ...] = ()
    timestep: float | None = None
    rows: int = 64
    tail_rows: int = 8
    layers: tuple[int, ...] = ()


@dataclass
class Gatherer:
    """Adds up what it sees of each layer, as a callback of `observe`; ends the run after the last step."""

    looks: Looks
    seed: int
    bar: tqdm
    reading: Reading
    profiles: dict[int, Profile] = field(default_factory=dict)
    tails: dict[int, Tail] = field(default_factory=dict)
    _step: int | None = None

    def __call__(self, seen: Seen) -> None:
        steps = [step - 1 for step in self.looks.steps] or [seen.step]
        if seen.step > max(steps):
            raise Enough
        if seen.step not in steps or (self.looks.layers and seen.layer not in self.looks.layers):
            return
        if self._step not in (None, seen.step):
            self.bar.update()
        self._step = seen.step
        self.bar.set_postfix_str(f"step {seen.step + 1}, layer {seen.layer}", refresh=False)
        rows = sample_rows(seen.mask.grid, self.looks.rows, seed=self.seed + seen.step)
        few = rows[:: max(1, -(-len(rows) // self.looks.tail_rows))]
        arguments, options = (seen.query, seen.key, seen.mask), {"text_lengths": seen.text_lengths}
        profile, tail = measure(*arguments, rows, **options), measure_tails(*arguments, few, **options)
        add(self.profiles, self.tails, seen.layer, profile, tail)
        self.reading.add(0, seen.layer, (seen.query, seen.key, seen.value), seen.text_lengths)

    def content(self) -> dict[str, dict[int, list]]:
        """Returns plain tensors, which `torch.load` takes with `weights_only`."""
        return {
            "profiles": {layer: list(vars(x).values()) for layer, x in self.profiles.items()},
            "tails": {layer: list(x) for layer, x in self.tails.items()},
            "sums": self.reading.sums,
            "counts": self.reading.counts,
        }


def add(
    profiles: dict[int, Profile], tails: dict[int, Tail], layer: int, profile: Profile, tail: Tail
) -> None:
    """Adds the readings of a layer to those that are there."""
    if layer in profiles:
        profile = profiles[layer] + profile
        tail = Tail(*map(torch.cat, zip(tails[layer], tail, strict=True)))
    profiles[layer], tails[layer] = profile, tail


def gather(plan: RunPlan, looks: Looks, folder: Path) -> tuple[dict[int, Profile], dict[int, Tail], Reading]:
    """Returns profiles and tails by layer, and maps of blocks, of all prompts together; see `observed`."""
    size = plan.config.attention.block_size
    contents = observed(
        plan,
        folder,
        lambda number, bar: Gatherer(looks, 1000 * number, bar, Reading(plan.grid, size)),
        facts=asdict(looks),
        steps=max(1, len(looks.steps)),
        timestep=looks.timestep,
    )
    profiles: dict[int, Profile] = {}
    tails: dict[int, Tail] = {}
    for content in contents:
        for layer in sorted(content["profiles"]):
            profile, tail = Profile(*content["profiles"][layer]), Tail(*content["tails"][layer])
            add(profiles, tails, layer, profile, tail)
    return profiles, tails, summed(contents, plan)


def summed(contents: list[dict[str, Any]], plan: RunPlan) -> Reading:
    """Adds up the maps of blocks of all prompts."""
    size = plan.config.attention.block_size
    first, *more = [Reading(plan.grid, size, content["sums"], content["counts"]) for content in contents]
    return sum(more, first)


def observed(
    plan: RunPlan,
    folder: Path,
    make: Callable[[int, tqdm], Any],
    *,
    facts: dict[str, Any],
    steps: int,
    timestep: float | None = None,
    own_noise: bool = False,
) -> list[dict[str, Any]]:
    """Observes a dense run of each prompt, and returns what was read, prompt by prompt.

    Prompts whose readings are in `folder` are not observed again.

    Args:
        make: returns the callback of a prompt, from its number and the progress bar. It may raise `Enough`,
            and has `content()`, a dictionary of tensors and numbers, none of its values empty.
        facts: what the readings depend on beside the plan.
        steps: of the progress bar, for each prompt; the callback counts all but the last.
        timestep: of one call on noise, in place of the run.
        own_noise: each prompt begins with noise of its own.
    """
    program, prompts = digest(plan.config, plan.path), plan.prompts
    files = {number: folder / f"{_name(program, plan, number, facts)}.pt" for number in prompts}
    known = {number: _kept(file) for number, file in files.items()}
    missing = [number for number in prompts if known[number] is None]
    pipeline = Sampler(plan).load() if missing else None
    with tqdm(total=steps * len(prompts), initial=steps * (len(prompts) - len(missing)), unit="step") as bar:
        for number in missing:
            callback = make(number, bar)
            seed = plan.config.generation.seed + own_noise * number
            _look(plan, pipeline, prompts[number], callback, seed=seed, timestep=timestep)
            known[number] = callback.content()
            with replacing(files[number]) as part:
                torch.save(known[number], part)
            bar.update()
    return list(known.values())


def _kept(file: Path) -> dict[str, Any] | None:
    """Returns what a file of readings holds, None if it is missing or damaged."""
    if not file.exists():
        return None
    with suppress(ValueError, TypeError):
        content = read_tensors(file)
        if content and all(content.values()):
            return content
    note_damage(file)
    return None


def _look(
    plan: RunPlan,
    pipeline: Any,
    prompt: str,
    callback: Callable[[Seen], None],
    *,
    seed: int,
    timestep: float | None,
) -> None:
    """Runs the pipeline with the configuration's noise, until all is observed."""
    config = _dense(plan.config, timestep)
    options = attention_arguments(config.attention) | {"quantize": None, "observe": callback}

    def end(*_: Any) -> None:
        raise Enough

    with ExitStack() as stack:
        if timestep is not None:
            stack.enter_context(_at_timestep(pipeline.transformer, timestep))
        stack.enter_context(apply_radial_attention(pipeline, **options))
        stack.enter_context(reported_choices())
        stack.enter_context(suppress(Enough))
        if timestep is not None:
            stack.enter_context(pipeline.transformer.register_forward_hook(end))
        arguments = {"output_type": "latent", **plan.inputs.arguments}
        sample(pipeline, config, [prompt], [seed], **arguments)


def _dense(config: Config, timestep: float | None) -> Config:
    """Makes every step dense; at a timestep there is no guidance, whose other half has no prompt."""
    attention = replace(config.attention, dense_steps=config.generation.steps, dense_last_steps=0)
    generation = config.generation
    if timestep is not None and FAMILIES[config.model.family].guidance == "guidance_scale":
        alone = {"guidance_scale_2": None, "stg_scale": None, "modality_scale": 1.0}
        generation = replace(generation, guidance_scale=1.0, **alone)
    return replace(config, attention=attention, generation=generation)


def _at_timestep(transformer: torch.nn.Module, timestep: float) -> RemovableHandle:
    """Makes the transformer's calls use this timestep; given tokens keep theirs, which is lower."""

    def change(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        before = kwargs["timestep"]
        changed = torch.where(before == before.max(), timestep, before).to(before.dtype)
        return args, kwargs | {"timestep": changed}

    return transformer.register_forward_pre_hook(change, prepend=True, with_kwargs=True)


def _name(program: str, plan: RunPlan, number: int, looks: dict[str, Any]) -> str:
    """Digests everything that the readings of a prompt depend on; its number gives the sampled rows.

    `program`: digest of configuration, program, weights and LoRAs.
    """
    prompt = number, plan.prompts[number]
    facts = [program, prompt, looks, plan.path, plan.inputs.files, plan.device]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
