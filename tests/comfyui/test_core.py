"""The node pack in the core of a real ComfyUI: COMFYUI_PATH=... bash scripts/test.sh -m comfy."""

import asyncio
import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

from comfyui import nodes, protocol
from radial_attn import TokenGrid, radial_attention, radial_mask
from radial_attn.models import apply_radial_attention
from radial_attn.models.published import BUNDLED
from tests.support import comfy_core
from tests.support.auto_backend import AUTO
from tests.support.comfy_core import condition, hunyuan, sample, wan
from tests.support.tiny import randoms

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI"),
]

ALL_SPARSE = {"start_percent": 0.0, "dense_blocks": "", "min_tokens": 0, "density": 0.5}
NEAR = {"atol": 1e-5, "rtol": 1e-5}
SLOT = protocol.OVERRIDE
PACK = Path(nodes.__file__).parent
# files of the nodes of workflows
EXTRAS = "audio", "custom_sampler", "flux", "hunyuan", "minimax_h3", "model_advanced", "preview_any", "video"


@pytest.fixture(scope="module", autouse=True)
def core():
    print("ComfyUI", comfy_core.load())


def radial(model, **settings):
    return nodes.patch_model(model, **ALL_SPARSE | settings)


def report(model) -> dict:
    return model.get_attachment(nodes.KEY).report()


def overridden(model, override):
    """Returns a clone whose calls go to `override`."""
    clone = model.clone()
    clone.model_options["transformer_options"][SLOT] = override
    return clone


def by_hand(model, mask, lengths=None, *, turned=0):
    """Returns a clone that computes all calls over the mask's tokens by the definition.

    `turned`: tokens of text before the video.
    """

    def override(func, q, k, v, heads, *args, skip_reshape=False, **kwargs):
        tokens = q.shape[2 if skip_reshape else 1]
        if tokens != mask.grid.tokens or k.shape != q.shape:
            return func(q, k, v, heads, *args, skip_reshape=skip_reshape, **kwargs)
        tensors = [x.transpose(1, 2) if skip_reshape else x.unflatten(2, (heads, -1)) for x in (q, k, v)]
        tensors = [torch.cat([x[:, turned:], x[:, :turned]], 1) for x in tensors]
        given = None if lengths is None else torch.tensor(lengths)
        output = radial_attention(*tensors, mask, backend="reference", text_lengths=given).flatten(2)
        return torch.cat([output[:, len(output[0]) - turned :], output[:, : len(output[0]) - turned]], 1)

    return overridden(model, override)


