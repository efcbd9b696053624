"""Positions of a longer video: each method by other formulas, in the tables and through the models."""

import math

import pytest
import torch

from radial_attn.models import apply_radial_attention
from radial_attn.models.pipeline.rope_scaling import (
    METHODS,
    describe,
    extend_positions,
    rescale,
    temporal_frequencies,
)
from tests.support.families import BY_NAME, FAMILIES, SPARSE, assert_same_gradients, gradients, run
from tests.support.rope_cases import REAL
from tests.support.tiny import wan_inputs, wan_pipeline, wan_transformer
from tests.support.tiny_ltx import ltx_transformer
from tests.support.tiny_mochi import mochi_transformer

CHANGING = METHODS[1:]
OTHER_ROPES = ("ltx", "skyreels", "chronoedit", "anyflow")
families = pytest.mark.parametrize(
    "family",
    [family for family in FAMILIES if family.name not in OTHER_ROPES],
    ids=lambda family: family.name,
)


def expected_frequencies(method, case):
    """Applies the rules of the papers, one component after the other; `case` is as in REAL."""
    channels, base, train, frames, k = case
    half, stretch = channels // 2, frames / train
    raised = base * stretch ** (half / (half - 1))
    rates = []
    for i in range(half):
        rate = base ** (-2 * i / channels)
        turns = train * rate / (2 * math.pi)
        if method == "riflex" and i == k - 1:
            rate = 0.9 * 2 * math.pi / frames
        elif method == "interpolate":
            rate *= train / frames
        elif method == "ntk":
            rate = raised ** (-2 * i / channels)
        elif method == "yarn":
            kept = min(max(turns - 1, 0), 1)
            rate = kept * rate + (1 - kept) * rate * train / frames
        rates.append(rate)
    return torch.tensor(rates, dtype=torch.float64)


@pytest.mark.parametrize("method", CHANGING)
@pytest.mark.parametrize("name", REAL)
def test_frequencies_and_tables_of_the_real_sizes(name, method):
    make, *case = REAL[name]
    channels, base, train, frames, _ = case
    transformer, latents = make(), torch.zeros(1, 4, frames, 4, 6)
    expected = expected_frequencies(method, case)
    before = temporal_frequencies(channels, base)
    factors = rescale(method, before, train, frames)
    torch.testing.assert_close(before * factors, expected, rtol=1e-12, atol=0)
    plain = [table.squeeze() for table in transformer.rope(latents)]
    with extend_positions(transformer, method, train, frames):
        tables = [table.squeeze() for table in transformer.rope(latents)]
    tokens = len(plain[0]) // frames
    angles = torch.arange(frames, dtype=torch.float64)[:, None] * expected
    angles = angles.repeat_interleave(tokens, dim=0).repeat_interleave(2, dim=1)
    stays = torch.cat([factors.repeat_interleave(2) == 1, torch.ones(128 - channels, dtype=torch.bool)])
    assert not stays.all()
    for table, original, turned in zip(tables, plain, (angles.cos(), angles.sin()), strict=True):
        assert table.dtype == original.dtype == torch.float32
        assert torch.equal(table[:, stays], original[:, stays])
        # upstream's float32 angles of 60 radians are off by 4e-6
        torch.testing.assert_close(table[:, :channels].double(), turned, rtol=0, atol=1e-5)
        torch.testing.assert_close(table[:, ~stays].double(), turned[:, ~stays[:channels]], rtol=0, atol=1e-7)


def test_the_component_that_riflex_lowers():
    """Compares with the authors' k of HunyuanVideo (4) and CogVideoX (2), and with Wan's known period."""
    for channels, base, train, frames, k in [
        (16, 256.0, 33, 66, 4),
        (16, 10000.0, 13, 25, 2),
        (44, 10000.0, 21, 42, 4),
        (44, 10000.0, 40, 80, 6),
    ]:
        factors = rescale("riflex", temporal_frequencies(channels, base), train, frames)
        assert (factors != 1).nonzero().flatten().tolist() == [k - 1]
    factors = rescale("riflex", temporal_frequencies(16, 256.0), 33, 50)
    assert torch.equal(factors, torch.ones(8, dtype=torch.float64))  # all 50 lie in one period of 50.3
    factors = rescale("riflex", torch.tensor([3.0, 1.0, 2.0]), 20, 40)  # all turned over: the longest
    torch.testing.assert_close(factors, torch.tensor([1, 0.9 * 2 * math.pi / 40, 1], dtype=torch.float64))


