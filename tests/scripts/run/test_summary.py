"""What a run says of its speed and of its attention calls."""

import pytest

from scripts.run.config import read_config
from scripts.run.describe import describe_plan
from scripts.run.summary import all_dense, describe_calls, step_speed, times_faster
from tests.support.auto_backend import AUTO
from tests.support.plans import FULL, TINY, plan_of

CALLS = {"dense_step": 48, "dense_layer": 0, "too_short": 0, "mask": 0, "cross_attention": 240}
PRESET = "configs/wan_tiny_4x.yaml"  # 20 steps, of which the first four are dense


def test_seconds_of_steps():
    plan = plan_of(read_config(PRESET, []))
    speed = step_speed(plan, [9.0, 0.6, 0.6, 0.6, 5.0, *[0.4] * 15])
    assert (speed["dense_step"], speed["sparse_step"]) == (0.6, 0.4)
    assert speed["speedup"] == pytest.approx(1.5)
    kept = 1 - plan.flops.share * (1 - plan.density)  # no layer is always dense
    assert speed["operations"] == pytest.approx(kept)
    assert speed["efficiency"] == pytest.approx(1.5 * kept)


def test_a_step_that_is_slower_is_said_to_be_slower():
    told = ["1.50x faster", "1.00x faster", "1.25x slower"]
    assert [times_faster(ratio) for ratio in (1.5, 1.0, 0.8)] == told


def test_a_shorter_segment_has_dense_steps_of_its_own():
    assert all_dense([4.0, 6.0, 1.0, 1.0, 2.0, 2.0, 0.5, 0.5], 4, [0, 1]) == 4 * 5 + 4 * 2


@pytest.mark.parametrize(
    ("words", "known"),
    [
        (["attention.dense_steps=0"], {"sparse_step", "operations"}),
        (["attention.pattern=dense"], {"dense_step"}),
        (["model.cache=first_block"], {"dense_step", "sparse_step", "operations"}),
    ],
)
def test_what_a_run_does_not_tell(words, known):
    speed = step_speed(plan_of(read_config(PRESET, words)), [0.5] * 20)
    assert {name for name, value in speed.items() if value is not None} == known


@pytest.mark.parametrize(
    ("calls", "stayed", "text"),
    [
        ({"dense": 48, "cpp": 192}, {}, "192 cpp, 48 dense (48 dense step), 240 cross-attention"),
        (
            {"dense": 60, "cpp": 12},
            {"dense_layer": 2, "too_short": 10, "cross_attention": 0},
            "12 cpp, 60 dense (48 dense step, 2 dense layer, 10 too short)",
        ),
        ({"blocks": 4}, dict.fromkeys(CALLS, 0) | {"mask": 4}, "4 blocks (4 mask)"),
        ({}, dict.fromkeys(CALLS, 0), "none"),
    ],
)
def test_calls_and_why_they_were_dense(calls, stayed, text):
    assert describe_calls({"calls": calls, "stayed_dense": CALLS | stayed}) == text


@pytest.mark.parametrize(
    ("preset", "device", "words", "measured"),
    [
        (TINY, "cpu", [], []),
        (TINY, "cpu", ["tune=always"], [f"{AUTO}, dense, ", "reference", "; tune=always"]),
        (TINY, "cpu", ["tune=always", "backend=blocks"], []),
        (TINY, "cpu", ["tune=always", "pattern=dense"], []),
        (FULL, "cuda", ["tune=off"], []),
        (FULL, "cuda", [], ["flex, dense, ", "blocks", "; tune=auto"]),
    ],
)
def test_a_dry_run_says_what_will_be_measured(preset, device, words, measured):
    plan = plan_of(read_config(preset, [f"attention.{word}" for word in words]), device=device)
    lines = [line for line in describe_plan(plan).splitlines() if line.startswith("measured ")]
    assert len(lines) == bool(measured)
    for line in lines:
        assert line.startswith(f"measured      at the first sparse call: {measured[0]}")
        assert measured[1] in line and line.endswith(measured[2])
        assert ("reference" in line) == (device == "cpu")  # its memory is quadratic
