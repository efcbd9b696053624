"""The backend that is chosen by measurement: the fastest right one, kept in a file, for all processes."""

import json
import logging
import math
from functools import partial

import pytest
import torch

from radial_attn.chooser import Choice, Chooser
from radial_attn.kernels import reference
from radial_attn.kernels.contract import Call
from radial_attn.kernels.cpp import op
from radial_attn.trial import ROWS, some_heads
from tests.support.attention_cases import GRIDS, fresh_mask, make_inputs
from tests.support.timed_backends import Costs, sdpa

GRID, CPU = GRIDS[111], torch.device("cpu")
SECONDS = {"cpp": 3e-3, "blocks": 2e-3, "reference": 5e-3, "dense": 8e-3}
MANY = 100_000  # calls of a run
ABOUT = {"dense": "native", "pattern": "radial", "padded_text": True}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def costs(monkeypatch, tmp_path):
    """Makes `blocks` the fastest; the default is `cpp`, whose compiler the tests do not need."""
    monkeypatch.setenv("RADIAL_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("radial_attn.chooser.choose_backend", lambda call: "cpp")
    for name in ("NEEDS", "attention", "partial_attention"):
        monkeypatch.setattr(op, name, getattr(reference, name), raising=False)
    monkeypatch.delattr(op, "with_far_field")
    return Costs(monkeypatch, SECONDS)


def choose(
    costs, tune="always", *, agree=None, calls=MANY, batch=2, tensors=None, about=ABOUT, **options
) -> Choice:
    """Chooses for a new mask, as every run has."""
    mask = options.pop("mask", None) or fresh_mask(GRID)
    call = Call(CPU, torch.float32, 16, options.pop("gradients", False), mask, **options)
    chooser, dense = Chooser(tune, agree), partial(costs.pay, "dense", sdpa)
    size = batch, GRID.tokens, 3, 16
    choice = chooser.open(call, size, mask.density, about=about, dense=dense, calls=calls)
    tensors = tensors or make_inputs(GRID, batch, 3, 16)[:3]
    chooser.settle(choice, tensors, mask, text_lengths=torch.tensor([4] * batch))
    assert chooser.report() == [choice.report()]
    return choice


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("seconds", "spoil", "name", "refused"),
    [
        ({}, {}, "blocks", {}),
        ({"blocks": 4e-3}, {}, "cpp", {}),
        ({"reference": 1e-3}, {}, "reference", {}),
        ({}, {"blocks": lambda output: 2 * output}, "cpp", {"blocks": "relative L2 error"}),
        ({}, {"blocks": lambda output: output * float("nan")}, "cpp", {"blocks": "relative L2 error nan"}),
        (
            {},
            {"blocks": RuntimeError("no kernel image\nlong story")},
            "cpp",
            {"blocks": "RuntimeError: no ker"},
        ),
        (
            {},
            {"cpp": torch.OutOfMemoryError("x"), "blocks": MemoryError()},
            "reference",
            {"cpp": "out of mem"},
        ),
        ({"dense": 1e-3}, {}, "dense", {}),
        ({"dense": 2.02e-3}, {}, "dense", {}),
        ({"dense": 2.1e-3}, {}, "blocks", {}),
        ({}, dict.fromkeys(SECONDS, RuntimeError("x")), "cpp", {"dense": "RuntimeError: x"}),
        ({}, {"cpp": ValueError("x"), "blocks": KeyError("x"), "reference": TypeError("x")}, "dense", {}),
    ],
)
def test_the_fastest_right_one(costs, gradients, seconds, spoil, name, refused):  # noqa: PLR0917
    costs.seconds |= seconds
    costs.spoil |= spoil
    choice = choose(costs, gradients=gradients)
    assert choice.name == name
    assert choice.seconds == pytest.approx({k: v for k, v in costs.seconds.items() if k not in spoil})
    assert all(choice.refused[key].startswith(text) for key, text in refused.items())
    assert choice.refused.keys() == spoil.keys()


def test_one_wrong_block_is_seen(costs):
    costs.spoil["blocks"] = lambda out: torch.cat([out[:, :96], 2 * out[:, 96:]], dim=1)
    assert choose(costs).refused["blocks"].startswith("relative L2 error")


