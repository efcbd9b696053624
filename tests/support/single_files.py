"""Writes transformers as single files: in the authors' layout, in 8 bits with scales, and as GGUF."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from radial_attn.models.lora.keys import layer_names

EIGHT = torch.float8_e4m3fn
CORE = r"_attn\.|\.norm\.|\.lin$|(in|embedder)\.(in|out)_layer$|(_|\d\.)mlp\.[02]$"  # HunyuanVideo in ComfyUI
Q4_K = gguf.GGMLQuantizationType.Q4_K
State = dict[str, torch.Tensor]


WIDE = {"attention_head_dim": 16, "ffn_dim": 256}  # rows of 32 and of 256: blocks of Q8_0, Q4_0 and Q4_K
NAMES = ("transformer", "transformer_2")


def folder_of(pipeline, path: Path, dtype=torch.float32) -> dict[str, torch.nn.Module]:
    """Saves a pipeline with its transformers in `dtype`, but not their weights; returns them."""
    transformers = {name: part for name in NAMES if (part := getattr(pipeline, name, None)) is not None}
    for part in transformers.values():
        part.to(dtype)
    pipeline.save_pretrained(path)
    for name in transformers:
        for file in (path / name).glob("*.safetensors"):
            file.rename(path / f"{name}.whole")
    return transformers


def with_weights(path: Path, *names: str) -> str:
    """Puts the weights of the folder back."""
    for name in names or NAMES:
        if (path / f"{name}.whole").is_file():
            shutil.copy(path / f"{name}.whole", path / name / "diffusion_pytorch_model.safetensors")
    return str(path)


def assert_same(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Compares all values and types of two models, with those that no file holds."""
    for kind in ("named_parameters", "named_buffers"):
        here, there = (dict(getattr(model, kind)()) for model in (actual, expected))
        assert here.keys() == there.keys()
        for name, value in there.items():
            assert here[name].dtype == value.dtype and torch.equal(here[name], value), name
    assert not actual.training


def original(transformer: torch.nn.Module, comfy: bool = False) -> State:
    """Returns the weights under the authors' names, or HunyuanVideo's under those of ComfyUI's core.

    Rows of several layers are joined, and halves that diffusers has the other way around change places.
    """
    own = transformer.state_dict()
    names = layer_names({name: tuple(x.shape) for name, x in own.items()})

    def is_last(name: str) -> tuple[bool, bool]:
        return name == names[name][0].layer, (re.search(CORE, name) is not None) != comfy

    state, done = {}, set()
    for name in sorted(names, key=is_last):
        for kind in (".weight", ".bias", ""):
            whole = [part.layer + kind for part in names[name]]
            if done & set(whole) or not own.keys() >= set(whole):
                continue
            joined, spans = torch.cat([own[x] for x in whole]), [x for y in names[name] for x in y.rows]
            order = torch.cat([torch.arange(*span) for span in spans]) if spans else torch.arange(len(joined))
            ending = ".scale" if comfy and kind == ".weight" and "_norm" in name else kind
            value = joined[order.argsort()].contiguous()
            if "net_app.convs" in name and kind == ".bias":  # of Wan-Animate
                value = value.reshape(1, -1, 1, 1)
            state[name + (".weight" if name.endswith(".direction") else ending)] = value
            done |= set(whole)
    assert done == own.keys()
    return state


def save(file: Path, state: State, prefix: str = "", **metadata: str) -> Path:
    """Writes a safetensors file whose names begin with a prefix."""
    save_file({prefix + name: value.contiguous() for name, value in state.items()}, file, metadata or None)
    return file


def in_eight_bits(state: State, spelling: str, rows: bool = False) -> tuple[State, State]:
    """Returns a state with the matrices of the blocks in 8 bits and their scales, and the values it means.

    Args:
        spelling: "scale_weight" (ComfyUI's older files, with a mark), or "weight_scale" (newer, described).
        rows: one scale a row in place of one a matrix.
    """
    small, meant = {}, {}
    for name, value in state.items():
        layer = name.removesuffix(".weight")
        if not ("blocks." in name and name.endswith(".weight") and value.ndim == 2):
            small[name] = meant[name] = value
            continue
        scale = (value.abs().amax(1) if rows else value.abs().max()).float() / torch.finfo(EIGHT).max
        wide = scale.unsqueeze(1) if rows else scale
        small[name] = (value.float() / wide).to(EIGHT)
        small |= {f"{layer}.{spelling}": scale, f"{layer}.{INPUTS[spelling]}": torch.ones(())}
        meant[name] = small[name].float() * wide
        if spelling == "weight_scale":
            about = json.dumps({"format": "float8_e4m3fn"}).encode()
            small[f"{layer}.comfy_quant"] = torch.tensor(list(about), dtype=torch.uint8)
    return small | ({"scaled_fp8": torch.zeros(2).to(EIGHT)} if spelling == "scale_weight" else {}), meant


INPUTS = {"scale_weight": "scale_input", "weight_scale": "input_scale"}


def random_blocks(data: np.ndarray) -> np.ndarray:
    """Makes random Q4_K blocks for a matrix `[rows, columns]`, which gguf reads but does not write."""
    block, size = gguf.GGML_QUANT_SIZES[Q4_K]
    packed = np.random.default_rng(0).integers(0, 255, (data.size // block, size), dtype=np.uint8)
    packed[:, :4] = np.array([2e-4, 1e-3], np.float16).view(np.uint8)  # scales of the steps and of the least
    return packed.reshape(len(data), -1)


def write_gguf(file: Path, state: State, kind: str, rest: Any = np.float16) -> tuple[Path, State]:
    """Writes matrices as a kind of GGUF if their rows are whole blocks; returns file and values."""
    kind, writer, meant = gguf.GGMLQuantizationType[kind], gguf.GGUFWriter(file, "wan"), {}
    make: Callable = random_blocks if kind == Q4_K else lambda data: gguf.quantize(data, kind)
    for name, value in state.items():
        data = value.float().numpy()
        if (
            data.ndim == 2
            and name.endswith(".weight")
            and data.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        ):
            packed = make(data)
            writer.add_tensor(name, packed, raw_dtype=kind)
            meant[name] = torch.from_numpy(gguf.dequantize(packed, kind)).reshape(value.shape)
        else:
            writer.add_tensor(name, data.astype(rest))
            meant[name] = torch.from_numpy(data.astype(rest)).float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, meant
