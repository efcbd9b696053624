"""The group attention: dense steps, densities of the others, and what adaptive attention costs."""

import pytest

from radial_attn import TokenGrid
from radial_attn.models import apply_radial_attention
from radial_attn.models.pipeline.load import noise_levels
from radial_attn.models.runtime.choices import Choices
from radial_attn.residual import residual_bytes
from radial_attn.selection import block_rows
from scripts.run.attention import attention_arguments, dense_steps, radial_config, step_densities
from scripts.run.config import read_config
from scripts.run.describe import describe_plan
from scripts.run.hub_models import HUB_MODELS, SHIFTS
from scripts.run.plan import make_plan
from tests.support.pipelines import KINDS
from tests.support.plans import plan_of

TINY = "configs/wan_tiny.yaml"
ADAPTIVE = [
    "attention.selection=dense_step",
    "attention.far_field=linear",
    "attention.dense_steps=[0, 1, 10]",
    "attention.density=0.25",
]
RANGE = "density={start: 0.95, end: 0.85}"


def attention(*words: str):
    return read_config(TINY, [f"attention.{word}" for word in words]).attention


def test_the_second_expert_begins_with_a_dense_step():
    sigmas = [1.0, 0.95, 0.9, 0.8, 0.5]
    chosen = attention("selection=dense_step", "dense_steps=1")
    assert dense_steps(chosen, 5, sigmas, boundary=0.9) == (0, 3)
    assert dense_steps(chosen, 5, sigmas, boundary=None) == (0,)
    assert dense_steps(attention("dense_steps=1"), 5, sigmas, boundary=0.9) == (0,)


def test_noise_levels_choose_the_dense_steps():
    plan = make_plan(read_config(TINY, ["attention.dense_steps=sigma>0.95"]), dry_run=True)
    assert plan.dense_steps == tuple(step for step, sigma in enumerate(plan.sigmas) if sigma > 0.95)
    assert 0 < len(plan.dense_steps) < 20


def test_densities_of_a_static_range_are_those_of_masks():
    plan = make_plan(read_config(TINY, ["attention.density={start: 0.6, end: 0.3}"]), dry_run=True)
    values = list(plan.densities.values())
    assert len(values) == 20 and values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(0.6, rel=0.1) and values[-1] == pytest.approx(0.3, rel=0.3)


def test_noise_levels_of_published_models_need_no_download():
    """Includes those of both experts of Wan2.2, whose second begins with a dense step below sigma 0.875."""
    keys = ["attention.dense_steps=sigma>0.95", "attention.selection=dense_step"]
    plan = make_plan(read_config("configs/wan2.2_t2v_a14b.yaml", keys), dry_run=True)
    first = next(step for step, sigma in enumerate(plan.sigmas) if sigma < 0.875)
    assert plan.config.generation.flow_shift is None
    assert plan.dense_steps == (*(step for step, sigma in enumerate(plan.sigmas) if sigma > 0.95), first)
    assert plan.sigmas[20] == pytest.approx(3 / 4, abs=0.01) and plan.config.generation.steps == 40
    for path, shift in SHIFTS.items():
        assert path in HUB_MODELS
        family = "hunyuan_video" if "Hunyuan" in path else "wan"
        assert noise_levels(path, family, 50, shift, 1)[25] == pytest.approx(shift / (1 + shift), abs=0.01)


@pytest.mark.parametrize("steps", ["1", "0.2", "sigma>0.99", "[0, 2]"])
def test_a_range_beside_two_experts_is_planned_as_it_runs(steps, monkeypatch):
    """The second expert of Wan2.2 begins with a dense step, which neither leaves out of the range."""
    kind, seen, attend = KINDS["wan-a14b"], [], Choices.attend

    def noted(self: Choices, *args: object, **options: object) -> object:
        seen.append(self.densities[self._level])
        return attend(self, *args, **options)

    monkeypatch.setattr(Choices, "attend", noted)
    pipeline, group = kind.make(), attention("selection=dense_step", f"dense_steps={steps}", RANGE)
    with apply_radial_attention(pipeline, **attention_arguments(group)):
        kind.generate(pipeline, 6)
    sigmas = pipeline.scheduler.sigmas.tolist()[:6]
    dense = dense_steps(group, 6, sigmas, pipeline.config.boundary_ratio)
    options = {"steps": 6, "sigmas": sigmas, "mask": radial_config(group)}
    planned = step_densities(group, dense, TokenGrid(*kind.grid), **options)
    assert any(step > 2 for step in dense) and len(set(planned.values())) > 1
    calls = kind.halves * len(pipeline.transformer.blocks)
    assert seen == [density for density in planned.values() for _ in range(calls)]


