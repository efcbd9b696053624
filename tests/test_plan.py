"""The arithmetic of --dry-run against the paper, against real modules, and against a run's measured peak."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scripts.generate import main
from scripts.run.config import ROOT, Config, read_config
from scripts.run.errors import UsageError
from scripts.run.hub_models import HUB_MODELS, read_model_info
from scripts.run.model_info import ModelInfo
from scripts.run.plan import (
    GIB,
    attention_flops,
    dense_steps,
    describe,
    fitting,
    host_bytes,
    memory,
    notes,
    other_flops,
    token_grid,
)
from scripts.run.shortage import check_host
from tests.tiny import wan_inputs, wan_transformer

FULL, TINY = "configs/wan2.1_t2v_14b.yaml", "configs/wan_tiny.yaml"
FOURTEEN = HUB_MODELS["Wan-AI/Wan2.1-T2V-14B-Diffusers"]
TOY = ModelInfo(layers=6, heads=4, head_dim=48, ffn=512, patch=(1, 1, 1), vae_base=8)


def elements(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_folder_is_read_without_its_weights(tiny_model):
    model = read_model_info(str(tiny_model))
    assert (model.layers, model.heads, model.head_dim, model.ffn) == (4, 2, 12, 32)
    assert (model.patch, model.vae_base, model.size_factor(1)) == ((1, 1, 1), 4, 16)
    real = WanTransformer3DModel.from_pretrained(tiny_model / "transformer")
    assert model.parameters["transformer"] == elements(real)


def test_tokens_and_operations_of_the_papers_default():
    """Wan2.1-14B, 69 frames, dense: the paper's table says 560 PFLOPs."""
    config = read_config(FULL, [])
    grid = token_grid(config, FOURTEEN)
    assert (grid.frames, grid.height, grid.width, grid.tokens) == (18, 48, 80, 69120)
    dense, sparse = attention_flops(config, FOURTEEN, density=0.25)
    assert dense + other_flops(config, FOURTEEN) == pytest.approx(560e15, rel=0.01)
    assert sparse / dense == pytest.approx(12 / 50 + 38 / 50 * (1 / 40 + 39 / 40 * 0.25))


def test_operations_are_those_that_torch_counts():
    """One call of a real transformer, with an SDPA that torch counts; patching and embeddings left out."""
    transformer = wan_transformer(num_layers=2, ffn_dim=512, attention_head_dim=64, patch_size=(1, 1, 1))
    inputs = wan_inputs(frames=3, height=16, width=16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        transformer(**inputs)
    model = replace(TOY, layers=2, heads=2, head_dim=64, text_tokens=7)
    sizes = [
        f"generation.{key}"
        for key in ("num_frames=9", "height=128", "width=128", "steps=1", "guidance_scale=1")
    ]
    config = read_config(TINY, sizes)
    dense, _ = attention_flops(config, model, density=1.0)
    assert dense + other_flops(config, model) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], []),
        (["attention.dense_steps=2", "attention.dense_last_steps=1"], [0, 1, 19]),
        (["attention.dense_steps=20", "attention.dense_last_steps=20"], list(range(20))),
        (["attention.pattern=dense"], list(range(20))),
    ],
)
def test_dense_steps(overrides, steps):
    assert dense_steps(read_config(TINY, overrides)) == steps


def test_guidance_off_halves_the_work():
    on, off = (read_config(TINY, [f"generation.guidance_scale={scale}"]) for scale in (3, 1))
    assert attention_flops(on, TOY, 0.5)[0] == 2 * attention_flops(off, TOY, 0.5)[0]
    assert other_flops(on, TOY) == 2 * other_flops(off, TOY)


def test_the_dense_pattern_saves_nothing():
    dense, configured = attention_flops(read_config(TINY, ["attention.pattern=dense"]), TOY, 0.5)
    assert dense == configured


def test_memory_of_the_14b_preset_is_that_of_an_80_gib_card():
    """38 GiB of weights; the paper's and the authors' runs of this setting are on one 80 GB H100."""
    need = memory(read_config(FULL, []), FOURTEEN, "cuda")
    assert need.weights == pytest.approx((14.29e9 + 5.68e9) * 2 + 0.127e9 * 4, rel=0.01)
    assert 45 * GIB < need.total < 75 * GIB


def test_predicted_memory_is_near_the_peak_of_a_run(tiny_model: Path, tmp_path: Path):
    """A process of its own, at a size whose decoding takes more than the program itself."""
    sizes = ["num_frames=5", "height=512", "width=512", "steps=1", "guidance_scale=1"]
    words = [f"model.path={tiny_model}", f"output.path={tmp_path / 'a.mp4'}", "attention.block_size=128"]
    command = [sys.executable, "-P", "-m", "scripts.generate", TINY, *words]
    command += [f"generation.{size}" for size in sizes]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=280)
    record = json.loads((tmp_path / "a.json").read_text())
    predicted, peak = record["predicted_memory"], record["peak_memory"]["host_bytes"]
    assert predicted["activations"] > predicted["host"]
    assert peak == pytest.approx(sum(predicted.values()), rel=0.2)


