"""What backends say of themselves: reasons against a call, and the printed table."""

import pytest
import torch

from radial_attn.__main__ import main
from radial_attn.dispatch import BACKENDS, ORDER, kernel, missing, unsuited
from radial_attn.kernels.contract import Call, Needs

CPU = Call(torch.device("cpu"), torch.float32, 64, gradients=False)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs(), None),
        (Needs(devices=("cuda",)), "runs on cuda, got a tensor on cpu"),
        (Needs(dtypes=(torch.float16, torch.bfloat16)), "takes float16 and bfloat16, got torch.float32"),
        (Needs(widths=(96, 128)), r"takes head widths (96, 128), got 64"),
        (Needs(also=lambda call: f"no {call.width}"), "no 64"),
        (Needs(backward=()), None),
    ],
)
def test_reasons(needs, reason):
    assert unsuited(needs, CPU) == reason


def test_gradients_and_quantised_products():
    training = Call(CPU.device, CPU.dtype, CPU.width, gradients=True, quantize="int8")
    assert unsuited(Needs(backward=("cuda",), quantize=(None, "int8")), training) == "has no gradients on cpu"
    assert unsuited(Needs(quantize=(None, "int8")), training) == "has no gradients with quantize='int8'"
    assert unsuited(Needs(), training) == "has no quantize='int8'"


def test_missing_libraries_are_named_with_their_installation():
    assert missing(Needs(modules=("torch",))) is None
    assert missing(Needs(modules=("nowhere_a|torch",))) is None
    absent = Needs(modules=("nowhere_a|nowhere_b",), install="pip install nowhere")
    assert missing(absent) == "needs nowhere_a or nowhere_b: pip install nowhere"


def test_every_backend_states_its_needs_and_every_order_its_source():
    assert all(isinstance(kernel(name).NEEDS, Needs) for name in BACKENDS[1:])
    assert ORDER.keys() >= {"cpu", "cuda"}
    assert {name for names in ORDER.values() for name in names} <= set(BACKENDS[1:])


def test_the_table(capsys):
    main(["backends", "--device", "cpu", "--width", "64"])
    first, head, *rows, order = capsys.readouterr().out.splitlines()
    assert first == "device cpu, float32, head width 64, no gradients"
    assert head.split() == ["backend", "installed", "usable", "why", "not"]
    assert [row.split()[0] for row in rows] == list(BACKENDS[1:])
    assert "runs on cuda, got a tensor on cpu" in next(row for row in rows if row.startswith("triton"))
    assert order == "auto tries: cpp, blocks"
