"""Pipelines of several families through the command, tiny and random."""

import json
from pathlib import Path
from typing import Any

import av
import imageio
import numpy as np
import pytest
import torch
from PIL import Image

from radial_attn import TokenGrid
from radial_attn.models.parallel.groups import Degrees
from radial_attn.models.pipeline.families import FAMILIES
from scripts.generate import main
from scripts.run.config import read_config
from scripts.run.describe import describe_plan
from scripts.run.errors import UsageError
from scripts.run.memory import transformer_bytes
from scripts.run.option_checks import check_shared
from scripts.run.plan import make_plan
from scripts.run.sampler import Sampler
from tests.support.multi_process import run_ranks
from tests.support.script_cases import SMALL
from tests.support.tiny import wan_pipeline
from tests.support.tiny_hunyuan import hunyuan15_image_pipeline, hunyuan15_pipeline, hunyuan_pipeline
from tests.support.tiny_kandinsky import kandinsky5_image_pipeline, kandinsky5_pipeline
from tests.support.tiny_ltx import ltx_image_pipeline, ltx_pipeline
from tests.support.tiny_ltx2 import RATE, ltx2_image_pipeline, ltx2_pipeline
from tests.support.tiny_mochi import mochi_pipeline
from tests.support.tiny_motif import motif_image_pipeline, motif_pipeline
from tests.support.tiny_wan_relatives import (
    animate_pipeline,
    anyflow_pipeline,
    chronoedit_pipeline,
    skyreels_forcing_pipeline,
    skyreels_image_pipeline,
    skyreels_pipeline,
)

ANIMATE, SEGMENTS = (
    "configs/wan2.2_animate_14b.yaml",
    ["generation.num_frames=11", "generation.segment_frames=5"],
)
FORCING = "configs/skyreels_v2_df.yaml"
RUNS = {
    "anyflow_t2v_14b": (anyflow_pipeline, ["generation.num_frames=9"]),
    "hunyuan_t2v": (hunyuan_pipeline, ["generation.num_frames=9", "generation.prompt_template=plain"]),
    "hunyuan15_t2v": (hunyuan15_pipeline, ["generation.num_frames=9"]),
    "kandinsky5_t2v_lite": (kandinsky5_pipeline, ["generation.num_frames=9"]),
    "ltx_t2v": (ltx_pipeline, ["generation.num_frames=5", "generation.height=32"]),
    "ltx2_t2v": (ltx2_pipeline, ["generation.num_frames=13", "generation.height=32"]),
    "mochi_t2v": (mochi_pipeline, ["generation.num_frames=7"]),
    "motif_t2v": (motif_pipeline, ["generation.num_frames=9"]),
    "skyreels_v2_t2v_14b": (skyreels_pipeline, ["generation.num_frames=9"]),
    "skyreels_v2_df": (
        skyreels_forcing_pipeline,
        ["generation.num_frames=29", "generation.segment_frames=25"],
    ),
    "wan2.2_t2v_a14b": (lambda: wan_pipeline(experts=2), ["generation.num_frames=9"]),
}
FROM_IMAGE = {
    "kandinsky5_i2v_lite": (kandinsky5_image_pipeline, ["generation.num_frames=17"]),
    "motif_i2v": (motif_image_pipeline, ["generation.num_frames=9"]),
    "chronoedit_14b": (chronoedit_pipeline, ["generation.num_frames=13"]),
    "skyreels_v2_i2v_14b": (skyreels_image_pipeline, ["generation.num_frames=9"]),
}


