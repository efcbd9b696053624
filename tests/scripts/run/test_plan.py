"""The arithmetic of a plan against the paper, against real modules, and against a run's measured peak."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from radial_attn import TokenGrid
from scripts.run import plan as planning
from scripts.run.attention import attention_arguments
from scripts.run.config import ROOT, VideoSize, read_config
from scripts.run.describe import describe_plan, describe_start, notes
from scripts.run.errors import UsageError
from scripts.run.flops import count_flops
from scripts.run.hub_models import read_model_info
from scripts.run.memory import GIB, host_bytes
from scripts.run.model_readers import from_configs
from scripts.run.plan import RunPlan
from tests.support.plans import FOURTEEN, FULL, TINY, TOY, plan_of
from tests.support.tiny import wan_inputs, wan_pipeline, wan_transformer
from tests.support.tiny_hunyuan import TEXT
from tests.support.tiny_motif import motif_inputs, motif_transformer


def test_a_folder_is_read_without_its_weights(tiny_model):
    model = read_model_info(str(tiny_model))
    assert (model.layers, model.heads, model.head_dim, model.ffn) == (4, 2, 12, 32)
    assert (model.patch, model.vae_base, model.size_factor(1)) == ((1, 1, 1), 4, 16)
    real = WanTransformer3DModel.from_pretrained(tiny_model / "transformer")
    assert model.parameters["transformer"] == real.num_parameters()


def test_tokens_and_operations_of_the_papers_default():
    """The paper's table says 560 PFLOPs for Wan2.1-14B with 69 frames and dense attention."""
    plan = plan_of(read_config(FULL, []))
    grid, flops, density = plan.grid, plan.flops, plan.block_mask.density
    assert (grid.frames, grid.height, grid.width, grid.tokens) == (18, 48, 80, 69120)
    assert flops.dense + flops.other == pytest.approx(560e15, rel=0.01)
    assert flops.sparse / flops.dense == pytest.approx(12 / 50 + 38 / 50 * (1 / 40 + 39 / 40 * density))
    assert density == pytest.approx(1 - 0.736, abs=1e-3)  # the paper's sparsity


def test_operations_are_those_that_torch_counts():
    """Calls a real transformer with an SDPA that torch counts; patching and embeddings are left out."""
    transformer = wan_transformer(num_layers=2, ffn_dim=512, attention_head_dim=64, patch_size=(1, 1, 1))
    inputs = wan_inputs(frames=3, height=16, width=16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(**inputs)
    model = replace(TOY, layers=2, heads=2, head_dim=64, text_tokens=7)
    sizes = ("num_frames=9", "height=128", "width=128", "steps=1", "guidance_scale=1")
    flops = plan_of(read_config(TINY, [f"generation.{size}" for size in sizes]), model).flops
    assert flops.dense + flops.other == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_decoder_of_motif_video_is_counted_over_two_copies_of_the_video():
    transformer = motif_transformer(attention_head_dim=64, rope_axes_dim=(16, 24, 24), num_single_layers=2)
    inputs = motif_inputs(frames=3, height=32, width=32)
    del inputs["image_embeds"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(**inputs)
    config = {"_class_name": type(transformer).__name__, **transformer.config}
    model = replace(from_configs(config, {}, {}), joint_text=TEXT)
    flops = count_flops(model, TokenGrid(3, 16, 16, TEXT), 1.0)
    assert (model.layers, model.decoder_layers) == (3, 1)
    assert flops.dense + flops.other == pytest.approx(counter.get_total_flops(), rel=0.03)
    without = count_flops(replace(model, decoder_layers=0), TokenGrid(3, 16, 16, TEXT), 1.0)
    assert without.other < 0.5 * flops.other and without.dense == flops.dense


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], ()),
        (["attention.dense_steps=2", "attention.dense_last_steps=1"], (0, 1, 19)),
        (["attention.dense_steps=20", "attention.dense_last_steps=20"], tuple(range(20))),
        (["attention.pattern=dense"], tuple(range(20))),
    ],
)
def test_dense_steps(overrides, steps):
    plan = plan_of(read_config(TINY, overrides), TOY)
    assert plan.dense_steps == steps
    assert [step for step in range(20) if plan.pattern(step) == "dense"] == list(steps)
    assert plan.dense_layers == (TOY.layers if "attention.pattern=dense" in overrides else 0)


