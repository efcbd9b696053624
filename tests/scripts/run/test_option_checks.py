"""Offload, storage, compiling, caches and LoRAs with radial attention under them, on random pipelines."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from torch._dynamo.testing import CompileCounter

from radial_attn import RadialConfig
from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.groups import Degrees
from radial_attn.models.pipeline.caches import CACHES, cached
from radial_attn.models.pipeline.efficiency import compile_blocks, economize, store_in_fp8
from scripts.generate import main
from scripts.run.config import read_config
from scripts.run.describe import gain
from scripts.run.errors import UsageError
from scripts.run.families import PLAIN_TEMPLATE
from scripts.run.machine_checks import missing_libraries
from scripts.run.memory import cache_bytes, stored_weights
from scripts.run.model_info import ModelInfo
from scripts.run.option_checks import check_shared
from scripts.run.plan import make_plan
from tests.support.long import all_but
from tests.support.plans import FULL, TINY, TOY, plan_of
from tests.support.tiny import wan_pipeline, wan_transformer
from tests.support.tiny_cosmos import cosmos_pipeline
from tests.support.tiny_hunyuan import TEMPLATE, hunyuan15_pipeline, hunyuan_image_pipeline, hunyuan_pipeline
from tests.support.tiny_kandinsky import kandinsky5_pipeline
from tests.support.tiny_ltx import ltx_pipeline
from tests.support.tiny_ltx2 import ltx2_pipeline
from tests.support.tiny_mochi import mochi_pipeline
from tests.support.tiny_motif import motif_pipeline
from tests.support.tiny_wan import i2v_pipeline
from tests.support.tiny_wan_relatives import (
    animate_pipeline,
    anyflow_pipeline,
    chronoedit_pipeline,
    skyreels_pipeline,
)

SPARSE = RadialConfig(decay_factor=0.25, block_size=16, decimation_width="block")
STEPS, LAYERS = 6, 4
IMAGE = Image.new("RGB", (64, 64), "red")
FAMILIES = {
    "wan": (wan_pipeline, {"num_frames": 9, "guidance_scale": 3.0}),
    "wan2.2": (partial(wan_pipeline, experts=2), {"num_frames": 9, "guidance_scale": 3.0}),
    "hunyuan_video": (hunyuan_pipeline, {"num_frames": 9, "prompt_template": PLAIN_TEMPLATE}),
    "mochi": (mochi_pipeline, {"num_frames": 7}),
    "ltx": (ltx_pipeline, {"num_frames": 5}),
    "ltx2": (ltx2_pipeline, {"num_frames": 5}),
    "hunyuan_video15": (hunyuan15_pipeline, {"num_frames": 5}),
    "motif_video": (motif_pipeline, {"num_frames": 9}),
    "kandinsky5": (kandinsky5_pipeline, {"num_frames": 9, "guidance_scale": 3.0}),
    "cosmos2": (cosmos_pipeline, {"num_frames": 9, "image": IMAGE}),
    "wan_animate": (
        animate_pipeline,
        {"image": IMAGE, "pose_video": 9 * [IMAGE], "face_video": 9 * [IMAGE], "segment_frame_length": 9},
    ),
    "skyreels_v2": (skyreels_pipeline, {"num_frames": 9}),
    "anyflow": (anyflow_pipeline, {"num_frames": 9}),
    "chronoedit": (chronoedit_pipeline, {"image": IMAGE}),
    "wan_i2v": (i2v_pipeline, {"num_frames": 9, "guidance_scale": 1.0, "image": IMAGE}),
    "hunyuan_video_i2v": (
        partial(hunyuan_image_pipeline, "token_replace"),
        {"num_frames": 9, "prompt_template": TEMPLATE, "image": IMAGE},
    ),
}
SKIPPING = {"first_block": {"threshold": 1e9}, "mag": {"ratios": "1,1", "threshold": 1e9}}
# Pairs of every two choices of different columns that go together, in few runs.
MATRIX = [
    ("wan", "none", "none", "blocks", "first_block", True),
    ("wan", "group", "fp8", "none", "taylorseer", True),
    ("wan", "model", "none", "blocks", "mag", False),
    ("wan", "model", "fp8", "none", "none", False),
    ("hunyuan_video", "none", "fp8", "none", "pab", True),
    ("hunyuan_video", "group", "none", "blocks", "first_block", False),
    ("hunyuan_video", "model", "fp8", "none", "mag", True),
    ("hunyuan_video", "model", "none", "blocks", "taylorseer", False),
    ("mochi", "none", "fp8", "none", "first_block", False),
    ("mochi", "group", "none", "none", "pab", True),
    ("mochi", "group", "none", "blocks", "mag", False),
    ("mochi", "model", "none", "blocks", "none", True),
    ("mochi", "none", "none", "blocks", "taylorseer", False),
    ("mochi", "none", "none", "none", "mag", False),
    ("mochi", "model", "none", "none", "pab", False),
    ("wan", "model", "none", "none", "first_block", False),
    ("hunyuan_video", "none", "none", "blocks", "none", False),
    ("hunyuan_video", "group", "fp8", "none", "none", True),
    ("ltx", "group", "fp8", "none", "first_block", False),
    ("ltx2", "model", "none", "blocks", "none", False),
    ("ltx2", "group", "fp8", "none", "none", False),
    ("hunyuan_video15", "group", "fp8", "none", "taylorseer", False),
    ("motif_video", "group", "fp8", "none", "taylorseer", False),
    ("motif_video", "model", "none", "blocks", "none", True),
    ("kandinsky5", "group", "fp8", "none", "taylorseer", False),
    ("kandinsky5", "model", "none", "blocks", "none", False),
    ("cosmos2", "group", "fp8", "none", "none", False),
    ("cosmos2", "model", "none", "blocks", "none", False),
    ("wan_animate", "group", "fp8", "none", "none", False),
    ("skyreels_v2", "group", "fp8", "none", "taylorseer", False),
    ("anyflow", "group", "fp8", "none", "none", False),
    ("anyflow", "model", "none", "blocks", "none", True),
    ("chronoedit", "model", "none", "blocks", "taylorseer", True),
    *((f, *3 * ["none"], c, False) for f in ("wan_i2v", "hunyuan_video_i2v") for c in CACHES[1:]),
]


def build(family: str, lora: bool = False) -> DiffusionPipeline:
    """Makes a tiny pipeline, with a LoRA of random weights if asked for."""
    pipeline = FAMILIES[family][0]()
    if lora:
        torch.manual_seed(1)
        targets = ["to_q", "to_v"]
        pipeline.transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        )
    return pipeline


def run(pipeline: DiffusionPipeline, family: str, cache: str = "none", **options: object) -> tuple:
    """Returns the latents of a video, and the reports of attention and cache."""
    settings = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    with (
        apply_radial_attention(pipeline, SPARSE, dense_steps=1, check="nan") as handle,
        cached(pipeline, cache, STEPS, dense_steps=1, **options) as use,
    ):
        latents = pipeline(prompt=["abc"], generator=generator, **settings, **FAMILIES[family][1]).frames
    return latents, handle.report(), use.report()


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@pytest.mark.parametrize("row", all_but(MATRIX[::4], MATRIX), ids=str)
def test_options_that_may_be_combined_work_together(row, monkeypatch):
    """Steps are counted and no output is bad; without a cache only 8 bits change anything."""
    family, offload, quantization, compile, cache, lora = row
    torch._dynamo.reset()
    eager = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", eager)
    plain, _, _ = run(build(family, lora), family)
    pipeline = build(family, lora)
    economize(pipeline, "cpu", torch.float32, offload=offload, quantization=quantization, compile=compile)
    latents, report, use = run(pipeline, family, cache, **SKIPPING.get(cache, {}))
    assert (report["videos"], report["steps"], report["dense_steps"]) == (1, STEPS, 1)
    limit = (0.1 if quantization == "fp8" else 1e-5) + (0.3 if cache != "none" else 0)
    assert torch.isfinite(latents).all() and error(latents, plain) < limit
    assert (error(latents, plain) > 1e-6) == (quantization == "fp8" or cache != "none")
    assert use["computed"] < use["due"] or cache == "none"
    again, _, _ = run(pipeline, family, cache, **SKIPPING.get(cache, {}))
    assert torch.equal(again, latents)


@pytest.mark.parametrize("preset", ["ltx_i2v", "motif_t2v", "motif_i2v"])
def test_families_whose_tokens_stay_in_one_process(preset):
    config = read_config(f"configs/{preset}.yaml", [])
    with pytest.raises(UsageError, match=r"^model\.family: got .* stay in one process"):
        check_shared(config, Degrees(ulysses=2))
    check_shared(config, Degrees(cfg=2))


def test_a_cache_that_skips_nothing_changes_nothing_and_leaves_no_trace():
    pipeline = build("wan")
    plain, _, _ = run(pipeline, "wan")
    latents, report, use = run(pipeline, "wan", "first_block", threshold=0.0)
    assert torch.equal(latents, plain)
    assert use["due"] == use["computed"] == sum(report["calls"].values()) == STEPS * 2 * LAYERS
    assert not pipeline.transformer.is_cache_enabled
    assert torch.equal(run(pipeline, "wan")[0], plain)


def test_a_first_block_that_hardly_changes_saves_the_others():
    """Each half of guidance computes all blocks in its first step, and one in every other."""
    _, _, use = run(build("wan"), "wan", "first_block", threshold=1e9)
    assert use["computed"] == 2 * (LAYERS + STEPS - 1)


@pytest.mark.parametrize(("cache", "options"), [("first_block", SKIPPING["first_block"]), ("taylorseer", {})])
def test_two_experts_have_a_cache_each(cache, options):
    _, report, use = run(build("wan2.2"), "wan2.2", cache, **options)
    assert report["steps"] == STEPS and use["due"] == STEPS * 2 * LAYERS


def test_compiled_blocks_need_no_more_graphs_under_a_cache():
    graphs = []
    for cache in ("none", "first_block"):
        torch._dynamo.reset()
        pipeline, counter = build("wan"), CompileCounter()
        compile_blocks(pipeline, backend=counter)
        run(pipeline, "wan", cache)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] <= 4


def test_layer_by_layer_offload_moves_weights_under_the_forks():
    """Uses accelerate, like sequential offload on a GPU."""
    plain, _, _ = run(build("wan"), "wan")
    pipeline = build("wan")
    cpu_offload(pipeline.transformer, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(run(pipeline, "wan")[0], plain)


def generate(pipeline: DiffusionPipeline, folder: Path, *keys: str) -> int:
    """Makes `a.mp4` with keys of the group `model`."""
    pipeline.save_pretrained(folder / "model")
    paths = [f"model.path={folder / 'model'}", f"output.path={folder / 'a.mp4'}"]
    sizes = ["height=64", "width=64", "num_frames=9", f"steps={STEPS}"]
    overrides = [f"generation.{size}" for size in sizes] + [f"model.{key}" for key in keys]
    return main([TINY, *paths, *overrides])


def test_int8_by_torchao(tmp_path):
    pytest.importorskip("torchao")
    pipeline = wan_pipeline(attention_head_dim=64, ffn_dim=256)
    assert generate(pipeline, tmp_path, "quantization=int8", "cache=first_block") == 0


def test_keys_reach_the_pipeline_and_the_record(tmp_path, capsys):
    keys = ["quantization=fp8", "cache=taylorseer", "vae_tiling=always"]
    assert generate(wan_pipeline(), tmp_path, *keys) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["cache"]["kind"] == "taylorseer"
    assert 0 < record["cache"]["computed"] < record["cache"]["due"] == STEPS * 2 * LAYERS
    assert "cache      taylorseer: " in capsys.readouterr().out


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr("scripts.run.machine_checks.find_spec", lambda name: None)
    config = read_config(TINY, ["model.quantization=int8", "model.device=cpu"])
    with pytest.raises(UsageError, match=r"needs torchao; install it with: pip install .*torchao"):
        make_plan(config)
    (line,) = missing_libraries(config.model, "cuda")
    assert "needs torchao" in line
    group = read_config(TINY, ["model.offload=group"])
    assert list(missing_libraries(group.model, "cuda")) == []


def test_predicted_storage_and_cache_are_those_of_real_tensors():
    settings = {"attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 20}
    pipeline = wan_pipeline(**settings)
    count = sum(p.numel() for p in wan_transformer(**settings).parameters())
    model = ModelInfo(layers=20, heads=2, head_dim=64, ffn=1024, parameters={"transformer": count})
    overrides = ["model.quantization=fp8", "model.cache=first_block", "generation.num_frames=9"]
    config = read_config(TINY, overrides)
    store_in_fp8(pipeline, torch.float32)
    real = sum(p.numel() * p.element_size() for p in pipeline.transformer.parameters())
    assert stored_weights(model, config.model)["transformer"] == pytest.approx(real, rel=0.15)
    kept: list[torch.Tensor] = []
    with cached(pipeline, "first_block", STEPS):
        hook = next(iter(pipeline.transformer.blocks[0]._diffusers_hook.hooks.values()))

        def note(pipe: object, step: int, time: object, tensors: dict) -> dict:
            states = hook.state_manager._state_cache.values()
            parts = [value for state in states for value in vars(state).values()]
            flat = [x for part in parts for x in (part if isinstance(part, tuple) else (part,))]
            kept[:] = [x for x in flat if isinstance(x, torch.Tensor)]
            return {}

        sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        pipeline(prompt="a", num_frames=9, callback_on_step_end=note, **sizes)
    size = sum(x.numel() * x.element_size() for x in kept)
    plan = plan_of(config, model, "cuda")
    assert cache_bytes(model, plan.grid, config.model, plan.calls) == pytest.approx(size, rel=0.15)


def test_every_choice_of_offload_needs_less_on_a_gpu():
    plan = plan_of(read_config(FULL, ["model.vae_tiling=always"]), device="cuda")
    offloads = ("none", "model", "group", "sequential")
    totals = [plan.memory_of(plan.size, offload=name).total for name in offloads]
    assert totals == sorted(totals, reverse=True) and totals[2] < totals[0] / 4


def test_the_gain_is_printed_before_a_run():
    (line,) = gain(plan_of(read_config(FULL, [])))
    assert line == "attention is 70% of the operations: 1.62x fewer in all with this mask"
    assert gain(plan_of(read_config(TINY, []), TOY)) == []
    assert gain(plan_of(read_config(FULL, ["attention.pattern=dense"]))) == []
