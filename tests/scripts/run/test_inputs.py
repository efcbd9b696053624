"""Image to video and VACE through the command: tiny random pipelines, the rule of fitting, refused files."""

import json
from functools import partial
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image

from scripts.generate import main
from scripts.run.config import read_config
from scripts.run.errors import UsageError
from scripts.run.inputs import fit, open_image, read_inputs, read_prompts
from tests.support.script_cases import SMALL, refused
from tests.support.tiny import CHANNELS
from tests.support.tiny_hunyuan import hunyuan15_image_pipeline, hunyuan_image_pipeline, hunyuan_pipeline
from tests.support.tiny_kandinsky import kandinsky5_image_pipeline
from tests.support.tiny_ltx import ltx_image_pipeline, ltx_pipeline
from tests.support.tiny_ltx2 import ltx2_image_pipeline
from tests.support.tiny_motif import motif_image_pipeline, motif_pipeline
from tests.support.tiny_wan import a14b_i2v_pipeline, i2v_pipeline, ti2v_pipeline, vace_pipeline
from tests.support.tiny_wan_relatives import chronoedit_pipeline, skyreels_image_pipeline

WAN, HUNYUAN, TEXT = "configs/wan2.1_i2v_14b_480p.yaml", "configs/hunyuan_i2v.yaml", "configs/wan_tiny.yaml"
FRAMES = ["generation.num_frames=9"]
AGAIN = ["output.overwrite=true"]
LAST = "generation.last_image={last}"
ANIMATE = ["configs/wan2.2_animate_14b.yaml", *FRAMES, "generation.image={here}/small.png"]
ANIMATE += ["generation.face_video={here}/short.gif"]
VACE = ["configs/wan2.1_t2v_14b.yaml", "model.family=wan_vace", "model.path=Wan-AI/Wan2.1-VACE-14B-diffusers"]


def ti2v() -> WanPipeline:
    """As Wan2.2 TI2V-5B, a text-to-video pipeline by its index, with a VAE of 16 x 16 pixels to a latent."""
    pipeline = ti2v_pipeline()
    torch.manual_seed(0)
    pipeline.vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=CHANNELS,
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    ).eval()
    return pipeline


RUNS = {
    "wan2.1": (i2v_pipeline, [WAN]),
    "wan2.1 flf2v": (partial(i2v_pipeline, last=True), [WAN, LAST]),
    "wan2.2": (a14b_i2v_pipeline, ["configs/wan2.2_i2v_a14b.yaml"]),
    "wan2.2 last": (a14b_i2v_pipeline, ["configs/wan2.2_i2v_a14b.yaml", LAST]),
    "wan2.2 5B": (ti2v, [WAN]),
    "skyreels": (skyreels_image_pipeline, ["configs/skyreels_v2_i2v_14b.yaml"]),
    "chronoedit": (chronoedit_pipeline, ["configs/chronoedit_14b.yaml"]),
    "ltx": (ltx_image_pipeline, ["configs/ltx_i2v.yaml"]),
    "ltx of text": (ltx_pipeline, ["configs/ltx_i2v.yaml"]),  # whose folder has all parts
    "hunyuan15": (hunyuan15_image_pipeline, ["configs/hunyuan15_i2v.yaml"]),  # its size is the image's
    "ltx2": (ltx2_image_pipeline, ["configs/ltx2_i2v.yaml"]),
    "motif": (motif_image_pipeline, ["configs/motif_i2v.yaml"]),
    "motif of text": (motif_pipeline, ["configs/motif_i2v.yaml"]),
    "hunyuan": (lambda: hunyuan_image_pipeline("token_replace", image_size=336), [HUNYUAN]),
    "hunyuan 33ch": (lambda: hunyuan_image_pipeline("latent_concat", image_size=336), [HUNYUAN]),
}


def picture(file: Path, size: tuple[int, int] = (96, 64), color: str = "red", **options: object) -> Path:
    Image.new("RGB", size, color).save(file, **options)
    return file


def clip(frames: int = 9, level: int = 200) -> np.ndarray:
    """Makes grey frames uint8 `[T, 48, 80, 3]` with a bright left half."""
    video = np.full((frames, 48, 80, 3), 20, dtype=np.uint8)
    video[:, :, :40] = level
    return video


def saved(build, folder: Path) -> list[str]:
    build().save_pretrained(folder / "model")
    return [f"model.path={folder / 'model'}", f"output.path={folder / 'out.mp4'}"]


