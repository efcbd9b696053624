"""LoRAs of every format in tiny Wan models: each key lands, and does what it says."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig

from radial_attn.models import apply_radial_attention
from radial_attn.models.lora.load import Lora, load_loras
from tests.support.families import SPARSE, run
from tests.support.tiny import wan_inputs, wan_pipeline, wan_transformer
from tests.support.tiny_lora import (
    FORMATS,
    changed,
    loaded,
    product,
    random_distilled,
    random_pairs,
    spell,
    write,
)

CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.fixture
def pairs():
    return random_pairs(wan_transformer())


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_gives_what_diffusers_makes_of_its_own(form, pairs, tmp_path):
    pipeline = wan_pipeline()
    pipeline.load_lora_weights(write(tmp_path / "own.safetensors", spell(pairs, "diffusers")))
    expected = run(pipeline.transformer)
    assert torch.equal(loaded(write(tmp_path / "a.safetensors", spell(pairs, form))), expected)
    torch.testing.assert_close(expected, changed(product(pairs)), **CLOSE)


@pytest.mark.parametrize("form", ["original", "original down", "kohya"])
@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_alpha_is_what_diffusers_makes_of_it(form, alpha, pairs, tmp_path):
    file = write(tmp_path / "a.safetensors", spell(pairs, form, alpha))
    pipeline = wan_pipeline()
    pipeline.load_lora_weights(file)
    actual = loaded(file)
    torch.testing.assert_close(actual, run(pipeline.transformer), **CLOSE)
    torch.testing.assert_close(actual, changed(product(pairs), alpha / 3), **CLOSE)


@pytest.mark.parametrize("mode", ["separate", "fused"])
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_a_distilled_lora_changes_every_parameter_that_it_names(mode, scale, tmp_path):
    """Checks norms, biases, modulation and patch embedding too, which diffusers does not load."""
    transformer = wan_transformer()
    state, change = random_distilled(transformer)
    assert change.keys() == dict(transformer.named_parameters()).keys()
    state["diffusion_model.blocks.1.diff_m"] = state["diffusion_model.blocks.1.diff_m"].squeeze(0)
    file = write(tmp_path / "a.safetensors", state)
    handle = load_loras(transformer, [Lora(file, scale)], mode=mode)
    torch.testing.assert_close(run(transformer), changed(change, scale), **CLOSE)
    (entry,) = handle.report()
    assert (entry["left_out"], entry["pairs"], entry["rank"], entry["scale"]) == (0, 46, 3, scale)
    assert entry["pairs"] + entry["deltas"] == len(change)
    pipeline = wan_pipeline()
    pipeline.load_lora_weights(file)
    assert (run(pipeline.transformer) - changed(change)).abs().max() > 1e-3


@pytest.mark.parametrize("first", ["radial", "lora"])
@pytest.mark.parametrize("mode", ["separate", "fused"])
def test_with_radial_attention(mode, first, pairs, tmp_path):
    lora = Lora(write(tmp_path / "a.safetensors", spell(pairs, "kohya")))
    expected, transformer = wan_transformer(), wan_transformer()
    with torch.no_grad():
        for name, delta in product(pairs).items():
            expected.get_parameter(name).add_(delta)
    apply_radial_attention(expected, SPARSE)
    if first == "radial":
        apply_radial_attention(transformer, SPARSE)
    load_loras(transformer, [lora], mode=mode)
    if first == "lora":
        apply_radial_attention(transformer, SPARSE)
    assert (run(expected) - changed(product(pairs))).abs().max() > 1e-3
    torch.testing.assert_close(run(transformer), run(expected), **CLOSE)


def test_scale_zero_is_none_and_two_add_up(tmp_path):
    transformer = wan_transformer()
    plain = run(transformer)
    state, change = random_distilled(transformer)
    other = random_pairs(transformer, seed=5, rank=2)
    files = [write(tmp_path / "a.safetensors", state)]
    files.append(write(tmp_path / "b.safetensors", spell(other, "peft")))
    handle = load_loras(transformer, [Lora(file, 0.0) for file in files])
    assert torch.equal(run(transformer), plain)
    handle.remove()
    load_loras(transformer, [Lora(files[0], 0.5), Lora(files[1], 2.0)])
    both = {name: 0.5 * delta for name, delta in change.items()}
    for name, delta in product(other).items():
        both[name] = both[name] + 2.0 * delta
    torch.testing.assert_close(run(transformer), changed(both), **CLOSE)


def test_removal_leaves_no_trace(tmp_path):
    transformer = wan_transformer()
    transformer.patch_embedding.requires_grad_(False)
    parameters = dict(transformer.named_parameters())
    before = {name: (value, value.clone(), value.requires_grad) for name, value in parameters.items()}
    file = write(tmp_path / "a.safetensors", random_distilled(transformer)[0])
    handle = load_loras(transformer, [Lora(file)])
    handle.remove()
    handle.remove()
    after = dict(transformer.named_parameters())
    assert list(after) == list(before)
    for name, (value, old, trained) in before.items():
        assert after[name] is value and torch.equal(value, old) and value.requires_grad == trained, name
    assert not hasattr(transformer, "peft_config")


def own_adapter(transformer, name: str = "mine", seed: int = 3) -> None:
    """Adds an adapter of the user's own with random values, and makes it the active one."""
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "proj_out"]), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in transformer.named_parameters():
            if f".{name}." in key:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))


