"""Masks per head chosen at dense steps, and residuals kept there, through the forks."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from radial_attn import BlockMask, RadialConfig, radial_mask
from radial_attn.models import apply_radial_attention
from radial_attn.models.pipeline.caches import cached
from radial_attn.models.runtime import layer_attention
from radial_attn.models.runtime.adaptive import Adaptive
from radial_attn.models.runtime.choices import Choices
from radial_attn.residual import Residual
from radial_attn.selection import floor_blocks, measure_blocks
from tests.support.auto_backend import AUTO
from tests.support.cache_cases import CACHES
from tests.support.families import BY_NAME, FAMILIES, FULL, SPARSE, assert_near, families, run, video
from tests.support.pipelines import KINDS, generate
from tests.support.tiny import wan_inputs, wan_transformer

CHOSEN = RadialConfig(block_size=16, density=0.9)
OPTIONS = {"selection": "dense_step", "dense_steps": 1, "num_steps": 4, "backend": "reference"}


@pytest.fixture
def masks(monkeypatch) -> list[BlockMask]:
    """Lists the masks that layers attend with."""
    seen, attention = [], layer_attention.radial_attention

    def noted(*args, **options):
        seen.append(args[3])
        return attention(*args, **options)

    monkeypatch.setattr(layer_attention, "radial_attention", noted)
    return seen


@families
@pytest.mark.parametrize("budget", ["head", "layer", "model"])
def test_everything_chosen_is_dense(family, budget):
    transformer = family.transformer()
    config = RadialConfig(block_size=16, density=1.0)
    batch = {} if family.text else {"batch": 2}
    expected = video(family, transformer, **batch)
    with apply_radial_attention(transformer, config, **OPTIONS, budget=budget) as handle:
        assert_near(video(family, transformer, **batch), expected)
        assert handle.report()["density"] == 1.0


@pytest.mark.parametrize("family", [FAMILIES[0], BY_NAME["mochi"]], ids=lambda family: family.name)
def test_layers_attend_to_the_blocks_that_cost_most(family, masks):
    """Compares the masks of sparse steps, by half and sample, with the losses at the dense step before."""
    transformer, seen = family.transformer(), []
    options = {**OPTIONS, "dense_layers": 1, "observe": seen.append}
    with apply_radial_attention(transformer, CHOSEN, **options) as handle:
        assert handle.chosen(1) is None
        video(family, transformer, batch=2) if not family.text else video(family, transformer)
        chosen = [handle.chosen(layer) for layer in range(family.layers + 1)]
    grid, layers = seen[0].mask.grid, family.layers
    floor = floor_blocks(grid, CHOSEN)
    heads, batch = seen[0].query.shape[2], len(seen[0].query)
    tokens = grid.block_tokens(16)
    pairs = torch.outer(tokens, tokens)
    count = int((CHOSEN.density * pairs.sum() - pairs[floor].sum()) * heads / 16**2)
    wanted = []
    for half in range(2):
        for call in seen[half * layers : (half + 1) * layers]:
            if call.layer == 0:
                continue
            options = {"far_field": False, "text_lengths": call.text_lengths}
            loss = measure_blocks(call[3:6], grid, 16, **options).loss
            least = loss.masked_fill(floor, -1).flatten(1).topk(count).values[:, -1, None, None, None]
            wanted.append(floor | (loss >= least))
    assert len(masks) == 3 * 2 * (layers - 1) * batch
    for number, mask in enumerate(masks):
        call, sample = divmod(number, batch)
        kept = wanted[call % len(wanted)][sample]
        assert (mask.blocks != kept).sum() <= 2  # losses that are equal after rounding
        assert mask.density > 0.85
    latest = masks[-2 * (layers - 1) * batch :: batch][: layers - 1]  # of the first sample, in the first half
    assert chosen == [None, *latest, None]


@pytest.mark.parametrize(("residual", "tolerance"), [("none", 1e-5), ("mean", 1e-5), ("int8", 1e-3)])
def test_samples_of_a_batch_are_as_alone(residual, tolerance):
    transformer, inputs = wan_transformer(), wan_inputs(batch=3)
    times = [inputs | {"timestep": torch.full((3,), time)} for time in (900.0, 500.0, 100.0)]
    options = {**OPTIONS, "residual": residual}
    with apply_radial_attention(transformer, CHOSEN, **options):
        together = [run(transformer, call) for call in times]
    for sample in range(3):
        alone = [{name: x[sample : sample + 1] for name, x in call.items()} for call in times]
        with apply_radial_attention(transformer, CHOSEN, **options):
            for call, whole in zip(alone, together, strict=True):
                output = run(transformer, call)
                torch.testing.assert_close(output, whole[sample : sample + 1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["wan", "wan-a14b", "mochi", "hunyuan_video", "vace-reference", "ltx"])
def test_every_video_begins_anew(name):
    """Gives the same video after another and after another size; the second expert has a dense step too."""
    kind, experts = KINDS[name], 2 if "a14b" in name else 1
    pipeline = kind.make()
    options = {"selection": "dense_step", "residual": "int4", "dense_steps": 1}
    with apply_radial_attention(pipeline, CHOSEN, **options) as handle:
        first = kind.generate(pipeline, 4)
        assert handle.report()["dense_steps"] == experts
        assert 0.85 < handle.report()["density"] <= CHOSEN.density
        more = {"num_frames": 9} if name == "ltx" else {"num_frames": 9, "height": 48}
        kind.generate(pipeline, 3, **{} if "reference" in name else more)
        assert torch.equal(kind.generate(pipeline, 4), first)
        assert handle.report()["videos"] == 3
    with apply_radial_attention(pipeline, CHOSEN, **options):
        assert torch.equal(kind.generate(pipeline, 4), first)


@pytest.mark.parametrize(
    ("density", "text"), [(None, "0.900 (chosen)"), ((0.9, 0.8), "0.800 to 0.900 (chosen)")]
)
def test_the_choice_of_a_backend_says_the_density_that_was_asked_for(density, text, caplog):
    caplog.set_level("INFO", logger="radial_attn")
    options = OPTIONS | {"backend": "auto", "density_range": density}
    config = CHOSEN if density is None else replace(CHOSEN, density=None)
    transformer = wan_transformer()
    with apply_radial_attention(transformer, config, **options):
        video(FAMILIES[0], transformer)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == f"backend {AUTO} for [1, 4, 6, 12, 16] torch.float32 on cpu, density {text}"


def test_a_run_without_a_dense_step_makes_one():
    transformer = wan_transformer()
    options = {**OPTIONS, "dense_steps": 0}
    with apply_radial_attention(transformer, CHOSEN, **options) as handle:
        video(FAMILIES[0], transformer)
        assert handle.report()["dense_steps"] == 1
        assert handle.report()["calls"] == {"dense": 8, "reference": 24}


def test_a_copy_of_the_model_has_a_state_of_its_own():
    transformer = wan_transformer()
    with apply_radial_attention(transformer, CHOSEN, **OPTIONS, residual="int8"):
        expected = video(FAMILIES[0], transformer)
        run(transformer)
        twin = copy.deepcopy(transformer)
        assert torch.equal(video(FAMILIES[0], twin), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_a_layer_that_a_cache_skips_keeps_its_far_field(cache, monkeypatch):
    """Every sparse call is corrected by the last dense one that its layer made, in its half of guidance."""
    recorded, corrected, sparse, record = {}, [], layer_attention._sparse, Choices.record

    def noted(self: Choices, layer: object, *args: object, **options: object) -> None:
        record(self, layer, *args, **options)
        recorded[self._call, layer] = self._calls[self._call][layer].biases[0]

    def seen(*args: object, call: layer_attention.AttentionCall, processor: object) -> torch.Tensor:
        corrected.append(args[5] is recorded[call.choices._call, processor])
        return sparse(*args, call=call, processor=processor)

    monkeypatch.setattr(Choices, "record", noted)
    monkeypatch.setattr(layer_attention, "_sparse", seen)
    pipeline, options = KINDS["wan"].make(), {"guidance_scale": 1.0 if cache == "pab" else 3.0}
    settings = {"threshold": 0.3} | CACHES[cache]
    with (
        apply_radial_attention(pipeline, SPARSE, far_field="linear", dense_steps=[0, 3]),
        cached(pipeline, cache, 6, **settings) as use,
    ):
        generate(pipeline, 6, **options)
    calls = len(pipeline.transformer.blocks) * (1 if cache == "pab" else 2)
    assert corrected and all(corrected) and len(recorded) == calls and use.computed < use.due


def test_a_compiled_layer_gives_the_same_far_field():
    """What a dense step measures stays outside the graphs, so few are made, whatever the number of layers."""
    outputs, calls = [], [wan_inputs(timestep=time) for time in (900.0, 500.0)]
    counter = CompileCounter()
    for compiled in (False, True):
        transformer = wan_transformer()
        for block in transformer.blocks if compiled else ():
            block.attn1.forward = torch.compile(block.attn1.forward, backend=counter)
        options = {"far_field": "linear", "dense_steps": 1, "num_steps": 2}
        with apply_radial_attention(transformer, SPARSE, **options):
            outputs.append(torch.cat([run(transformer, call) for call in calls]))
    assert_near(*outputs)
    assert 2 <= counter.frame_count <= 6


@pytest.mark.parametrize("residual", ["mean", "int8", "int4", "output"])
def test_a_residual_in_host_memory_gives_the_same(residual, monkeypatch):
    copies, to_host = [], Residual.to_host
    monkeypatch.setattr(Residual, "to_host", lambda self: copies.append(to_host(self)) or copies[-1])
    transformer, outputs, reports = wan_transformer(), [], []
    for memory in ("device", "host"):
        selection = "static" if residual == "output" else "dense_step"
        options = {**OPTIONS, "residual": residual, "residual_memory": memory, "selection": selection}
        with apply_radial_attention(transformer, CHOSEN, **options) as handle:
            outputs.append(video(FAMILIES[0], transformer))
            reports.append(handle.report()["adaptive"]["residual_bytes"])
    assert torch.equal(*outputs) and reports[0] == reports[1] == sum(copy.bytes for copy in copies)
    assert len(copies) == 2 * FAMILIES[0].layers


@pytest.mark.gpu
def test_a_residual_of_a_gpu_goes_to_pinned_memory_and_back():
    dense, sparse = (torch.randn(1, 64, 2, 8, device="cuda") for _ in range(2))
    for kind in ("mean", "int8", "int4"):
        residual = Residual.of(kind, dense, sparse, 16)
        host = residual.to_host()
        assert host.values.is_pinned() and torch.equal(host.add_to(sparse), residual.add_to(sparse))


def test_sparse_steps_repeat_the_output_of_the_dense_step(masks):
    transformer, options = wan_transformer(), {**OPTIONS, "selection": "static", "residual": "output"}
    same, later = (wan_inputs(timestep=time) for time in (900.0, 500.0))
    with apply_radial_attention(transformer, CHOSEN, **options) as handle:
        dense, other = run(transformer, same), run(transformer, later)
        report = handle.report()
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    outputs = len(transformer.blocks) * math.prod(report["grid"]) * heads * width
    assert report["adaptive"]["residual_bytes"] == 4 * outputs
    assert not masks and not torch.equal(dense, other)
    assert torch.equal(dense, run(transformer, same))


@pytest.mark.parametrize(("residual", "tolerance"), [("int8", 0.01), ("int4", 0.16), ("mean", 1.1)])
@pytest.mark.parametrize("selection", ["static", "dense_step"])
def test_residual_gives_the_dense_output_back(residual, tolerance, selection):
    """Attends again to the very tensors of the dense step; text is dense in the mask and stays as it is."""
    family = BY_NAME["mochi"]
    grid = family.grid()
    options = Adaptive(selection=selection, residual=residual)
    config = RadialConfig(block_size=16, density=0.9)
    choices, generator = Choices(options, config), torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, grid.tokens, 2, 12, generator=generator) for _ in range(3)]
    choices.begin(object(), grid, video=0, densities=[0.9], first=True)
    choices.begin_dense()
    choices.set_density(0.9)

    def sparse(*inputs):
        *tensors, mask, text_lengths, _ = inputs
        return layer_attention.radial_attention(*tensors, mask, text_lengths=text_lengths)

    dense = sparse(*tensors, radial_mask(grid, FULL), None, None)
    mask = radial_mask(grid, config)
    options = {"text_lengths": None, "sparse": sparse}
    choices.record("layer", tensors, dense, mask, **options)
    kept = choices.attend("layer", tensors, mask, **options, residual=False)
    whole = choices.attend("layer", tensors, mask, **options)
    lacking = (dense - kept)[:, : grid.video_tokens]
    error = (whole - dense)[:, : grid.video_tokens].norm() / lacking.norm()
    assert error < tolerance and lacking.norm() > 0.01
    assert torch.equal(whole[:, grid.video_tokens :], kept[:, grid.video_tokens :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "dense"}, "selection must be one of static, dense_step, profile, got 'dense'"),
        ({"budget": 3}, "budget must be one of head, layer, model, got 3"),
        ({"far_field": "most"}, "far_field must be one of none, mean, linear, got 'most'"),
        ({"residual": "fp8"}, "residual must be one of none, mean, int8, int4, output, got 'fp8'"),
        ({"residual_memory": "disk"}, "residual_memory must be one of device, host, got 'disk'"),
        (
            {"far_field": "mean", "residual": "output"},
            "set selection='static' and far_field='none', got 'static' and 'mean'",
        ),
        (
            {"selection": "dense_step", "budget": "model", "residual": "int4"},
            "budget='model' is known only after the last layer .* use budget='layer'",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        apply_radial_attention(wan_transformer(), SPARSE, **options)


def test_density_below_the_floor():
    transformer = wan_transformer()
    config = RadialConfig(block_size=16, density=0.01)
    with (
        apply_radial_attention(transformer, config, **OPTIONS),
        pytest.raises(ValueError, match=r"density must be at least 0\.0556, .* got 0\.01"),
    ):
        run(transformer)
