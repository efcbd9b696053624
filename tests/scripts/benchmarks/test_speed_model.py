"""The estimates of speed: hot loops as the compiler writes them, pipes, and the order of programs."""

from collections import Counter

import pytest

from radial_attn.kernels.triton.configs import Launch
from scripts.benchmarks.cases import CASES
from scripts.benchmarks.hot_loop import loop_instructions, tiles_of
from scripts.benchmarks.kernel_sources import Variant
from scripts.benchmarks.speed_model import estimate, launch_order, makespan, tail
from scripts.run.config import ROOT, read_config
from scripts.run.plan import make_plan

PRESETS = [file.name for file in ROOT.glob("configs/*.yaml") if "tiny" not in file.name]
IR = """
  %k = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xbf16, #shared, #smem, mutable>
  %r:2 = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (i32) {
    %0 = ttg.memdesc_index %k[%i] : !ttg.memdesc<3x128x64xbf16, #shared, #smem, mutable> -> !ttg.memdesc<1>
    %1 = ttg.memdesc_index %b[%i] : !ttg.memdesc<2x1xi64, #shared, #smem, mutable> -> !ttg.memdesc<1xi64>
    %2 = ttg.local_load %s : !ttg.memdesc<1x128xf32, #shared, #smem> -> tensor<1x128xf32, #blocked>
    %3 = ttg.local_alloc %w {a = 1 : i32} : (tensor<128x64xbf16, #mma>) -> !ttg.memdesc<128x64xbf16, #shared>
    %4 = ttng.warp_group_dot %0, %3, %z : tensor<128x64xf32>
    scf.yield %4 : i32
  }
"""
SASS = """
        /*0000*/                   FADD R1, R2, R3 ;                  /* 0x0 */
        /*0010*/              @!P1 BAR.SYNC.DEFER_BLOCKING 0x0 ;      /* 0x0 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
        /*0030*/                   MUFU.EX2 R1, R2 ;
        /*0040*/                   FMNMX.FTZ R1, R2, R3, !PT ;
        /*0050*/               @P2 BRA 0x10 ;
        /*0060*/              @!P3 BRA 0x60 ;
        /*0070*/                   BRA 0x0 ;
"""


def test_what_is_read_of_a_loop():
    tiles = tiles_of(IR)
    assert (tiles.loops, tiles.buffers, tiles.moved) == (1, 3, 1)
    wanted = {"all": 5, "other": 2, "barriers": 1, "tensor": 1, "exp": 1, "integer": 1}
    assert loop_instructions(SASS) == wanted
    assert tiles_of("").buffers == 0 and not loop_instructions("")


def test_an_estimate_from_pipes_and_occupancy():
    """Two groups of warps: 2048 cycles of products a tile, 8 cycles for each exponential of a warp."""
    variant = Variant("forward", 128, Launch(128, 128, 8, 3))
    counts = Counter({"all": 500, "exp": 64, "float": 200, "integer": 100, "tensor": 16})
    made = estimate("sm90", variant, 243, 230_400, counts)
    assert (made.programs, made.groups, made.tensor, made.other, made.pipe) == (1, 2, 1024, 512, "exp")
    assert made.least == pytest.approx(2 / 3) and made.most == 1 and made.middle == pytest.approx(5 / 6)
    smaller = estimate("sm90", variant, 96, 100_000, counts)
    assert (smaller.programs, smaller.groups) == (2, 4)
    slow = estimate("sm90", variant, 243, 230_400, counts + Counter({"exp": 192}))
    assert slow.other == 2048 and slow.most == pytest.approx(0.5)


def test_programs_in_turn():
    assert makespan([3, 3, 2, 2, 2], 2) == 7 and makespan([2, 2, 2, 3, 3], 2) == 7
    assert makespan([1] * 7, 3) == 3
    assert sorted(launch_order(37, True)) == sorted(launch_order(37, False)) == list(range(37))
    assert launch_order(32, True)[:3] == [30, 31, 0] and launch_order(32, False)[:2] == [31, 30]


@pytest.mark.parametrize("name", ["wan-69", "mochi-163"])
def test_no_multiprocessor_waits_long_at_the_end(name):
    case = CASES[name]
    assert 1 <= tail(case.mask, case.heads, 132) <= 1.01
    assert 1 <= tail(case.mask, case.heads, 132, rows=32, by_key=True) <= 1.01


@pytest.mark.long
@pytest.mark.parametrize("name", [*CASES, *PRESETS])
def test_no_multiprocessor_waits_long_at_the_end_of_any_preset(name):
    """At most 1 % of the time, or one program: of Wan2.1-1.3B a multiprocessor has 23, of LTX 12 to 14."""
    if name in CASES:
        mask, heads = CASES[name].mask, CASES[name].heads
    else:
        plan = make_plan(read_config(f"configs/{name}", []), dry_run=True)
        mask, heads = plan.block_mask, plan.model.heads
    most = max(1.01, 1 + 132 / (heads * -(-mask.grid.tokens // 128)))
    limit = most if name.startswith("ltx") else 1.02 if name == "wan2.1_t2v_1.3b.yaml" else 1.01
    assert 1 <= tail(mask, heads, 132) <= limit
    assert 1 <= tail(mask, heads, 132, rows=32, by_key=True) <= most