@pytest.fixture
def distilled(tmp_path):
    state, change = random_distilled(wan_transformer())
    return Lora(write(tmp_path / "distilled.safetensors", state), 0.5), change


def test_adapters_of_the_user_from_before_count_with_the_loras_and_stay(distilled):
    lora, change = distilled
    transformer, plain = wan_transformer(), wan_transformer()
    own_adapter(transformer)
    transformer.set_adapters("mine", 0.7)
    with torch.no_grad():
        for name, delta in change.items():
            plain.get_parameter(name).add_(0.5 * delta)
    own_adapter(plain)
    plain.set_adapters("mine", 0.7)
    before = {name: (value, value.clone()) for name, value in transformer.named_parameters()}
    trained = {name: value.requires_grad for name, value in transformer.named_parameters()}
    expected = run(transformer)
    for mode in ("separate", "fused"):
        handle = load_loras(transformer, [lora], mode=mode)
        torch.testing.assert_close(run(transformer), run(plain), **CLOSE)
        assert transformer.active_adapters() == (["mine", "lora_0"] if mode == "separate" else ["mine"])
        if mode == "separate":
            handle.remove()
            assert torch.equal(run(transformer), expected)
            after = dict(transformer.named_parameters())
            assert list(after) == list(before)
            assert all(after[name] is old and torch.equal(old, copy) for name, (old, copy) in before.items())
            assert {name: value.requires_grad for name, value in after.items()} == trained
        assert list(transformer.peft_config) == ["mine"]


def test_adapters_of_the_user_from_after_stay(distilled):
    transformer, alone = wan_transformer(), wan_transformer()
    own_adapter(alone)
    handle = load_loras(transformer, [distilled[0]])
    own_adapter(transformer)
    assert torch.equal(run(transformer), run(alone))  # the new adapter is the active one
    transformer.set_adapters(["mine", "lora_0"], [1.0, 0.5])
    assert not torch.equal(run(transformer), run(alone))
    handle.remove()
    assert torch.equal(run(transformer), run(alone)) and list(transformer.peft_config) == ["mine"]
    assert list(dict(transformer.named_parameters())) == list(dict(alone.named_parameters()))
    load_loras(transformer, [distilled[0]]).remove()
    assert torch.equal(run(transformer), run(alone))


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
@pytest.mark.parametrize(
    ("method", "arguments", "scale"),
    [
        ("set_adapters", ("lora_0", 0.0), 0.0),
        ("set_adapters", ("lora_0", -1.5), -1.5),
        ("disable_lora", (), 0.0),
        ("disable_adapters", (), 0.0),
        ("delete_adapters", ("lora_0",), 0.0),
        ("unload_lora", (), 0.0),
    ],
)
def test_changes_of_weights_follow_the_methods_of_diffusers(method, arguments, scale, copied, distilled):
    lora, change = distilled
    transformer = wan_transformer()
    handle = load_loras(transformer, [lora])
    transformer = copy.deepcopy(transformer) if copied else transformer
    getattr(transformer, method)(*arguments)
    torch.testing.assert_close(run(transformer), changed(change, scale), **CLOSE)
    if method.startswith("disable"):
        getattr(transformer, method.replace("disable", "enable"))()
        torch.testing.assert_close(run(transformer), changed(change, 0.5), **CLOSE)
    if not copied:
        handle.remove()
        assert torch.equal(run(transformer), run(wan_transformer()))
        load_loras(transformer, [lora])
        torch.testing.assert_close(run(transformer), changed(change, 0.5), **CLOSE)


