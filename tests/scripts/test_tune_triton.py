"""Tests the tuner of the launch table: its candidates, its changes to the table, what it prints."""

from dataclasses import replace

import pytest
import torch

from radial_attn.analysis.sampled_error import sample_blocks, sampled_rows
from radial_attn.kernels.triton.configs import KINDS
from scripts import tune_triton
from scripts.benchmarks.tuner import LAUNCHES, Launch, candidates, entry, fits, launch, row, sampled_lse, show
from tests.support.attention_cases import GRIDS, make_inputs, make_mask


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_start_with_the_entry_of_now(kind, capsys):
    assert tune_triton.main(["--dry-run", "--kinds", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    now = LAUNCHES["sm90"][kind, 128]
    assert lines[0] == row(kind, 128, now) and len(lines) == len(set(lines)) > 20
    assert eval(f"{{{lines[0]}}}", {"Launch": Launch}) == {(kind, 128): now}
    assert all(fits(each, kind, 128) for each in candidates(now, kind, 128)[1:])


def test_the_launch_table_is_put_back():
    device, kind = torch.device("cpu"), "forward"
    before = launch(kind, device, 64)
    other = replace(before, rows=2 * before.rows)
    with entry(kind, device, 64, other):
        assert launch(kind, device, 64) == other
    assert launch(kind, device, 64) == before


def test_the_log_sum_exp_of_the_sample_is_that_of_all_kept_keys():
    mask = make_mask(GRIDS[111], heads=2)
    query, key, *_ = make_inputs(mask.grid, 2, 2, 16)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.25
    wanted = scores.masked_fill(~mask.token_mask(), -torch.inf).logsumexp(-1).transpose(1, 2)
    for blocks in ([0, 6], sample_blocks(mask, 3)):
        actual = sampled_lse(query, key, mask, blocks, 0.25)
        torch.testing.assert_close(actual, sampled_rows(wanted, mask, blocks))


def test_the_best_row_of_each_kind_is_shown(capsys):
    rows = [
        {"kind": "forward", "row": "a,", "ms": 2.0},
        {"kind": "forward", "row": "b,", "ms": 1.5},
        {"kind": "fp8", "row": "c,", "skipped": "out of memory"},
    ]
    show(rows, {"gpu": "G", "architecture": "sm90"})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["# G, sm90", "    b,  # 1.500 ms, before 2.000 ms", "# fp8: none ran"]