def learned(head, method, train, frames):
    """Applies a method to the learned frequencies of one head, as its docstring defines it."""
    rates = [abs(rate) for rate in head if rate != 0]
    long = [rate for rate in rates if 2 * math.pi / rate >= train] or [min(rates)]
    changed = []
    for rate in head:
        factor = 1.0
        if rate != 0 and method == "riflex" and abs(rate) == max(long):
            factor = min(1, 0.9 * 2 * math.pi / frames / abs(rate))
        elif rate != 0 and method == "interpolate":
            factor = train / frames
        elif rate != 0 and method == "ntk":
            factor = (train / frames) ** (
                math.log(max(rates) / abs(rate)) / math.log(max(rates) / min(rates))
            )
        elif rate != 0 and method == "yarn":
            kept = min(max(train * abs(rate) / (2 * math.pi) - 1, 0), 1)
            factor = kept + (1 - kept) * train / frames
        changed.append(rate * factor)
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", CHANGING)
def test_learned_frequencies_change_head_by_head(method, dtype):
    """Mochi's 128 channels a head; some do not turn, some turn backwards."""
    transformer, sizes = mochi_transformer(attention_head_dim=128, num_layers=1).to(dtype), (56, 2, 3)
    with torch.no_grad():
        transformer.pos_frequencies.uniform_(-1, 1).pow_(3)
        transformer.pos_frequencies[0, :, ::5] = 0
    frequencies = transformer.pos_frequencies.detach()
    plain = transformer.rope(transformer.pos_frequencies, *sizes, dtype=torch.float32)
    with extend_positions(transformer, method, 28, 56):
        tables = transformer.rope(transformer.pos_frequencies, *sizes, dtype=torch.float32)
    again = transformer.rope(transformer.pos_frequencies, *sizes, dtype=torch.float32)
    assert all(map(torch.equal, again, plain))
    changed = frequencies.double()
    changed[0] = torch.tensor([learned(head, method, 28, 56) for head in frequencies[0].double().tolist()])
    positions = transformer.rope._get_positions(*sizes, dtype=torch.float64)
    angles = torch.einsum("nd,dhp->nhp", positions, changed)
    for table, turned in zip(tables, (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(table.double(), turned, rtol=0, atol=1e-4)  # float32 angles of 200 radians
    assert not torch.equal(tables[0], plain[0])


def hooks_of(transformer):
    rope = transformer.rope
    return len(rope._forward_hooks), len(rope._forward_pre_hooks)


@families
def test_what_changes_nothing_leaves_the_model_alone(family):
    transformer, call = family.transformer(), family.inputs()
    expected = run(transformer, call)
    for method, train, frames in [("plain", 3, 6), *((method, 6, 6) for method in CHANGING), ("ntk", 9, 6)]:
        with extend_positions(transformer, method, train, frames):
            assert hooks_of(transformer) == (0, 0)
            assert torch.equal(run(transformer, call), expected)


@pytest.mark.parametrize("method", CHANGING)
@families
def test_both_orders_with_radial_attention_and_an_exact_end(family, method):
    transformer, call = family.transformer(), family.inputs(9)
    dense = run(transformer, call)
    with apply_radial_attention(transformer, SPARSE):
        plain = run(transformer, call)
    with extend_positions(transformer, method, 3, 9):
        assert not torch.equal(run(transformer, call), dense)
        with apply_radial_attention(transformer, SPARSE):
            expected = run(transformer, call)
    handle = apply_radial_attention(transformer, SPARSE)
    positions = extend_positions(transformer, method, 3, 9)
    assert torch.equal(run(transformer, call), expected) and not torch.equal(expected, plain)
    positions.remove()
    assert torch.equal(run(transformer, call), plain)
    positions.remove()
    handle.remove()
    assert torch.equal(run(transformer, call), dense) and hooks_of(transformer) == (0, 0)


def test_the_model_sees_the_frequencies():
    """Upstream with a buffer made of other frequencies is the same as the method."""
    transformer, other, call = wan_transformer(), wan_transformer(), wan_inputs(9)
    rates = expected_frequencies("interpolate", (4, 10000.0, 3, 9, 1))
    angles = torch.outer(torch.arange(64, dtype=torch.float64), rates).repeat_interleave(2, dim=1)
    other.rope.freqs_cos[:, :4], other.rope.freqs_sin[:, :4] = angles.cos(), angles.sin()
    with extend_positions(transformer, "interpolate", 3, 9):
        assert torch.equal(run(transformer, call), run(other, call))


@pytest.mark.parametrize(("name", "batch"), [("wan", {"batch": 2}), ("mochi", {"lengths": (5, 5)})])
def test_a_sample_of_a_batch_is_as_alone(name, batch):
    transformer, call = BY_NAME[name].transformer(), BY_NAME[name].inputs(9, **batch)
    with extend_positions(transformer, "yarn", 3, 9):
        both = run(transformer, call)
        for index in range(2):
            alone = run(transformer, {key: value[index : index + 1] for key, value in call.items()})
            torch.testing.assert_close(both[index : index + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "mochi"])
def test_gradients_are_those_with_checkpoints(name):
    transformer, call = BY_NAME[name].transformer().train(), BY_NAME[name].inputs(9)
    plain = gradients(transformer, call)
    with extend_positions(transformer, "ntk", 3, 9), apply_radial_attention(transformer, SPARSE):
        expected = gradients(transformer, call)
        transformer.enable_gradient_checkpointing()
        assert_same_gradients(gradients(transformer, call), expected)
    assert expected.keys() == plain.keys() and (name != "mochi" or "pos_frequencies" in expected)
    assert any(not torch.equal(expected[key], plain[key]) for key in plain)


def test_both_experts_of_a_pipeline_and_another_length():
    pipeline = wan_pipeline(experts=2)
    with extend_positions(pipeline, "interpolate", 3, 9):
        for part in (pipeline.transformer, pipeline.transformer_2):
            assert hooks_of(part) == (1, 0)
            longer, shorter = (part.rope(torch.zeros(1, 4, frames, 4, 4))[0] for frames in (9, 2))
            assert torch.equal(longer[:, : shorter.shape[1]], shorter)
    assert hooks_of(pipeline.transformer_2) == (0, 0)


@pytest.mark.parametrize(
    ("model", "call", "message"),
    [
        (wan_transformer(), ("alibi", 3, 9), "method must be one of plain, riflex, .*, got 'alibi'"),
        (wan_transformer(), ("ntk", 0, 9), "train_frames must be a whole number of at least 1, got 0"),
        (wan_transformer(), ("ntk", 2, 2.5), r"frames must be a whole number of at least 1, got 2\.5"),
        (
            wan_transformer(),
            ("ntk", 3, 65),
            "frames must be at most 64, the last position of this Wan.*got 65",
        ),
        (ltx_transformer(), ("ntk", 3, 9), "of Wan, .*HunyuanVideo, .*Mochi, got LTX"),
        (torch.nn.Linear(2, 2), ("ntk", 3, 9), "of Wan, .*HunyuanVideo, .*Mochi, got Linear"),
        ("wan", ("ntk", 3, 9), "expected a transformer, or a pipeline that has one, got str"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_bad_input(model, call, message):
    with pytest.raises(ValueError, match=message):
        extend_positions(model, *call)


def test_the_second_method_is_refused_until_the_first_is_taken_back():
    transformer = wan_transformer()
    with extend_positions(transformer, "ntk", 3, 9):
        with pytest.raises(ValueError, match=r"extended already; call remove\(\) first"):
            extend_positions(transformer, "riflex", 3, 9)
        assert hooks_of(transformer) == (1, 0)
    assert hooks_of(transformer) == (0, 0)


@pytest.mark.parametrize(
    ("method", "frames", "text"),
    [
        ("riflex", 41, "riflex, component 4 of 22 lowered to a period of 45.6: "),
        ("ntk", 41, "ntk, components 2 to 22 of 22 divided by 1.03 to 1.95: "),
        ("interpolate", 41, "interpolate, components 1 to 22 of 22 divided by 1.95: "),
        ("riflex", 22, "riflex, no change: "),
    ],
)
def test_descriptions(method, frames, text):
    wan = temporal_frequencies(44, 10000.0)
    assert describe(method, 21, frames, wan) == f"{text}{frames} latent frames, 21 in training"
    learned = describe("yarn", 28, 28)
    assert learned == "yarn, learned frequencies: 28 latent frames, 28 in training, so no change"