def test_adaptive_attention_is_counted():
    plan = make_plan(read_config(TINY, [*ADAPTIVE, "attention.residual=int8"]), dry_run=True)
    assert plan.dense_steps == (0, 1, 10) and plan.recording_steps == (1, 10)
    assert set(plan.densities.values()) == {0.25} and len(plan.densities) == 17
    one = plan.flops.dense / 20
    far = 36 / 576 + 48 / 576  # pooled keys, and the first-order matrix
    rows = len(block_rows(plan.grid, 16)) / 576 * (1 + 36 / 576)
    wanted = 3 + 17 * (0.25 + far) + 2 * (rows + 0.25 + far)
    assert plan.flops.sparse / one == pytest.approx(wanted)
    kept = residual_bytes("int8", 576, 4, 48, block_size=16, itemsize=4) * 6 * 2
    assert plan.kept(selection="static").device == kept
    plain = make_plan(read_config(TINY, ADAPTIVE), dry_run=True)
    assert plan.memory.total - plain.memory.total == pytest.approx(kept)
    assert plan.kept().device == kept + plain.kept().device


def test_the_dry_run_shows_it():
    plan = make_plan(read_config(TINY, [*ADAPTIVE, "attention.residual=mean"]), dry_run=True)
    text = describe_plan(plan)
    assert [plan.pattern(step) for step in (1, 2)] == ["dense", "chosen"]
    for words in (
        "density       0.2500 (chosen)",
        "dense steps   3 of 20 (0-1, 10), sigma 1 to 0.983, 0.75",
        "selection     blocks chosen at steps 1, 10, their number shared by the heads of a layer; ",
        "far field     linear, ",
        "residual      mean, ",
    ):
        assert words in text


def test_a_residual_of_the_host_takes_none_of_the_gpu():
    """Beside a GPU torch rounds pinned memory up to a power of two: 576 x 4 x 48 bytes, and the scales."""
    keys = [*ADAPTIVE, "attention.residual=int8"]
    here, there = (
        plan_of(read_config(TINY, [*keys, f"attention.residual_memory={memory}"]), device="cuda")
        for memory in ("device", "host")
    )
    alone, kept = {"selection": "static"}, here.kept(selection="static").device
    assert there.kept(**alone) == (0, (2**17 + 2**13) * 6 * 2)
    assert here.memory.total - there.memory.total == pytest.approx(kept)
    assert here.kept(**alone).host == 0 and "of host memory" in describe_plan(there)
    assert "residual_memory=host" in here.shortage(0, here.memory.total - 1)
    plan = make_plan(read_config(TINY, [*keys, "attention.residual_memory=host"]), dry_run=True)
    assert plan.kept(**alone) == (kept, 0)  # on the CPU there is one memory


def test_a_small_share_of_the_operations_measures_the_blocks():
    """Asks for at most 1 % of the run, on the bundled model and at the real size."""
    for preset in ("configs/wan_tiny_adaptive.yaml", "configs/wan2.1_t2v_14b_adaptive.yaml"):
        plan = make_plan(read_config(preset, []), dry_run=True)
        able = plan.model.attention_layers(plan.dense_layers) / plan.model.attention_layers()
        measured = plan.beyond.measured * plan.beyond.steps * able
        one = plan.flops.dense / plan.config.generation.steps
        assert 0 < measured * one <= 0.01 * (plan.flops.sparse + plan.flops.other)


def test_densities_without_sparse_steps():
    config = read_config(TINY, ["attention.dense_steps=20"])
    assert step_densities(config.attention, tuple(range(20)), None, steps=20, sigmas=None, mask=None) == {}
