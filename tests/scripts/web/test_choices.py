"""What the page offers, and how a request is planned or refused."""

import pytest

from scripts.run.config import ROOT
from scripts.run.errors import UsageError
from scripts.web.choices import BUNDLED, DENSE, LARGE, Request, lengths, plans, selections, settings, usual
from tests.support.web_cases import make_studio, request

WAN = Request(
    "Wan (bundled)", 33, "a red circle moving around on a navy background", "static", 0.573, 1, 0, 0
)


def test_every_preset_that_is_offered_is_there():
    for presets in (BUNDLED | LARGE).values():
        for preset in presets:
            assert (ROOT / f"{preset}.yaml").is_file()
            assert ("profile" in selections(preset)) == (presets in BUNDLED.values())


@pytest.mark.parametrize("model", BUNDLED)
def test_bundled_models_have_every_selection(model):
    for preset in lengths(BUNDLED, model).values():
        wanted = {"static": "none", "dense_step": "linear", "profile": "linear"}
        assert selections(preset) == list(wanted)
        for way, far_field in wanted.items():
            plan = usual(preset, way)
            attention = plan.config.attention
            assert (attention.selection, attention.far_field) == (way, far_field)
            assert (way == "dense_step") <= bool(plan.dense_steps) and (way == "profile") <= (
                not plan.dense_steps
            )
            assert 0.2 < plan.density < 0.91


def test_the_longer_video_has_its_adapter():
    short, long = lengths(BUNDLED, "Wan (bundled)").items()
    assert (short[0], long[0]) == (33, 129)
    assert len(usual(long[1], "static").loras) == 1 and not usual(short[1], "static").loras


def test_a_large_model_without_a_gpu_is_one_line():
    with pytest.raises(UsageError, match="no CUDA device here; choose a bundled model"):
        settings("configs/hunyuan_t2v", "static")


def test_the_density_of_a_preset_keeps_its_mask_and_another_is_solved():
    preset = usual("configs/wan_tiny", "static")
    planned = plans(BUNDLED, WAN, "videos")
    assert list(planned) == [DENSE, "static"] and planned["static"].mask == preset.mask
    assert planned[DENSE].config.attention.pattern == "dense" and len(planned[DENSE].dense_steps) == 20
    assert planned[DENSE].config.generation == planned["static"].config.generation
    assert planned["static"].config.output.path == "videos/wan_tiny_static_0.573"
    thin = Request(*[*vars(WAN).values()][:4], 0.3, 1, 0, 0)
    assert abs(plans(BUNDLED, thin, "videos")["static"].density - 0.3) < 0.006


def test_words_that_the_model_does_not_know_are_a_note():
    asked = Request(*[*vars(WAN).values()][:2], "a purple\ncat", *[*vars(WAN).values()][3:])
    plan = plans(BUNDLED, asked, "videos")["static"]
    (note,) = plan.notes
    assert plan.config.generation.prompt == "a purple cat"
    assert "does not know, in the prompt: purple, cat; its words: a moving on" in note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "Sora"}, "model: got 'Sora', allowed: random Wan"),
        ({"frames": 33}, "frames: got 33, allowed for random Wan: 5"),
        ({"prompt": " \n"}, "generation.prompt: got '', must be text that is not empty"),
        ({"selection": "profile"}, "selection: got 'profile', allowed: static, dense_step"),
        ({"density": 0.02}, r"attention.density: got 0.02, which no mask has: density must be 0\.\d+ to 1"),
        ({"density": 1.5}, "attention.density: got 1.5, must be null, a number above 0 up to 1"),
        ({"density": None}, "attention.density: got 'None', must be"),
        ({"selection": "dense_step", "density": 0.02}, "attention.density: must be at least"),
        ({"seed": -1}, "generation.seed: got -1"),
        ({"seed": None}, "generation.seed: got 'None'"),
        ({"layer": 9}, "layer: got 9, must be 0 to "),
        ({"head": -1}, "head: got -1, must be 0 to "),
    ],
)
def test_what_is_refused(tiny_model, tmp_path, changes, message):
    studio = make_studio(tiny_model, tmp_path)
    with pytest.raises(UsageError, match=message):
        studio.make(request(**changes), lambda status: None)
    assert not (tmp_path / "videos").exists()