def test_a_lora_that_diffusers_loads_later_is_the_active_one(distilled, pairs, tmp_path):
    pipeline, alone = wan_pipeline(), wan_pipeline()
    mine = write(tmp_path / "mine.safetensors", spell(pairs, "diffusers"))
    handle = load_loras(pipeline, [distilled[0]])
    for one in (pipeline, alone):
        one.load_lora_weights(mine, adapter_name="mine")
    assert torch.equal(run(pipeline.transformer), run(alone.transformer))
    pipeline.set_adapters(["lora_0"], [0.5])
    torch.testing.assert_close(run(pipeline.transformer), changed(distilled[1], 0.5), **CLOSE)
    handle.remove()
    assert pipeline.get_list_adapters() == {"transformer": ["mine"]}
    pipeline.set_adapters("mine")
    assert torch.equal(run(pipeline.transformer), run(alone.transformer))


def test_a_pipeline_unloads_a_lora_without_pairs_and_does_not_fuse_it(tmp_path):
    pipeline, delta = wan_pipeline(), torch.ones(24)
    file = write(tmp_path / "a.safetensors", {"diffusion_model.blocks.0.self_attn.q.diff_b": delta})
    load_loras(pipeline, [Lora(file)])
    torch.testing.assert_close(run(pipeline.transformer), changed({"blocks.0.attn1.to_q.bias": delta}))
    with pytest.raises(ValueError, match=r"fuse_lora could not be undone with these LoRAs; use .*fused"):
        pipeline.transformer.fuse_lora()
    pipeline.unload_lora_weights()
    assert torch.equal(run(pipeline.transformer), run(wan_transformer()))


@pytest.mark.parametrize("method", ["disable_lora", "fuse_lora"])
def test_adapters_that_would_hide_a_lora_are_refused(method, distilled):
    transformer = wan_transformer()
    own_adapter(transformer)
    getattr(transformer, method)()
    with pytest.raises(ValueError, match="adapters that are disabled or fused; call enable_lora"):
        load_loras(transformer, [distilled[0]])


def test_fused_loras_cannot_be_taken_back(pairs, tmp_path):
    transformer = wan_transformer()
    lora = Lora(write(tmp_path / "a.safetensors", spell(pairs, "diffusers")))
    handle = load_loras(transformer, [lora], mode="fused")
    assert not [name for name, _ in transformer.named_parameters() if "lora" in name]
    with pytest.raises(ValueError, match="fused LoRAs are part of the weights"):
        handle.remove()
    load_loras(transformer, [lora], mode="fused")
    torch.testing.assert_close(run(transformer), changed(product(pairs), 2.0), **CLOSE)


@pytest.mark.parametrize("mode", ["separate", "fused"])
def test_bfloat16(mode, pairs, tmp_path):
    transformer = wan_transformer().to(torch.bfloat16)
    load_loras(transformer, [Lora(write(tmp_path / "a.safetensors", spell(pairs, "kohya", 1.0)))], mode=mode)
    assert {value.dtype for value in transformer.parameters()} == {torch.bfloat16}
    actual = run(transformer, {name: value.bfloat16() for name, value in wan_inputs().items()})
    expected = changed(product(pairs), 1 / 3)
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


