"""The override of a patched model against a stub of ComfyUI's core."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from comfyui.override import STATE, PatchedModel
from comfyui.state import Run, Settings
from radial_attn import TokenGrid, radial_attention, radial_mask
from radial_attn.models.profile import MeasuredModel, ModelProfile, Reading
from radial_attn.models.published import ModelTraits, nearest_settings
from tests.support import comfy_stub
from tests.support.auto_backend import AUTO
from tests.support.comfy_stub import (
    HEADS,
    OVERRIDE,
    Base,
    Flux,
    HunyuanVideo,
    NewHunyuanVideo,
    WanModel,
    core_attention,
    to_tokens,
)
from tests.support.timed_backends import Costs
from tests.support.tiny import first, randoms

SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]
SPARSE = {"start_percent": 0.0, "dense_blocks": "", "min_tokens": 0, "density": 0.5}
SIZE = (6, 12, 16)  # of the latents; 6 x 6 x 8 tokens
GRID = TokenGrid(6, 6, 8)
HUGE = torch.finfo(torch.float32).min


def patched(**settings) -> PatchedModel:
    return PatchedModel(Settings(**SPARSE | settings))


def latents(batch: int = 1, seed: int = 0) -> torch.Tensor:
    return randoms(seed)(batch, 4, *SIZE)


def context(batch: int = 1, tokens: int = 5) -> torch.Tensor:
    return randoms(7)(batch, tokens, 16)


def call(model, patch, x, text, *, sigma=1.0, options=None, **arguments):
    """Calls the model at a noise level of a run of four steps; without a patch as the core does."""
    options = {} if options is None else options
    options |= {"sample_sigmas": torch.tensor(SIGMAS)}
    wrapper = None if patch is None else patch.apply_model
    t = torch.full((len(x),), sigma)
    return Base(model).apply_model(wrapper, x, t, c_crossattn=text, transformer_options=options, **arguments)


def expected(model, x, text, mask, lengths=None):
    """Computes the output of a stub of Wan or Hunyuan from the op, apart from the override."""
    tokens, joint = to_tokens(x), isinstance(model, HunyuanVideo)
    if joint:
        heads = [part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in model.projections.of(0, text)]
        bias = None
        if lengths is not None:
            bias = torch.where(first(lengths, text.shape[1]), 0.0, HUGE)[:, None].expand(
                -1, text.shape[1], -1
            )
        tokens = torch.cat([tokens, text + core_attention(*heads, HEADS, mask=bias, skip_reshape=True)], 1)
    for layer in range(len(model.projections.layers)):
        tensors = [part.unflatten(2, (HEADS, -1)) for part in model.projections.of(layer, tokens)]
        tokens = tokens + radial_attention(*tensors, mask, text_lengths=lengths, backend="reference").flatten(
            2
        )
        if not joint:
            tokens = tokens + core_attention(*model.projections.of(layer, tokens, text), HEADS)
    return tokens[:, : GRID.video_tokens]


def mask_of(model_class: str, layers: int, density: float, text: int = 0):
    """Returns the mask that diffusers' model of that size would have."""
    config = nearest_settings(ModelTraits(model_class, 16, layers)).config
    return radial_mask(TokenGrid(6, 6, 8, text), replace(config, density=density))


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_wan_equals_the_op_and_cross_attention_stays(modern, backend):
    model, patch = WanModel(), patched(backend=backend)
    model.modern = modern
    x, text = latents(2), context(2)
    output = call(model, patch, x, text)
    mask = mask_of("WanTransformer3DModel", 3, 0.5)
    torch.testing.assert_close(output, expected(model, x, text, mask))
    report = patch.report()
    assert report["grid"] == [6, 6, 8, 0] and report["density"] == mask.density
    assert report["calls"] == {AUTO if backend == "auto" else backend: 3}
    assert report["stayed_dense"]["cross_attention"] == 3


