"""LoRA training by its command: what it learns and writes."""

import math
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from radial_attn.models import apply_radial_attention
from radial_attn.models.lora.load import Lora, load_loras
from radial_attn.models.runtime import layer_attention
from radial_attn.models.training.flow import predict_velocity, stack_text
from scripts.generate import main as generate
from scripts.lora import step
from scripts.lora.config import SCHEMA
from scripts.lora.plan import plan_training
from scripts.lora.setup import prepared
from scripts.lora.step import learning_rate, noise_levels
from scripts.lora.train import train_step
from scripts.run.attention import radial_config
from tests.support.auto_backend import AUTO
from tests.support.families import assert_same_gradients
from tests.support.far_cases import defined
from tests.support.lora_cases import (
    CAPTIONS,
    FILE,
    adapter,
    launch_training,
    log,
    losses,
    make_latents,
    train,
    write_config,
)
from tests.support.plans import TINY
from tests.support.tiny_hunyuan import hunyuan_pipeline
from tests.support.tiny_mochi import mochi_pipeline

SEED = 0  # drops the first of two captions at a rate of one half


def test_adapter_loads_everywhere(lora_run, tiny_model, lora_config):
    """Plain diffusers and our own loader give the same model, which differs from the one before."""
    state = adapter(lora_run)
    assert len(state) == 4 * 4 * 2 and all(name.startswith("transformer.blocks.") for name in state)
    assert all(x.abs().sum() > 0 for x in state.values())  # the matrices B too, which began at zero
    plain, theirs, ours = (WanPipeline.from_pretrained(tiny_model) for _ in range(3))
    theirs.load_lora_weights(lora_run)
    load_loras(ours, [Lora(lora_run / FILE)])
    inputs = torch.randn(1, 4, 3, 6, 8), torch.tensor([500.0]), torch.randn(1, 7, 16)
    with torch.no_grad():
        before, expected, output = (each.transformer(*inputs).sample for each in (plain, theirs, ours))
    assert torch.equal(output, expected) and not torch.allclose(output, before, atol=1e-4)


def test_generation_says_what_an_adapter_was_trained_for(lora_run, tiny_model, capsys, tmp_path):
    sizes = ["generation.num_frames=9", "generation.height=48", "generation.width=64", "generation.steps=2"]
    words = [TINY, f"model.path={tiny_model}", f"model.loras={lora_run}", *sizes]
    mask = ["attention.block_size=16", "attention.decay_factor=0.2", "attention.neighbour=half"]
    mask += ["attention.dense_layers=1"]
    assert generate([*words, *mask, f"output.path={tmp_path / 'a.mp4'}"]) == 0
    assert "was trained with" not in capsys.readouterr().out
    assert generate([*words, *mask, "generation.num_frames=13", "attention.sink=false", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"note: LoRA {lora_run} was trained with videos of 9x48x64 (here 13x48x64), " in out
    assert "attention.sink=True (here False)" in out


def test_loss_is_that_of_flow_matching(lora_config, tmp_path):
    """The loss is the error of the velocity against noise - video, with some captions left out."""
    parsed = SCHEMA.read(str(lora_config), [f"output.path={tmp_path}"])
    with prepared(plan_training(parsed)) as (run, _):
        indices, sigma = [0, 4], torch.tensor([0.25, 0.75])
        random = torch.Generator().manual_seed(SEED)
        loss = step.flow_loss(run, run.plain, indices, sigma, random=random, drop=0.5)
        store, transformer = run.store, run.plain
        random.manual_seed(SEED)
        dropped = torch.rand(2, generator=random) < 0.5
        assert dropped.tolist() == [True, False]
        video = torch.stack([store.load(i)[0] for i in indices])
        noise = torch.randn(video.shape, generator=random)
        noisy = torch.stack([0.75 * video[0] + 0.25 * noise[0], 0.25 * video[1] + 0.75 * noise[1]])
        text = stack_text([store.empty_text, store.load(4)[1]])
        velocity = transformer(noisy, 1000 * sigma, text["prompt_embeds"]).sample
        assert torch.allclose(loss, (velocity - (noise - video)).square().mean())


def test_training_uses_radial_attention(lora_config, tmp_path):
    parsed = SCHEMA.read(str(lora_config), [f"output.path={tmp_path}", "attention.neighbour=0.1"])
    with prepared(plan_training(parsed)) as (run, _), torch.no_grad():
        latents, text = run.store.load(0)
        inputs = latents[None], torch.tensor([0.5]), stack_text([text])
        radial = predict_velocity(run.plain, "wan", *inputs)
        plain = WanPipeline.from_pretrained(parsed.model.path).transformer
        dense = predict_velocity(plain, "wan", *inputs)
        assert not torch.allclose(radial, dense, atol=1e-4)
        with apply_radial_attention(plain, radial_config(parsed.attention), dense_layers=1):
            assert torch.allclose(predict_velocity(plain, "wan", *inputs), radial, atol=1e-6)


def test_training_counts_what_the_mask_drops(lora_config, tmp_path, monkeypatch):
    """The adapter's gradients are those of the far field by its definition, checkpointed or not."""
    keys = ["attention.neighbour=0.1", "attention.far_field=mean", "train.checkpointing=true"]
    parsed = SCHEMA.read(str(lora_config), [f"output.path={tmp_path}", *keys])

    def gradients(run: step.Run) -> dict[str, torch.Tensor]:
        random, sigma = torch.Generator().manual_seed(SEED), torch.tensor([0.25, 0.75])
        step.flow_loss(run, run.plain, [0, 4], sigma, random=random, drop=0.0).backward()
        of_all = {name: parameter.grad for name, parameter in run.trained.items()}
        run.optimizer.zero_grad(set_to_none=True)
        return of_all

    with prepared(plan_training(parsed)) as (run, _):
        assert train_step(run, 0)["skipped"] == 0  # no matrix B is zero after it
        actual = gradients(run)
        monkeypatch.setattr(layer_attention, "radial_attention", by_definition)
        expected = gradients(run)
        run.plain.disable_gradient_checkpointing()
        monkeypatch.undo()
        assert_same_gradients(actual, expected)
        assert_same_gradients(gradients(run), expected)


def by_definition(*args: Any, backend: str, far_field: str, **_: object) -> torch.Tensor:
    *tensors, mask = args
    assert (backend, far_field) == (AUTO, "mean") and not mask.is_dense
    return defined(tensors, mask, far_field, scale=tensors[0].shape[-1] ** -0.5).float()


def test_noise_levels():
    random = torch.Generator().manual_seed(0)
    uniform = noise_levels(20000, random, kind="uniform", shift=1.0)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01) and 0 <= uniform.min() < uniform.max() <= 1
    shifted = noise_levels(20000, random, kind="uniform", shift=5.0)
    # the median of t is 1/2, and sigma rises with t: 5 / 2 over 1 + 4 / 2
    assert shifted.median().item() == pytest.approx(2.5 / 3, abs=0.01)
    normal = noise_levels(20000, random, kind="logit_normal", shift=1.0)
    assert torch.logit(normal).std().item() == pytest.approx(1.0, abs=0.03)
    for kind in ("uniform", "logit_normal"):
        low = noise_levels(5000, random, kind=kind, shift=5.0, span=(0.0, 0.875))
        high = noise_levels(5000, random, kind=kind, shift=5.0, span=(0.875, 1.0))
        assert low.max() <= 0.8751 and high.min() >= 0.8749


def test_learning_rate(lora_config):
    parsed = SCHEMA.read(str(lora_config), ["train.steps=100", "train.warmup=10", "train.rate=1.0"])
    rates = [learning_rate(parsed, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90))) and rates[99] < 0.001
    flat = SCHEMA.read(str(lora_config), ["train.schedule=constant", "train.warmup=0", "train.rate=1.0"])
    assert {learning_rate(flat, step) for step in range(6)} == {1.0}


