"""Computes attention in the layers that upstream does not serve."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from radial_attn import BlockMask, TokenGrid, radial_attention
from radial_attn.chooser import Choice, Chooser
from radial_attn.trial import DENSE

from .choices import Choices

SLICED_DEVICES = ("cuda",)  # elsewhere dense attention masks padded text, bit for bit as upstream


class AttentionCall(NamedTuple):
    """Tells the layers of a call how to attend, unless upstream serves them.

    Attributes:
        mask: blocks that are computed.
        backend: a backend of `radial_attention`, or "dense": upstream's dispatch, which runs here for several
            processes or an observer, or the dense attention of a ring.
        quantize: as in `radial_attention`.
        compare: also compare with the definition.
        text_lengths: valid text tokens of each sample, int64 `[B]` on the CPU, None for all.
        parallel: the processes that share the sequence.
        valid: keys for the dispatch: a mask, bool `[B, 1, 1, S]`, or how many each sample has; None for all.
        observe: gets the inputs of each layer, None without an observer.
        far_field: as in `radial_attention`.
        choices: what the layers chose and kept at the last dense step, None if they choose and keep nothing.
        records: the sparse call that a dense one prepares, None if no sparse step follows.
        choice: replaces the backend as soon as `chooser` has measured it; None if the backend is final.
    """

    mask: BlockMask
    backend: str
    quantize: str | None = None
    compare: bool = False
    text_lengths: Tensor | None = None
    parallel: Any = None
    valid: Tensor | tuple[int, ...] | None = None
    observe: Callable[..., None] | None = None
    far_field: str = "none"
    choices: Choices | None = None
    records: "AttentionCall | None" = None
    choice: Choice | None = None
    chooser: Chooser | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, processor: Any) -> Tensor:
    """Computes attention `[B, S, H, D]` of a layer that upstream does not serve; notes it for its check."""
    if call.observe is not None:
        call.observe(processor, query, key, value)
    of_all = partial(_attend, call=call, processor=processor)
    if call.parallel is None:
        return of_all(query, key, value)
    choices = call.choices if call.records is None else call.records.choices
    heads = None if choices is None else choices.deal(processor)
    return call.parallel.exchange(query, key, value, call.mask.grid, of_all, heads=heads)


def _attend(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, processor: Any) -> Tensor:
    if call.parallel is not None and call.parallel.ring is not None:
        output = call.parallel.ring.attend(
            query, key, value, call.mask, backend=call.backend, text_lengths=call.text_lengths
        )
        if processor.layer_check is not None and call.backend != "dense" and output.numel():
            processor.layer_check.note((query, key, value), output, None, None)
        return output
    if call.backend == "dense":
        output = _dense(query, key, value, call.valid, getattr(processor, "_attention_backend", None))
    elif call.choices is None:
        output = _sparse(query, key, value, call.mask, call.text_lengths, call=call, processor=processor)
    else:
        sparse = partial(_sparse, call=call, processor=processor)
        options = {"text_lengths": call.text_lengths, "sparse": sparse}
        return call.choices.attend(processor, (query, key, value), call.mask, **options)
    if call.records is not None and not processor.dense:
        record((query, key, value), output, call.records, processor)
    return output


def record(tensors: Sequence[Tensor], dense: Tensor, call: AttentionCall, processor: Any) -> None:
    """Keeps what a layer needs for the sparse steps to come.

    Args:
        tensors: query, key and value, `[B, S, H, D]`.
        dense: the dense output.
        call: a sparse call that follows.
    """
    sparse = partial(_sparse, call=call, processor=processor)
    options = {"text_lengths": call.text_lengths, "sparse": sparse}
    call.choices.record(processor, tensors, dense, call.mask, **options)


def _sparse(  # noqa: PLR0917 (`Choices` passes all but the call)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    text_lengths: Tensor | None,
    bias: Tensor | None = None,
    *,
    call: AttentionCall,
    processor: Any,
) -> Tensor:
    tensors, backend = (query, key, value), call.backend
    if not torch.compiler.is_compiling() and call.choice is not None:
        backend = call.chooser.settle(call.choice, tensors, mask, text_lengths=text_lengths, bias=bias)
    if backend == DENSE:
        output = call.choice.dense(*tensors, text_lengths=text_lengths)
    else:
        options = {"text_lengths": text_lengths, "backend": backend, "quantize": call.quantize}
        options |= {"far_field": call.far_field, "far_bias": bias}
        output = radial_attention(*tensors, mask, **options)
    if processor.layer_check is not None:
        compared = mask if call.compare and backend != DENSE else None
        far = call.far_field, bias
        processor.layer_check.note(tensors, output, compared, text_lengths, far=far)
    return output


def _dense(query: Tensor, key: Tensor, value: Tensor, valid: Any, backend: Any) -> Tensor:
    """Computes dense attention by the dispatch; `valid` is as in `AttentionCall`.

    Keys beyond those of a sample are sliced off, because the fastest kernels take no mask.
    """
    if valid is None or isinstance(valid, Tensor):
        return dispatch_attention_fn(query, key, value, attn_mask=valid, backend=backend)
    if len(set(valid)) == 1:
        key, value = (x[:, : valid[0]] for x in (key, value))
        return dispatch_attention_fn(query, key, value, backend=backend)
    samples = zip(query.split(1), key.split(1), value.split(1), valid, strict=True)
    return torch.cat([_dense(q, k, v, (count,), backend) for q, k, v, count in samples])


def valid_keys(
    grid: TokenGrid, lengths: Tensor | None, device: torch.device
) -> Tensor | tuple[int, ...] | None:
    """Returns `AttentionCall.valid` for text lengths `[B]`."""
    if lengths is None:
        return None
    if device.type in SLICED_DEVICES:
        return tuple((lengths + grid.video_tokens).tolist())
    valid = torch.arange(grid.tokens) < grid.video_tokens + lengths[:, None]
    return valid[:, None, None].to(device)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_lengths: Tensor | None,
    *,
    grid: TokenGrid,
    backend: Any,
) -> Tensor:
    """Computes dense attention `[B, S, H, D]` as the layers do; `backend`: a name of the dispatch or None."""
    return _dense(query, key, value, valid_keys(grid, text_lengths, query.device), backend)