def test_guidance_off_halves_the_work():
    on, off = (plan_of(read_config(TINY, [f"generation.guidance_scale={scale}"]), TOY) for scale in (3, 1))
    assert (on.calls, off.calls) == (2, 1)
    assert on.flops.dense == 2 * off.flops.dense and on.flops.other == 2 * off.flops.other


def test_the_dense_pattern_saves_nothing():
    flops = plan_of(read_config(TINY, ["attention.pattern=dense"]), TOY).flops
    assert flops.dense == flops.sparse


def test_a_dense_run_beside_an_adaptive_one_takes_its_keys():
    """Every comparison makes one: of the keys of adaptive attention it uses none."""
    words = ["selection=dense_step", "residual=int8", "far_field=mean", "dense_steps=1", "pattern=dense"]
    plan = plan_of(read_config(TINY, [f"attention.{word}" for word in words]), TOY)
    assert plan.flops.dense == plan.flops.sparse and plan.recording_steps == ()
    adaptive = {"selection", "residual", "residual_memory", "far_field", "budget"}
    assert not adaptive & attention_arguments(plan.config.attention).keys()


def test_memory_of_the_14b_preset_is_that_of_an_80_gib_card():
    """Weights take 38 GiB. The paper runs this setting on one 80 GB H100."""
    need = plan_of(read_config(FULL, []), device="cuda").memory
    assert need.weights == pytest.approx((14.29e9 + 5.68e9) * 2 + 0.127e9 * 4, rel=0.01)
    assert 45 * GIB < need.total < 75 * GIB


def measured(model: Path, folder: Path, *keys: str) -> tuple[float, dict[str, float], RunPlan]:
    """Returns peak and prediction of a run in its own process, whose heap keeps nothing, and its plan."""
    sizes = ["num_frames=5", "height=512", "width=512", "steps=1", "guidance_scale=1"]
    overrides = [TINY, f"model.path={model}", f"output.path={folder / 'a.mp4'}", "attention.block_size=128"]
    overrides += [f"generation.{size}" for size in sizes]
    command = [sys.executable, "-P", "-m", "scripts.generate", *overrides, *keys]
    settings = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "131072"}
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | settings)
    record = json.loads((folder / "a.json").read_text())
    plain = plan_of(read_config(TINY, overrides[1:]))
    return record["peak_memory"]["host_bytes"], record["predicted_memory"], plain


@pytest.mark.long
def test_predicted_memory_is_near_the_peak_of_a_run(tiny_model, tmp_path):
    """Decoding takes more than the program itself."""
    peak, predicted, _ = measured(tiny_model, tmp_path)
    assert predicted["activations"] > predicted["host"]
    assert peak == pytest.approx(sum(predicted.values()), rel=0.2)


@pytest.mark.long
def test_predicted_memory_of_tiles_and_fp8_is_near_the_peak_of_a_run(tmp_path):
    wan_pipeline().save_pretrained(tmp_path / "model")
    keys = ("model.vae_tiling=always", "model.quantization=fp8")
    peak, predicted, plain = measured(tmp_path / "model", tmp_path, *keys)
    assert peak == pytest.approx(sum(predicted.values()), rel=0.15)
    assert peak < 0.75 * plain.memory.total


def cards(monkeypatch: pytest.MonkeyPatch, gpu: tuple[float, float], host: tuple[float, float]) -> None:
    """Pretends that GPU and host have this much memory free and in all, in GiB."""
    sizes = {"cuda": gpu, "cpu": host}
    monkeypatch.setattr(planning, "room", lambda device: sizes[device][0] * GIB)
    monkeypatch.setattr(planning, "total_memory", lambda device: sizes[device][1] * GIB)


def for_gpu(*overrides: str) -> RunPlan:
    """Plans a run of the 14B preset on the GPU."""
    return plan_of(read_config(FULL, list(overrides)), device="cuda", dry_run=False)


def test_a_gpu_with_room_is_warned_of_nothing(monkeypatch):
    cards(monkeypatch, (79, 80), (60, 64))
    plan = for_gpu()
    assert plan.warnings == ()
    assert not [line for line in describe_start(plan) if "memory" in line]


def test_a_prediction_that_does_not_fit_a_gpu_only_warns(monkeypatch):
    """Activations are predicted and never measured there: the run may fit all the same."""
    cards(monkeypatch, (46, 48), (60, 64))
    plan = for_gpu()
    (warning,) = plan.warnings
    assert warning.startswith("memory may be short: ") and "46 GiB free" in warning
    assert "would fit: generation.num_frames=" in warning
    assert f"note: {warning}" in describe_start(plan)
    assert plan_of(read_config(FULL, []), device="cuda").warnings == ()  # a dry run may be for another card


