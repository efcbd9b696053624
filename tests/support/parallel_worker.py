"""In several processes: tiny transformers of every family, one's output beside that of all together.

`run_ranks(N, "tests.support.parallel_worker", OUT.json, CFG, RING)` writes the difference of each case.
A ring of 2 of 4 processes is joined with Ulysses; all 4 in one ring, and two rings of 2, come beside it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from diffusers import HunyuanVideoPipeline, MochiPipeline

from radial_attn import RadialConfig
from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.groups import Degrees, import_xfuser, start, stop
from radial_attn.models.parallel.guidance import GuidanceParallel
from radial_attn.models.parallel.ring import RingParallel, share_sequence
from radial_attn.models.parallel.ulysses import SequenceParallel
from radial_attn.models.profile import SHARES, Cells, MeasuredModel, ModelProfile
from tests.support.families import BY_NAME, DENSE, SPARSE
from tests.support.tiny import wan_inputs, wan_pipeline, wan_transformer
from tests.support.tiny_hunyuan import TEMPLATE, hunyuan_pipeline, hunyuan_transformer
from tests.support.tiny_mochi import mochi_inputs, mochi_pipeline, mochi_transformer

RADIAL = {"config": SPARSE}
ADAPTIVE = {  # a dense call, then two sparse ones of different density
    "config": RadialConfig(block_size=16),
    "density_range": (0.6, 0.3),
    "selection": "dense_step",
    "far_field": "linear",
    "dense_steps": 1,
    "num_steps": 3,
}
PROFILED = ADAPTIVE | {  # a dense step in the middle meets heads that are dealt
    "selection": "profile",
    "residual": "int8",
    "dense_steps": [0, 2],
    "num_steps": None,
}
MIXED = {"config": SPARSE, "dense_layers": 2}
REPLACED = partial(hunyuan_transformer, image_condition_type="token_replace")
PIPELINES = {  # whose steps have two halves: two calls, two calls of one of two experts, one batch
    "wan": wan_pipeline,
    "wan2.2": partial(wan_pipeline, experts=2),
    "mochi": mochi_pipeline,
    "hunyuan_video": hunyuan_pipeline,
}
Case = tuple[str, Callable[[], torch.nn.Module], Callable[[int, int, int], dict], dict]


def uneven_transformer() -> torch.nn.Module:
    """Makes a Wan of 8 heads; the first half attends to few tokens, so they keep more of a layer's blocks."""
    transformer = wan_transformer(num_attention_heads=8, num_layers=2)
    for block in transformer.blocks:
        block.attn1.norm_q.weight.data[: 4 * 12] *= 4
    return transformer