def test_wrong_gradients_are_seen(costs):
    costs.spoil["blocks"] = lambda out: 2 * out - out.detach()
    assert choose(costs).name == "blocks"
    assert choose(costs, gradients=True).name == "cpp"


@pytest.mark.parametrize("far_field", ["mean", "linear"])
def test_a_far_field_is_compared_with_its_definition(costs, far_field):
    choice = choose(costs, far_field=far_field)
    assert {"blocks", "reference"} <= choice.seconds.keys() and not choice.refused


def test_the_line_says_what_was_found(costs, caplog):
    caplog.set_level(logging.INFO, logger="radial_attn")
    costs.spoil["cpp"] = lambda output: 2 * output
    choice = choose(costs)
    shape = "[2, 111, 3, 16] torch.float32 on cpu"
    efficiency = SECONDS["dense"] * choice.density / SECONDS["blocks"]
    assert choice.efficiency == pytest.approx(efficiency)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        f"backend blocks for {shape}, density {choice.density:.3f}: blocks 2.00 ms, "
        f"reference 5.00 ms, dense 8.00 ms; efficiency {efficiency:.2f}; cpp refused: relative L2 error 1"
    )


def test_a_short_sequence_stays_dense_and_says_so(costs, caplog):
    caplog.set_level(logging.INFO, logger="radial_attn")
    costs.seconds["dense"] = 1e-3
    assert choose(costs).report()["efficiency"] is None
    assert caplog.messages[0].endswith("; dense attention is as fast, so these calls stay dense")
    costs.spoil |= {name: RuntimeError("x") for name in SECONDS if name != "dense"}
    choose(costs)
    assert "; no sparse backend is right, so these calls stay dense; cpp refused" in caplog.messages[1]


def test_values_that_are_not_finite_decide_nothing(costs, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="radial_attn")
    bad = [torch.full((2, GRID.tokens, 3, 16), math.nan)] * 3
    assert choose(costs, "once", tensors=bad).name == "cpp" and not (tmp_path / "cache").exists()
    assert "cpp refused: FloatingPointError: query, key or value is not finite" in caplog.messages[0]
    assert choose(costs, "once").name == "blocks"


def test_measuring_ends_when_its_share_of_the_run_is_spent(costs, caplog):
    caplog.set_level(logging.INFO, logger="radial_attn")
    costs.seconds |= {"cpp": 0.1, "dense": 0.2, "blocks": 0.05, "reference": 9.0}
    assert choose(costs, calls=100).name == "cpp"  # 2 % of 10 s: dense attention alone takes that
    assert caplog.messages[0].endswith("; not measured: blocks, reference")
    assert choose(costs, calls=800).name == "blocks"
    costs.calls["reference"] = 0
    choose(costs, calls=10_000)
    assert costs.calls["reference"] == 2  # a first call, and one that is so slow that it is not repeated


@pytest.mark.parametrize("tune", ["once", "always"])
def test_a_range_of_densities_is_measured_once(costs, caplog, tmp_path, tune):
    """Dense attention takes as long at every density, so it is chosen while the density is high."""
    caplog.set_level(logging.INFO, logger="radial_attn")
    costs.seconds |= {"blocks": 0.3, "cpp": 0.4, "reference": 9.0, "dense": 0.2}
    chooser, dense = Chooser(tune), partial(costs.pay, "dense", sdpa)
    names = {}
    for density in (0.9, 0.8, 0.5, 0.3, 0.5):
        mask = fresh_mask(GRID)
        call, size = Call(CPU, torch.float32, 16, False, mask), (2, GRID.tokens, 3, 16)
        choice = chooser.open(call, size, density, about=ABOUT, dense=dense, calls=MANY)
        names[density] = chooser.settle(choice, make_inputs(GRID, 2, 3, 16)[:3], mask)
        assert choice.seconds["blocks"] == pytest.approx(0.3 * density / 0.9)
    assert names == {0.9: "dense", 0.8: "dense", 0.5: "blocks", 0.3: "blocks"}
    assert costs.calls["blocks"] == 4 and len(caplog.messages) == 4
    assert caplog.messages[3].endswith("; scaled from the times at density 0.900")
    assert [x["measured_at"] for x in chooser.report()] == [None, 0.9, 0.9, 0.9]
    assert len(list(tmp_path.rglob("choice-*.json"))) == (tune == "once")
    other = chooser.open(call, (1, *size[1:]), 0.3, about=ABOUT, dense=dense, calls=MANY)
    assert other.name is None  # another shape is measured


