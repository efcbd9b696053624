"""The C++ backend against the definition, forward and backward, and how it is compiled."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from radial_attn import BlockMask, TokenGrid, radial_attention
from radial_attn.attention import choose_backend
from radial_attn.kernels.contract import Call
from radial_attn.kernels.cpp.build import load_library
from radial_attn.kernels.cpp.op import SOURCE, cpp_attention
from tests.support.attention_cases import GRIDS, compare, make_inputs, make_mask, run
from tests.support.long import all_but

pytestmark = pytest.mark.skipif(isinstance(load_library(SOURCE), str), reason="no C++ compiler")


@pytest.mark.long
def test_a_sequence_whose_gradients_are_summed_in_parts():
    grid = TokenGrid(20, 16, 16)
    blocks = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < 0.1
    blocks.fill_diagonal_(fill_value=True)
    mask = BlockMask.from_blocks(grid, blocks, 128)
    compare("cpp", make_inputs(grid, 1, 1, 16), mask, torch.float32)


def test_features_that_do_not_lie_side_by_side():
    grid, mask = GRIDS[1000], make_mask(GRIDS[1000])
    together = torch.stack(make_inputs(grid, 2, 3, 16)[:3])
    apart = together.transpose(-1, -2).contiguous().transpose(-1, -2)
    out = radial_attention(*together, mask, backend="cpp")
    assert apart.stride(-1) != 1 and torch.equal(out, radial_attention(*apart, mask, backend="cpp"))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_shows_in_the_rows_that_see_it(which, number):
    grid = TokenGrid(4, 8, 8)
    blocks = torch.eye(16, dtype=torch.bool)
    inputs = list(make_inputs(grid, 1, 1, 48)[:3])
    inputs[which][0, 20, 0, 5] = number
    out = radial_attention(*inputs, BlockMask.from_blocks(grid, blocks, 16), backend="cpp")
    seen = ~out.isfinite().all(dim=-1).flatten()
    assert seen[16:32].any() and not seen[:16].any() and not seen[32:].any()


def test_large_scores_do_not_overflow():
    grid = GRIDS[111]
    inputs = [x * 10 for x in make_inputs(grid, 1, 2, 16)]
    compare("cpp", inputs, make_mask(grid), torch.float32)


def test_log_sum_exp_is_that_of_the_scores():
    grid, mask = GRIDS[63], make_mask(GRIDS[63])
    query, key, value, _ = make_inputs(grid, 1, 2, 16)
    _, lse = cpp_attention(query, key, value, mask.blocks, mask.block_size, None, 0.25)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key).double() * 0.25
    scores = scores.masked_fill(~mask.token_mask()[None, :, None], -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())


@pytest.mark.parametrize(
    ("grid", "size", "lengths"), [(TokenGrid(18, 16, 16), 64, None), (GRIDS[111], 16, [4])], ids=str
)
def test_no_sum_depends_on_threads(grid, size, lengths):
    inputs, mask = make_inputs(grid, 1, 3, 16), make_mask(grid, size)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run("cpp", inputs, mask, torch.float32, text_lengths=lengths))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_operator_is_what_it_says_to_compilers():
    grid, mask = GRIDS[63], make_mask(GRIDS[63])
    query, key, value, _ = (x.requires_grad_() for x in make_inputs(grid, 1, 2, 16))
    arguments = query, key, value, mask.blocks, mask.block_size, torch.tensor([60]), 0.25
    torch.library.opcheck(cpp_attention, arguments)


@pytest.mark.parametrize("lengths", [None, [4, 11]], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype, lengths, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    grid = GRIDS[111]
    compare("cpp", make_inputs(grid, 2, 3, 16), make_mask(grid), dtype, text_lengths=lengths)


def test_bfloat16_is_left_to_processors_that_multiply_its_tiles(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    call = Call(torch.device("cpu"), torch.bfloat16, 16, gradients=True, mask=make_mask(GRIDS[63]))
    assert choose_backend(call) == "blocks" and choose_backend(replace(call, dtype=torch.float16)) == "cpp"
    tensors = [x.bfloat16() for x in make_inputs(GRIDS[63], 1, 2, 16)[:3]]
    with pytest.raises(ValueError, match="backend 'cpp' computes in float32, slower than `blocks`"):
        radial_attention(*tensors, call.mask, backend="cpp")


def test_without_a_compiler_it_names_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert load_library.__wrapped__(SOURCE) == "a C++ compiler, but none was found: apt install g++"


def test_a_source_that_does_not_compile_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("RADIAL_ATTN_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "broken.cpp"
    source.write_text("int main( {", encoding="utf-8")
    reason = load_library.__wrapped__(source)
    assert reason.startswith("broken.cpp compiled by ") and "error" in reason and "\n" not in reason
    assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def source(tmp_path):
    """Writes a function that returns 1."""
    file = tmp_path / "one.cpp"
    file.write_text('extern "C" int one() { return 1; }', encoding="utf-8")
    return file


def test_it_is_compiled_once_and_a_folder_with_a_space_will_do(source, monkeypatch, tmp_path):
    folder = tmp_path / "a cache"
    monkeypatch.setenv("RADIAL_ATTN_CACHE", str(folder))
    assert load_library.__wrapped__(source).one() == 1
    (kept,) = folder.iterdir()
    before = kept.stat().st_mtime_ns
    assert load_library.__wrapped__(source).one() == 1 and kept.stat().st_mtime_ns == before
    source.write_text('extern "C" int one() { return 2; }', encoding="utf-8")
    assert load_library.__wrapped__(source).one() == 2 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "damage", [lambda x: b"", lambda x: x[: len(x) // 2], lambda x: x[:99] + bytes([x[99] ^ 1]) + x[100:]]
)
def test_a_damaged_library_is_built_again(damage, source, monkeypatch, tmp_path):
    monkeypatch.setenv("RADIAL_ATTN_CACHE", str(tmp_path / "cache"))
    load_library.__wrapped__(source)
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # the one that is loaded stays as it is
    kept.write_bytes(damage(whole))
    assert load_library.__wrapped__(source).one() == 1
    assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to(source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spare"))
    monkeypatch.setenv("RADIAL_ATTN_CACHE", str(tmp_path / "file"))
    assert load_library.__wrapped__(source).one() == 1
    assert not list((tmp_path / "spare").iterdir())


@pytest.mark.parametrize("flags", all_but([()], [("-mavx2", "-mfma"), ()]))
def test_narrower_vectors_compute_the_same(flags, monkeypatch, tmp_path):
    if flags and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no AVX2")
    program = (
        "import torch; from radial_attn.kernels.cpp import build; "
        f"build.CHOICES = (({', '.join(map(repr, (*flags, '-pthread')))},),); "
        "from tests.support.attention_cases import GRIDS, compare, make_inputs, make_mask; "
        "torch.manual_seed(0); "
        "[compare('cpp', make_inputs(GRIDS[111], 2, 2, w), make_mask(GRIDS[111]), torch.float32, "
        "text_lengths=[4, 11]) for w in (10, 48)]"
    )
    options = {"env": os.environ | {"RADIAL_ATTN_CACHE": str(tmp_path)}, "cwd": SOURCE.parents[3]}
    done = subprocess.run([sys.executable, "-c", program], check=False, stderr=subprocess.PIPE, **options)
    assert done.returncode == 0, done.stderr.decode()
