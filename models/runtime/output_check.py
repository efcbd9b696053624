"""Checks a run: it stops at values that are not finite, or at attention far from the definition.

Every layer, dense or not, notes on the device whether hidden states before and after it are finite, without
waiting for the device. After each call of a transformer all notes are read at once, and the first bad place
is named. Notes are tensors that a compiled block writes in place, and the comparison is one operator: neither
adds a graph break.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from radial_attn import BlockMask, TokenGrid
from radial_attn.analysis.sampled_error import (
    SAMPLED_BLOCKS,
    OutputError,
    output_error,
    sample_blocks,
    sampled_reference,
    sampled_rows,
)
from radial_attn.far_field import Far

CHECKS = ("auto", "off", "nan", "reference")
MOST_ERROR = 0.2  # relative L2 norm; 8-bit products stay under half of it


class CheckError(RuntimeError):
    """Names the first place that is not finite, or an attention output far from the definition."""


def resolve_check(check: str, quantize: str | None, *backends: str) -> str:
    """Returns `check` with "auto" resolved: "nan" if products are quantised, else "off".

    Raises ValueError if the name is not in `CHECKS`.
    """
    if check not in CHECKS:
        raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {check!r}")
    if check != "auto":
        return check
    return "nan" if quantize is not None or "sage" in backends else "off"


def not_finite(*tensors: Tensor) -> Tensor:
    """Returns whether any value is NaN or infinite, bool `[]` on the device."""
    extremes = [extreme.float() for x in tensors if x.numel() for extreme in torch.aminmax(x.detach())]
    extremes = extremes or [tensors[0].new_zeros(())]
    return torch.stack(extremes).isfinite().all().logical_not()


def watched(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `__call__` of a processor, so that its layer check notes the hidden states on both sides."""

    @wraps(call)
    def noted(self: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = call(self, attn, hidden_states, *args, **kwargs)
        if self.layer_check is not None:
            text = args[0] if args else kwargs.get("encoder_hidden_states")
            inputs = [hidden_states, text] if isinstance(text, Tensor) else [hidden_states]
            self.layer_check.note_sides(inputs, output if isinstance(output, tuple) else (output,))
        return output

    return noted


class LayerCheck:
    """Holds one layer's notes: `bad`, bool `[3]`, and `error`, float32 `[2]`.

    `bad` says whether hidden states before the layer, attention, and hidden states after the layer were not
    finite. `layer`: its name; `dense`: whether it is dense at every step.
    """

    def __init__(self, layer: str, dense: bool) -> None:
        self.layer, self.dense = layer, dense
        self.move_to(torch.device("cpu"))

    def move_to(self, device: torch.device) -> None:
        """Makes empty notes on another device."""
        with torch.inference_mode(False):
            self.bad = torch.zeros(3, dtype=torch.bool, device=device)
            self.error = torch.zeros(2, device=device)

    def note_sides(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Notes the hidden states `[B, S, C]` before and after a layer."""
        before, after = not_finite(*inputs), not_finite(*outputs)
        self.bad.logical_or_(torch.stack([before, torch.zeros_like(before), after]).to(self.bad.device))

    def note(
        self,
        inputs: Sequence[Tensor],
        output: Tensor,
        mask: BlockMask | None,
        text_lengths: Tensor | None,
        *,
        far: tuple[str, Tensor | None] = ("none", None),
    ) -> None:
        """Notes attention `[B, S, H, D]` of query, key and value; with a mask also its error, sampled.

        Samples of a batch with masks of their own are noted one by one; the largest error stays. `far`: the
        call's `far_field` and `far_bias`.
        """
        output = output.detach()
        bad = not_finite(output)
        self.bad.logical_or_(torch.stack([torch.zeros_like(bad), bad, bad]).to(self.bad.device))
        if mask is None:
            return
        grid = mask.grid
        sizes = [grid.frames, grid.height, grid.width, grid.text]
        tensors = (x.detach() for x in inputs)
        error = sampled_error(
            *tensors,
            output,
            mask.blocks,
            mask.block_size,
            sizes,
            text_lengths=text_lengths,
            far_field=far[0],
            far_bias=far[1],
        )
        self.error.copy_(torch.where(error[0] < self.error[0], self.error, error))


@torch.library.custom_op("radial_models::sampled_error", mutates_args=())
def sampled_error(  # noqa: PLR0917 (an operator's schema is positional)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    blocks: Tensor,
    block_size: int,
    grid: list[int],
    text_lengths: Tensor | None,
    far_field: str,
    far_bias: Tensor | None,
) -> Tensor:
    """Returns relative L2 norm and cosine, float32 `[2]`, of the error of some query blocks.

    Args:
        query, key, value, output: `[B, S, H, D]`.
        blocks, block_size, grid: the mask, with its grid as frames, height, width, text.
        text_lengths: valid text tokens of each sample, int64 `[B]` on the CPU, or None for all.
        far_field, far_bias: as in `radial_attention`.
    """
    mask = BlockMask(TokenGrid(*grid), block_size, blocks)
    sample = sample_blocks(mask, SAMPLED_BLOCKS)
    with torch.autocast(query.device.type, enabled=False):
        far = None if far_field == "none" else Far.of(key, value, mask, far_field, far_bias)
        wanted = sampled_reference(query, key, value, mask, sample, text_lengths=text_lengths, far=far)
        error = output_error(sampled_rows(output, mask, sample), wanted)
    return torch.tensor([error.relative_l2, error.cosine], device=query.device)


@sampled_error.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(2, dtype=torch.float32)


class OutputCheck:
    """Holds the layer checks of all transformers of one application; `check`: "off", "nan" or "reference"."""

    def __init__(self, check: str) -> None:
        self.check = check
        self._layers: dict[torch.nn.Module, list[LayerCheck]] = {}
        self._compared: set[tuple[torch.nn.Module, TokenGrid]] = set()
        self._comparing = False
        self._inputs: dict[str, Tensor] = {}
        self._errors: list[tuple[str, OutputError]] = []

    def add_layer(self, transformer: torch.nn.Module, dense: bool, layer: str) -> LayerCheck | None:
        """Adds the check of the next layer, in the order in which they run; None if nothing is checked."""
        if self.check == "off":
            return None
        layers = self._layers.setdefault(transformer, [])
        layers.append(LayerCheck(layer, dense))
        return layers[-1]

    def begin(
        self, transformer: torch.nn.Module, mask: BlockMask | None, arguments: Mapping[str, Any]
    ) -> bool:
        """Returns whether a call is compared: the first with a mask, by transformer and grid.

        Notes which `arguments` of the call are not finite.
        """
        device = arguments["hidden_states"].device
        for layer_check in self._layers.get(transformer, []):
            if layer_check.bad.device != device:
                layer_check.move_to(device)
        if self.check != "off":
            given = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and "mask" not in name}
            self._inputs = {name: not_finite(x) for name, x in given.items() if x.is_floating_point()}
        self._comparing = self.check == "reference" and mask is not None
        if self._comparing:
            call = transformer, mask.grid
            self._comparing = call not in self._compared
            self._compared.add(call)
            for layer_check in self._layers.get(transformer, []):
                layer_check.error.zero_()
        return self._comparing

    def leave_out(self) -> None:
        """Compares nothing in the call that ends: its layers were dense."""
        self._comparing = False

    def end(
        self, transformer: torch.nn.Module, output: Tensor, backends: tuple[str, str], moment: str
    ) -> None:
        """Reads the notes of the call that ended; names the first place that is not finite.

        Args:
            backends: backend of the layers that are not dense at every step, and backend of the others.
            moment: step and dtype, for the message.

        Raises:
            CheckError: values were not finite, or the error of an output is above `MOST_ERROR`.
        """
        layers = self._layers[transformer]
        inputs, self._inputs = self._inputs, {}
        notes = [*inputs.values(), *(layer_check.bad for layer_check in layers), not_finite(output)]
        # one wait for the device; a caller may keep an input elsewhere, such as the timestep
        flags = torch.cat([x.flatten().to(layers[0].bad.device) for x in notes]).tolist()
        if any(flags):
            for layer_check in layers:
                layer_check.bad.zero_()
            raise CheckError(self._first_place(transformer, list(inputs), flags, backends, moment))
        if self._comparing:
            sparse = [layer_check for layer_check in layers if not layer_check.dense]
            self._compare(transformer, sparse, backends[0], moment)

    def _first_place(
        self,
        transformer: torch.nn.Module,
        inputs: Sequence[str],
        flags: Sequence[bool],
        backends: tuple[str, str],
        moment: str,
    ) -> str:
        """Describes the first bad place: `flags` of the inputs, `LayerCheck.bad` by layer, of the output."""
        for name, bad in zip(inputs, flags, strict=False):
            if bad:
                return (
                    f"non-finite values in {name}, an input of the transformer, at {moment}; "
                    "check what makes it, and its dtype"
                )
        layer, place = divmod(flags[len(inputs) :].index(True), 3)
        if layer == len(self._layers[transformer]):
            return f"non-finite values after the last layer at {moment}; check the weights, and the dtype"
        layer_check = self._layers[transformer][layer]
        name, backend = self._name(transformer, layer_check), backends[layer_check.dense]
        if place == 0:
            return (
                f"non-finite values before the attention of {name} at {moment}; "
                "check the weights before it, and the dtype"
            )
        if place == 2 and backend != "dense":
            return (
                f"non-finite values after the output projection of {name} at {moment}, not in its attention; "
                "check the weights, and the dtype"
            )
        return f"non-finite attention output in {name} at {moment}, backend {backend}; try another backend"

    def report(self) -> dict[str, object]:
        """Returns `mode`, and if outputs were compared, how many (`compared`) and the `worst` of them."""
        if not self._errors:
            return {"mode": self.check}
        name, error = max(self._errors, key=lambda entry: entry[1].relative_l2)
        worst = {"where": name, "relative_l2": error.relative_l2, "cosine": error.cosine}
        return {"mode": self.check, "compared": len(self._errors), "worst": worst}

    def _compare(
        self, transformer: torch.nn.Module, layers: list[LayerCheck], backend: str, moment: str
    ) -> None:
        errors = []
        for layer_check, values in zip(layers, torch.stack([w.error for w in layers]).tolist(), strict=True):
            errors.append((self._name(transformer, layer_check), OutputError(*values)))
            text = "check %s: %s against reference: %s"
            logging.getLogger("radial_attn").info(text, errors[-1][0], backend, errors[-1][1])
        self._errors += errors
        for name, error in errors:
            if not error.relative_l2 <= MOST_ERROR:
                raise CheckError(
                    f"wrong attention output in {name} at {moment}, backend {backend}: {error} against "
                    f"the reference, above the limit of relative L2 {MOST_ERROR}; try another backend"
                )

    def _name(self, transformer: torch.nn.Module, layer_check: LayerCheck) -> str:
        """Returns the layer's name, with its transformer if that is the second."""
        number = list(self._layers).index(transformer)
        return layer_check.layer + (f" of transformer_{number + 1}" if number else "")
