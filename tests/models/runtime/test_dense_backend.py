"""Which kernel serves dense steps and layers: named, timed, or upstream's."""

import contextlib
import logging

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch._dynamo.testing import CompileCounter

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.dispatch import kernel
from radial_attn.kernels import reference
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime import dense_backend as dense
from tests.support.families import DENSE, SPARSE, assert_near, run
from tests.support.tiny import wan_inputs, wan_transformer

OTHERS = ("native", "_native_math")


@pytest.fixture
def timed_here(monkeypatch):
    """Makes "auto" choose between two backends on the CPU too; by their times the second is faster."""
    monkeypatch.setattr(dense, "TIMED_DEVICES", ("cpu",))
    monkeypatch.setattr(dense, "CANDIDATES", OTHERS)
    times = {"native": 2e-3, "_native_math": 1e-3}
    monkeypatch.setattr(dense, "measure", lambda names, *_: {name: times[name] for name in names})


def chosen(transformer):
    """Returns the backend names of the self-attention processors, and those of cross-attention."""
    processors = [
        [getattr(block, name).processor for block in transformer.blocks] for name in ("attn1", "attn2")
    ]
    return [{p._attention_backend and p._attention_backend.value for p in group} for group in processors]


def fresh_config() -> RadialConfig:
    """Clears the cache of masks, since a mask keeps the times of its shapes."""
    radial_mask.cache_clear()
    return DENSE


def test_measure_times_what_runs():
    """cuDNN needs a GPU, FlashAttention-3 a package."""
    names = (*OTHERS, "_native_cudnn", "_flash_3")
    times = dense.measure(names, (1, 96, 2, 16), torch.float32, torch.device("cpu"))
    assert list(times) == list(names)
    assert all(times[name] > 0 for name in OTHERS)
    if not torch.cuda.is_available():
        assert times["_native_cudnn"] is None and times["_flash_3"] is None


def test_measure_takes_one_sample_and_a_part_of_the_rows(monkeypatch):
    """Of 460,800 tokens a whole call takes seconds; what does not fit in memory is not usable."""
    seen, call = [], (["native"], (2, 20, 3, 8), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(dense, "ROWS", 6)
    monkeypatch.setattr(
        "diffusers.models.attention_dispatch.dispatch_attention_fn",
        lambda *tensors, backend: seen.append([tuple(x.shape) for x in tensors]),
    )
    assert dense.measure(*call)["native"] >= 0
    assert seen == [[(1, 6, 3, 8), (1, 20, 3, 8), (1, 20, 3, 8)]] * (1 + dense.REPEATS)

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "randn", full)
    assert dense.measure(*call) == {"native": None}


def test_measure_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    dense.measure(["native"], (1, 8, 1, 8), torch.float32, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


def test_choose_takes_the_fastest_and_says_so_once(caplog):
    caplog.set_level(logging.INFO, logger="radial_attn")
    mask = radial_mask.__wrapped__(TokenGrid(2, 4, 6), SPARSE)
    call = [*OTHERS, "_flash_3"], (1, 48, 2, 16), torch.float32, torch.device("cpu"), mask
    name, times = dense.choose(*call)
    assert times[name] == min(times[other] for other in OTHERS)
    assert dense.choose(*call) == (name, times)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"dense backend {name} for [1, 48, 2, 16] torch.float32 on cpu: native ")
    assert line.endswith(" ms; not usable: _flash_3")


def test_auto_sets_self_attention_to_the_fastest_and_takes_it_back(timed_here):
    transformer = wan_transformer()
    expected = run(transformer)
    with apply_radial_attention(transformer, fresh_config()) as handle:
        assert chosen(transformer) == [{None}, {None}]
        assert_near(run(transformer), expected)
        assert chosen(transformer) == [{"_native_math"}, {None}]
        report = handle.report()["dense_backend"]
    assert report["backend"] == "_native_math" and set(report["seconds"]) == set(OTHERS)
    assert chosen(transformer) == [{None}, {None}]
    assert all(vars(block.attn1.processor) == {} for block in transformer.blocks)


def test_auto_waits_for_a_dense_call(timed_here):
    transformer = wan_transformer()
    radial_mask.cache_clear()
    with apply_radial_attention(transformer, SPARSE, dense_last_steps=1, num_steps=2) as handle:
        for timestep, expected in ((900, None), (500, "_native_math")):
            run(transformer, wan_inputs(timestep=timestep))
            assert chosen(transformer)[0] == {expected}
    with apply_radial_attention(transformer, SPARSE) as handle:
        run(transformer)
        assert chosen(transformer)[0] == {None} and handle.report()["dense_backend"]["seconds"] == {}


