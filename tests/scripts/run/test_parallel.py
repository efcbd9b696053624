"""The work of each of several processes, against arithmetic by hand and the plan of one process."""

import subprocess
import sys
from dataclasses import replace

import pytest

from radial_attn.models.parallel.groups import Degrees
from scripts.run.config import ROOT, AttentionConfig, Config, GenerationConfig, ModelConfig, read_config
from scripts.run.model_info import ModelInfo
from scripts.run.parallel import RankWork, plan_degrees
from scripts.run.plan import RunPlan
from tests.support.plans import plan_of

PRESETS = ["configs/hunyuan_t2v_4x.yaml", "configs/mochi_t2v_4x.yaml", "configs/wan2.1_t2v_14b.yaml"]
ALONE = Degrees()


def tiny(family: str, text: int = 0, joint: int = 0, **model: object) -> RunPlan:
    """Plans 3 frames of 2 x 5 tokens in 2 layers of 4 heads of 8, float16, guidance on."""
    shape = ModelInfo(2, 4, 8, 64, text_tokens=text, joint_text=joint, **model)
    shift = None if family == "mochi" else 5.0
    sizes = GenerationConfig(height=32, width=80, num_frames=9, steps=10, flow_shift=shift)
    attention = AttentionConfig(block_size=16, dense_steps=4, dense_layers=1, dense_last_steps=1)
    return plan_of(Config(ModelConfig(family=family, dtype="float16"), attention, sizes), shape)


def work(plan: RunPlan, degrees: Degrees = ALONE) -> RankWork:
    """Returns the work of one of the processes that share a plan in this way."""
    return replace(plan, degrees=degrees).rank_work


def test_bytes_by_hand_with_joint_text():
    """4 processes share 30 video tokens and 6 of text: 8 tokens each, the last two padding, and one head."""
    sent = work(tiny("hunyuan_video", joint=6), Degrees(ulysses=4)).sent
    of_a_head = 8 * 2  # channels, bytes
    assert sent.streams == 2 * 4 * 8 * of_a_head * 3  # layers, streams, tokens; to each of 3 others
    assert sent.text == 2 * 6 * of_a_head * 3
    assert sent.tokens == 8 * 64 * 2 * 3  # 16 channels of 2 x 2 latents
    assert sent.guidance == 0
    assert sent.total == 3072 + 576 + 3072


def test_bytes_by_hand_with_guidance():
    """Wan runs on 2 x 2 processes: one call each, latents of 16 channels."""
    plan = tiny("wan", text=12)
    sent = work(plan, Degrees(ulysses=2, cfg=2)).sent
    assert sent.streams == 2 * 4 * 15 * 2 * 8 * 2
    assert (sent.text, sent.tokens) == (0, 15 * 64 * 2)
    assert sent.guidance == 3 * 4 * 10 * 16 * 2  # latent frames, rows, columns, channels, bytes
    both = work(plan, Degrees(ulysses=2)).sent
    assert (both.streams, both.tokens, both.guidance) == (2 * sent.streams, 2 * sent.tokens, 0)
    assert work(plan, Degrees(cfg=2)).sent.total == sent.guidance


def test_control_layers_and_padded_heads_count():
    plan = tiny("wan_vace", control_layers=(0,))
    shared = work(plan, Degrees(ulysses=3))
    # calls, layers, streams, tokens, heads, channels, bytes, to 2 others
    assert shared.sent.streams == 2 * 3 * 4 * 10 * 2 * 8 * 2 * 2
    assert shared.dense == work(plan).dense / 2


