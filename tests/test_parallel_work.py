"""What several GPUs will cost, against arithmetic by hand and the plan of one process."""

import subprocess
import sys

import pytest

from radial_attn import radial_mask
from radial_attn.models.parallel.groups import Degrees
from scripts.generate import main as generate
from scripts.parallel_cost import main
from scripts.run import plan
from scripts.run.config import ROOT, AttentionConfig, Config, GenerationConfig, ModelConfig, read_config
from scripts.run.hub_models import HUB_MODELS
from scripts.run.model_info import ModelInfo
from scripts.run.parallel import plan_degrees
from scripts.run.parallel_work import Rates, exchange, lines, predict, rank_memory, work

HUNYUAN = HUB_MODELS["hunyuanvideo-community/HunyuanVideo"]
MOCHI = HUB_MODELS["genmo/mochi-1-preview"]
WAN_14B = HUB_MODELS["Wan-AI/Wan2.1-T2V-14B-Diffusers"]
PRESETS = [
    ("configs/hunyuan_t2v_4x.yaml", HUNYUAN),
    ("configs/mochi_t2v_4x.yaml", MOCHI),
    ("configs/wan2.1_t2v_14b.yaml", WAN_14B),
]
RATES = Rates(linear=400e12, attention=400e12, bandwidth=25e9)
CALL = ["configs/hunyuan_t2v_4x.yaml", "--tflops", "400", "--bandwidth", "200", "25"]


def tiny(family: str, text: int = 0, joint: int = 0, **model: object) -> tuple[Config, ModelInfo]:
    """3 frames of 2 x 5 tokens in 2 layers of 4 heads of 8, float16, guidance on."""
    shape = ModelInfo(2, 4, 8, 64, text_tokens=text, joint_text=joint, **model)
    sizes = GenerationConfig(height=32, width=80, num_frames=9, steps=10)
    attention = AttentionConfig(block_size=16, dense_steps=4, dense_layers=1, dense_last_steps=1)
    return Config(ModelConfig(family=family, dtype="float16"), attention, sizes), shape


def test_bytes_by_hand_with_joint_text():
    """30 video tokens and 6 of text, 4 processes: 8 tokens each, the last two filled up, one head each."""
    config, model = tiny("hunyuan_video", joint=6)
    sent = exchange(config, model, Degrees(ulysses=4))
    of_a_head = 8 * 2  # channels, bytes
    assert sent.streams == 2 * 4 * 8 * of_a_head * 3  # layers, streams, tokens; to each of 3 others
    assert sent.text == 2 * 6 * of_a_head * 3
    assert sent.tokens == 8 * 64 * 2 * 3  # 16 channels of 2 x 2 latents
    assert sent.guidance == 0
    assert sent.total == 3072 + 576 + 3072


def test_bytes_by_hand_with_guidance():
    """Wan on 2 x 2 processes: one call each, latents of 16 channels."""
    config, model = tiny("wan", text=12)
    sent = exchange(config, model, Degrees(ulysses=2, cfg=2))
    assert sent.streams == 2 * 4 * 15 * 2 * 8 * 2
    assert (sent.text, sent.tokens) == (0, 15 * 64 * 2)
    assert sent.guidance == 3 * 4 * 10 * 16 * 2  # latent frames, rows, columns, channels, bytes
    both = exchange(config, model, Degrees(ulysses=2))
    assert (both.streams, both.tokens, both.guidance) == (2 * sent.streams, 2 * sent.tokens, 0)
    assert exchange(config, model, Degrees(cfg=2)).total == sent.guidance


def test_control_layers_and_filled_up_heads_count():
    config, model = tiny("wan_vace", control_layers=(0,))
    sent = exchange(config, model, Degrees(ulysses=3))
    assert (
        sent.streams == 2 * 3 * 4 * 10 * 2 * 8 * 2 * 2
    )  # calls, layers, streams, tokens, heads, to 2 others
    assert work(config, model, Degrees(ulysses=3)).dense == work(config, model, Degrees()).dense / 2