def test_settings_of_peft_scale_a_lora(pairs, tmp_path):
    """Reads them beside peft's file, and from the header that diffusers writes."""
    settings = {"r": 3, "lora_alpha": 6, "alpha_pattern": {"ffn.net.2": 12}, "use_rslora": False}
    prefixed = {f"transformer.{key}": value for key, value in settings.items()}
    change = product(pairs)
    scaled = {name: (4 if "ffn.net.2." in name else 2) * delta for name, delta in change.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    files = [
        write(tmp_path / "adapter_model.safetensors", spell(pairs, "peft")),
        write(tmp_path / "a.safetensors", spell(pairs, "adapter"), settings),
        write(tmp_path / "b.safetensors", spell(pairs, "diffusers"), prefixed),
    ]
    for file in files:
        torch.testing.assert_close(loaded(file), changed(scaled), **CLOSE)
    rooted = write(tmp_path / "c.safetensors", spell(pairs, "adapter"), {"lora_alpha": 6, "use_rslora": True})
    torch.testing.assert_close(loaded(rooted), changed(change, 6 / 3**0.5), **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": None},
        {"lora_alpha": "6"},
        {"lora_alpha": True},
        {"lora_alpha": math.nan},
        {"lora_alpha": 6, "alpha_pattern": {"to_q": "x"}},
        {"lora_alpha": 6, "alpha_pattern": {"(": 3}},
        {"lora_alpha": 6, "alpha_pattern": [1]},
    ],
)
def test_settings_of_peft_that_are_broken_are_refused(settings, pairs, tmp_path):
    file = write(tmp_path / "a.safetensors", spell(pairs, "adapter"), settings)
    with pytest.raises(ValueError, match=r"a\.safetensors has broken settings of peft"):
        loaded(file)


def test_what_is_trained_and_saved_here_loads_the_same_way(tmp_path):
    trained = wan_transformer()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], lora_bias=True)
    trained.add_adapter(config, "longer")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3)
    trained.save_lora_adapter(tmp_path, adapter_name="longer")
    for mode in ("separate", "fused"):
        actual = loaded(tmp_path / "pytorch_lora_weights.safetensors", mode=mode)
        torch.testing.assert_close(actual, run(trained), **CLOSE)


def test_a_kohya_file_of_some_layers_loads(tmp_path):
    """diffusers' own conversion wants all layers of every block."""
    pairs = random_pairs(wan_transformer(), only="blocks.2.attn1")
    actual = loaded(write(tmp_path / "a.safetensors", spell(pairs, "kohya")))
    torch.testing.assert_close(actual, changed(product(pairs)), **CLOSE)


def test_a_low_rank_change_of_a_convolution(tmp_path):
    down, up = torch.randn(2, 4, 1, 2, 2), torch.randn(24, 2, 1, 1, 1)
    name = "diffusion_model.patch_embedding"
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    state[f"{name}.alpha"] = torch.tensor(1.0)
    transformer = wan_transformer()
    handle = load_loras(transformer, [Lora(write(tmp_path / "a.safetensors", state), 0.5)])
    delta = 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(24, 4, 1, 2, 2)
    torch.testing.assert_close(run(transformer), changed({"patch_embedding.weight": delta}, 0.5), **CLOSE)
    handle.remove()
    assert torch.equal(run(transformer), run(wan_transformer()))


@pytest.mark.parametrize(
    ("choice", "with_it"), [("both", [True, True]), ("1", [True, False]), ("2", [False, True])]
)
def test_two_transformers(choice, with_it, pairs, tmp_path):
    pipeline = wan_pipeline(experts=2)
    parts = pipeline.transformer, pipeline.transformer_2
    plain = [run(part) for part in parts]
    file = write(tmp_path / "a.safetensors", spell(pairs, "original"))
    report = load_loras(pipeline, [Lora(file, transformer=choice)]).report()
    assert [not torch.equal(run(part), before) for part, before in zip(parts, plain, strict=True)] == with_it
    assert [entry["transformer"] for entry in report] == [i for i, there in enumerate(with_it, 1) if there]