@pytest.mark.parametrize("when", ["before", "inside"])
def test_auto_keeps_what_the_user_chose(timed_here, when):
    transformer = wan_transformer()
    if when == "before":
        transformer.set_attention_backend("native")
    with apply_radial_attention(transformer, fresh_config()) as handle:
        if when == "inside":
            run(transformer)
            transformer.set_attention_backend("native")
        run(transformer)
        assert chosen(transformer) == [{"native"}, {"native"}]
        assert handle.report()["dense_backend"]["backend"] == "native"
    assert chosen(transformer) == [{"native"}, {"native"}]


def test_auto_keeps_the_context_of_the_user(timed_here):
    transformer = wan_transformer()
    with apply_radial_attention(transformer, fresh_config()) as handle:
        for context, expected in (
            (contextlib.nullcontext(), "_native_math"),
            (attention_backend("_native_math"), None),
            (contextlib.nullcontext(), "_native_math"),
        ):
            with context:
                run(transformer)
            assert chosen(transformer)[0] == {expected}
        assert handle.report()["dense_backend"]["backend"] == "_native_math"


def test_a_name_of_the_dispatch_is_set_and_taken_back(timed_here):
    transformer = wan_transformer()
    expected = run(transformer)
    transformer.set_attention_backend("native")
    with apply_radial_attention(transformer, DENSE, dense_backend="_native_math") as handle:
        assert chosen(transformer) == [{"_native_math"}, {"native"}]
        assert_near(run(transformer), expected)
        assert handle.report()["dense_backend"]["backend"] == "_native_math"
    assert chosen(transformer) == [{"native"}, {"native"}]


@pytest.mark.parametrize("name", ["auto", "native"])
def test_the_cpu_and_native_are_left_to_upstream(name, request):
    if name == "native":
        request.getfixturevalue("timed_here")
    transformer = wan_transformer()
    with apply_radial_attention(transformer, DENSE, dense_backend=name) as handle:
        run(transformer)
        assert chosen(transformer) == [{None}, {None}]
        assert handle.report()["dense_backend"] == {"name": name, "backend": "native", "seconds": {}}


def test_the_choice_makes_no_graphs_after_the_first_call(timed_here):
    torch._dynamo.reset()
    transformer, counter = wan_transformer(), CompileCounter()
    with apply_radial_attention(transformer, fresh_config()):
        transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        for _ in range(3):
            run(transformer)
    assert counter.frame_count == 1


def test_unknown_and_missing_backends_are_one_line():
    transformer = wan_transformer()
    with pytest.raises(ValueError, match="got 'flsh'; did you mean 'flash'") as raised:
        apply_radial_attention(transformer, SPARSE, dense_backend="flsh")
    assert "\n" not in str(raised.value) and "auto, native, sage, flash4, flash, " in str(raised.value)
    message = r"dense_backend '_sage_qk_int8_pv_fp16_cuda' cannot be used here: .* install `sageattention"
    with pytest.raises(ImportError, match=message) as raised:
        apply_radial_attention(transformer, SPARSE, dense_backend="_sage_qk_int8_pv_fp16_cuda")
    assert "\n" not in str(raised.value)
    assert not transformer._forward_pre_hooks


@pytest.mark.parametrize(("name", "check"), [("sage", "nan"), ("flash4", "off")])
def test_our_own_serve_dense_layers_through_the_op(name, check, monkeypatch):
    """Replaces it by the definition, which needs no GPU."""
    seen = []

    def attention(*args, **options):
        seen.append(args[3])
        return reference.attention(*args, **options)

    monkeypatch.setattr(kernel(name), "NEEDS", reference.NEEDS)
    monkeypatch.setattr(kernel(name), "attention", attention, raising=False)
    transformer = wan_transformer()
    expected = run(transformer)
    with apply_radial_attention(transformer, SPARSE, dense_layers=4, dense_backend=name) as handle:
        assert_near(run(transformer), expected)
        report = handle.report()
    assert len(seen) == 4 and all(mask.is_dense for mask in seen)
    assert report["calls"] == {"dense": 4} and report["check"] == {"mode": check}
    assert report["dense_backend"] == {"name": name, "backend": name, "seconds": {}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="may be installed")
@pytest.mark.parametrize("name", ["sage", "flash4"])
def test_our_own_without_their_library_are_one_line(name):
    with pytest.raises(ImportError, match=f"dense_backend '{name}' needs "):
        apply_radial_attention(wan_transformer(), SPARSE, dense_backend=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_auto_on_a_gpu():
    transformer = wan_transformer(attention_head_dim=64).to("cuda", torch.bfloat16)
    inputs = {name: value.to("cuda", torch.bfloat16) for name, value in wan_inputs().items()}
    with apply_radial_attention(transformer, fresh_config()) as handle:
        assert torch.isfinite(run(transformer, inputs)).all()
        report = handle.report()["dense_backend"]
    assert report["seconds"]["native"] > 0
    assert report["seconds"][report["backend"]] == min(filter(None, report["seconds"].values()))
