"""The forks of every family under LoRA, gradient checkpointing and torch.compile."""

from operator import attrgetter

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from radial_attn.models import apply_radial_attention
from tests.support.auto_backend import AUTO
from tests.support.families import (
    BY_NAME,
    FAMILIES,
    FULL,
    SPARSE,
    Family,
    assert_near,
    assert_same_gradients,
    families,
    gradients,
    video,
)
from tests.support.long import all_but
from tests.support.tiny import wan_inputs, wan_transformer

SCHEDULE = {"dense_steps": 1, "dense_layers": 1, "dense_last_steps": 1, "num_steps": 4}
LAYERS = r"(to_q(uery)?|to_k(ey)?|to_v(alue)?|to_out\.0|out_layer|add_[qkv]_proj|to_add_out)"
LORA = LoraConfig(
    r=2,
    lora_alpha=2,
    target_modules=rf".*blocks\.\d+\.(attn1?|self_attention)\.{LAYERS}",
    init_lora_weights=False,
)


def trained(family: Family, lora: bool) -> torch.nn.Module:
    transformer = family.transformer().train()
    if lora:
        torch.manual_seed(1)
        transformer.add_adapter(LORA)
    return transformer


@families
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_upstream_checkpointed_or_not(family, lora):
    """Includes padded text: what upstream computes for it reaches no loss."""
    transformer, inputs = trained(family, lora), family.sized(4, 4, 4, **family.samples[-1])
    expected = gradients(transformer, inputs)
    assert all("lora" in name for name in expected) is lora
    assert len(expected) >= 2 * 3 * family.layers  # two matrices each for at least query, key and value
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        assert_same_gradients(gradients(transformer, inputs), expected)
        transformer.enable_gradient_checkpointing()
        assert_same_gradients(gradients(transformer, inputs), expected)


@families
def test_checkpointed_blocks_keep_the_mask_and_text_of_their_own_call(family):
    """Makes two calls of different grids and steps, then one backward pass that reruns the blocks of both."""
    transformer = trained(family, lora=family.name != "wan")
    times = (400.0, 900.0) if family.name == "mochi" else (900.0, 400.0)
    calls = [
        family.sized(*size, timestep=time, **samples)
        for size, time, samples in zip([(), (5, 4, 6)], times, family.samples[-2:], strict=True)
    ]
    with apply_radial_attention(transformer, SPARSE, dense_steps=1) as handle:
        expected = gradients(transformer, *calls)
        assert handle.report()["dense_steps"] == 1
        transformer.enable_gradient_checkpointing()
        assert_same_gradients(gradients(transformer, *calls), expected)


def test_random_timesteps_in_training_are_all_radial():
    transformer = wan_transformer().train()
    with apply_radial_attention(transformer, SPARSE) as handle:
        gradients(transformer, *(wan_inputs(timestep=time) for time in (300.0, 800.0, 100.0, 100.0, 999.0)))
        assert handle.report()["calls"] == {AUTO: 5 * 4}


def compile_blocks(transformer: torch.nn.Module, **options: object) -> None:
    """Compiles each block; Mochi lists no repeated ones, so compile_repeated_blocks does not serve it."""
    torch._dynamo.reset()
    names = {"MochiTransformerBlock", *(transformer._repeated_blocks or [])}
    for module in transformer.modules():
        if type(module).__name__ in names:
            module.compile(**options)


@pytest.mark.parametrize(
    ("name", "changes", "check", "graphs", "schedule"),
    [
        ("wan", {"num_layers": 10}, "off", 4, SCHEDULE),
        pytest.param("wan", {"num_layers": 10}, "nan", 4, SCHEDULE, marks=pytest.mark.long),
        ("wan", {"num_layers": 10}, "reference", 5, SCHEDULE),  # one more for the calls that are compared
        # two kinds of blocks, and two graphs for the inputs
        pytest.param("hunyuan_video", {}, "nan", 9, SCHEDULE, marks=pytest.mark.long),
        pytest.param("hunyuan_video15", {}, "nan", 5, SCHEDULE, marks=pytest.mark.long),
        ("mochi", {}, "nan", 2, {}),  # the last block has no text
        ("wan_vace", {}, "nan", 3, {}),
        ("ltx", {}, "nan", 1, {}),
        ("kandinsky5", {}, "nan", 2, {}),  # the text has blocks of its own
    ],
)
def test_compiled_blocks_need_few_graphs(name, changes, check, graphs, schedule):
    """Counts a radial and a dense graph for each kind of block, and another for its dense layers.

    Guidance, text lengths, more steps or layers, a second video and the check add none.
    """
    family = BY_NAME[name]
    transformer, counter = family.transformer(**changes), CompileCounter()
    with apply_radial_attention(transformer, SPARSE, check=check, **schedule) as handle:
        expected = video(family, transformer, frames=4, height=4, width=6)
        compile_blocks(transformer, fullgraph=True, backend=counter)
        assert_near(video(family, transformer, frames=4, height=4, width=6), expected)
        before = counter.frame_count
        assert 0 < before <= graphs + (torch.__version__ < "2.9" and "hunyuan" in name)  # 2.8 makes one more
        assert_near(video(family, transformer, frames=4, height=4, width=6), expected)
        if not schedule:
            more = video(family, transformer, 7, frames=4, height=4, width=6)
            assert_near(more[-2:], expected[-2:])
        assert counter.frame_count == before
        report = handle.report()
    if schedule:
        layers = changes.get("num_layers", 4)
        assert report["calls"] == {"dense": 3 * 2 * (2 * layers + 2), AUTO: 3 * 2 * 2 * (layers - 1)}


@pytest.mark.parametrize(
    "family", all_but(["wan", "ltx"], FAMILIES, attrgetter("name")), ids=attrgetter("name")
)
def test_compiled_blocks_follow_dense_steps_and_grids(family):
    """Mochi's dense attention takes text out of the padding, which breaks the graph."""
    both_kinds = family.name == "hunyuan_video"  # of blocks, one each and none always dense: they are slow
    few = {"num_layers": 1, "num_single_layers": 1} if both_kinds else {"num_layers": 3}
    transformer, sizes = family.transformer(**few), [{}, {"frames": 4, "height": 3}, {}]
    automatic = family.name in ("wan", "hunyuan_video")  # a size is dynamic after its first change
    dense_layers = 0 if both_kinds else 1
    with apply_radial_attention(transformer, SPARSE, dense_steps=1, dense_layers=dense_layers):
        expected = [video(family, transformer, 2, 1, **size) for size in sizes]
        options = {"fullgraph": family.name != "mochi", "dynamic": None if automatic else False}
        compile_blocks(transformer, **options, backend="eager")
        for size, output in zip(sizes, expected, strict=True):
            assert_near(video(family, transformer, 2, 1, **size), output)


@pytest.mark.parametrize("name", all_but(["wan"], ["wan", "hunyuan_video15"]))
def test_a_compiled_transformer_runs_and_is_unwrapped(name):
    """HunyuanVideo 1.5 breaks the graph at its sorting of the text."""
    family = BY_NAME[name]
    torch._dynamo.reset()
    transformer = family.transformer(num_layers=2)
    compiled = torch.compile(transformer, backend="eager")
    with apply_radial_attention(transformer, SPARSE, **SCHEDULE):
        expected = video(family, transformer, frames=4, height=4, width=6)
    with apply_radial_attention(compiled, SPARSE, **SCHEDULE) as handle:
        assert_near(video(family, compiled, frames=4, height=4, width=6), expected)
        assert handle.report()["steps"] == 4