@pytest.mark.parametrize("name", RUNS)
def test_a_tiny_random_pipeline_from_an_image(name, tmp_path):
    build, preset = RUNS[name]
    size = (96, 96) if name == "hunyuan15" else (96, 64)
    image, last = picture(tmp_path / "cat.png", size), picture(tmp_path / "last.png", color="blue")
    preset = [word.format(last=last) for word in preset]
    argv = [*preset, *SMALL, *FRAMES, *saved(build, tmp_path), f"generation.image={image}"]
    assert main(argv) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["inputs"]["image"]["file"] == "cat.png" and len(record["inputs"]["image"]["sha256"]) == 64
    assert [file["file"] for file in record["inputs"].values()][1:] == ["last.png"] * (len(preset) - 1)
    assert record["attention"]["steps"] == 3 and record["attention"]["dense_steps"] == 1
    side = {"wan2.2 5B": 2, "ltx": 16, "ltx of text": 16, "ltx2": 16}.get(name, 4)
    assert record["attention"]["grid"] == [3, side, side]
    assert record["attention"]["check"]["worst"]["relative_l2"] < 1e-5


@pytest.mark.parametrize(
    ("preset", "build", "frames"),
    [("motif_i2v", motif_image_pipeline, 9), ("kandinsky5_i2v_lite", kandinsky5_image_pipeline, 17)],
)
def test_from_an_image_in_bfloat16(preset, build, frames, tmp_path):
    """Its pipeline gives the VAE, which is in float32, an image in the dtype of the transformer."""
    argv = [f"configs/{preset}.yaml", *SMALL, f"generation.num_frames={frames}", *saved(build, tmp_path)]
    argv += ["model.dtype=bfloat16", "attention.check=nan"]
    assert main([*argv, f"generation.image={picture(tmp_path / 'cat.png')}"]) == 0


def test_the_last_image_changes_the_video_and_a_model_that_needs_it_says_so(tmp_path, capsys):
    model = saved(partial(i2v_pipeline, last=True), tmp_path)
    image = picture(tmp_path / "first.png")
    argv = [WAN, *SMALL, *FRAMES, *model, *AGAIN, "attention.check=off", f"generation.image={image}"]
    refused(capsys, argv, "generation.last_image: got null, but this model needs a first and a last image")
    assert main([*argv, "--dry-run"]) == 0
    videos = []
    for color in ("red", "blue"):
        last = picture(tmp_path / "last.png", color=color)
        assert main([*argv, f"generation.last_image={last}"]) == 0
        videos.append((tmp_path / "out.mp4").read_bytes())
    assert videos[0] != videos[1]
    for build in (i2v_pipeline, ti2v):
        other = saved(build, tmp_path / build.__name__)
        wrong = [WAN, *SMALL, *FRAMES, *other, f"generation.image={image}", f"generation.last_image={last}"]
        refused(capsys, wrong, "generation.last_image: got", "takes no last image; set")


def test_a_reference_image_is_white_where_it_is_clear_like_the_ground_that_it_stands_on(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 51)).save(tmp_path / "clear.png")
    config = read_config(TEXT, [f"generation.reference_images={tmp_path / 'clear.png'}"])
    (image,) = read_inputs(config.generation, "wan_vace").arguments["reference_images"]
    assert image.size == (8, 8) and image.getpixel((0, 0)) == (255, 204, 204)