@pytest.mark.parametrize("made", [HunyuanVideo, NewHunyuanVideo])
@pytest.mark.parametrize("lengths", [None, (4, 9)])
def test_hunyuan_equals_the_op_and_the_refiner_stays(made, lengths):
    model, patch = made(), patched()
    x, text = latents(2), context(2, 9)
    arguments = {}
    if lengths is not None:
        arguments["attention_mask"] = torch.where(first(lengths, 9), 0.0, HUGE)
    output = call(model, patch, x, text, **arguments)
    mask = mask_of("HunyuanVideoTransformer3DModel", 4, 0.5, text=9)
    torch.testing.assert_close(output, expected(model, x, text, mask, lengths))
    assert patch.report()["stayed_dense"]["cross_attention"] == 1  # the refiner


def test_density_one_is_the_core():
    for model, text in ((WanModel(), context()), (HunyuanVideo(), context(1, 9))):
        plain = call(model, None, latents(), text)
        patch = patched(density=1.0)
        assert torch.equal(call(model, patch, latents(), text), plain)
        assert patch.report()["stayed_dense"]["mask"] > 2
        named = call(model, patched(density=1.0, backend="blocks"), latents(), text)
        torch.testing.assert_close(named, plain, atol=1e-5, rtol=1e-5)


def test_a_reference_frame_is_a_frame_and_other_extras_are_context():
    model, patch, reference = WanModel(), patched(density=0), randoms(3)(1, 4, *SIZE[1:])
    model.ref_conv = object()
    call(model, patch, latents(), context(), reference_latent=reference)
    assert patch.report()["grid"] == [7, 6, 8, 0]
    model.ref_conv = None
    call(
        model, patch, latents(), context(), options={"grid_sizes": (4, 6, 8)}
    )  # two frames at the end are none
    assert patch.report()["grid"] == [4, 6, 8, 2 * 48]


@pytest.mark.parametrize("settings", [{}, {"far_field": "linear"}, {"selection": "dense_step"}])
@pytest.mark.parametrize(("named", "made"), [("uuids", WanModel), ("cond_or_uncond", NewHunyuanVideo)])
def test_a_batch_of_two_conditions_equals_one_by_one(settings, named, made):
    model = made() if made is WanModel else made(2, 1)
    x, text = latents(2), context(2)
    together, apart = patched(start_percent=0.3, **settings), patched(start_percent=0.3, **settings)
    for sigma in SIGMAS[:-1]:
        pair = call(model, together, x, text, sigma=sigma, options={named: [0, 1]})
        for index in (1, 0):
            rows = slice(index, index + 1)
            single = call(model, apart, x[rows], text[rows], sigma=sigma, options={named: [index]})
            torch.testing.assert_close(pair[rows], single)
    assert together.report()["stayed_dense"]["dense_step"] == 6
    assert together.report()["density"] == pytest.approx(0.5, abs=0.1)


def test_halves_that_change_places_keep_their_choices():
    model, x, text = WanModel(), latents(2), context(2)
    patch, steady = patched(selection="dense_step"), patched(selection="dense_step")
    for step, sigma in enumerate(SIGMAS[:-1]):
        order = [0, 1] if step % 2 == 0 else [1, 0]
        output = call(model, patch, x[order], text[order], sigma=sigma, options={"uuids": order})
        same = call(model, steady, x, text, sigma=sigma, options={"uuids": [0, 1]})
        torch.testing.assert_close(output[order], same)


def test_steps_and_blocks_that_are_dense():
    model, patch = WanModel(4), patched(start_percent=0.25, end_percent=0.6, dense_blocks="1, 3-5")
    plain = call(model, None, latents(), context())
    for sigma in SIGMAS[:-1]:
        output = call(model, patch, latents(), context(), sigma=sigma)
        assert torch.equal(output, plain) == (sigma not in {0.75, 0.5})
    report = patch.report()
    assert report["calls"] == {"dense": 12, AUTO: 4}
    assert report["stayed_dense"]["dense_step"] == 4 and report["stayed_dense"]["dense_block"] == 8
    assert report["model_calls"] == {"dense": 2, "sparse": 2}