def test_a_long_sequence_is_measured_on_a_few_heads(costs, monkeypatch):
    assert [some_heads((1, tokens, 40, 128)) for tokens in (460_800, 115_200, 32_760, 1000)] == [1, 3, 9, 40]
    assert ROWS // 2 <= 3 * 115_200
    monkeypatch.setattr("radial_attn.trial.ROWS", 2 * GRID.tokens)
    heads, attend = [], reference.attention

    def noted(query, *args, **options):
        heads.append(query.shape[2])
        return attend(query, *args, **options)

    monkeypatch.setattr(reference, "attention", noted)
    choose(costs, mask=fresh_mask(GRID, heads=3))
    assert set(heads) == {1}


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (None, False),
        (lambda text: text[: len(text) // 2], True),
        (lambda text: text.replace("0.002", "-0.002"), True),
        (lambda text: text.replace('"device": "', '"device": "another '), True),
        *((lambda text, x=text: x, True) for text in ("", "[]", "null", "\0", "[" * 9999)),
        *(
            (lambda text, x=times: json.dumps(json.loads(text) | {"times": x}), True)
            for times in ([], None, "cpp", 1, {"cpp": [1.0]}, {"cpp": True}, {"cpp": 10**400})
        ),
    ],
)
def test_once_keeps_the_times_in_a_file(costs, tmp_path, caplog, damage, note):
    assert choose(costs, "once").name == "blocks"
    (file,) = (tmp_path / "cache").glob("choice-*.json")
    whole = file.read_text()
    assert json.loads(whole)["times"] == pytest.approx(SECONDS)
    costs.calls = dict.fromkeys(SECONDS, 0)
    if damage is not None:
        file.write_text(damage(whole))
    caplog.set_level(logging.INFO, logger="radial_attn")
    assert choose(costs, "once").name == "blocks"
    assert any(costs.calls.values()) == note == ("is damaged" in caplog.messages[0])
    assert caplog.messages[-1].endswith("; measured before") != note
    assert json.loads(file.read_text())["times"] == pytest.approx(SECONDS)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_was_left_is_measured_by_the_next_run(costs):
    costs.seconds |= {"cpp": 0.1, "dense": 0.01, "blocks": 0.05, "reference": 9.0}
    costs.spoil["dense"] = MemoryError()  # may pass: it is not kept
    assert choose(costs, "once", calls=100).seconds.keys() == {"cpp", "blocks"}
    costs.calls = dict.fromkeys(SECONDS, 0)
    costs.spoil.clear()
    assert choose(costs, "once", calls=10_000).seconds.keys() == SECONDS.keys()
    assert not costs.calls["cpp"] and costs.calls["dense"] and costs.calls["reference"]


def test_a_backend_that_serves_no_more_is_not_chosen_from_the_file(costs, tmp_path):
    """Exported kernels, a compiler or deterministic mode come and go without another version."""
    choose(costs, "once")
    (file,) = (tmp_path / "cache").iterdir()
    content = json.loads(file.read_text())
    content["times"] |= {"flash4": 1e-4, "removed": 1e-5}
    file.write_text(json.dumps(content))
    costs.calls = dict.fromkeys(SECONDS, 0)
    choice = choose(costs, "once")
    assert choice.name == "blocks" and choice.seconds.keys() == SECONDS.keys()
    assert not any(costs.calls.values())


def test_a_failure_that_may_pass_is_not_kept(costs, tmp_path):
    costs.spoil["blocks"] = OSError(28, "No space left on device")
    assert choose(costs, "once").refused == {"blocks": "system error: [Errno 28] No space left on device"}
    costs.spoil.clear()
    assert choose(costs, "once").name == "blocks"


