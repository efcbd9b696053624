"""radial_attention: validation, choice of a backend, and use inside torch.compile."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.attention import choose_backend
from radial_attn.kernels.contract import Call
from tests.support.attention_cases import GRIDS, make_inputs, make_mask
from tests.support.auto_backend import AUTO, AUTO_BFLOAT16

GRID = GRIDS[111]


pytestmark = pytest.mark.usefixtures("one_thread")


def call(change=None, **options) -> torch.Tensor:
    tensors = make_inputs(GRID, 2, 3, 16)[:3]
    mask = options.pop("mask", make_mask(GRID))
    return radial_attention(*(change(tensors) if change else tensors), mask, **options)


BAD = {
    "unknown backend": ({"backend": "block"}, "got 'block'; did you mean 'blocks'"),
    "unknown backend, nothing near": ({"backend": "xyz"}, "got 'xyz'"),
    "quantize": ({"quantize": "int4"}, "quantize .* got 'int4'; did you mean 'int8'"),
    "no mask": ({"mask": torch.ones(7, 7)}, "BlockMask .* got Tensor"),
    "rank": ({"change": lambda t: [x[0] for x in t]}, r"got \[111, 3, 16\]"),
    "empty": ({"change": lambda t: [x[:0] for x in t]}, r"got \[0, 111, 3, 16\]"),
    "grid": ({"change": lambda t: [x[:, :110] for x in t]}, "111 tokens .* got 110"),
    "shapes": ({"change": lambda t: [t[0], t[1][..., :8], t[2]]}, r"key .* got \[2, 111, 3, 8\]"),
    "dtypes": ({"change": lambda t: [t[0], t[1], t[2].half()]}, "value .* got torch.float16"),
    "gradients": (
        {"change": lambda t: [x.requires_grad_() for x in t], "backend": "flex"},
        "backend 'flex' has no gradients on cpu; backend='auto'",
    ),
    "devices": ({"change": lambda t: [t[0], t[1].to("meta"), t[2]]}, "key .* got meta"),
    "dtype": ({"change": lambda t: [x.double() for x in t]}, "got torch.float64"),
    "heads": ({"mask": make_mask(GRID, heads=2)}, "heads must be the 2 .* got 3"),
    "too much text": ({"text_lengths": [3, 12]}, r"text_lengths .*11.* got \[3, 12\]"),
    "negative text": ({"text_lengths": torch.tensor([-1, 2])}, r"got \[-1, 2\]"),
    "count of lengths": ({"text_lengths": [3]}, r"2 samples, got \[1\]"),
    "type of lengths": ({"text_lengths": [0.5, 1.0]}, "integers, got torch.float32"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_auto_reports_each_shape_once(caplog):
    mask = make_mask(GRID, heads=3)
    with caplog.at_level(logging.INFO, logger="radial_attn"):
        torch.manual_seed(1)
        first = call(mask=mask)
        call(mask=mask)
        call(lambda tensors: [x[:1] for x in tensors], mask=mask)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0] == f"backend {AUTO} for [2, 111, 3, 16] torch.float32 on cpu, density {mask.density:.3f}"
    torch.manual_seed(1)
    assert torch.equal(first, call(mask=mask, backend=AUTO))


def chosen(device: str, mask=None, width: int = 64, quantize: str | None = None) -> str:
    mask = make_mask(GRID) if mask is None else mask
    return choose_backend(Call(torch.device(device), torch.bfloat16, width, False, mask, quantize))


def test_choice():
    dense = radial_mask(GRID, RadialConfig(block_size=16, pattern="dense"))
    assert [chosen(device) for device in ("cpu", "cuda", "mps")] == [AUTO_BFLOAT16, "flex", "blocks"]
    assert chosen("cuda", dense) == "blocks"


def test_auto_says_why_no_backend_serves_a_call():
    with pytest.raises(ValueError, match=r"no backend serves this call: .*; blocks has no quantize='int8'"):
        chosen("cpu", quantize="int8")


@pytest.mark.parametrize("backend", ["auto", "reference", "blocks"])
def test_dense_mask_is_sdpa(backend):
    mask = radial_mask(GRID, RadialConfig(block_size=16, pattern="dense"))
    query, key, value, _ = make_inputs(GRID, 2, 3, 16)
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    out = radial_attention(query, key, value, mask, backend=backend)
    if backend == "reference":
        torch.testing.assert_close(out, plain)
    else:
        assert torch.equal(out, plain)


class Layer(torch.nn.Module):
    """Adds attention of 2 heads of 16 under a given mask to its input."""

    def __init__(self, mask, **options):
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)
        self.mask, self.options = mask, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.linear(x).unflatten(2, (2, 16))
        return x + radial_attention(heads, heads, heads, self.mask, **self.options).flatten(2)


@pytest.mark.parametrize("pattern", ["radial", "dense"])
def test_compiles_without_graph_breaks_and_once_for_all_layers(pattern):
    mask = radial_mask(TokenGrid(6, 8, 8), RadialConfig(block_size=16, pattern=pattern))
    layers = torch.nn.ModuleList(Layer(mask, backend="blocks") for _ in range(3))
    x = torch.randn(2, mask.grid.tokens, 32)

    def gradient() -> list[torch.Tensor]:
        out = x
        for layer in layers:
            out = layer(out)
        return [out, *torch.autograd.grad(out.square().mean(), list(layers.parameters()))]

    expected, graphs = gradient(), []
    torch._dynamo.reset()

    def count(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    for layer in layers:
        layer.compile(fullgraph=True, backend=count)
    for actual in (gradient(), gradient()):
        torch.testing.assert_close(actual, expected)
    assert len(graphs) == 2  # the first layer's input needs no gradient


def test_compiles_with_text_lengths():
    mask, lengths = make_mask(GRID), torch.tensor([0, 7])
    query, key, value, _ = make_inputs(GRID, 2, 2, 16)

    def attend(query: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return radial_attention(query, key, value, mask, backend="blocks", text_lengths=lengths)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, lengths), attend(query, lengths))


def test_operator_contract():
    """Checks schema, fake tensors and autograd registration with torch's checker."""
    from radial_attn.kernels.blocks.op import block_attention

    mask = make_mask(GRIDS[63])
    tensors = [torch.randn(2, 63, 2, 16, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(block_attention, (*tensors, mask.blocks, 16, 63, None, 0.25))