@pytest.mark.parametrize("error", [-1e-7, 0, 1e-7])
def test_a_step_on_the_edge_of_the_window(error):
    """The first is sparse and the last dense, however the noise levels were rounded."""
    sigmas = tuple(level * (1 + error) for level in SIGMAS[:-1])
    run = Run(sigmas, window=(0.75, 0.25))
    assert [run.is_dense(level) for level in sigmas] == [True, False, False, True]
    assert [run.precedes_sparse(level) for level in sigmas] == [True, True, False, False]


def test_another_override_is_called_for_what_is_not_served():
    seen = []

    def other(func, *args, **kwargs):
        seen.append(args[1].shape[1])
        return func(*args, **kwargs)

    model, options = WanModel(), {OVERRIDE: other}
    patch = patched(start_percent=0.25)
    call(model, patch, latents(), context(), sigma=1.0, options=options)
    assert seen == [288, 5] * 3  # a dense step: all calls
    call(model, patch, latents(), context(), sigma=0.75, options=options)
    assert seen[6:] == [5] * 3  # cross-attention alone
    assert options[OVERRIDE] is other and STATE not in options
    alone: dict = {}
    call(model, patch, latents(), context(), sigma=0.75, options=alone)
    assert OVERRIDE not in alone and STATE not in alone


def test_a_copy_of_the_options_does_not_copy_the_model():
    class Copies(WanModel):
        def __call__(self, latents, options, context, **arguments):
            return super().__call__(latents, copy.deepcopy(options), context, **arguments)

        def __deepcopy__(self, memo):
            raise AssertionError

    patch = patched()
    call(Copies(), patch, latents(), context())
    assert patch.report()["calls"] == {AUTO: 3}


def test_an_error_in_the_model_leaves_nothing_behind():
    options: dict = {}
    with pytest.raises(RuntimeError):
        call(WanModel(), patched(), latents(), torch.zeros(1, 5, 3), options=options)
    assert OVERRIDE not in options and STATE not in options


@pytest.mark.parametrize(
    ("settings", "model", "reason", "words"),
    [
        ({"min_tokens": 4096}, WanModel(), "too_short", "288 tokens are below min_tokens=4096"),
        ({"backend": "flashinfer"}, WanModel(), "refused", "backend 'flashinfer'"),
        ({"selection": "dense_step", "density": 0.01}, WanModel(), "refused", "density must be at least"),
        ({}, Flux(), None, "Flux stays dense: this node serves Wan"),
    ],
)
def test_what_cannot_be_served_is_dense_and_said_once(settings, model, reason, words, *, caplog):
    patch, x = patched(**settings), latents()
    plain = call(model, None, x, context())
    for sigma in (1.0, 0.75, 0.5):
        assert torch.equal(call(model, patch, x, context(), sigma=sigma), plain)
        patch.clean_up()
    lines = [line for line in caplog.messages if line.startswith("Radial Attention:")]
    assert len(lines) == 1 and words in lines[0] and words in patch.report()["notes"][0]
    counts = patch.report()["stayed_dense"]
    assert reason is None or counts[reason] == 3