@pytest.mark.parametrize(
    "other",
    [
        {"batch": 1},
        {"gradients": True},
        {"mask": fresh_mask(GRID, 32)},
        {"about": ABOUT | {"pattern": "spatial"}},
        {"about": ABOUT | {"padded_text": False}},
    ],
    ids=str,
)
def test_another_shape_is_measured_anew(costs, tmp_path, other):
    choose(costs, "once")
    costs.calls = dict.fromkeys(SECONDS, 0)
    choose(costs, "once", **other)
    assert all(costs.calls.values()) and len(list((tmp_path / "cache").iterdir())) == 2


def test_always_measures_again_and_keeps_nothing(costs, tmp_path):
    mask = fresh_mask(GRID)
    assert choose(costs, mask=mask) is choose(costs, mask=mask)  # one run
    costs.seconds["cpp"] = 1e-3
    assert choose(costs).name == "cpp"
    assert not (tmp_path / "cache").exists()


UNWRITABLE = {"file": "File exists", "file/cache": "Not a directory", "x" * 300: "File name too long"}


@pytest.mark.parametrize("named", UNWRITABLE)
def test_a_folder_that_cannot_be_written_keeps_nothing(costs, monkeypatch, tmp_path, caplog, named):
    (tmp_path / "file").touch()
    caplog.set_level(logging.INFO, logger="radial_attn")
    monkeypatch.setenv("RADIAL_ATTN_CACHE", str(tmp_path / named))
    assert choose(costs, "once").name == "blocks"
    assert caplog.messages[-1].endswith(f".json cannot be written ({UNWRITABLE[named]})")


def test_a_file_that_is_a_folder_is_reported_and_stays(costs, tmp_path, caplog):
    choose(costs, "once")
    (file,) = (tmp_path / "cache").iterdir()
    file.unlink()
    file.mkdir()
    assert choose(costs, "once").name == "blocks"
    assert caplog.messages == [f"{file} is damaged or cannot be read; backends are measured again"]
    assert [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("tune", ["once", "always"])
def test_processes_take_what_the_first_one_found(costs, tune):
    times = {"cpp": 1e-3, "blocks": 2e-3, "dense": 9e-3}
    told = iter([({}, False), (times, True)][tune == "always" :])
    assert choose(costs, tune, agree=lambda _: next(told)).name == "cpp"
    assert not list(told)


def test_a_failure_in_one_process_does_not_leave_the_others_waiting(costs, monkeypatch, tmp_path):
    def fails(*_):
        raise KeyError("only here")

    monkeypatch.setattr("radial_attn.chooser.Trial", fails)
    told = iter([({}, False), ({"cpp": 2e-3, "blocks": 1e-3}, True)])
    assert choose(costs, "once", agree=lambda _: next(told)).name == "blocks" and not list(told)
    said = []
    assert choose(costs, agree=lambda x: said.append(x) or x).name == "cpp"
    assert said == [({"cpp": "KeyError: 'only here'"}, False)]


def test_when_backends_are_measured():
    cuda = torch.device("cuda")
    measures = {
        tune: [Chooser(tune).measures(x) for x in (CPU, cuda)] for tune in ("auto", "off", "once", "always")
    }
    assert measures == {"auto": [False, True], "off": [False] * 2, "once": [True] * 2, "always": [True] * 2}
    with pytest.raises(ValueError, match="tune must be one of auto, off, once, always, got 'on'"):
        Chooser("on")


def test_made_up_tensors_if_the_call_has_none_to_show(costs, monkeypatch):
    mask = fresh_mask(GRID)
    call = Call(CPU, torch.float32, 16, False, mask)
    chooser, dense = Chooser("always"), partial(costs.pay, "dense", sdpa)
    options = {"dense": dense, "about": ABOUT, "calls": MANY}
    state = torch.get_rng_state()
    assert chooser.settle_alone(chooser.open(call, (2, GRID.tokens, 3, 16), 0.5, **options)) == "blocks"
    assert torch.equal(torch.get_rng_state(), state)

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "randn", no_memory)
    choice = chooser.open(call, (1, GRID.tokens, 3, 16), 0.5, **options)
    assert chooser.settle_alone(choice) == "cpp" and choice.refused == {"cpp": "out of memory"}