@pytest.mark.parametrize(("preset", "model"), PRESETS)
def test_one_process_is_the_plan(preset, model):
    config = read_config(preset, [])
    mask = radial_mask(plan.token_grid(config, model), plan.radial_config(config))
    dense, whole = plan.attention_flops(config, model, mask.density)
    todo, steps = work(config, model, Degrees()), config.generation.steps
    first = len(plan.dense_steps(config))
    assert exchange(config, model, Degrees()).total == 0
    assert steps * todo.dense == pytest.approx(dense, rel=1e-12)
    assert first * todo.dense + (steps - first) * todo.radial == pytest.approx(whole, rel=1e-12)
    assert steps * todo.other == pytest.approx(plan.other_flops(config, model), rel=1e-12)
    assert todo.repeated == pytest.approx(0, abs=1e-12 * todo.other)
    assert todo.kept_blocks == model.heads * int(mask.blocks.sum())
    assert rank_memory(config, model, Degrees()) == plan.memory(config, model, "cuda")
    found = predict(config, model, Degrees(), RATES)
    assert (found.exchange, found.speed_up, found.efficiency) == (0, 1, 1)
    assert steps * found.mean == pytest.approx((whole + steps * todo.other) / 400e12, rel=1e-12)


@pytest.mark.parametrize(("preset", "model"), PRESETS)
@pytest.mark.parametrize("processes", [2, 3, 4, 7, 8])
def test_all_processes_do_no_less_than_one(preset, model, processes):
    config = read_config(preset, [])
    one = work(config, model, Degrees())
    for degrees in (plan_degrees(config, model, processes, processes), Degrees(processes)):
        each, sharing = work(config, model, degrees), degrees.processes // degrees.data
        for name in ("dense", "radial", "other"):
            assert sharing * getattr(each, name) >= (1 - 1e-12) * getattr(one, name)
        assert degrees.ulysses * each.kept_blocks >= one.kept_blocks
        assert sharing * each.repeated == pytest.approx(
            sharing * each.other - one.other, abs=1e-9 * one.other
        )


@pytest.mark.parametrize("degrees", [Degrees(2), Degrees(cfg=2), Degrees(2, cfg=2), Degrees(2, data=3)])
def test_all_processes_do_what_one_does_where_all_divides_and_there_is_no_text(degrees):
    config, model = tiny("wan")
    one, each, sharing = (
        work(config, model, Degrees()),
        work(config, model, degrees),
        degrees.ulysses * degrees.cfg,
    )
    for name in ("dense", "radial", "other"):
        assert sharing * getattr(each, name) == pytest.approx(getattr(one, name), rel=1e-12)
    assert each.repeated == pytest.approx(0, abs=1e-12 * one.other)
    assert degrees.ulysses * each.kept_blocks == one.kept_blocks


def test_text_rows_are_repeated():
    config, model = tiny("hunyuan_video", joint=6)
    each = work(config, model, Degrees(2))
    rows = 2.0 * model.macs * 2  # multiply-adds of a row in 2 layers
    assert each.other == (15 + 6) * rows
    assert each.repeated == 3 * rows


def test_seconds_by_hand():
    config, model = tiny("hunyuan_video", joint=6)
    todo, sent = work(config, model, Degrees(2)), exchange(config, model, Degrees(2)).total
    found = predict(config, model, Degrees(2), Rates(linear=1e6, attention=2e6, bandwidth=1e3))
    assert found.exchange == sent / 1e3
    assert found.dense == pytest.approx(sent / 1e3 + todo.other / 1e6 + todo.dense / 2e6)
    assert found.mean == pytest.approx((5 * found.dense + 5 * found.radial) / 10)
    assert found.efficiency == found.speed_up / 2 < 1


def test_prompts_shared_cost_nothing():
    config, model = tiny("wan", text=12)
    found = predict(config, model, Degrees(data=3), RATES)
    assert (found.speed_up, found.efficiency, found.exchange) == (3, 1, 0)


def test_memory_keeps_weights_whole_and_shares_tokens():
    config = read_config("configs/hunyuan_t2v_4x.yaml", [])
    needs = [rank_memory(config, HUNYUAN, Degrees(ulysses=n)) for n in (1, 2, 4, 24)]
    assert len({need.weights for need in needs}) == 1
    assert [need.activations for need in needs] == sorted((n.activations for n in needs), reverse=True)
    assert needs[1].activations == pytest.approx(needs[0].activations / 2, rel=0.02)


def test_degrees_that_no_run_has_are_refused():
    config, model = tiny("hunyuan_video")
    with pytest.raises(ValueError, match="cfg must be 1 or 1 with this guidance"):
        exchange(config, model, Degrees(cfg=2))


