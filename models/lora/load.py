"""Loads LoRA files into diffusers' transformers, every key of them, and removes or fuses them.

diffusers' own loading drops keys without a message: changes of norms, keys without the prefix that it
expects, keys of layers that it does not find. Here each key is used, or an error names it. Low-rank pairs
become peft layers; changes without a rank (norms, biases, modulation) are added to the parameters.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .files import Header, read_header, read_weights
from .keys import Match, Shape, listed, match_keys

MODES = ("separate", "fused")
UNMATCHED = ("error", "warn")
EXPERTS = ("both", "1", "2")


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
        ValueError: no key fits, most layers have other shapes (the file is for another model), or with
            `unmatched="error"` any key has another shape.
    """
    match, name = match_keys(header.shapes, parameters), Path(file).name
    fitting, strict = len(match.pairs) + len(match.deltas), unmatched == "error"
    if len(match.misfits) > (0 if strict else fitting):
        raise ValueError(
            f"LoRA {name} is for a model of other sizes: {len(match.misfits)} layers do not fit: "
            f"{listed(match.misfits, 2)}; use a LoRA for this model"
        )
    if not fitting:
        raise ValueError(
            f"LoRA {name} holds nothing for this model, its keys are {listed(header.shapes.keys())}; "
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
    before and after `apply_radial_attention`.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file does not match (see `match_lora`), an option is unknown, values are not finite, the
            model lacks a second transformer, or it has adapters already.
    """
    _check_option("mode", mode, MODES)
    _check_option("unmatched", unmatched, UNMATCHED)
    names = ("transformer", "transformer_2")
    parts = [model] if isinstance(model, torch.nn.Module) else [getattr(model, name, None) for name in names]
    targets = [Target(getattr(part, "_orig_mod", part)) for part in parts if part is not None]
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
        if present := getattr(transformer, "peft_config", None):
            raise ValueError(
                f"this {type(transformer).__name__} has adapters ({', '.join(present)}); remove them first"
            )
        self.transformer = transformer
        self.parameters = dict(transformer.named_parameters())
        self.shapes = {name: tuple(value.shape) for name, value in self.parameters.items()}
        self.report: list[dict[str, Any]] = []
        self._scales: dict[str, float] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._trained = [name for name, value in self.parameters.items() if value.requires_grad]

    def add(self, lora: Lora, header: Header, match: Match) -> None:
        """Adds one file: its pairs as an adapter, its other changes to the sums of `activate`."""
        state, deltas = read_weights(lora.file, header, match, self.parameters)
        if state:
            name = f"lora_{len(self.report)}"
            self._scales[name] = lora.scale
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a second adapter is intended
                self.transformer.load_lora_adapter(
                    state, prefix=None, adapter_name=name, low_cpu_mem_usage=True
                )
            self._verify(lora.file, name, state)
        for parameter, delta in deltas.items():
            self._sums[parameter] = self._sums.get(parameter, 0) + lora.scale * delta
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
        if self._scales:
            self.transformer.set_adapters(list(self._scales), list(self._scales.values()))
        for name, delta in self._sums.items():
            value = self.parameters[name].data
            self._before[name] = value.clone()
            value.copy_(value.float() + delta.to(value.device))
        if fuse and self._scales:
            self.transformer.fuse_lora(adapter_names=list(self._scales))
            self._unload()

    def remove(self) -> None:
        """Restores the modules, and the values that `activate` changed."""
        self._unload()
        for name, value in self._before.items():
            self.parameters[name].data.copy_(value)
        self._before = {}

    def _unload(self) -> None:
        if self._scales:
            self.transformer.unload_lora()
            for name in self._trained:
                self.parameters[name].requires_grad_(True)
        self._scales = {}


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