def test_the_weights_of_a_gpu_run_pass_through_the_host():
    config = read_config(FULL, [])
    need = host_bytes(config, FOURTEEN)
    assert need > memory(config, FOURTEEN, "cuda").weights > 37 * GIB
    check_host(config, FOURTEEN, need)
    with pytest.raises(UsageError, match=r"out of memory: model\.path=.* host .* 20 GiB are free"):
        check_host(config, FOURTEEN, 20 * GIB)


def test_weights_that_are_unknown_are_said_to_be():
    config = read_config(FULL, ["attention.pattern=dense"])
    assert notes(config, FOURTEEN) == []
    (note,) = notes(config, replace(FOURTEEN, parameters={}))
    assert "weights of Wan-AI/Wan2.1-T2V-14B-Diffusers are unknown" in note
    assert "an unknown amount for weights" in describe(config, replace(FOURTEEN, parameters={}), "cuda")


def suggestion(config: Config, text: str) -> Config:
    sizes = dict(pair.removeprefix("generation.").split("=") for pair in text.split())
    return replace(config, generation=replace(config.generation, **{k: int(v) for k, v in sizes.items()}))


@pytest.mark.parametrize("budget", [59, 50, 41])
def test_what_would_fit_fits_and_is_allowed(budget):
    config = read_config(FULL, ["generation.num_frames=161"])
    text = fitting(config, FOURTEEN, "cuda", budget * GIB)
    smaller = suggestion(config, text)
    assert memory(smaller, FOURTEEN, "cuda").total <= budget * GIB
    assert smaller.generation.num_frames % 4 == 1
    assert smaller.generation.height % 16 == smaller.generation.width % 16 == 0


def test_nothing_fits_where_the_weights_do_not():
    assert fitting(read_config(FULL, []), FOURTEEN, "cuda", 20 * GIB) is None


def test_what_fits_already_is_left_alone():
    config = read_config(FULL, [])
    assert fitting(config, FOURTEEN, "cuda", 141 * GIB) == "generation.num_frames=69"


def test_the_table_of_the_dry_run():
    text = describe(read_config(FULL, ["attention.dense_last_steps=2"]), FOURTEEN, "cuda")
    rows = dict(line.split(maxsplit=1) for line in text.replace("dense ", "dense_").splitlines())
    assert rows["tokens"].startswith("69120 = 18 latent frames x 48 x 80, 540 blocks of 128")
    assert rows["dense_steps"] == "14 of 50 (0-11, 48-49)"
    assert rows["dense_layers"] == "1 of 40 (0)"
    assert "note" not in rows
    assert float(rows["density"].split()[0]) == pytest.approx(1 - 0.736, abs=1e-3)  # the paper's sparsity
    assert "391.4 PFLOP dense" in text.replace("dense_", "dense ")


def test_the_table_of_a_wanted_density():
    """0.2 is below what a decay factor can do at this length; the curve says what else gives way."""
    text = describe(read_config(FULL, ["attention.density=0.2"]), FOURTEEN, "cuda")
    rows = text.splitlines()
    (density,) = (row for row in rows if row.startswith("density "))
    assert density.split(maxsplit=1)[1] == "0.2016 (radial); density 0.2: decay_factor 0.125, neighbour 0.061"
    curve = [row.removeprefix("curve").split(maxsplit=1) for row in rows if row.startswith("curve ")]
    assert 6 <= len(curve) <= 10
    assert [float(point) for point, _ in curve] == sorted(float(point) for point, _ in curve)
    assert float(curve[0][0]) < 0.1 and float(curve[-1][0]) == 1
    assert ["0.2634", "decay_factor 0.125"] in curve
    assert "curve" not in describe(read_config(FULL, ["attention.pattern=dense"]), FOURTEEN, "cuda")


def test_notes_warn_of_small_frames_and_small_gain():
    config = read_config(FULL, ["generation.height=64", "generation.width=64", "generation.num_frames=33"])
    texts = notes(config, FOURTEEN)
    assert len(texts) == 3
    assert "frames of 16 tokens are under a third of a block" in texts[0]
    assert "attention.decimation_width=16 or less" in texts[1]
    assert "% of the operations: at most 1." in texts[2]
    assert notes(read_config(FULL, []), FOURTEEN) == []


@pytest.mark.parametrize("preset", ["wan2.1_t2v_14b", "wan2.1_t2v_1.3b"])
def test_the_dry_run_of_a_hub_preset_needs_no_network(preset, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([f"configs/{preset}.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr()
    for row in ("tokens", "density", "dense steps", "dense layers", "attention", "transformer", "memory"):
        assert f"\n{row} " in printed.out
    assert printed.err == ""