def test_bytes_of_a_ring_by_hand():
    """30 video tokens, 16 of them with the first of 2 ranks, and 6 of text."""
    config, model = tiny("hunyuan_video", joint=6)
    sent, alone = (exchange(config, model, Degrees(ulysses=n, ring=2)) for n in (2, 1))
    key_and_value, found = 2 * 8 * 2, 4 * (8 + 1)  # of a token and head; in float32, with the sum
    assert sent.ring == 2 * 2 * ((16 + 6) * key_and_value + 6 * found)  # layers, heads
    assert alone.ring == 2 * sent.ring and alone.streams == alone.text == 0
    assert sent.streams == 2 * 4 * 8 * 2 * 8 * 2  # layers, streams, tokens, heads
    assert sent.tokens == 8 * 64 * 2 * 3


@pytest.mark.parametrize(("preset", "model"), PRESETS)
@pytest.mark.parametrize("ring", [2, 4, 8])
def test_a_ring_does_little_more_than_its_part(preset, model, ring):
    config = read_config(preset, [])
    one, each = work(config, model, Degrees()), work(config, model, Degrees(ring=ring))
    assert 1 <= ring * each.dense / one.dense < 1.02
    assert 1 <= ring * each.radial / one.radial < 1.12
    assert 1 <= each.busiest <= each.waiting < 1.12
    assert one.kept_blocks <= ring * each.kept_blocks < 1.05 * one.kept_blocks


def test_the_command_writes_its_tables(tmp_path, capsys):
    file = tmp_path / "predicted.md"
    main([*CALL, "--gpus", "1", "8", "--out", str(file)])
    text = file.read_text(encoding="utf-8")
    assert text.startswith("Predicted, not measured: `python -m scripts.parallel_cost configs/hunyuan")
    assert "| 8 | ulysses 8 |" in text and "| 1 | 1 |" in text
    main([*CALL, "--gpus", "16", "--prompts", "1"])
    assert "| 16 | ring 2, ulysses 8 |" in capsys.readouterr().out
    assert text.count("400 TFLOP/s in linear layers, 400 in attention") == 2
    assert "200 GB/s" in text and "25 GB/s" in text and "Left out" in text
    main([*CALL, "--gpus", "1", "8", "--attention-tflops", "600"])
    assert "400 TFLOP/s in linear layers, 600 in attention" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (CALL[:1], "required: --tflops, --bandwidth"),
        (CALL[:3], "required: --bandwidth"),
        ([*CALL, "--gpus", "0"], "whole number from 1 on, got '0'"),
        ([*CALL[:2], "-1", *CALL[3:]], "number above 0, got '-1'"),
        ([*CALL[:4], "nan"], "number above 0, got 'nan'"),
        (["configs/none.yaml", *CALL[1:]], "not found"),
        ([CALL[0], "attention.decay=1", *CALL[1:]], "unknown key"),
        ([CALL[0], "generation.num_frames=510", *CALL[1:]], "nearest: 509"),
        ([CALL[0], "parallel.ulysses_degree=2", *CALL[1:]], "--gpus decides"),
        ([*CALL, "--gpus", "1", "--out", "/dev/null/x.md"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert expected in error


def test_it_imports_nothing_that_starts_processes():
    check = "import sys, scripts.parallel_cost; print(sorted({'xfuser', 'yunchang'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_dry_run_of_several_processes_says_what_each_does(capsys):
    config, model = tiny("hunyuan_video", joint=6)
    assert lines(config, model, Degrees(), "cpu") == []
    sent, memory = lines(config, model, Degrees(ulysses=4), "cpu")
    assert sent.startswith("each a step   0.00 GB sent, ") and sent.endswith(" kept blocks a layer")
    assert "of memory" in memory
    _, around, _ = lines(config, model, Degrees(ring=2), "cpu")
    assert around.startswith("ring          0.00 GB of that; kept blocks of the busiest rank 1.")
    words = ["configs/hunyuan_t2v_4x.yaml", "--dry-run", "parallel.ulysses_degree=8"]
    assert generate(words) == 0
    assert "74.45 GB sent, 20.377 PFLOP dense, 3.660 radial" in capsys.readouterr().out