def text_before(model, tokens, text):
    """Counts the tokens of text before the video: the rows of the first query that other noise leaves."""
    queries = []

    def override(func, q, *args, **kwargs):
        if q.shape[2] == tokens:
            queries.append(q)
        return func(q, *args, **kwargs)

    for seed in (0, 1):
        sample(overridden(model, override), steps=1, positive=text, seed=seed)
    same = (queries[0] == queries[len(queries) // 2]).all(3).all(1)[0]
    assert same.sum() == tokens - 6 * 6 * 8
    return int(same.sum()) if same[0] else 0


def masks(text: int = 0):
    return radial_mask(TokenGrid(6, 6, 8, text), replace(BUNDLED, density=0.5))


def test_names_of_the_core():
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    assert (protocol.APPLY_MODEL, protocol.ON_CLEANUP) == (WrappersMP.APPLY_MODEL, CallbacksMP.ON_CLEANUP)


def test_wan_equals_the_op():
    model = wan()
    sparse, dense = radial(model), radial(model, density=1.0, backend="blocks")
    plain = sample(model)
    torch.testing.assert_close(sample(dense), plain, **NEAR)
    output = sample(sparse)
    torch.testing.assert_close(output, sample(by_hand(model, masks())), **NEAR)
    assert (output - plain).abs().max() > 1e-3
    assert report(sparse)["calls"] == {AUTO: 12} and report(sparse)["stayed_dense"]["cross_attention"] == 12


@pytest.mark.parametrize("valid", [None, 4])
def test_hunyuan_video_equals_the_op(valid):
    model, text = hunyuan(), condition(1, 9, valid)
    turned = text_before(model, 6 * 6 * 8 + 9, text)
    sparse, dense = radial(model), radial(model, density=1.0, backend="blocks")
    plain = sample(model, positive=text)
    torch.testing.assert_close(sample(dense, positive=text), plain, **NEAR)
    output = sample(sparse, positive=text)
    lengths = None if valid is None else [valid]
    hand = by_hand(model, masks(9), lengths, turned=turned)
    torch.testing.assert_close(output, sample(hand, positive=text), **NEAR)
    assert (output - plain).abs().max() > 1e-3
    assert report(sparse)["calls"] == {AUTO: 16}
    assert report(sparse)["stayed_dense"]["cross_attention"] == 8  # two blocks of the refiner


@pytest.mark.parametrize(
    ("name", "grid", "calls"),
    [
        ("wan i2v", (6, 6, 8, 0), 3),
        ("wan2.2 5b", (6, 6, 8, 0), 3),
        ("wan with a reference", (7, 6, 8, 0), 3),
        ("wan vace", (6, 6, 8, 0), 6),
        ("wan animate", (6, 6, 8, 0), 5),
        ("hunyuan 1.5", (6, 12, 16, 9 + 4), 4),
        ("mochi", (6, 6, 8, 5), 3),
        ("ltx", (6, 12, 16, 0), 3),
        ("minimax h3", (22, 6, 8, 9 + 2 * 5), 3),
        ("minimax h3 with a keyframe", (22, 6, 8, 9 + 2 * 5 + 48), 3),
    ],
)
def test_other_models_equal_the_op(name, grid, calls):
    from comfy import supported_models

    if not hasattr(supported_models, comfy_core.KINDS[name][0]):
        pytest.skip("this ComfyUI is older than the model")
    model, text = comfy_core.kind(name), condition(1, 9, valid=5)
    if "1.5" in name:
        del text[0][1]["attention_mask"]
        text[0][1]["conditioning_byt5small"] = torch.randn(1, 4, 1472)
    if "keyframe" in name:
        latent = torch.randn(1, 24, 1, *comfy_core.SIZE[1:])
        text[0][1]["minimax_keyframes"] = [{"resolved_frame_index": 0, "latent": latent}]
    if "reference" in name:
        text[0][1]["reference_latents"] = [comfy_core.noise((1, *comfy_core.SIZE[1:]))]
    options = {"positive": text, "steps": 2}
    sparse, dense = radial(model), radial(model, density=1.0, backend="blocks")
    plain, output = sample(model, **options), sample(sparse, **options)
    torch.testing.assert_close(sample(dense, **options), plain, **NEAR)
    mask = sparse.get_attachment(nodes.KEY).run.mask(TokenGrid(*grid))
    turned = grid[3] if name.startswith(("hunyuan", "minimax")) else 0
    torch.testing.assert_close(output, sample(by_hand(model, mask, turned=turned), **options), **NEAR)
    assert mask.density < 0.7 and (output - plain).abs().max() > 1e-4
    assert report(sparse)["grid"] == list(grid) and report(sparse)["calls"] == {AUTO: 2 * calls}
    if name == "mochi":
        assert text_before(model, mask.grid.tokens, text) == 0
    first = radial(model, dense_blocks="0")
    sample(first, **options)
    assert report(first)["stayed_dense"]["dense_block"] == 2 * (2 if "vace" in name else 1)


@pytest.mark.parametrize(
    "settings", [{}, {"far_field": "linear"}, {"selection": "dense_step", "far_field": "mean"}]
)
def test_guidance_in_one_batch_equals_one_by_one(settings):
    model = wan()
    sparse = radial(model, start_percent=0.3, **settings)
    together, counts = sample(sparse, cfg=3.0), report(sparse)
    model.model.memory_required = lambda *args, **kwargs: float("inf")
    apart = sample(sparse, cfg=3.0)
    torch.testing.assert_close(together, apart, **NEAR)
    assert counts["calls"] == {"dense": 6, AUTO: 6} and report(sparse)["calls"] == {"dense": 12, AUTO: 12}


def test_another_override_is_called_for_the_rest_whichever_came_first():
    seen = []

    def other(func, q, *args, **kwargs):
        seen.append(q.shape[1])
        return func(q, *args, **kwargs)

    model = wan()
    sample(radial(overridden(model, other)))
    assert len(seen) == 12  # cross-attention
    after = overridden(radial(model), other)
    sample(after)
    assert len(seen) == 24 and report(after)["calls"] == {AUTO: 12}
    assert after.model_options["transformer_options"] == {SLOT: other}


def test_an_unknown_model_passes_through_with_one_line(caplog):
    model = comfy_core.flux()
    patched = radial(model)
    lines = [line for line in caplog.messages if line.startswith("Radial Attention")]
    assert lines == [
        "Radial Attention: Flux stays dense: this node serves Wan, HunyuanVideo, Mochi, LTX-Video "
        "and MiniMax-H3"
    ]
    assert not patched.wrappers.get(protocol.APPLY_MODEL, {}).get(nodes.KEY)
    assert torch.equal(sample(patched, size=(12, 16)), sample(model, size=(12, 16)))
    assert "note: Flux stays dense" in nodes.report_text(patched)


def test_runs_sizes_samplers_and_clones():
    model = wan()
    sparse = radial(model, selection="dense_step", start_percent=0.3)
    first = sample(sparse)
    sample(sparse, size=(4, 10, 12), batch=2)
    assert report(sparse)["grid"] == [4, 5, 6, 0]
    sample(sparse, sampler="heun")
    assert report(sparse)["calls"] == {"dense": 9, AUTO: 12}
    sample(sparse, sampler="dpmpp_2m", steps=6)
    assert torch.equal(sample(sparse.clone()), first)
    assert not sparse.get_attachment(nodes.KEY).run.choices
    twice = radial(sparse, density=1.0, backend="blocks")
    torch.testing.assert_close(sample(twice), sample(model), **NEAR)


def test_a_lora():
    model = wan()
    key = "diffusion_model.blocks.1.self_attn.q.weight"
    change = {key: ("diff", (torch.randn(24, 24) / 5,))}
    sparse = radial(model)
    sparse.add_patches(change, 0.8)
    hand = by_hand(model, masks())
    hand.add_patches(change, 0.8)
    changed = sample(sparse)
    torch.testing.assert_close(changed, sample(hand), **NEAR)
    assert not torch.allclose(changed, sample(radial(model)))


def test_a_compiled_model():
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = wan()
    expected = sample(radial(model, start_percent=0.3))
    for order in (0, 1):
        compiled = radial(model, start_percent=0.3) if order == 0 else model.clone()
        set_torch_compile_wrapper(compiled, backend="eager")
        compiled = compiled if order == 0 else radial(compiled, start_percent=0.3)
        torch.testing.assert_close(sample(compiled), expected, **NEAR)
        assert report(compiled)["calls"] == {"dense": 6, AUTO: 6}


def wan_in_diffusers(model):
    """Returns diffusers' transformer with the weights of a patcher of Wan."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16}
    sizes = {"text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 3}
    transformer = WanTransformer3DModel(**heads, **sizes).eval()
    state = {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}
    transformer.load_state_dict(convert_wan_transformer_to_diffusers(state))
    return transformer


@pytest.mark.parametrize("adaptive", [{}, {"selection": "dense_step", "far_field": "linear"}])
@pytest.mark.parametrize(
    ("made", "converted"), [(wan, wan_in_diffusers), (hunyuan, comfy_core.hunyuan_in_diffusers)]
)
def test_the_same_weights_in_diffusers_give_the_same_video(made, converted, adaptive):
    model, text = made(), condition(1, 9)
    sparse = radial(model, start_percent=0.2, dense_blocks="0", **adaptive)
    ours = model.model.process_latent_in(sample(sparse, steps=5, positive=text))
    sigmas = sparse.get_attachment(nodes.KEY).run.sigmas
    arguments = {"encoder_hidden_states": text[0][0], "return_dict": False}
    if made is hunyuan:
        arguments["pooled_projections"], arguments["guidance"] = (
            text[0][1]["pooled_output"],
            torch.tensor([6e3]),
        )
        arguments["encoder_attention_mask"] = torch.ones(1, 9)
    transformer, config = converted(model), replace(BUNDLED, density=0.5)
    options = {"dense_steps": 1, "dense_layers": 1, "num_steps": 5, **adaptive}
    with apply_radial_attention(transformer, config, **options) as handle, torch.no_grad():
        x = comfy_core.noise()
        for sigma, following in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
            velocity = transformer(x, timestep=torch.tensor([1000 * sigma]), **arguments)[0]
            x = x + (following - sigma) * velocity
        calls = handle.report()["calls"]
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    assert report(sparse)["calls"] == calls


@torch.no_grad()
def test_minimax_h3_is_that_of_diffusers(tmp_path):
    """One call: the velocities of video and sound, whose noise levels differ, have the other sign."""
    from comfy import supported_models

    if not hasattr(supported_models, "MiniMaxH3"):
        pytest.skip("this ComfyUI is older than the model")
    from comfy.ldm.minimax import model as minimax

    model, make, level = comfy_core.kind("minimax h3"), randoms(0), 0.7
    transformer = comfy_core.minimax_in_diffusers(model, tmp_path)
    sizes, text = (7, 12, 16, comfy_core.SOUND), make(1, 9, comfy_core.TEXT)
    video, sound = make(1, 24, *sizes[:3]), make(1, 32, 2, sizes[3])
    packed = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(9).long(),
        *sizes,
        (1, 2, 2),
        audio_channels=2,
        audio_tag=2,
        video_tag=0,
        keyframe_anchors=(),
    )
    names = "position_ids", "token_tags", "video_indices", "audio_indices", "text_indices"
    times = torch.tensor([1 - level, 1 - float(minimax.time_shift_sigma(torch.tensor(level), 12.0, 3.0))])
    rows = {"hidden_states": minimax.patchify_video(video)[None], "encoder_hidden_states": text}
    rows |= {"audio_hidden_states": minimax.pack_audio(sound)[None], "timestep": times}
    rows |= {"timestep_indices": (packed[1] == 2).long(), "return_dict": False}
    made = transformer(**rows, **dict(zip(names, packed, strict=False)))
    inside = model.model.diffusion_model
    core_video, core_sound = inside([video, sound], torch.tensor([1000 * level]), text)
    torch.testing.assert_close(-core_video, minimax.unpatchify_video(made[0], 7, 6, 8), **NEAR)
    torch.testing.assert_close(-core_sound, minimax.unpack_audio(made[1][0]), **NEAR)


@pytest.fixture(scope="module")
def loaded(core, tmp_path_factory):
    """Loads the pack through a link, as ComfyUI does; returns the core's table of nodes."""
    import nodes as table

    link = tmp_path_factory.mktemp("custom_nodes") / "radial-attention"
    link.symlink_to(PACK)
    assert asyncio.run(table.load_custom_node(str(link)))
    return table


def test_the_nodes_of_the_newer_api(loaded):
    made = loaded.NODE_CLASS_MAPPINGS["RadialAttention"], loaded.NODE_CLASS_MAPPINGS["RadialAttentionReport"]
    kinds = made[0].INPUT_TYPES()["required"]
    assert list(kinds) == [entry.name for entry in nodes.INPUTS]
    defaults = {name: options["default"] for name, (_, options) in kinds.items() if name != "model"}
    (sparse,) = made[0].execute(model=wan(), **defaults | {"min_tokens": 0, "density": 0.5}).args
    sample(sparse)
    output = made[1].execute(model=sparse, after={})
    assert output.args[0].startswith("Radial Attention over 6 x 6 x 8 tokens, density 0.497\n")
    assert output.ui.as_dict() == {"text": (output.args[0],)}


def test_workflows_fit_the_nodes_of_the_core(loaded):
    folder = Path(os.environ["COMFYUI_PATH"]) / "comfy_extras"
    older = not (folder / "nodes_minimax_h3.py").exists()  # than the model
    for name in EXTRAS:
        file = str(folder / f"nodes_{name}.py")
        loads = asyncio.run(loaded.load_custom_node(file, module_parent="comfy_extras"))
        assert loads or (older and name == "minimax_h3")
    files = [*(PACK / "workflows" / "api").glob("*.json")]
    for file in (file for file in files if not (older and file.stem == "minimax_h3")):
        for entry in json.loads(file.read_text()).values():
            kinds = loaded.NODE_CLASS_MAPPINGS[entry["class_type"]].INPUT_TYPES()
            known = {*kinds["required"], *kinds.get("optional", {})}
            assert set(kinds["required"]) <= set(entry["inputs"]) <= known, entry


def test_the_core_reads_the_metadata(loaded):
    from comfy_config import config_parser

    read = config_parser.extract_node_configuration(str(PACK))
    content = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert read.project.name == content["project"]["name"] and read.project.license.text == "Apache-2.0"
    assert read.tool_comfy.publisher_id and read.tool_comfy.display_name == "Radial Attention"
    assert read.project.supported_os and len(read.project.supported_accelerators) == 2
