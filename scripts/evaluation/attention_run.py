"""Looking at the attention of a running model: what is gathered of each layer, and the run itself.

The run is dense at every step, so that its query and key are those of the model and not those of a mask; the
mask of the configuration only says what it would keep.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from radial_attn.analysis.bound import Tail, measure_tails
from radial_attn.analysis.decay import Profile, measure
from radial_attn.analysis.recall import sample_rows
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.observe import Seen
from scripts.run.config import Config
from scripts.run.digest import digest
from scripts.run.families import HUNYUAN
from scripts.run.files import replacing
from scripts.run.plan import RunPlan, attention_arguments
from scripts.run.sampler import Sampler, reported_choices, sample


class Enough(Exception):
    """All that was asked for has been seen: the pipeline need not go on."""


@dataclass(frozen=True)
class Looks:
    """What is looked at.

    Attributes:
        steps: denoising steps from 1; none where `timestep` is given, at which noise is looked at.
        timestep: in the model's own units.
        rows: query tokens of each call; tail_rows: how many of them get a bound.
        layers: by order of execution from 0; none for all.
    """

    steps: tuple[int, ...] = ()
    timestep: float | None = None
    rows: int = 64
    tail_rows: int = 8
    layers: tuple[int, ...] = ()


@dataclass
class Gatherer:
    """A callback of `observe`: adds up what it sees of each layer and ends the run after the last step."""

    looks: Looks
    seed: int
    bar: tqdm
    profiles: dict[int, Profile] = field(default_factory=dict)
    tails: dict[int, Tail] = field(default_factory=dict)
    _step: int | None = None

    def __call__(self, seen: Seen) -> None:
        steps = [step - 1 for step in self.looks.steps] or [seen.step]
        if seen.step > max(steps):
            raise Enough
        if seen.step in steps and (not self.looks.layers or seen.layer in self.looks.layers):
            self._add(seen)

    def _add(self, seen: Seen) -> None:
        if self._step not in (None, seen.step):
            self.bar.update()
        self._step = seen.step
        self.bar.set_postfix_str(f"step {seen.step + 1}, layer {seen.layer}", refresh=False)
        rows = sample_rows(seen.mask.grid, self.looks.rows, seed=self.seed + seen.step)
        few = rows[:: max(1, -(-len(rows) // self.looks.tail_rows))]
        arguments, options = (seen.query, seen.key, seen.mask), {"text_lengths": seen.text_lengths}
        profile, tail = measure(*arguments, rows, **options), measure_tails(*arguments, few, **options)
        add(self.profiles, self.tails, seen.layer, profile, tail)


def add(
    profiles: dict[int, Profile], tails: dict[int, Tail], layer: int, profile: Profile, tail: Tail
) -> None:
    """Adds what was seen of a layer to what is known of it."""
    if layer in profiles:
        profile = profiles[layer] + profile
        tail = Tail(*map(torch.cat, zip(tails[layer], tail, strict=True)))
    profiles[layer], tails[layer] = profile, tail


def gather(plan: RunPlan, looks: Looks, folder: Path) -> tuple[dict[int, Profile], dict[int, Tail]]:
    """Profiles and tails by layer, of all prompts together; prompts whose readings are in `folder` are not
    looked at again.
    """
    program, prompts = digest(plan.config, plan.path), plan.prompts
    files = {
        number: folder / f"{_name(program, plan, (number, prompt), looks)}.pt"
        for number, prompt in prompts.items()
    }
    missing = [number for number in prompts if not files[number].exists()]
    pipeline = Sampler(plan).load() if missing else None
    steps = max(1, len(looks.steps))
    with tqdm(total=steps * len(prompts), initial=steps * (len(prompts) - len(missing)), unit="step") as bar:
        for number in missing:
            gathered = _look(plan, pipeline, prompts[number], Gatherer(looks, 1000 * number, bar))
            _keep(files[number], {"profiles": gathered.profiles, "tails": gathered.tails})
            bar.update()
    contents = [torch.load(file, weights_only=True) for file in files.values()]
    return _added(contents)


def _added(contents: Iterable[dict[str, Any]]) -> tuple[dict[int, Profile], dict[int, Tail]]:
    """The readings of several prompts as one."""
    profiles: dict[int, Profile] = {}
    tails: dict[int, Tail] = {}
    for content in contents:
        for layer in sorted(content["profiles"]):
            profile, tail = Profile(*content["profiles"][layer]), Tail(*content["tails"][layer])
            add(profiles, tails, layer, profile, tail)
    return profiles, tails


def _keep(file: Path, content: dict[str, dict[int, Any]]) -> None:
    """Writes the tensors of each layer, which `torch.load` takes without more, whole or not at all."""
    plain = {
        kind: {layer: list(vars(x).values() if isinstance(x, Profile) else x) for layer, x in layers.items()}
        for kind, layers in content.items()
    }
    with replacing(file) as part:
        torch.save(plain, part)


def _look(plan: RunPlan, pipeline: Any, prompt: str, gatherer: Gatherer) -> Gatherer:
    """One run with the configuration's noise, as far as it is needed."""
    config, looks = _dense(plan.config, gatherer.looks), gatherer.looks
    options = attention_arguments(config.attention) | {"quantize": None, "observe": gatherer}
    hooks = [] if looks.timestep is None else _single_call(pipeline.transformer, looks.timestep)
    with apply_radial_attention(pipeline, **options), reported_choices(), suppress(Enough):
        if looks.timestep is not None:
            hooks.append(pipeline.transformer.register_forward_hook(_end))
        try:
            given = {"output_type": "latent", **plan.inputs.arguments}
            sample(pipeline, config, [prompt], [config.generation.seed], **given)
        finally:
            for hook in hooks:
                hook.remove()
    return gatherer


def _dense(config: Config, looks: Looks) -> Config:
    """Dense at every step; at a timestep without guidance, whose other half has no prompt."""
    attention = replace(config.attention, dense_steps=config.generation.steps, dense_last_steps=0)
    generation = config.generation
    if looks.timestep is not None and config.model.family not in HUNYUAN:
        generation = replace(generation, guidance_scale=1.0, guidance_scale_2=None)
    return replace(config, attention=attention, generation=generation)


def _single_call(transformer: torch.nn.Module, timestep: float) -> list[Any]:
    """Hooks that give the transformer this timestep; tokens that are given keep theirs, which is lower."""

    def change(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        before = kwargs["timestep"]
        changed = torch.where(before == before.max(), timestep, before).to(before.dtype)
        return args, kwargs | {"timestep": changed}

    return [transformer.register_forward_pre_hook(change, prepend=True, with_kwargs=True)]


def _end(*_: Any) -> None:
    raise Enough


def _name(program: str, plan: RunPlan, prompt: tuple[int, str], looks: Looks) -> str:
    """A digest of all that the readings of a prompt, whose number gives the sampled rows, follow from.

    `program` is that of the configuration, the program, the weights and the LoRAs.
    """
    facts = [program, prompt, asdict(looks), plan.path, plan.inputs.files, plan.device]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
