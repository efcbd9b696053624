"""Tests models of real size on fake CUDA tensors: no copies, waits or large tensors in the layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, MochiTransformer3DModel, WanTransformer3DModel

from radial_attn.kernels import flex
from radial_attn.kernels.flash4 import op as flash4
from radial_attn.models import apply_radial_attention
from scripts.run.config import read_config
from scripts.run.hub_models import HUB_MODELS
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.plans import plan_of

WAN = "Wan-AI/Wan2.{}-Diffusers"
MODELS = {  # class, its sizes, model and preset
    "wan-1.3b": (WanTransformer3DModel, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "wan-14b": (WanTransformer3DModel, {}),
    "wan2.2-a14b": (WanTransformer3DModel, {}),
    "hunyuan": (HunyuanVideoTransformer3DModel, {}),
    "mochi": (MochiTransformer3DModel, {}),
}
PRESETS = {
    "wan-1.3b": "wan2.1_t2v_1.3b",
    "wan-14b": "wan2.1_t2v_14b",
    "wan2.2-a14b": "wan2.2_t2v_a14b",
    "hunyuan": "hunyuan_t2v",
    "mochi": "mochi_t2v",
}
WAITS = {"mochi": {"nonzero"}}  # in dense layers: upstream removes padded text by value
TEXT = 256  # tokens of HunyuanVideo and Mochi
KERNELS = ("triton", "flex", "flash4")


def inputs(name: str, plan, valid: int) -> dict:
    """Returns a call's arguments on CUDA for the video of a plan, with `valid` tokens of text."""
    grid, channels = plan.grid, 12 if name == "mochi" else 16
    latents = torch.empty(1, channels, grid.frames, 2 * grid.height, 2 * grid.width, device="cuda")
    if name.startswith("wan"):
        return {"hidden_states": latents, "encoder_hidden_states": torch.empty(1, 512, 4096, device="cuda")}
    mask = (torch.arange(TEXT) < valid)[None]
    given = {"hidden_states": latents, "encoder_hidden_states": torch.empty(1, TEXT, 4096, device="cuda")}
    if name == "mochi":
        return given | {"encoder_attention_mask": mask.to("cuda")}
    pooled, guidance = torch.empty(1, 768, device="cuda"), torch.empty(1, device="cuda")
    mask = mask.to("cuda", torch.bfloat16)
    return given | {"encoder_attention_mask": mask, "pooled_projections": pooled, "guidance": guidance}


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


def check(name: str, sizes: dict, texts: tuple[int, ...]) -> None:
    """Runs dense and sparse steps of a model in turn, with each backend and length of the text."""
    make = MODELS[name][0]
    config = read_config(f"configs/{PRESETS[name]}.yaml", [])
    plan = plan_of(config, HUB_MODELS[config.model.path], "cuda")
    with sixteen_bits(), fake_cuda() as mode, torch.no_grad():
        with torch.device("cuda"):
            model = make(**MODELS[name][1] | sizes).eval()
        watch(model, mode)
        for backend in KERNELS:
            options = {"config": plan.mask, "dense_steps": [0, 2], "dense_backend": "native"}
            for valid in texts if plan.grid.text else (0,):
                given = inputs(name, plan, valid)
                with apply_radial_attention(model, backend=backend, **options) as handle:
                    for step in range(4):
                        times = torch.tensor([250 * step if name == "mochi" else 1000 - 250 * step])
                        (out,) = model(**given, timestep=times.to("cuda"), return_dict=False)
                        if step == 1:  # the first step of each kind prepares the mask
                            mode.copies.clear()
                            mode.syncs.clear()
                    assert handle.report()["calls"][backend] == 2 * len(layers_of(model))
                assert out.shape == given["hidden_states"].shape and out.device.type == "cuda"
                waits = {operator for _, operator in mode.syncs}
                assert not mode.copies and waits <= WAITS.get(name, set()), (backend, valid)
    size, where = mode.largest
    assert size <= 2 * 2 * plan.grid.tokens * plan.model.ffn, where


@pytest.fixture(autouse=True)
def without_libraries(monkeypatch):
    """Replaces the kernel that torch.compile would make by an empty tensor; flash4 needs no library."""
    monkeypatch.setattr(flex, "_check_compiler", lambda device: None)
    monkeypatch.setattr(flex, "_compiled", lambda mask: lambda query, *_, **__: query.new_empty(query.shape))
    monkeypatch.setattr(flash4, "NEEDS", replace(flash4.NEEDS, modules=(), also=None))


@pytest.mark.parametrize("name", ["wan-14b", "hunyuan", "mochi"])
def test_two_layers_of_real_size(name):
    sizes = {"num_layers": 1, "num_single_layers": 1} if name == "hunyuan" else {"num_layers": 2}
    check(name, sizes, texts=(100,))


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_of_real_size(name):
    check(name, {}, texts=(TEXT,))


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
