"""Measures how far attention on 8-bit operands is from exact attention, by the definition of its rounding.

`bash scripts/benchmark.sh --quantized`: relative L2 error and cosine on random inputs, with heavy tails, with
outlier channels, and on the activations of the bundled model. Tests compare the kernels with the definition.
"""

import argparse
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.analysis.sampled_error import OutputError, output_error
from radial_attn.kernels.quantized_reference import quantized_attention
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime import layer_attention
from scripts.run.config import read_config
from scripts.run.plan import make_plan
from scripts.run.results import table
from scripts.run.sampler import Sampler, sample

NAME = "quantization_cpu"
GRID = TokenGrid(8, 20, 32)  # 5120 tokens
HEADS, OUTLIERS = 2, 4
MODES = {  # what each quantised kernel rounds
    "int8, values in 16 bits (sm80, sm86, gfx942)": {"bits": "int8", "fp8_values": False},
    "int8, values in fp8 (sm89 and newer)": {"bits": "int8", "fp8_values": True},
    "fp8 (sm89 and newer)": {"bits": "fp8", "fp8_values": True},
}


def normal(shape: tuple[int, ...]) -> list[Tensor]:
    """Draws query, key and value, `[B, S, H, D]`: independent normal numbers."""
    return [torch.randn(shape) for _ in range(3)]


def heavy_tails(shape: tuple[int, ...]) -> list[Tensor]:
    """Draws from Student's t with 3 degrees of freedom."""
    return [torch.distributions.StudentT(3.0).sample(shape) for _ in range(3)]


def outlier_channels(shape: tuple[int, ...]) -> list[Tensor]:
    """Draws heavy tails; four channels of keys are 20 off zero, of queries 5, of values 20 times larger."""
    query, key, value = heavy_tails(shape)
    key[..., :OUTLIERS] += 20
    query[..., OUTLIERS : 2 * OUTLIERS] *= 5
    value[..., :OUTLIERS] *= 20
    return [query, key, value]


INPUTS: dict[str, Callable[[tuple[int, ...]], list[Tensor]]] = {
    "normal": normal,
    "heavy tails": heavy_tails,
    "heavy tails, outlier channels": outlier_channels,
}


def error(tensors: list[Tensor], mask: BlockMask, columns: int, mode: dict) -> OutputError:
    """Compares one mode with exact attention in float32, both over the kept pairs of `mask`."""
    exact = radial_attention(*tensors, mask, backend="reference")
    heads = [x.transpose(1, 2) for x in tensors]
    keep = mask.token_mask().view(1, -1, mask.grid.tokens, mask.grid.tokens)
    out = quantized_attention(*heads, keep, scale=tensors[0].shape[-1] ** -0.5, columns=columns, **mode)
    return output_error(out.transpose(1, 2), exact)


def random_rows() -> Iterator[tuple[str, int, int, str, OutputError]]:
    """Yields inputs, head width, keys that share a scale, mode, error."""
    mask = radial_mask(GRID, RadialConfig())
    for name, make in INPUTS.items():
        for width, columns in ((64, 64), (128, 64), (128, 128)):
            torch.manual_seed(0)
            tensors = make((1, GRID.tokens, HEADS, width))
            for mode, options in MODES.items():
                yield name, width, columns, mode, error(tensors, mask, columns, options)


def model_rows() -> Iterator[tuple[str, int, int, str, OutputError]]:
    """Yields the same for the bundled model in the middle of denoising, of its worst layer."""
    calls = activations()
    for mode, options in MODES.items():
        errors = [error(tensors, mask, 64, options) for tensors, mask in calls]
        worst = max(errors, key=lambda one: one.relative_l2)
        yield "bundled model, step 10, worst layer", calls[0][0][0].shape[-1], 64, mode, worst


def activations() -> list[tuple[list[Tensor], BlockMask]]:
    """Returns query, key, value and mask of every layer at step 10 of the bundled model's preset."""
    plan = make_plan(read_config("configs/wan_tiny.yaml", []))
    kept: list[tuple[list[Tensor], BlockMask]] = []
    attend = radial_attention

    def keep(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **options: object) -> Tensor:
        kept.append(([x.detach().float() for x in (query, key, value)], mask))
        return attend(query, key, value, mask, **options)

    pipeline, mask = Sampler(plan).load(), RadialConfig(block_size=16, decimation_width="block")
    with patch.object(layer_attention, "radial_attention", keep), apply_radial_attention(pipeline, mask):
        sample(pipeline, plan.config, [plan.config.generation.prompt], [1])
    first = 10 * len(kept) // plan.config.generation.steps
    return kept[first : first + plan.model.layers]


def measured(options: argparse.Namespace, command: str, picture: str) -> tuple[list[str], None]:
    """Measures, and returns the lines of the table."""
    density = radial_mask(GRID, RadialConfig()).density
    rows = (
        (*case, f"{error.relative_l2:.4f}", f"{error.cosine:.5f}")
        for *case, error in [*random_rows(), *model_rows()]
    )
    return [
        "# Error of attention on 8-bit operands",
        "",
        f"`{command}`: the definition of the rounding (radial_attn/kernels/quantized_reference.py) against "
        f"exact attention in float32. Random inputs: {GRID.tokens} tokens, {HEADS} heads, the default radial "
        f"mask (density {density:.3f}). Keys lose their mean first; queries have a scale a token, keys one a "
        "group of tokens, values one a channel. Nothing here ran on a GPU; a test holds the kernels to the "
        "definition.",
        *table("inputs|head width|keys a scale|mode|relative L2|cosine", rows),
    ], None