@pytest.mark.parametrize("preset", RUNS)
def test_a_tiny_random_pipeline_through_the_command(preset, tmp_path, recwarn):
    build, options = RUNS[preset]
    build().save_pretrained(tmp_path / "model")
    paths = [f"model.path={tmp_path / 'model'}", f"output.path={tmp_path / 'out.mp4'}"]
    assert main([f"configs/{preset}.yaml", *SMALL, *options, *paths]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    videos = record["attention"]["videos"]
    assert videos == len(record["attention"]["grids"]) == (2 if preset == "skyreels_v2_df" else 1)
    assert (record["attention"]["steps"], record["attention"]["dense_steps"]) == (3 * videos, videos)
    assert record["attention"]["check"]["compared"] > 0
    assert record["attention"]["check"]["worst"]["relative_l2"] < 1e-5
    assert not [warning for warning in recwarn if "autocast" in str(warning.message)]


OTHERS = {  # whose dense runs have tests of their own
    "hunyuan15_i2v": (hunyuan15_image_pipeline, []),
    "ltx_i2v": (ltx_image_pipeline, ["generation.num_frames=5"]),
    "ltx2_i2v": (ltx2_image_pipeline, []),
    "wan2.2_animate_14b": (animate_pipeline, ["generation.num_frames=5", "generation.segment_frames=5"]),
}
MOTIF, BUILT_IN = {"motif_t2v", "motif_i2v"}, {"anyflow_t2v_14b", "hunyuan_t2v", "wan2.2_animate_14b"}
UNSHARED = {  # degree -> presets that refuse it, and what their line has
    "ulysses_degree": (MOTIF | {"skyreels_v2_df", "ltx_i2v"}, "tokens.*, so they stay in one process"),
    "cfg_degree": (
        MOTIF | BUILT_IN | {"ltx2_t2v", "ltx2_i2v", "kandinsky5_t2v_lite", "kandinsky5_i2v_lite"},
        "parallel.cfg_degree: got 2",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("degree", UNSHARED)
@pytest.mark.parametrize("preset", [*RUNS, *FROM_IMAGE, *OTHERS])
def test_two_processes_make_the_video_of_one(preset, degree, tmp_path):
    """They share the tokens, or the halves of guidance."""
    build, options = (RUNS | FROM_IMAGE | OTHERS)[preset]
    build().save_pretrained(tmp_path / "model")
    keys = [f"configs/{preset}.yaml", *SMALL, "generation.num_frames=9", *options, "attention.check=off"]
    keys.append(f"model.path={tmp_path / 'model'}")
    takes = FAMILIES[read_config(keys[0], []).model.family].takes
    for name in {"pose_video", "face_video"}.intersection(takes):
        drawn(tmp_path / name, 64)
        keys.append(f"generation.{name}={tmp_path / name}")
    if "image" in takes:
        Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "image.png")
        keys.append(f"generation.image={tmp_path / 'image.png'}")
    one, two = (f"output.path={tmp_path / name}.mp4" for name in ("one", "two"))
    shared, (refusing, line) = [*keys, two, f"parallel.{degree}=2"], UNSHARED[degree]
    if preset in refusing:
        with pytest.raises(UsageError, match=line):
            make_plan(read_config(shared[0], shared[1:]), processes=2)
        return
    assert main([*keys, one]) == 0
    run_ranks(2, "scripts.generate", *shared)
    videos = [imageio.mimread(tmp_path / f"{name}.mp4", memtest=False) for name in ("one", "two")]
    assert np.abs(np.diff(np.stack(videos).astype(float), axis=0)).mean() < 0.1


@pytest.mark.parametrize(("keys", "calls"), [([], 3), (["modality_scale=1"], 2), (["stg_scale=1"], 4)])
def test_ltx2_writes_its_sound_and_makes_the_passes_of_each_guidance(keys, calls, tmp_path):
    """Sound has 14 latents of 160 x 4 samples for 13 frames, the first one of 160. Each pass is planned."""
    build, options = RUNS["ltx2_t2v"]
    build().save_pretrained(tmp_path / "model")
    keys = [
        "attention.decay_factor=0.2",
        *(f"generation.{key}" for key in keys),
        f"model.path={tmp_path / 'model'}",
    ]
    argv = ["configs/ltx2_t2v.yaml", *SMALL, *options, *keys, f"output.path={tmp_path / 'out.mp4'}"]
    assert main(argv) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["video"]["sound"] == {"channels": 2, "rate": RATE, "seconds": 53 * 160 / RATE}
    with av.open(str(tmp_path / "out.mp4")) as container:
        (sound,), (video,) = container.streams.audio, container.streams.video
        assert (sound.codec_context.name, sound.rate, sound.channels) == ("aac", RATE, 2)
        assert float(sound.duration * sound.time_base) == pytest.approx(0.53, abs=0.07)  # a packet has 0.064
        assert (video.frames, video.average_rate) == (13, 24)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out.json", "out.mp4"]
    assert record["attention"]["density"] == pytest.approx(record["density"]) and record["density"] < 0.9
    plan = make_plan(read_config(argv[0], argv[1:]))
    assert plan.calls == calls and plan.memory.weights == 4 * sum(plan.model.parameters.values())
    assert {"connectors", "audio_vae", "vocoder"} < set(plan.model.parameters)
    made = sum(record["attention"]["calls"].values())  # of a layer: both halves of guidance are one call
    assert made == 3 * 4 * (calls - 1)


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ("ltx_t2v", {"guidance_scale": 3.0, "frame_rate": 25}),
        ("ltx2_t2v", {"guidance_scale": 3.0, "frame_rate": 24, "stg_scale": 0.0, "audio_stg_scale": 0.0}),
        ("hunyuan15_t2v", {}),
        ("kandinsky5_t2v_lite", {}),
        ("anyflow_t2v_14b", {}),
        ("motif_t2v", {}),
        ("motif_i2v", {}),
        ("kandinsky5_i2v_lite", {}),
        ("chronoedit_14b", {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 3}),
        ("chronoedit_14b", {"num_frames": 5}),
        ("skyreels_v2_t2v_14b", {"guidance_scale": 6.0}),
        ("skyreels_v2_i2v_14b", {"guidance_scale": 5.0}),
    ],
)
def test_a_dense_run_is_that_of_diffusers(preset, given, tmp_path):
    """Calls the pipeline by its own arguments; guidance of two families is in their guider."""
    build, options = (RUNS | FROM_IMAGE)[preset]
    pipeline, keys = build(), [f"model.path={tmp_path}", "attention.pattern=dense", "attention.check=off"]
    keys += ["generation.guidance_scale=7.5", "generation.flow_shift=null"] if "motif" in preset else []
    pipeline.save_pretrained(tmp_path)
    if preset in FROM_IMAGE:
        given = given | {"image": Image.linear_gradient("L").resize((64, 64)).convert("RGB")}
        given["image"].save(tmp_path / "image.png")
        keys += [f"generation.image={tmp_path / 'image.png'}"]
    keys += [f"generation.num_frames={given['num_frames']}"] if "num_frames" in given else []
    plan = make_plan(read_config(f"configs/{preset}.yaml", [*SMALL, *options, *keys]))
    generation, sampler = plan.config.generation, Sampler(plan)
    if "flow_shift" in pipeline.scheduler.config:
        shifted = {"flow_shift": generation.flow_shift}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **shifted)
    frames, run = sampler.sample_video(sampler.load(), generation.prompt, {})
    assert list(run["attention"]["calls"]) == ["dense"] and len(run["step_seconds"]) == 3
    expected = pipeline(
        prompt=[generation.prompt],
        negative_prompt=generation.negative_prompt,
        **{name: getattr(generation, name) for name in ("height", "width", "num_frames")} | given,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    assert np.array_equal(frames, (expected * 255).round().astype(np.uint8))
    assert list(run["attention"]["calls"]) == ["dense"] and len(run["step_seconds"]) == 3


def test_kandinsky_with_nabla_keeps_its_tiles_of_tokens(tmp_path):
    """Its sizes are multiples of 128 pixels, a tile of 8 x 8 tokens."""
    window = {"attention_wT": 3, "attention_wW": 3, "attention_wH": 3, "attention_add_sta": True}
    nabla = {"attention_type": "nabla", "attention_P": 0.9, "attention_method": "topcdf"} | window
    kandinsky5_pipeline(**nabla).save_pretrained(tmp_path)
    keys = [*SMALL, "generation.num_frames=9", "generation.height=128", "generation.width=256"]
    plan = make_plan(read_config("configs/kandinsky5_t2v_lite.yaml", [*keys, f"model.path={tmp_path}"]))
    assert plan.grid == TokenGrid(3, 8, 16, order="tiles") and plan.model.size_factor(2) == 128
    sampler = Sampler(plan)
    _, run = sampler.sample_video(sampler.load(), plan.config.generation.prompt, {})
    assert run["attention"]["grid"] == [3, 8, 16]
    assert run["attention"]["density"] == pytest.approx(plan.density)
    assert run["attention"]["check"]["worst"]["relative_l2"] < 1e-5


def drawn(folder: Path, side: int, levels: int = 256) -> list[Image.Image]:
    """Draws 11 random grey frames into a new folder, and returns them."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, levels, (11, side, side), dtype=np.uint8)
    frames = [Image.fromarray(frame * (255 // (levels - 1))).convert("RGB") for frame in pixels]
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:02d}.png")
    return frames


@pytest.fixture
def animation(tmp_path) -> tuple[dict[str, Any], list[str]]:
    """Makes what Wan-Animate is given by key, and the words that name the files, `video` and `mask` last."""
    sides = {"image": 64, "pose_video": 64, "face_video": 16, "video": 64, "mask": 64}
    given = {key: drawn(tmp_path / key, side, 2 if key == "mask" else 256) for key, side in sides.items()}
    animate_pipeline().save_pretrained(tmp_path / "model")
    words = [f"generation.image={tmp_path / 'image' / '00.png'}"]
    words += [f"generation.{key}={tmp_path / key}" for key in given if key != "image"]
    paths = [f"model.path={tmp_path / 'model'}", f"output.path={tmp_path / 'out.mp4'}"]
    return given | {"image": given["image"][0]}, [ANIMATE, *SMALL, *SEGMENTS, *paths, *words]


def test_each_segment_of_wan_animate_begins_with_dense_steps(animation, tmp_path, capsys):
    """Makes 11 frames in segments of 5; each has 2 latent frames behind that of the character."""
    _, words = animation
    assert main(words[:-2]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    report, printed = record["attention"], capsys.readouterr()
    assert (report["videos"], report["steps"], report["dense_steps"]) == (3, 9, 3)
    assert report["stayed_dense"]["dense_step"] == 3 * 4 and report["grid"] == [3, 4, 4]
    assert report["check"]["worst"]["relative_l2"] < 1e-5 and record["mask"]["sink"] == 2
    assert len(record["step_seconds"]) == 9 and "9/9" in printed.err
    assert imageio.v3.imread(tmp_path / "out.mp4").shape == (11, 64, 64, 3)
    assert set(record["inputs"]) == {"image", "pose_video", "face_video"}
    assert main([*words, "output.overwrite=true", "--dry-run"]) == 0
    assert "11 frames at 30 per second, 3 segments of 5" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_a_dense_run_of_wan_animate_is_that_of_diffusers(mode, animation):
    given, words = animation
    replaced = {"background_video": given.pop("video"), "mask_video": given.pop("mask")}
    words = words[1:] if mode == "replace" else words[1:-2]
    plan = make_plan(read_config(ANIMATE, [*words, "attention.pattern=dense", "attention.check=off"]))
    sampler = Sampler(plan)
    pipeline = sampler.load()
    frames, run = sampler.sample_video(pipeline, plan.config.generation.prompt, {})
    expected = pipeline(
        **given | (replaced if mode == "replace" else {}),
        prompt=plan.config.generation.prompt,
        height=64,
        width=64,
        segment_frame_length=5,
        num_inference_steps=3,
        mode=mode,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    assert np.array_equal(frames, (expected * 255).round().astype(np.uint8)) and len(frames) == 11
    assert list(run["attention"]["calls"]) == ["dense"] and len(run["step_seconds"]) == 9


@pytest.mark.parametrize(
    ("family", "frames", "segment"), [("skyreels_v2_df", 29, 25), ("skyreels_v2_df_i2v", 25, 21)]
)
def test_segments_of_diffusion_forcing_are_those_of_diffusers(family, frames, segment, tmp_path, capsys):
    """Makes two segments, the second one of 21 frames; the noise on what they begin with is of the seed."""
    skyreels_forcing_pipeline().save_pretrained(tmp_path / "model")
    image = Image.linear_gradient("L").resize((64, 32)).convert("RGB")
    given, keys = {}, [*SMALL, f"model.path={tmp_path / 'model'}", f"model.family={family}"]
    keys += [f"generation.num_frames={frames}", f"generation.segment_frames={segment}", "attention.check=off"]
    keys += ["generation.height=32"]
    if family.endswith("i2v"):
        image.save(tmp_path / "image.png")
        given, keys = {"image": image}, [*keys, f"generation.image={tmp_path / 'image.png'}"]
    videos = []
    for attention in ("pattern=dense", "density=1"):
        plan = make_plan(read_config(FORCING, [*keys, f"attention.{attention}"]))
        sampler, prompt = Sampler(plan), plan.config.generation.prompt
        pipeline = sampler.load()
        video, run = sampler.sample_video(pipeline, prompt, {})
        videos.append(video.astype(int))
    assert run["attention"]["dense_steps"] == 2 and len(run["step_seconds"]) == 6
    assert all(entry["density"] == 1 for entry in run["attention"]["grids"])
    assert "6/6" in capsys.readouterr().err and np.abs(np.diff(videos, axis=0)).max() <= 1
    torch.manual_seed(0)
    expected = pipeline(
        prompt=prompt,
        negative_prompt=plan.config.generation.negative_prompt,
        **given | {"height": 32, "width": 64, "num_frames": frames, "base_num_frames": segment},
        overlap_history=17,
        addnoise_condition=20,
        guidance_scale=6.0,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    assert np.array_equal(videos[0], (expected * 255).round()) and len(expected) == frames


def test_segments_of_diffusion_forcing_are_counted_one_by_one():
    """The last one may be shorter. The VAE decodes all frames at once; each token has six modulations."""
    lengths = {"one": 97, "last": 81, "three": 257, "shorter": 241, "long": 8017, "longer": 8097}
    plans = {
        name: make_plan(read_config(FORCING, [f"generation.num_frames={count}"]), dry_run=True)
        for name, count in lengths.items()
    }
    one, last, three, shorter, long, longer = plans.values()
    assert three.flops == pytest.approx([3 * count for count in one.flops])
    assert shorter.flops == pytest.approx([2 * a + b for a, b in zip(one.flops, last.flops, strict=True)])
    assert three.memory == one.memory and "3 segments of 97, the last of 81" in describe_plan(shorter)
    assert longer.memory.total - long.memory.total == pytest.approx(2 * 4 * 3 * 544 * 960 * 80)
    alone = make_plan(read_config("configs/skyreels_v2_t2v_14b.yaml", []), dry_run=True)
    need, plain = (transformer_bytes(x.model, x.grid, x.config.model) for x in (one, alone))
    assert one.grid == alone.grid and need - plain == one.grid.tokens * 5120 * 6 * (2 + 4)
    check_shared(three.config, Degrees(cfg=2))
    with pytest.raises(UsageError, match="tokens have timesteps of their own"):
        check_shared(one.config, Degrees(ulysses=2))


def test_a_dense_run_of_hunyuan_video_15_from_an_image_is_that_of_diffusers(tmp_path):
    hunyuan15_image_pipeline().save_pretrained(tmp_path / "model")
    (image, *_) = drawn(tmp_path / "image", 96)
    keys = [f"model.path={tmp_path / 'model'}", f"generation.image={tmp_path / 'image' / '00.png'}"]
    keys += [*SMALL, "generation.num_frames=5", "attention.pattern=dense", "attention.check=off"]
    plan = make_plan(read_config("configs/hunyuan15_i2v.yaml", keys))
    sampler, prompt = Sampler(plan), plan.config.generation.prompt
    pipeline, noise = sampler.load(), torch.Generator().manual_seed(0)
    frames, _ = sampler.sample_video(pipeline, prompt, {})
    pipeline.guider = pipeline.guider.new(guidance_scale=6.0)
    options = {"negative_prompt": "", "num_frames": 5, "num_inference_steps": 3, "generator": noise}
    expected = pipeline(image=image, prompt=prompt, **options).frames[0]
    assert np.array_equal(frames, (expected * 255).round().astype(np.uint8))


def test_further_segments_add_operations_and_their_videos_to_the_memory():
    """Keeps frames of poses and faces, and decoded ones twice, in float32; one video stays in one process."""
    frames = 77, 229
    one, three = (
        make_plan(read_config(ANIMATE, [f"generation.num_frames={count}"]), dry_run=True) for count in frames
    )
    assert three.grid == one.grid and three.flops.sparse == pytest.approx(3 * one.flops.sparse)
    more = 12 * (frames[1] - frames[0]) * (3 * 720 * 1280 + 512**2)
    assert three.memory.total - one.memory.total == pytest.approx(more)
    with pytest.raises(UsageError, match=r"generation\.segment_frames: got 77"):
        check_shared(three.config, Degrees(ulysses=2))
    check_shared(three.config, Degrees(data=2))
    check_shared(one.config, Degrees(ulysses=2))