def test_the_mean_of_the_adapter_is_saved(lora_config, tmp_path):
    """With decay 0.5 it is half the mean before and half the new parameters."""
    words = ["train.steps=2", "train.save_every=1", "train.ema=0.5"]
    assert train(lora_config, tmp_path, *words) == 0
    first, second = (torch.load(tmp_path / f"step_00000{n}" / "state.pt") for n in (1, 2))
    saved = adapter(tmp_path)
    for name, value in second["trained"].items():
        mean = 0.5 * first["average"][name] + 0.5 * value
        assert torch.allclose(saved["transformer." + name.replace(".length.", ".")], mean)


def test_validation(lora_config, lora_run, tmp_path):
    """The noise is always the same, samples are held out, the best adapter is kept, videos are written."""
    words = ["validation.every=2", "validation.videos=1", "train.rate=1e-9"]
    assert train(lora_config, tmp_path, *words) == 0
    first, *later = (entry["validation_loss"] for entry in log(tmp_path) if "validation_loss" in entry)
    assert later == pytest.approx([first] * 2, rel=1e-5)
    assert (tmp_path / "best" / FILE).is_file()
    videos = sorted((tmp_path / "videos" / "000002").glob("*"))
    assert [file.suffix for file in videos] == [".mp4", ".txt"]
    assert videos[1].read_text().strip() in CAPTIONS
    config = SCHEMA.read(str(lora_config), [f"output.path={tmp_path / 'x'}", *words])
    with prepared(plan_training(config)) as (run, _):
        trained = {i for members in run.sampler.buckets.values() for i in members}
        assert run.held_out == [2, 6] and trained == set(range(8)) - {2, 6}


def test_mochi_trains(tmp_path):
    model, size = tmp_path / "model", (13, 48, 64)
    mochi_pipeline().save_pretrained(model)
    latents = make_latents(model, tmp_path / "latents", "mochi", size, channels=12, step=6)
    config = write_config(tmp_path / "tiny.yaml", model, latents, "mochi", size)
    assert train(config, tmp_path / "out", "train.steps=2", "train.checkpointing=true") == 0
    assert all(x.abs().sum() > 0 for x in adapter(tmp_path / "out").values())


def test_hunyuan_video_shared_by_two_processes_trains_as_in_one(tmp_path):
    hunyuan_pipeline().save_pretrained(tmp_path / "model")
    latents = make_latents(tmp_path / "model", tmp_path / "latents", "hunyuan_video")
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "model", latents, "hunyuan_video")
    words = ["train.steps=2", "train.checkpointing=true"]
    words += ["attention.far_field=mean", "attention.neighbour=0.1"]
    assert train(config, tmp_path / "one", *words) == 0
    launch_training(str(config), f"output.path={tmp_path / 'two'}", "parallel.ulysses_degree=2", *words)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert all(x.abs().sum() > 0 for x in adapter(tmp_path / "one").values())
