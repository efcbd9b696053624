"""What a Triton call does on the host after the first of its shape: allocations and launches, nothing else.

The kernels themselves are left out (a launch is only counted), so that this runs without a GPU.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from radial_attn.far_field import Far
from tests.support.attention_cases import GRIDS, make_inputs, make_mask
from tests.support.far_cases import some_mask

pytest.importorskip("triton")


class Operators(TorchDispatchMode):
    """Counts the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


class Launches:
    """Stands for a kernel."""

    def __init__(self, counter: Counter, name: str) -> None:
        self.counter, self.name = counter, name

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        self.counter[self.name] += 1


@pytest.fixture
def launches(monkeypatch) -> Counter:
    from radial_attn.kernels.triton import backward as triton_backward
    from radial_attn.kernels.triton import forward as triton_forward
    from radial_attn.kernels.triton import quantize as triton_quantize
    from radial_attn.kernels.triton import quantized_forward as triton_quantized_forward

    counter: Counter = Counter()
    for module in (triton_backward, triton_forward, triton_quantize, triton_quantized_forward):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launches(counter, name))
    return counter


@pytest.fixture
def opened(monkeypatch):
    """The operators as the functions behind them, so that what they run is seen."""
    from radial_attn.kernels.triton import op as triton
    from radial_attn.kernels.triton import quantized as triton_quantized

    for module, name in (
        (triton, "triton_attention"),
        (triton, "triton_attention_backward"),
        (triton_quantized, "quantized_attention"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name)._init_fn)
    return triton


def second_call(run, launches) -> tuple[Counter, Counter]:
    with torch.no_grad():
        run()
        launches.clear()
        with Operators() as operators:
            run()
    return operators.seen, Counter(launches)


@pytest.mark.parametrize("lengths", [None, [4, 7]], ids=["whole", "padded"])
def test_forward(opened, launches, lengths):
    grid = GRIDS[111]
    tensors, mask = [x.half() for x in make_inputs(grid, 2, 2, 64)[:3]], make_mask(grid)
    counts = None if lengths is None else torch.tensor(lengths)
    operators, kernels = second_call(
        lambda: opened.attention(*tensors, mask, text_lengths=counts, scale=0.125), launches
    )
    assert kernels == {"forward_kernel": 1}
    assert operators.pop("new_empty") == 2
    # the list of text lengths, on the CPU, is compared with the one whose copy is on the device
    assert not lengths or operators.pop("add") == 1
    assert not set(operators) - {"_local_scalar_dense", "unbind", "select"} and (lengths or not operators)


@pytest.mark.parametrize("far_field", ["mean", "linear"])
def test_far_field(opened, launches, far_field):
    """One launch; beside the outputs a call makes 16-bit copies of the means, and no scores."""
    grid = GRIDS[111]
    tensors, mask = [x.half() for x in make_inputs(grid, 2, 2, 64)[:3]], some_mask(grid, 16)
    far = Far.of(*tensors[1:], mask, far_field)
    operators, kernels = second_call(
        lambda: opened.with_far_field(*tensors, mask, far, text_lengths=None, scale=0.125), launches
    )
    assert kernels == {"forward_kernel": 1}
    slope = {"mul": 1} if far_field == "linear" else {}
    assert operators == {"new_empty": 2, "_to_copy": 2 + len(slope), "expand": 1, "transpose": 1} | slope


def test_backward(opened, launches):
    grid = GRIDS[111]
    query, key, value, grad = (x.half() for x in make_inputs(grid, 2, 2, 64))
    mask = make_mask(grid)
    out, lse = query.clone(), torch.zeros(2, 2, grid.tokens)
    operators, kernels = second_call(
        lambda: opened.triton_attention_backward(
            grad, None, query, key, value, out, lse, mask.blocks, 16, grid.video_tokens, None, 0.125
        ),
        launches,
    )
    assert kernels == {"row_products_kernel": 1, "query_gradient_kernel": 1, "key_gradients_kernel": 1}
    assert operators == {"new_empty": 3, "empty_like": 1}


@pytest.mark.parametrize(("bits", "extra"), [("int8", {}), ("fp8", {"quantize_values_kernel": 1})])
def test_quantized(opened, launches, bits, extra):
    """Beside the outputs: the 8-bit copies, their scales, the mean key and the largest values."""
    grid = GRIDS[111]
    tensors, mask = [x.half() for x in make_inputs(grid, 2, 2, 64)[:3]], make_mask(grid)
    operators, kernels = second_call(
        lambda: opened.attention(*tensors, mask, text_lengths=None, scale=0.125, quantize=bits), launches
    )
    assert kernels == {
        "quantized_forward_kernel": 1,
        "quantize_queries_kernel": 1,
        "quantize_keys_kernel": 1,
        **extra,
    }
    assert operators == {"new_empty": 7, "mean": 1} | (
        {"new_empty": 8, "linalg_vector_norm": 1} if extra else {}
    )
