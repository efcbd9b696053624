"""Tests models of real size on fake CUDA tensors: no copies, waits or large tensors in the layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from radial_attn.kernels import flex
from radial_attn.kernels.flash4 import op as flash4
from radial_attn.models import apply_radial_attention
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.real_sizes import REAL, TEXT

WAITS = {"mochi": {"nonzero"}}  # in dense layers: upstream removes padded text by value
KERNELS = ("triton", "flex", "flash4")


@contextmanager
def sixteen_bits() -> Iterator[None]:
    """Makes bfloat16 the default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    lists = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [block for name in lists for block in getattr(model, name, ())]


def watch(model: torch.nn.Module, mode: FakeCuda) -> None:
    """Notes what happens in the layers."""
    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(lambda *_, name=f"layer {number}": setattr(mode, "watching", name))
        layer.register_forward_hook(lambda *_: setattr(mode, "watching", ""))


def check(name: str, texts: tuple[int, ...], *, few: bool = False) -> None:
    """Runs dense and sparse steps of a model in turn, with each backend and length of the text."""
    real = REAL[name]
    grid, mask, ffn = real.plan()
    with sixteen_bits(), fake_cuda() as mode, torch.no_grad():
        with torch.device("cuda"):
            model = real.make(few=few).eval()
        watch(model, mode)
        for backend in KERNELS:
            options = {"config": mask, "dense_steps": [0, 2], "dense_backend": "native"}
            for valid in texts:
                with apply_radial_attention(model, backend=backend, num_steps=4, **options) as handle:
                    for step in range(4):
                        time = torch.tensor([250 * step if real.rises else 1000 - 250 * step])
                        given = real.call(grid, time.to("cuda"), valid)
                        out = model(**given).sample
                        if step == 1:  # the first step of each kind prepares the mask
                            mode.copies.clear()
                            mode.syncs.clear()
                    report = handle.report()
                    assert report["calls"][backend] == 2 * report["layers"]
                assert len(out) == 1 and out.device.type == "cuda"
                waits = {operator for _, operator in mode.syncs}
                assert not mode.copies and waits <= WAITS.get(name, set()), (backend, valid)
        (size, where), limit = mode.largest, 2 * 2 * grid.tokens * ffn
        if size > limit:  # is it upstream's?
            mode.largest = 0, ""
            model(**given)
            limit = mode.largest[0]
        assert size <= limit, where


@pytest.fixture(autouse=True)
def without_libraries(monkeypatch):
    """Replaces the kernel that torch.compile would make by an empty tensor; flash4 needs no library."""
    monkeypatch.setattr(flex, "_check_compiler", lambda device: None)
    monkeypatch.setattr(flex, "_compiled", lambda mask: lambda query, *_, **__: query.new_empty(query.shape))
    monkeypatch.setattr(flash4, "NEEDS", replace(flash4.NEEDS, modules=(), also=None))


QUICK = {"wan-14b", "hunyuan", "mochi"}
WHOLE = "wan-1.3b", "wan-14b", "wan2.2-a14b", "hunyuan", "mochi"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in REAL]
)
def test_two_layers_of_real_size(name):
    check(name, texts=(100,), few=True)


@pytest.mark.long
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_of_real_size(name):
    check(name, texts=(TEXT,))


def test_what_waits_or_copies_is_noted():
    with fake_cuda() as mode:
        mode.watching = "here"
        lengths = torch.tensor([3, 5]).to("cuda")
        numbers = torch.arange(8).to("cuda")
        assert lengths[0].item() == 3 and lengths.cpu().tolist() == [3, 5]
        numbers[torch.tensor([True] * 8).to("cuda")]
        assert numbers.device.type == "cuda"
    assert mode.copies == {("here", "_to_copy"): 4}
    assert mode.syncs == {("here", "_local_scalar_dense"): 1, ("here", "index"): 1}