def test_reference_images_of_vace_are_frames_that_every_query_sees(tmp_path, capsys):
    """Two images in front of 3 latent frames; the sink covers both and the video's first frame."""
    files = [str(picture(tmp_path / f"{color}.png", (40, 90), color)) for color in ("red", "blue")]
    names = f"generation.reference_images=[{', '.join(files)}]"
    argv = [*VACE, *SMALL, *FRAMES, *saved(vace_pipeline, tmp_path), *AGAIN, "attention.dense_steps=0"]
    assert main([*argv, names]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["attention"]["grid"] == [5, 4, 4] and record["tokens"] == 80
    assert record["mask"]["sink"] == 3 and record["config"]["generation"]["reference_images"] == files
    inputs = {key: file["file"] for key, file in record["inputs"].items()}
    assert inputs == {"reference_images[0]": "red.png", "reference_images[1]": "blue.png"}
    assert record["attention"]["density"] == pytest.approx(record["density"])
    assert imageio.v3.imread(tmp_path / "out.mp4").shape == (9, 64, 64, 3)
    assert main([*argv, names, "--dry-run"]) == 0
    assert "80 = 5 latent frames x 4 x 4" in capsys.readouterr().out
    assert main([*argv, f"generation.reference_images={files[0]}"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["mask"]["sink"] == 2
    refused(
        capsys, [*argv, f"generation.reference_images=[{files[0]}, x.png]"], "reference_images[1]", "'x.png'"
    )


@pytest.mark.parametrize("build", [hunyuan_pipeline, RUNS["hunyuan"][0]], ids=["text", "image"])
def test_true_guidance_of_hunyuan_video_makes_two_calls_a_step(build, tmp_path, capsys):
    pipeline = saved(build, tmp_path)
    preset = [HUNYUAN, f"generation.image={picture(tmp_path / 'a.png')}"]
    argv = [
        *(["configs/hunyuan_t2v.yaml"] if build is hunyuan_pipeline else preset),
        *SMALL,
        *FRAMES,
        *pipeline,
    ]
    argv += ["generation.guidance_scale=1", "attention.check=off", *AGAIN]
    videos, flops = [], []
    for scale, negative in ((1, ""), (3, "a"), (3, "zzz")):
        options = [f"generation.true_cfg_scale={scale}", f"generation.negative_prompt={negative}"]
        assert main([*argv, *options]) == 0
        record = json.loads((tmp_path / "out.json").read_text())
        assert sum(record["attention"]["calls"].values()) == 3 * 4 * min(scale, 2)
        videos.append((tmp_path / "out.mp4").read_bytes())
        capsys.readouterr()
        assert main([*argv, *options, "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert ("true guidance 3" in out) == (scale == 3)
        flops.append(float(out.split("transformer")[1].split()[0]))
    assert len(set(videos)) == 3 and flops[1] == flops[2] == pytest.approx(2 * flops[0], rel=1e-3)


@pytest.mark.parametrize("given", ["nothing", "video", "video and mask"])
def test_a_tiny_random_vace(given, tmp_path):
    options = [] if given == "nothing" else [f"generation.video={tmp_path / 'video.mp4'}"]
    options += [f"generation.mask={tmp_path / 'mask.gif'}"] if "mask" in given else []
    imageio.mimwrite(tmp_path / "video.mp4", clip(), macro_block_size=1)
    imageio.mimwrite(tmp_path / "mask.gif", [frame + i for i, frame in enumerate(clip())])
    assert main([*VACE, *SMALL, *FRAMES, *saved(vace_pipeline, tmp_path), *options]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert set(record["inputs"]) == set(given.replace("nothing", "").split()) - {"and"}
    assert record["attention"]["layers"] == 6 and record["attention"]["dense_layers"] == 2
    assert record["attention"]["check"]["worst"]["relative_l2"] < 1e-5


def test_comments_are_no_prompts(tmp_path):
    """A prompt that begins with # is written with a backslash; any other backslash stays."""
    file = tmp_path / "prompts.txt"
    file.write_text("# cats\n a # b\n\n\t# dogs\n\\# c\n\\d\n\\\\#\n")
    generation = read_config(WAN, [f"generation.prompt_file={file}"]).generation
    assert read_prompts(generation) == {2: "a # b", 5: "# c", 6: "\\d", 7: "\\\\#"}
    file.write_text("# nothing\n")
    with pytest.raises(UsageError, match="which is empty"):
        read_prompts(generation)


def test_a_prompt_file_resumes_unless_the_image_changed(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    image = picture(tmp_path / "first.png")
    model, _ = saved(a14b_i2v_pipeline, tmp_path)
    options = [*SMALL, *FRAMES, model, "generation.steps=1", "output.overwrite=true"]
    options.append(f"output.path={tmp_path / 'out'}")
    argv = [WAN, *options, f"generation.prompt_file={tmp_path / 'prompts.txt'}"]

    def run(file: Path) -> str:
        assert main([*argv, f"generation.image={file}"]) == 0
        return capsys.readouterr().out

    assert "2 of 2 videos to make" in run(image)
    assert "0 of 2 videos to make" in run(image.rename(tmp_path / "second.png"))
    out = run(picture(tmp_path / "first.png", color="blue"))
    assert out.count("was made with other settings (generation.image): made again") == 2


@pytest.mark.parametrize(
    ("size", "left", "right"),
    [
        ((64, 32), (64, 0, 0), (191, 0, 0)),  # of the shape of the video: no crop
        ((128, 32), (96, 0, 0), (159, 0, 0)),  # wider: the middle half
        ((64, 128), (64, 0, 0), (191, 0, 0)),  # taller: the whole width
        ((16, 8), (64, 0, 0), (191, 0, 0)),  # smaller: scaled up
    ],
)
def test_an_image_covers_the_video_and_is_cropped_at_the_centre(size, left, right):
    """Red grows from left to right; checks it at a quarter and at three quarters of the width."""
    red = np.linspace(0, 255, size[0])
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = red
    fitted = np.asarray(fit(Image.fromarray(pixels), 32, 64)).astype(int)
    assert fitted.shape == (32, 64, 3)
    assert np.abs(fitted[:, 15:17].mean((0, 1)) - left).max() < 6
    assert np.abs(fitted[:, 47:49].mean((0, 1)) - right).max() < 6


def test_an_image_of_the_size_of_the_video_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    assert np.array_equal(fit(Image.fromarray(pixels), 32, 64), pixels)


def test_an_image_is_rotated_and_composited_on_black(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    turned = open_image("generation.image", str(picture(tmp_path / "a.jpg", (40, 20), exif=exif)))
    assert turned.size == (20, 40)
    for mode in ("RGBA", "LA"):
        color = (255, 255, 255, 51) if mode == "RGBA" else (255, 51)
        Image.new(mode, (8, 8), color).save(tmp_path / "clear.png")
        assert open_image("generation.image", str(tmp_path / "clear.png")).getpixel((0, 0)) == (51, 51, 51)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert open_image("generation.image", str(tmp_path / "print.jpg")).mode == "RGB"


@pytest.mark.parametrize("kind", ["mp4", "gif", "folder"])
def test_video_and_mask_are_fitted_and_cut(kind, tmp_path):
    """Takes the first frames of a longer video; the mask is white from half brightness on."""
    names = {}
    for name, level in (("video", 200), ("mask", 140)):
        frames = [frame + i for i, frame in enumerate(clip(7, level))]
        target = tmp_path / (name if kind == "folder" else f"{name}.{kind}")
        if kind == "folder":
            target.mkdir()
            for number, frame in enumerate(frames):
                Image.fromarray(frame).save(target / f"{number:03d}.png")
        else:
            imageio.mimwrite(target, frames, **({"macro_block_size": 1} if kind == "mp4" else {}))
        names[f"generation.{name}"] = target
    sizes = ["generation.height=32", "generation.width=64", "generation.num_frames=5"]
    overrides = [*sizes, *(f"{key}={file}" for key, file in names.items())]
    inputs = read_inputs(read_config(TEXT, overrides).generation, "wan_vace")
    video, mask = (np.stack(inputs.arguments[name]) for name in ("video", "mask"))
    assert video.shape == (5, 32, 64, 3) and mask.shape == (5, 32, 64)
    assert abs(int(video[0, 16, 8, 0]) - 200) < 8 and abs(int(video[4, 16, 60, 0]) - 24) < 8
    assert set(np.unique(mask)) == {0, 255} and mask[0, 16, 8] == 255 and mask[0, 16, 60] == 0
    assert [file["file"] for file in inputs.files.values()] == [file.name for file in names.values()]


BAD = {
    "deep": ([WAN, "generation.image={here}/deep.png"], ["deep.png", "more than 8 bits a channel"]),
    "too long": ([WAN, f"generation.image={300 * 'x'}"], ["cannot be read", "too long"]),
    "gif": ([WAN, "generation.image={here}/short.gif"], ["short.gif", "it is animated, with 5 frames"]),
    "truncated": ([WAN, "generation.image={here}/cut.png"], ["cut.png", "cannot be read", "truncated"]),
    "truncated jpg": ([HUNYUAN, "generation.image={here}/cut.jpg"], ["cut.jpg", "truncated"]),
    "truncated video": ([*VACE, "generation.video={here}/cut.mp4"], ["cut.mp4", "cannot be read"]),
    "short video": ([*VACE, "generation.video={here}/short.gif"], ["with 5 frames", "at least 69"]),
    "other shape": (
        ["configs/hunyuan15_i2v.yaml", "generation.image={here}/small.png"],
        ["64x64, of which", "makes 960x960, not 720x1280", "generation.height=960 generation.width=960"],
    ),
    "short poses": (
        [*ANIMATE, "generation.pose_video={here}/short.gif"],
        ["generation.pose_video", "with 5 frames", "at least 9"],
    ),
    "fewer faces": (
        [*ANIMATE, "generation.pose_video={here}/long.gif"],
        ["generation.face_video", "with 5 frames", "9, as many as generation.pose_video"],
    ),
    "other count": (
        [*VACE, *FRAMES, "generation.video={here}/long.gif", "generation.mask={here}/short.gif"],
        ["generation.mask", "with 5 frames", "9"],
    ),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """Makes a folder of broken files."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(folder / "deep.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture(folder / "small.png", (64, 64))
    for name in ("cut.png", "cut.jpg"):
        Image.fromarray(noise).save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:2000])
    imageio.mimwrite(folder / "cut.mp4", clip(), macro_block_size=1)
    (folder / "cut.mp4").write_bytes((folder / "cut.mp4").read_bytes()[:600])
    for name, frames in (("short.gif", 5), ("long.gif", 9)):
        imageio.mimwrite(folder / name, [frame + i for i, frame in enumerate(clip(frames))])
    return folder


@pytest.mark.parametrize("case", BAD)
def test_broken_inputs_are_one_line_before_the_weights(case, here, capsys):
    """The models are hub ids, so an attempt to load one would fail with another message."""
    argv, parts = BAD[case]
    refused(capsys, [word.format(here=here) for word in argv], *parts)