def token_times(inputs: dict) -> dict:
    """Sets one timestep a token, as Wan2.2 TI2V-5B has it: the first frame is given."""
    frames, height, width = inputs["hidden_states"].shape[2:]
    times = torch.full((1, frames, height // 2, width // 2), 500.0)
    times[:, 0] = 0
    return inputs | {"timestep": times.flatten(1)}


def cases(ring: int, processes: int) -> Iterator[Case]:
    """Every family, radial and dense, with tokens that 2 and 4 divide and that they do not, batch 1 and 2.

    A ring has no 8-bit products; it takes tokens that nothing divides. Four processes without a ring take
    both kinds of layer in one model.
    """
    wan, hunyuan = BY_NAME["wan"], BY_NAME["hunyuan_video"]
    families = {
        "wan": (wan, {"batch": 2}),
        "wan, a time a token": (replace(wan, inputs=lambda *sizes: token_times(wan_inputs(*sizes))), {}),
        "wan_vace": (BY_NAME["wan_vace"], {}),
        "hunyuan_video": (hunyuan, {"lengths": (4, 11)}),
        "hunyuan_video, first frame given": (replace(hunyuan, transformer=REPLACED), {}),
        "hunyuan_video15": (BY_NAME["hunyuan_video15"], {"lengths": (3, 9)}),
        "mochi": (BY_NAME["mochi"], {"lengths": (3, 7)}),
        "ltx": (BY_NAME["ltx"], {}),
        "kandinsky5": (BY_NAME["kandinsky5"], {"batch": 2}),
        "skyreels": (BY_NAME["skyreels"], {}),
        "chronoedit": (BY_NAME["chronoedit"], {}),
        "anyflow": (BY_NAME["anyflow"], {"batch": 2}),
        "wan_animate": (BY_NAME["wan_animate"], {"batch": 2}),
    }
    for name, (family, samples) in families.items():
        for size in ((6, 6, 8), (5, 3, 7)):
            for kind, options in (("radial", RADIAL), ("dense", {"config": DENSE}), ("mixed", MIXED)):
                if ring > 1 and (size[0] == 6 or kind == "mixed"):
                    continue
                if ring == 1 and processes == 4 and kind != "mixed":
                    continue
                inputs = partial(family.sized, *size, **samples)
                yield f"{name}, {size}, {kind}", family.transformer, inputs, options
    for quantize in ("int8", "fp8") if ring == 1 else ():
        rounded = {"config": SPARSE, "backend": "reference", "quantize": quantize}
        yield f"wan, {quantize}", wan_transformer, partial(wan_inputs, 6, 12, 16), rounded
        yield f"mochi, {quantize}", mochi_transformer, partial(mochi_inputs, 5, 6, 14), rounded
    for budget in ("head", "layer", "model") if ring == 1 else ():
        chosen = ADAPTIVE | {"budget": budget, "residual": "none" if budget == "model" else "int8"}
        chosen["residual_memory"] = "host" if budget == "layer" else "device"
        yield f"wan, uneven, chosen by {budget}", uneven_transformer, partial(wan_inputs, 6, 12, 16), chosen
        odd = partial(wan_transformer, num_attention_heads=5, num_layers=2)
        yield f"wan, 5 heads, chosen by {budget}", odd, partial(wan_inputs, 6, 12, 16, batch=2), chosen
        many = partial(mochi_transformer, num_attention_heads=8, num_layers=2)
        text = chosen | {"density_range": (0.95, 0.85)}
        text["residual"] = text["residual"].replace("int8", "mean")
        yield f"mochi, chosen by {budget}", many, partial(mochi_inputs, 5, 6, 14), text
    yield "wan, few blocks", wan_transformer, partial(wan_inputs, 2, 6, 14), RADIAL | {"check": "nan"}
    for heads in (3, 5):
        few = partial(wan_transformer, num_attention_heads=heads)
        yield f"wan, {heads} heads", few, partial(wan_inputs, 6, 12, 16), RADIAL


@torch.no_grad()
def differences(case: Case, shares: dict[str, SequenceParallel]) -> Iterator[tuple[str, float]]:
    """Yields the largest difference of the outputs for each way to share, relative to the largest value."""
    name, make, inputs, options = case
    transformer, given = make(), inputs()
    outputs = []
    for shared in (None, *shares.values()):
        with apply_radial_attention(transformer, **options, parallel=shared) as handle:
            outputs.append(transformer(**given).sample)
            if "selection" in options:
                for step in (-1, -2) if "mochi" not in name else (1, 2):  # Mochi's timesteps rise
                    outputs[-1] = transformer(**given | {"timestep": given["timestep"] + step}).sample
                check_balance(handle.report()["adaptive"], shared, name)
    for how, output in zip(shares, outputs[1:], strict=True):
        yield name + how, ((output - outputs[0]).abs().max() / outputs[0].abs().max()).item()


def check_balance(report: dict[str, Any], shared: SequenceParallel | None, name: str) -> None:
    """Checks that processes keep about equally many blocks, by the report and in the latest call."""
    if shared is None:
        assert report["imbalance"] is None
        return
    kept = torch.zeros(shared.degree)
    kept[shared.rank] = report["density"]
    torch.distributed.all_reduce(kept)
    worst = max(report["imbalance"], (kept.max() / kept.mean()).item())
    assert "uneven" not in name or worst < 1.05, f"{name}: {report}, {kept}"


def latents(
    pipeline: Any, prompts: int, shared: SequenceParallel | None, guided: bool, **attention: Any
) -> torch.Tensor:
    """Returns the final latents with radial attention; `guided`: with its two halves on two processes."""
    attention = attention or {"config": SPARSE, "dense_steps": 1}
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
    if type(pipeline) is HunyuanVideoPipeline:
        options |= {"true_cfg_scale": 3.0, "negative_prompt": prompts * ["no"], "prompt_template": TEMPLATE}
    sizes = {"height": 48, "width": 64, "num_frames": 13 if type(pipeline) is MochiPipeline else 9}
    if "profile" in attention:
        sizes = {"height": 96, "width": 64, "num_frames": 17}
    generators = [torch.Generator().manual_seed(seed) for seed in range(prompts)]
    parts = [part for part in (pipeline.transformer, getattr(pipeline, "transformer_2", None)) if part]
    batched = type(pipeline) is MochiPipeline
    with ExitStack() as stack:
        stack.enter_context(apply_radial_attention(pipeline, **attention, parallel=shared))
        if guided:
            group = import_xfuser("cpu").get_cfg_group().device_group
            stack.enter_context(GuidanceParallel(parts, group, batched=batched))
        return pipeline(prompts * ["a cat"], generator=generators, **sizes, **options).frames


@torch.no_grad()
def pipeline_difference(
    make: Callable[[], Any], prompts: int, shared: SequenceParallel | None, **attention: Any
) -> float:
    """Returns the largest difference of the latents from one process's, relative to the largest value."""
    pipeline = make()
    alone = latents(pipeline, prompts, None, False, **attention)
    guided = import_xfuser("cpu").get_cfg_group().world_size == 2
    together = latents(pipeline, prompts, shared, guided, **attention)
    return ((together - alone).abs().max() / alone.abs().max()).item()


def check_frame_times_are_refused(shared: SequenceParallel) -> None:
    """Checks that diffusion forcing, whose times of frames cannot be split by tokens, does not run."""
    family, times = BY_NAME["skyreels"], {"timestep": torch.full((1, 6), 500.0)}
    inputs = family.sized() | times | {"enable_diffusion_forcing": True}
    with apply_radial_attention(transformer := family.transformer(), **RADIAL, parallel=shared):
        try:
            transformer(**inputs)
        except ValueError as error:
            assert "6 timesteps are for frames" in str(error)
            return
    raise AssertionError("diffusion forcing ran")


def profile_difference(shared: SequenceParallel | None) -> float:
    """Returns the difference for the blocks of a profile, whose five heads keep different numbers of them."""
    generator, model = torch.Generator().manual_seed(0), MeasuredModel("wan", layers=4, heads=5, width=12)
    basis, parts = (torch.rand(shape, generator=generator).half() for shape in ((9, 144), (3, 2, 4, 5, 9)))
    biases = torch.rand(2, 4, 5, len(SHARES), generator=generator).half()
    profile = ModelProfile(model, Cells(3, 4), (0.7, 0.0), (), basis, parts, biases)
    with NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(profile.to_bytes())
        file.flush()
        return pipeline_difference(
            partial(wan_pipeline, num_attention_heads=5), 2, shared, **PROFILED, profile=file.name
        )


def all_shares(degrees: Degrees) -> dict[str, SequenceParallel]:
    """Makes xDiT's groups first, and with a ring others of the same processes."""
    shares = {"": share_sequence(import_xfuser("cpu").get_sp_group())}
    if degrees.ring > 1 and degrees.cfg == 1:
        rank, everyone = torch.distributed.get_rank(), torch.distributed.group.WORLD
        alone = [torch.distributed.new_group([index]) for index in range(degrees.processes)][rank]
        pairs = [torch.distributed.new_group([2 * i, 2 * i + 1]) for i in range(degrees.processes // 2)]
        shares[", all in a ring"] = RingParallel(alone, everyone, everyone)
        shares[", rings of two"] = RingParallel(alone, pairs[rank // 2], pairs[rank // 2])
    return shares


def measure(degrees: Degrees) -> Iterator[tuple[str, float]]:
    """Yields each case with its difference: transformers if all share the sequence, else pipelines."""
    shares = all_shares(degrees)
    if degrees.cfg == 1:
        check_frame_times_are_refused(shares[""])
        for case in cases(degrees.ring, degrees.processes):
            yield from differences(case, shares)
    if degrees.ring == 1:
        yield "wan pipeline, profile", profile_difference(shares[""])
    for name, make in PIPELINES.items():
        for prompts in (1, 2) if degrees.ring == 1 else (2,):
            yield f"{name} pipeline, {prompts} prompts", pipeline_difference(make, prompts, shares[""])


def main(arguments: list[str]) -> None:
    """Runs all cases in all processes; the first one writes the worst of all of them."""
    out, cfg, ring = Path(arguments[0]), *map(int, arguments[1:])
    degrees = Degrees(ulysses=int(os.environ["WORLD_SIZE"]) // (cfg * ring), ring=ring, cfg=cfg)
    start(degrees, "cpu")
    results = {}
    for name, value in measure(degrees):
        worst = torch.tensor(value)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        results[name] = worst.item()
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(results, indent=1))
    stop()


if __name__ == "__main__":
    main(sys.argv[1:])