@pytest.mark.parametrize("preset", PRESETS)
def test_one_process_is_the_plan(preset):
    plan = plan_of(read_config(preset, []))
    each, steps, first = plan.rank_work, plan.config.generation.steps, len(plan.dense_steps)
    assert plan.degrees == ALONE and each.sent.total == 0 and each.tokens == plan.grid.video_tokens
    assert steps * each.dense == pytest.approx(plan.flops.dense, rel=1e-12)
    assert first * each.dense + (steps - first) * each.sparse == pytest.approx(plan.flops.sparse, rel=1e-12)
    assert steps * each.other == pytest.approx(plan.flops.other, rel=1e-12)
    assert each.kept_blocks == plan.model.heads * int(plan.block_mask.blocks.sum())
    assert plan.rank_memory == plan.memory


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("processes", [2, 3, 4, 7, 8])
def test_all_processes_do_no_less_than_one(preset, processes):
    plan = plan_of(read_config(preset, []))
    counts = {"processes": processes, "prompts": processes}
    chosen = plan_degrees(plan.config.parallel, heads=plan.model.heads, calls=plan.calls, **counts)
    one = work(plan)
    for degrees in (chosen, Degrees(processes)):
        each, sharing = work(plan, degrees), degrees.processes // degrees.data
        for name in ("dense", "sparse", "other"):
            assert sharing * getattr(each, name) >= (1 - 1e-12) * getattr(one, name)
        assert degrees.ulysses * each.kept_blocks >= one.kept_blocks


@pytest.mark.parametrize("degrees", [Degrees(2), Degrees(cfg=2), Degrees(2, cfg=2), Degrees(2, data=3)])
def test_without_text_and_padding_all_processes_together_do_the_work_of_one(degrees):
    plan, sharing = tiny("wan"), degrees.ulysses * degrees.cfg
    one, each = work(plan), work(plan, degrees)
    for name in ("dense", "sparse", "other"):
        assert sharing * getattr(each, name) == pytest.approx(getattr(one, name), rel=1e-12)
    assert degrees.ulysses * each.kept_blocks == one.kept_blocks


def test_text_rows_are_repeated():
    plan = tiny("hunyuan_video", joint=6)
    each = work(plan, Degrees(2))
    rows = 2.0 * plan.model.macs * 2  # multiply-adds of a row in 2 layers
    assert each.other == (15 + 6) * rows


def test_prompts_shared_cost_nothing():
    plan = tiny("wan", text=12)
    assert work(plan, Degrees(data=3)) == work(plan)


def test_memory_keeps_weights_whole_and_shares_tokens():
    plan = plan_of(read_config("configs/hunyuan_t2v_4x.yaml", []), device="cuda")
    needs = [replace(plan, degrees=Degrees(ulysses=n)).rank_memory for n in (1, 2, 4, 24)]
    assert len({need.weights for need in needs}) == 1
    assert [need.activations for need in needs] == sorted((n.activations for n in needs), reverse=True)
    assert needs[1].activations == pytest.approx(needs[0].activations / 2, rel=0.02)


def test_bytes_of_a_ring_by_hand():
    """The first of 2 ranks has 16 of 30 video tokens; 6 tokens are text."""
    plan = tiny("hunyuan_video", joint=6)
    sent, alone = (work(plan, Degrees(ulysses=n, ring=2)).sent for n in (2, 1))
    key_and_value, merged = 2 * 8 * 2, 4 * (8 + 1)  # of a token and head; in float32, with the sum
    assert sent.ring == 2 * 2 * ((16 + 6) * key_and_value + 6 * merged)  # layers, heads
    assert alone.ring == 2 * sent.ring and alone.streams == alone.text == 0
    assert sent.streams == 2 * 4 * 8 * 2 * 8 * 2  # layers, streams, tokens, heads
    assert sent.tokens == 8 * 64 * 2 * 3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("ring", [2, 4, 8])
def test_a_ring_does_little_more_than_its_part(preset, ring):
    plan = plan_of(read_config(preset, []))
    one, each = work(plan), work(plan, Degrees(ring=ring))
    assert 1 <= ring * each.dense / one.dense < 1.02
    assert 1 <= ring * each.sparse / one.sparse < 1.12
    assert 1 <= each.busiest <= each.waiting < 1.12
    assert one.kept_blocks <= ring * each.kept_blocks < 1.05 * one.kept_blocks


def test_a_plan_imports_nothing_that_starts_processes():
    check = "import sys, scripts.run.plan; print(sorted({'xfuser', 'yunchang'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