def test_weights_that_exceed_the_card_are_refused(monkeypatch):
    """38, 27 and 1 GiB are on the card at a time."""
    cards(monkeypatch, (23, 24), (60, 64))
    for offload in ("none", "model"):
        message = r"out of memory: the weights of model.path=Wan-AI.* 24 GiB; set model.offload=group"
        with pytest.raises(UsageError, match=message):
            for_gpu(f"model.offload={offload}")
    assert for_gpu("model.offload=group", "model.vae_tiling=always").warnings == ()


def test_the_weights_of_a_gpu_run_pass_through_the_host(monkeypatch):
    """A host without room for them gives a warning, as files are mapped and not held."""
    config = read_config(FULL, [])
    assert host_bytes(FOURTEEN, config.model) > plan_of(config, device="cuda").memory.weights > 37 * GIB
    cards(monkeypatch, (79, 80), (20, 64))
    (warning,) = for_gpu().warnings
    assert warning.startswith("host memory may be short: ") and "20 GiB are free" in warning
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # processes of this machine, each of which reads all
    (warning,) = for_gpu().warnings
    assert "5.00 GiB are free" in warning


def test_a_cpu_without_room_refuses_with_what_would_fit(monkeypatch):
    """On the CPU the prediction was measured. Several processes share the host."""
    config = read_config(TINY, ["generation.height=1024", "generation.width=1024"])
    need = plan_of(config).memory.total
    cards(monkeypatch, (0, 0), (0.9 * need / GIB, 64))
    with pytest.raises(UsageError, match=r"out of memory: generation\.height=1024 .* would fit: generat"):
        plan_of(config, dry_run=False)
    cards(monkeypatch, (0, 0), (1.1 * need / GIB, 64))
    assert plan_of(config, dry_run=False).warnings == ()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"out of memory: the processes of this machine need about"):
        plan_of(config, processes=2, dry_run=False)


def test_unknown_weights_are_noted():
    config = read_config(FULL, ["attention.pattern=dense"])
    assert notes(plan_of(config)) == []
    unknown = plan_of(config, replace(FOURTEEN, parameters={}), "cuda")
    (note,) = notes(unknown)
    assert "weights of Wan-AI/Wan2.1-T2V-14B-Diffusers is unknown" in note
    text = describe_plan(unknown)
    assert "an unknown amount for weights" in text and "GPU memory" not in text


def suggestion(plan: RunPlan, text: str) -> VideoSize:
    """Returns the size that a line names; the rest is as planned."""
    names = {"num_frames": "frames", "height": "height", "width": "width"}
    sizes = dict(pair.removeprefix("generation.").split("=") for pair in text.split(": ")[1].split())
    return plan.size._replace(**{names[name]: int(value) for name, value in sizes.items()})


@pytest.mark.parametrize("budget", [59, 50, 41])
def test_the_suggested_size_fits_and_is_allowed(budget):
    plan = plan_of(read_config(FULL, ["generation.num_frames=161"]), device="cuda")
    smaller = suggestion(plan, plan.nearest_fit(budget * GIB))
    assert plan.memory_of(smaller).total <= budget * GIB
    assert smaller.frames % 4 == 1 and smaller.height % 16 == smaller.width % 16 == 0
    larger = smaller._replace(frames=smaller.frames + 4)
    assert smaller.frames == plan.size.frames or plan.memory_of(larger).total > budget * GIB


def test_nothing_fits_if_the_weights_do_not_and_what_fits_already_is_left_alone():
    plan = plan_of(read_config(FULL, []), device="cuda")
    assert plan.nearest_fit(20 * GIB) == "no size of this model would fit; try configs/wan_tiny.yaml"
    assert plan.nearest_fit(141 * GIB) == "would fit: generation.num_frames=69"


def test_notes_warn_of_small_frames_and_small_gain():
    config = read_config(FULL, ["generation.height=64", "generation.width=64", "generation.num_frames=33"])
    texts = notes(plan_of(config))
    assert len(texts) == 3
    assert "frames of 16 tokens are under a third of a block" in texts[0]
    assert "attention.decimation_width=16 or less" in texts[1]
    assert "% of the operations: at most 1." in texts[2]
    assert notes(plan_of(read_config(FULL, []))) == []
