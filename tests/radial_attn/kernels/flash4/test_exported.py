"""Exported kernels of FlashAttention-4: which folders are refused, and how the others are called."""

import hashlib
import json
import re
import sys

import pytest
import torch

from radial_attn import TokenGrid
from radial_attn.kernels.flash4 import exported
from radial_attn.kernels.flash4 import op as kernel
from tests.support.attention_cases import attend, fresh_mask, make_inputs
from tests.support.kernel_emulations import module

NAME = "forward-float16-64-128x128-shared"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a folder with one kernel, which `load_module` replaces; the calls are in `module.calls`."""
    calls = []
    tvm = module(
        "tvm_ffi", calls=calls, load_module=lambda file: {"forward": lambda *args: calls.append(args)}
    )
    monkeypatch.setitem(sys.modules, "tvm_ffi", tvm)
    monkeypatch.setenv(exported.FOLDER, str(tmp_path))
    monkeypatch.setattr(exported, "cuda_runtime", lambda: torch._C.__file__)
    content = b"machine code"
    (tmp_path / "kernel.so").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    entry = {"file": "kernel.so", "sha256": digest, "functions": ["forward"], "rows": 0}
    write(tmp_path, {"format": 1, "package": exported.MADE, "capability": [9, 0], "kernels": {NAME: entry}})
    exported.load.cache_clear()
    yield tmp_path
    exported.load.cache_clear()


def write(folder, index):
    (folder / exported.INDEX).write_text(json.dumps(index), encoding="utf-8")


def test_a_call_reaches_the_kernel_of_its_name(folder):
    """The kernel gets the valid part of each sample and lists cut to it; a missing kernel is named."""
    import tvm_ffi

    mask = fresh_mask(TokenGrid(4, 10, 10, text=100), 128)
    inputs = make_inputs(mask.grid, 2, 2, 64)
    attend(kernel, inputs, mask, torch.float16, [0, 100])
    assert [args[0].shape[1] for args in tvm_ffi.calls] == [400, 500]
    assert [args[14][2].shape for args in tvm_ffi.calls] == [(1, 2, 4)] * 2
    with pytest.raises(
        ValueError, match="'flash4' has no kernel forward-bfloat16-64-128x128-shared in RADIAL"
    ):
        attend(kernel, inputs, mask, torch.bfloat16)


def cut(folder):
    (folder / exported.INDEX).write_text('{"format": 1, ', encoding="utf-8")


def change(**entries):
    def apply(folder):
        index = json.loads((folder / exported.INDEX).read_text(encoding="utf-8"))
        write(folder, index | entries)

    return apply


def entry(**fields):
    kernel = {"file": "kernel.so", "sha256": "", "functions": ["forward"], "rows": 0} | fields
    return change(kernels={NAME: kernel})


def damage(folder):
    (folder / "kernel.so").write_bytes(b"machine cod")


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: None, None),
        (
            remove("flash4.json"),
            r"needs the file flash4.json of RADIAL_ATTN_FLASH4=.*: export .* \(No such file",
        ),
        (cut, "needs the complete file flash4.json of RADIAL_ATTN_FLASH4=.*: export the kernels again"),
        *(
            (change(**entries), "needs the complete file flash4.json of .*: export the kernels again")
            for entries in (
                {"kernels": [1]},
                {"kernels": {NAME: {"file": "kernel.so", "sha256": ""}}},
                {"kernels": {NAME: {"file": "kernel.so", "sha256": "", "functions": 1, "rows": 0}}},
                {"capability": [9]},
                {"capability": 9},
            )
        ),
        (
            entry(file="x" * 300),
            "needs the complete file x+ of RADIAL_ATTN_FLASH4=.*: export the kernels again",
        ),
        (entry(file=".\0"), "needs the complete file .*: export the kernels again"),
        (entry(file=""), "needs the complete file .*: export the kernels again"),
        (
            remove("kernel.so"),
            "needs the complete file kernel.so of RADIAL_ATTN_FLASH4=.*: export the kernels again",
        ),
        (damage, "needs the complete file kernel.so of RADIAL_ATTN_FLASH4=.*: export the kernels again"),
        (
            change(package="flash-attn-4 4.0.0"),
            "needs kernels of flash-attn-4 4.0.0b36 .*, got flash-attn-4 4.0.0 in",
        ),
        (change(format=2), "needs kernels of .* in format 1, got .* in 2 of RADIAL_ATTN_FLASH4=.*: export"),
        (
            change(capability=[10, 0]),
            "needs kernels for compute capability 9.0, got 10.0 in RADIAL.*: export them",
        ),
    ],
    ids=lambda value: None if callable(value) else "whole" if value is None else value[6:40],
)
def test_a_folder_that_is_not_whole_is_refused(folder, harm, message):
    harm(folder)
    reason = exported.problem(folder, (9, 0))
    assert reason is None if message is None else re.match(message, reason)
    if message is not None:
        mask = fresh_mask(TokenGrid(4, 10, 10), 128)
        with pytest.raises(ImportError, match="backend 'flash4' needs"):
            attend(kernel, make_inputs(mask.grid, 1, 2, 64), mask, torch.float16)


def test_a_file_in_place_of_the_folder_is_named(folder):
    file = folder / "kernel.so"
    assert exported.problem(file, (9, 0)) == (
        f"needs the file flash4.json of RADIAL_ATTN_FLASH4={file}: export the kernels again (Not a directory)"
    )


def test_the_fingerprint_changes_with_the_kernels(folder, monkeypatch):
    before = exported.fingerprint()
    assert before == exported.fingerprint() != "none"
    entry(rows=128)(folder)
    assert exported.fingerprint() not in {before, "none"}
    monkeypatch.setenv(exported.FOLDER, str(folder / "kernel.so"))
    assert exported.fingerprint() == "none"
    monkeypatch.delenv(exported.FOLDER)
    assert exported.fingerprint() == "none"


def test_what_a_machine_lacks_is_named(folder, monkeypatch):
    monkeypatch.setattr(exported, "cuda_runtime", lambda: None)
    assert exported.problem(folder, (9, 0)).startswith(
        "needs the CUDA runtime that CUDA builds of torch load"
    )
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    assert exported.problem(folder, (9, 0)).endswith(": pip install apache-tvm-ffi")


def test_tensors_that_no_kernel_could_read_are_copied():
    """Kernels load 16 bytes at a time, and are compiled for strides that are not 0."""
    whole = torch.randn(1, 5, 2, 72).half()
    for x in (whole, whole[..., :64], whole[..., 8:72], whole[:, 1:4]):
        assert exported._aligned(x).data_ptr() == x.data_ptr()
    for x in (whole[..., 1:65], whole[:, :, :1].expand(1, 5, 3, 72), whole.flatten()[1:73].view(1, 1, 1, 72)):
        copy = exported._aligned(x)
        assert copy.data_ptr() != x.data_ptr() and 0 not in copy.stride() and torch.equal(copy, x)
