"""Loads LoRA files into diffusers' transformers, every key of them, and removes or fuses them.

diffusers' own loading drops keys without a message: changes of norms, keys without the prefix that it
expects, keys of layers that it does not find. Here each key is used, or an error names it. Low-rank pairs
become peft layers; changes without a rank (norms, biases, modulation) are added to the parameters.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from .files import Header, read_header, read_weights
from .keys import HALF, RANKS, WHOLE, Match, Shape, listed, match_keys
from .kinds import other_kind

MODES = ("separate", "fused")
UNMATCHED = ("error", "warn")
EXPERTS = ("both", "1", "2")
LOADED = "_radial_loras"  # attribute of a transformer with LoRAs of an open handle
FOLLOWED = (  # methods of diffusers that change which adapters count, and how much
    "load_lora_adapter",
    "set_adapters",
    "set_adapter",
    "disable_lora",
    "enable_lora",
    "disable_adapters",
    "enable_adapters",
    "delete_adapters",
    "unload_lora",
    "fuse_lora",
)


class UnmatchedKeysError(ValueError):
    """Reports keys that mean nothing to the model; with `unmatched="warn"` they are left out."""


@dataclass(frozen=True)
class Lora:
    """Names a safetensors file, its strength, and its transformer if there are two (Wan2.2 A14B)."""

    file: str | Path
    scale: float = 1.0
    transformer: str = "both"


def match_lora(
    file: str | Path, header: Header, parameters: Mapping[str, Shape], unmatched: str = "error"
) -> Match:
    """Returns what each key of a file changes among `parameters`, the shapes of a transformer by name.

    Raises:
        UnmatchedKeysError: with `unmatched="error"`, any key means nothing here.
        ValueError: the file is no plain LoRA (DoRA, LoKr, ...), parts of it are missing, no key fits, most
            layers have other shapes (the file is for another model), or with `unmatched="error"` any key has
            another shape.
    """
    name = Path(file).name
    if kind := other_kind(header.shapes, header.settings):
        raise ValueError(
            f"LoRA {name} is a {kind}, which is not supported; use a plain LoRA, or a model into which its "
            "trainer has merged it"
        )
    match = match_keys(header.shapes, parameters)
    bare = [parts["down"].key for parts in match.pairs.values() if "alpha" not in parts]
    faults = {
        "it lacks the other half of": [key for key, reason in match.unmatched.items() if reason == HALF],
        "the halves differ in rank of": [key for key, reason in match.unmatched.items() if reason == RANKS],
        "it lacks the alpha, which other layers have, of": bare if len(bare) < len(match.pairs) else [],
    }
    for fault, broken in faults.items():
        if broken:
            raise ValueError(f"LoRA {name} is not whole: {fault} {listed(broken)}; download or save it again")
    fitting, strict = len(match.pairs) + len(match.deltas), unmatched == "error"
    if len(match.misfits) > (0 if strict else fitting):
        raise ValueError(
            f"LoRA {name} is for a model of other sizes: {len(match.misfits)} layers do not fit: "
            f"{listed(match.misfits, 2)}; use a LoRA for this model"
        )
    if not fitting:
        what = "whole weights, no changes" if WHOLE in match.unmatched.values() else "nothing"
        raise ValueError(
            f"LoRA {name} holds {what} for this model, its keys are {listed(header.shapes.keys())}; "
            "use a LoRA for this model"
        )
    if match.unmatched and strict:
        raise UnmatchedKeysError(_left_out(name, match))
    return match


def _left_out(name: str, match: Match) -> str:
    strange = match.unmatched | match.misfits
    count = f"{len(strange)} of {len(match.shapes)} keys"
    return f"LoRA {name}: {count} match nothing in this model: {listed(strange)}"


def load_loras(
    model: Any, loras: Sequence[Lora], *, mode: str = "separate", unmatched: str = "error"
) -> "LoraHandle":
    """Loads LoRAs into a transformer, or into a pipeline's transformers; several add up.

    All files are checked against the model before it changes. `mode="separate"` keeps the LoRAs in layers of
    peft. "fused" adds them to the weights, which costs nothing later and cannot be undone. Keys that mean
    nothing to the model are an error, or with `unmatched="warn"` a line in the log of "radial_attn". Works
    before and after `apply_radial_attention`, and beside adapters of the user's own, which it leaves alone.
    Separate LoRAs follow diffusers' methods, such as `set_adapters`, `disable_lora` and `unload_lora`, with
    their changes of norms and biases too.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file does not match (see `match_lora`), an option is unknown, values are not finite, the
            model lacks a second transformer, or it has LoRAs of another `load_loras`, or adapters that are
            disabled or fused.
    """
    _check_option("mode", mode, MODES)
    _check_option("unmatched", unmatched, UNMATCHED)
    names = ("transformer", "transformer_2")
    parts = [model] if isinstance(model, torch.nn.Module) else [getattr(model, name, None) for name in names]
    targets = [Target(getattr(part, "_orig_mod", part)) for part in parts if part is not None]
    if mode == "fused" and any(is_packed(x) for target in targets for x in target.parameters.values()):
        raise ValueError("LoRAs cannot be added to weights that GGUF holds quantised; use mode='separate'")
    plans = []
    for lora in loras:
        header = read_header(lora.file)
        for target in _chosen(targets, lora):
            match = match_lora(lora.file, header, target.shapes, unmatched)
            plans.append((lora, target, header, match))
            if match.unmatched or match.misfits:
                logging.getLogger("radial_attn").warning(_left_out(Path(lora.file).name, match))
    handle = LoraHandle(targets, fused=mode == "fused")
    try:
        for lora, target, header, match in plans:
            target.add(lora, header, match)
        for target in targets:
            target.activate(fuse=mode == "fused")
    except BaseException:
        for target in targets:
            target.remove()
        raise
    return handle


class LoraHandle:
    """Holds the LoRAs of one `load_loras`."""

    def __init__(self, targets: "Sequence[Target]", fused: bool) -> None:
        self._targets, self._fused = targets, fused

    def remove(self) -> None:
        """Removes separate LoRAs and restores the modules and values; a second call does nothing.

        Raises:
            ValueError: the LoRAs are fused, so they are part of the weights.
        """
        if self._fused:
            raise ValueError(
                "fused LoRAs are part of the weights; load the model again, or use mode='separate'"
            )
        for target in self._targets:
            target.remove()

    def report(self) -> list[dict[str, Any]]:
        """Returns an entry for each LoRA and transformer: file, scale, rank, and counts of its keys."""
        return [
            {"transformer": number, **entry}
            for number, target in enumerate(self._targets, 1)
            for entry in target.report
        ]


class Target:
    """Holds one transformer that LoRAs are loaded into."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        kind, self.transformer = type(transformer).__name__, transformer
        if names := getattr(transformer, LOADED, None):
            raise ValueError(f"this {kind} has LoRAs ({', '.join(names)}); remove them by their handle first")
        if any(layer.disable_adapters or layer.merged for _, layer in self._layers()):
            raise ValueError(
                f"this {kind} has adapters that are disabled or fused; call enable_lora() or unfuse_lora()"
            )
        self._present = tuple(getattr(transformer, "peft_config", None) or ())
        self._active = transformer.active_adapters() if self._present else []
        self._trained = {value: value.requires_grad for value in transformer.parameters()}
        self.parameters = self._base_parameters()
        self.shapes = {
            name: tuple(value.quant_shape if is_packed(value) else value.shape)
            for name, value in self.parameters.items()
        }
        self.report: list[dict[str, Any]] = []
        self._scales: dict[str, float] = {}
        self._adapters: list[str] = []
        self._deltas: dict[str, dict[str, torch.Tensor]] = {}
        self._before: dict[str, torch.Tensor] = {}

    def _layers(self) -> list[tuple[str, Any]]:
        """Returns name and module of each layer of peft."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        modules = self.transformer.named_modules()
        return [(name, module) for name, module in modules if isinstance(module, BaseTunerLayer)]

    def _base_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns the model's own parameters, by their names without adapters."""
        layers, base = tuple(f"{name}." for name, _ in self._layers()), ".base_layer."
        return {
            name.replace(base, "."): value
            for name, value in self.transformer.named_parameters()
            if base in name or not name.startswith(layers)
        }

    def add(self, lora: Lora, header: Header, match: Match) -> None:
        """Adds one file: its pairs as an adapter, its other changes for `activate`."""
        if packed := [name for name in match.deltas if is_packed(self.parameters[name])]:
            raise ValueError(
                f"LoRA {Path(lora.file).name} changes {listed(packed, 2)}, which GGUF holds quantised; use "
                "weights in fp16, bf16 or fp8"
            )
        state, deltas = read_weights(lora.file, header, match, self.parameters)
        taken = {*self._present, *self._scales}
        name = next(name for number in count() if (name := f"lora_{number}") not in taken)
        self._scales[name], self._deltas[name] = lora.scale, deltas
        if state:
            self._adapters.append(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a second adapter is intended
                self.transformer.load_lora_adapter(
                    state, prefix=None, adapter_name=name, low_cpu_mem_usage=True
                )
            self._verify(lora.file, name, state)
        ranks = (header.shapes[parts["down"].key][0] for parts in match.pairs.values())
        entry = {"file": str(lora.file), "scale": lora.scale, "rank": max(ranks, default=0)}
        entry |= {"pairs": len(match.pairs), "deltas": len(match.deltas)}
        self.report.append(entry | {"left_out": len(match.unmatched) + len(match.misfits)})

    def _verify(self, file: str | Path, adapter: str, state: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError unless the model holds exactly `state`: diffusers only logs omissions."""
        mark = f".{adapter}."
        named = self.transformer.named_parameters()
        there = {name.replace(mark, "."): value for name, value in named if mark in name}
        strange = there.keys() ^ state.keys() or {
            key
            for key, value in state.items()
            if not torch.equal(there[key].cpu(), value.to(there[key].dtype))
        }
        if strange:
            raise ValueError(
                f"LoRA {Path(file).name}: diffusers loaded {len(strange)} keys wrongly: "
                f"{listed(sorted(strange))}; check the installed versions of diffusers and peft"
            )

    def activate(self, fuse: bool) -> None:
        """Sets the scales, and adds changes without a rank in float32; `fuse` adds the adapters as well."""
        for _, layer in self._layers() if self._adapters else ():
            layer.set_adapter([*self._active, *self._adapters])
            for name in self._adapters:
                layer.set_scale(name, self._scales[name])
        changed = dict.fromkeys(name for deltas in self._deltas.values() for name in deltas)
        self._before = {name: self.parameters[name].data.clone() for name in changed}
        self._change(self._scales)
        if fuse:
            if self._adapters:
                self.transformer.fuse_lora(adapter_names=self._adapters)
            self._unload()
            return
        setattr(self.transformer, LOADED, tuple(self._scales))
        for name in FOLLOWED:
            setattr(self.transformer, name, Followed(self, name))

    def _change(self, scales: Mapping[str, float]) -> None:
        """Sets the changed parameters to their own values plus each LoRA's changes times its scale."""
        for name, before in self._before.items():
            changes = [
                scale * self._deltas[lora][name]
                for lora, scale in scales.items()
                if name in self._deltas[lora]
            ]
            value = before.float() + sum(changes).to(before.device) if changes else before
            self.parameters[name].data.copy_(value)

    def follow(self, unloaded: bool) -> None:
        """Scales the changes without a rank as peft now scales the adapters of the same files."""
        layers = [layer for _, layer in self._layers()]
        scales = dict(self._scales)
        for name in self._adapters:
            active = (layer for layer in layers if name in layer.active_adapters and name in layer.r)
            scales[name] = next((layer.scaling[name] for layer in active), 0.0)
        off = unloaded or any(layer.disable_adapters for layer in layers)
        self._change({} if off else {name: scale for name, scale in scales.items() if scale})
        if unloaded:
            self._unload()

    def remove(self) -> None:
        """Restores the modules, and the values that `activate` changed."""
        if self._scales:
            self._unload()
            self._change({})

    def _unload(self) -> None:
        """Takes out the adapters of these LoRAs; those of the user stay as they are."""
        for name in (LOADED, *FOLLOWED):
            vars(self.transformer).pop(name, None)
        present = getattr(self.transformer, "peft_config", {})
        if present.keys() - self._adapters:
            for path, layer in self._layers():
                self._take_out(path, layer)
            for name in self._adapters:
                present.pop(name, None)
        elif self._adapters:
            self.transformer.unload_lora()
        for value, trained in self._trained.items():
            value.requires_grad_(trained)
        self._scales, self._adapters = {}, []

    def _take_out(self, path: str, layer: Any) -> None:
        active = [name for name in layer.active_adapters if name not in self._adapters]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft chooses another active adapter
            for name in self._adapters:
                layer.delete_adapter(name)
        layer.merged_adapters = [name for name in layer.merged_adapters if name not in self._adapters]
        layer.set_adapter(active)
        if not layer.r:
            parent, _, child = path.rpartition(".")
            setattr(self.transformer.get_submodule(parent), child, layer.get_base_layer())


class Followed:
    """Calls a method of diffusers, after which changes without a rank follow the adapters; can be copied."""

    def __init__(self, target: Target, name: str) -> None:
        self._target, self._name = target, name

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._name == "fuse_lora":
            raise ValueError("fuse_lora could not be undone with these LoRAs; use load_loras(mode='fused')")
        transformer = self._target.transformer
        result = getattr(type(transformer), self._name)(transformer, *args, **options)
        self._target.follow(unloaded=self._name == "unload_lora")
        return result


def is_packed(parameter: torch.nn.Parameter) -> bool:
    """Tells whether a parameter is quantised as a GGUF file stores it, in bytes."""
    return hasattr(parameter, "quant_shape")


def _chosen(targets: Sequence[Target], lora: Lora) -> Sequence[Target]:
    _check_option("transformer", lora.transformer, EXPERTS)
    if lora.transformer == "both":
        return targets
    if int(lora.transformer) > len(targets):
        raise ValueError(
            f"LoRA {Path(lora.file).name} is for transformer 2, but the model has only one; "
            "use transformer='1' or 'both'"
        )
    return [targets[int(lora.transformer) - 1]]


def _check_option(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