def test_runs_do_not_mix():
    """Another size, another sampler's steps, and a run that was stopped begin anew."""
    model, patch = WanModel(), patched(selection="dense_step", far_field="mean")
    call(model, patch, latents(), context())
    call(model, patch, latents(), context(), sigma=0.75)
    assert patch.report()["model_calls"] == {"dense": 1, "sparse": 1} and patch.run.choices
    smaller = latents()[:, :, :5]
    call(model, patch, smaller, context(), sigma=0.5)
    assert patch.report()["grid"] == [5, 6, 8, 0] and patch.report()["calls"] == {"dense": 6, AUTO: 3}
    patch.note("a line of this run")
    patch.clean_up()
    assert not patch.run.choices and patch.report()["calls"] == {"dense": 6, AUTO: 3}
    options = {"sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}
    base, t = Base(model), torch.ones(1)
    arguments = {"c_crossattn": context(), "transformer_options": options}
    base.apply_model(patch.apply_model, latents(), t, **arguments)
    assert patch.report()["calls"] == {"dense": 3} and not patch.report()["notes"]


def test_a_control_layer_counts_as_the_layer_that_it_feeds():
    model, patch = WanModel(), patched(dense_blocks="0")
    model.blocks, model.vace_layers_mapping = (0, 0, 1), {0: 0}  # a layer, its control, a layer
    model.projections.layers = model.projections.layers[:2]
    control = torch.zeros(1, 1, 4, *SIZE)
    call(model, patch, latents(), context(), vace_context=control)
    assert patch.report()["stayed_dense"]["dense_block"] == 2


@pytest.mark.parametrize("fastest", ["reference", "dense"])
@pytest.mark.parametrize(
    ("model", "lengths"),
    [(WanModel(), None), (NewHunyuanVideo(2, 1), (9, 9)), (NewHunyuanVideo(2, 1), (4, 9))],
)
def test_auto_measures_and_takes_the_fastest(fastest, model, lengths, monkeypatch):
    """Dense attention as the core has it is one of them: if it is the fastest, later calls are the core's."""
    radial_mask.cache_clear()  # a mask caches the choices of its shapes
    seconds = {"reference": 2e-3, "cpp": 3e-3, "blocks": 3e-3, "dense": 4e-3, fastest: 1e-3}
    costs = Costs(monkeypatch, seconds)
    core = partial(costs.pay, "dense", comfy_stub.core_attention)
    monkeypatch.setattr(comfy_stub, "core_attention", core)
    x, text = latents(2), context(2, 9)
    masks = {} if lengths is None else {"attention_mask": torch.where(first(lengths, 9), 0.0, HUGE)}
    patch = PatchedModel(Settings(**SPARSE), tune="always")
    wanted = call(model, patched() if fastest == "reference" else None, x, text, **masks)
    for sigma in (1.0, 0.75):
        torch.testing.assert_close(call(model, patch, x, text, sigma=sigma, **masks), wanted)
    report = patch.report()
    assert report["calls"] == {fastest: 6} and report["tuning"][0]["backend"] == fastest
    assert report["stayed_dense"]["too_short"] == (6 if fastest == "dense" else 0)
    assert report["model_calls"] == dict.fromkeys(("dense", "sparse"), 0) | {
        "dense" if fastest == "dense" else "sparse": 2
    }


def test_a_profile_serves_every_step_of_its_model_alone(tmp_path):
    reading, model = Reading(GRID, 16), WanModel()
    for part in (0, 1):
        for layer in model.blocks:
            tensors = [x.unflatten(2, (HEADS, -1)) for x in model.projections.of(layer, to_tokens(latents()))]
            reading.add(part, layer, tensors, None)
    file = tmp_path / "wan.safetensors"
    file.write_bytes(ModelProfile.of(reading, MeasuredModel("wan", 3, HEADS, 8), [0.5, 0.0]).to_bytes())
    patch = patched(selection="profile", profile=str(file), far_field="linear")
    x, text = latents(2), context(2)
    for sigma in SIGMAS[:-1]:
        pair = call(model, patch, x, text, sigma=sigma, options={"uuids": [0, 1]})
        torch.testing.assert_close(pair[1:], call(model, patch, x[1:], text[1:], sigma=sigma))
    assert patch.report()["calls"] == {AUTO: 24} and patch.report()["density"] == pytest.approx(0.5, abs=0.05)
    call(WanModel(2), patch, x, text)
    assert patch.report()["stayed_dense"]["refused"] == 2
    assert "measured on another model: layers 3, not 2" in patch.report()["notes"][-1]
