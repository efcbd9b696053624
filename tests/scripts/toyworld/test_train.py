"""The trainer of the bundled models: exact resumption, the short-text equivalence, a run of all stages."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from radial_attn.models.hunyuan_video import attention_layers
from scripts.toyworld import Attributes, all_attributes, parse_caption
from scripts.toyworld.train.loop import Stage, build_optimizers, learning_rate
from scripts.toyworld.train.options import FAMILIES, Options, draw_mosaic, draw_video, generator, run
from scripts.toyworld.train.vae import initialise_vae
from scripts.toyworld.train.wan import TEXT_SLOTS, Denoiser
from scripts.train_tiny import parse, prepare, train, write_caption

CAPTION = "a red circle moving around on a navy background"


def linear_stage(options: Options, stop_at: int | None = None) -> Stage:
    """A small regression whose loss raises KeyboardInterrupt at one step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def loss(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        random = generator(options, 1, step)
        return (model(torch.randn(4, 3, generator=random)) - 1).square().mean()

    return Stage("linear", model, loss, 12, 0.1, 0.9)


def test_interrupted_run_ends_with_the_same_weights(tmp_path):
    whole = Options(work=tmp_path / "whole", save_every=4)
    parts = Options(work=tmp_path / "parts", save_every=4)
    for options in (whole, parts):
        options.work.mkdir()
    expected = run(linear_stage(whole), whole).state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(linear_stage(parts, stop_at=6), parts)
    resumed = run(linear_stage(parts), parts).state_dict()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert not list(parts.work.glob("*.part"))


def test_learning_rate_warms_up_and_decays():
    stage = Stage("linear", nn.Linear(1, 1), lambda step: None, 1000, 1.0)
    rates = [learning_rate(stage, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(1, abs=0.05)
    assert rates[100:] == sorted(rates[100:], reverse=True) and rates[-1] < 0.011


def random_denoiser(family: str) -> nn.Module:
    """Weights that are far from those that a denoiser starts with."""
    torch.manual_seed(0)
    denoiser = FAMILIES[family].denoiser().eval()
    for name, parameter in denoiser.named_parameters():
        if name != "transformer.pos_frequencies":
            nn.init.normal_(parameter, std=0.08)
    return denoiser


LATENTS, SIGMA = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1)), (0.3, 0.8)


def test_processors_of_training_equal_those_of_pipelines():
    denoiser, sigma = random_denoiser("wan"), torch.tensor(SIGMA)
    with torch.no_grad():
        short = denoiser(LATENTS, sigma, [CAPTION, ""])
        text = denoiser.embed([CAPTION, ""])
        denoiser.use_training_attention(False)
        text = torch.cat([text, text.new_zeros(2, TEXT_SLOTS - text.shape[1], 64)], dim=1)
        padded = denoiser.transformer(LATENTS, 1000 * sigma, text, return_dict=False)[0]
    assert torch.allclose(short, padded, atol=1e-4 * padded.abs().max().item())


def test_hunyuan_video_is_trained_on_what_its_pipeline_feeds_it():
    denoiser, sigma = random_denoiser("hunyuan_video"), torch.tensor(SIGMA)
    with torch.no_grad():
        short = denoiser(LATENTS, sigma, [CAPTION, ""])
        pipeline = denoiser.pipeline(FAMILIES["hunyuan_video"].build_vae())
        template = {"template": "{}", "crop_start": 0}
        text, pooled, mask = pipeline.encode_prompt([CAPTION, ""], prompt_template=template)
        padded = pipeline.transformer(LATENTS, 1000 * sigma, text, mask, pooled, return_dict=False)[0]
    assert text.shape[1] == 256
    assert torch.allclose(short, padded, atol=1e-4 * padded.abs().max().item())


def test_mochi_is_trained_on_what_its_pipeline_feeds_it():
    """Mochi's own velocity points from noise to video, its time runs from 0, noise, to 1000."""
    denoiser, sigma, latents = random_denoiser("mochi"), torch.tensor(SIGMA), LATENTS[:, :12]
    with torch.no_grad():
        short = denoiser(latents, sigma, [CAPTION, ""])
        pipeline = denoiser.pipeline(FAMILIES["mochi"].build_vae())
        text, mask, empty, no_mask = pipeline.encode_prompt([CAPTION], "")
        text, mask = torch.cat([text, empty]), torch.cat([mask, no_mask])
        padded = pipeline.transformer(latents, text, 1000 * (1 - sigma), mask, return_dict=False)[0]
    assert text.shape[1] == 256 and not no_mask.any()
    assert torch.allclose(short, -padded, atol=1e-4 * padded.abs().max().item())


def test_image_to_video_is_trained_on_what_its_pipeline_feeds_it():
    """The mask and the first frame beside the noise, as WanImageToVideoPipeline makes them."""
    family, denoiser = FAMILIES["wan_i2v"], random_denoiser("wan_i2v")
    vae = family.build_vae().requires_grad_(False).eval()
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    latents = family.normalise(family.encode(vae, video), vae)
    fed = []
    denoiser.transformer.patch_embedding.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    with torch.no_grad():
        denoiser(latents, torch.tensor([0.5]), [CAPTION])
        pipeline = denoiser.pipeline(vae)
        _, condition = pipeline.prepare_latents(video[:, :, 0], 1, 16, 32, 32, 5, torch.float32, "cpu", None)
    assert torch.allclose(fed[0][:, 16:], condition, atol=1e-5)


def test_image_to_video_starts_as_the_text_to_video_model(tmp_path):
    """The kept layers and the rest are that model's; the new channels do nothing yet."""
    wan, longer = random_denoiser("wan"), FAMILIES["wan_i2v"].denoiser()
    longer.take_over(wan.pipeline(FAMILIES["wan"].build_vae()))
    kept = [wan.transformer.blocks[number] for number in (0, 1, 4, 5)]
    for ours, theirs in zip(longer.transformer.blocks, kept, strict=True):
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    wan.transformer.blocks = nn.ModuleList(kept)
    wan.use_training_attention(True)
    with torch.no_grad():
        before = wan(LATENTS, torch.tensor(SIGMA), [CAPTION, ""])
        after = longer.eval()(torch.cat([LATENTS, LATENTS + 1], dim=1), torch.tensor(SIGMA), [CAPTION, ""])
    assert torch.allclose(before, after, atol=1e-5)


def test_layers_that_a_hunyuan_video_lacks_begin_as_identities():
    shallow, deep = random_denoiser("hunyuan_video"), FAMILIES["hunyuan_video"].denoiser().eval()
    layers = shallow.transformer.single_transformer_blocks
    shallow.transformer.single_transformer_blocks = layers[:-1]
    shallow.transformer.register_to_config(num_single_layers=len(layers) - 1)
    deep.take_over(shallow.pipeline(FAMILIES["hunyuan_video"].build_vae()))
    shallow.use_training_attention(True)
    given = LATENTS, torch.tensor(SIGMA), [CAPTION, ""]
    with torch.no_grad():
        assert torch.allclose(shallow(*given), deep(*given), atol=1e-5)
        assert not torch.allclose(shallow(*given), random_denoiser("hunyuan_video")(*given), atol=1e-2)


def test_tokenizer_knows_every_caption():
    tokenizer = Denoiser().tokenizer
    for attributes in all_attributes():
        assert tokenizer.unk_token_id not in tokenizer(attributes.caption).input_ids
    assert tokenizer("grey").input_ids == tokenizer("gray").input_ids
    assert tokenizer("A unicorn").input_ids[1] == tokenizer.unk_token_id


def test_captions_say_what_is_there():
    attributes = Attributes("red", "circle", "around", "navy")
    random = torch.Generator().manual_seed(0)
    captions = [write_caption(attributes, random) for _ in range(500)]
    assert 0.05 < captions.count("") / 500 < 0.15
    assert 0.6 < captions.count(attributes.caption) / 500 < 0.7
    assert all("red circle" in caption for caption in captions if caption)
    assert parse_caption(attributes.caption) == attributes


def shortest(family: str, tmp_path: Path, **changes: object) -> Options:
    """Options of one or two steps a stage."""
    settings = {"image_steps": 1, "vae_steps": 1, "outline_steps": 1, "videos": 2, "steps": 2, "batch": 2}
    sizes = {"size": 16, "frames": 7 if family == "mochi" else 5}
    folders = {"out": tmp_path / "model", "work": tmp_path / "work", "start": FAMILIES[family].start}
    return Options(family=family, **(settings | sizes | folders | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_stages_make_a_pipeline_that_diffusers_loads(family, tmp_path):
    options = shortest(family, tmp_path)
    train(options)
    pipeline = DiffusionPipeline.from_pretrained(options.out, torch_dtype=torch.float32)
    given = {"image": Image.new("RGB", (16, 16))} if family == "wan_i2v" else {}
    template = {"prompt_template": {"template": "{}", "crop_start": 0}} if family == "hunyuan_video" else {}
    sizes = {"height": 16, "width": 16, "num_frames": options.frames, "num_inference_steps": 2}
    video = pipeline(prompt=CAPTION, output_type="np", **sizes, **given, **template).frames
    assert video.shape == (1, options.frames, 16, 16, 3)
    assert torch.isfinite(torch.from_numpy(video)).all()


def test_muon_trains_the_matrices_of_the_blocks_and_nothing_is_left_out():
    denoiser = FAMILIES["hunyuan_video"].denoiser()
    blocks = tuple(f"transformer.{name}." for name in denoiser.BLOCKS)
    stage = Stage("transformer", denoiser, lambda step: None, 10, 1e-3, matrices=blocks)
    rest, muon = (optimizer.param_groups[0]["params"] for optimizer in build_optimizers(stage))
    assert any(p is attention_layers(denoiser.transformer)[0].to_q.weight for p in muon)
    assert len(rest) + len(muon) == len(list(denoiser.parameters()))
    assert len(build_optimizers(Stage("linear", nn.Linear(2, 2), lambda step: None, 10, 1e-3))) == 1


def test_goes_on_from_a_model(tmp_path):
    """The VAE and what it was normalised with stay; the transformer starts where it was and is trained."""
    options = shortest("wan", tmp_path, out=tmp_path / "first", work=tmp_path / "a", steps=1)
    train(options)
    train(replace(options, out=tmp_path / "second", work=tmp_path / "b", start=tmp_path / "first", rate=1e-9))
    first, second = (DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert first.vae.config.latents_mean == second.vae.config.latents_mean
    written = [(tmp_path / name / "vae" / "config.json").read_text() for name in ("first", "second")]
    assert written[0] == written[1]
    for part in ("vae", "transformer", "text_encoder"):
        before, after = (getattr(pipeline, part).state_dict() for pipeline in (first, second))
        assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    with pytest.raises(ValueError, match="start must be the folder of a model, got"):
        train(replace(options, work=tmp_path / "c", start=tmp_path / "none"))
    with pytest.raises(ValueError, match=r"start must hold a MochiPipeline, got .*first, a WanPipeline"):
        train(replace(options, family="mochi", work=tmp_path / "c", start=tmp_path / "first"))
    assert not (tmp_path / "c").exists()
    train(replace(options, out=tmp_path / "first", work=tmp_path / "d", seed=1))
    with pytest.raises(ValueError, match=r"other options \(weights of start \w+ -> \w+\)"):
        prepare(replace(options, work=tmp_path / "b", start=tmp_path / "first", rate=1e-9))


def test_a_folder_that_is_no_model_is_left_alone(tmp_path):
    (tmp_path / "video.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="out must be a new folder or one that holds a model"):
        train(Options(out=tmp_path, work=tmp_path / "work"))
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]


def test_a_work_folder_of_another_run_is_refused(tmp_path):
    prepare(Options(out=tmp_path / "model", work=tmp_path, seed=1))
    prepare(Options(out=tmp_path / "other", work=tmp_path, seed=1, save_every=7))
    with pytest.raises(ValueError, match=r"other options \(seed 1 -> 2, steps 5200 -> 5\)"):
        prepare(Options(out=tmp_path / "model", work=tmp_path, seed=2, steps=5))


def test_what_is_left_out_is_the_familys():
    options = parse(["--family", "hunyuan_video"])
    assert (options.out, options.frames, options.start) == (Path("assets/hunyuan-tiny"), 33, None)
    assert options.outline_steps == 1000 and parse([]).outline_steps == 1200
    assert parse(["--family", "hunyuan_video", "--outline-steps", "7"]).outline_steps == 7
    options = parse(["--family", "wan_i2v", "--frames", "5"])
    assert (options.start, options.frames) == (Path("assets/wan-tiny"), 5)
    assert parse(["--family", "mochi"]).work == Path("outputs/train_mochi_tiny")


def test_a_mosaic_holds_four_shapes():
    options = Options()
    mosaics = [draw_mosaic(options, 1, generator(options, 9, step)) for step in range(8)]
    assert all(mosaic.shape == (3, 1, 64, 64) for mosaic in mosaics)
    for mosaic in mosaics:
        for rows, columns in itertools.product((slice(0, 32), slice(32, 64)), repeat=2):
            quarter = mosaic[:, 0, rows, columns]
            ground = quarter.flatten(1).median(dim=1).values[:, None, None]
            assert 0.05 < ((quarter - ground).abs().amax(dim=0) > 0.2).float().mean() < 0.5
    again = draw_mosaic(options, 1, generator(options, 9, 0))
    assert torch.equal(mosaics[0], again)


def test_the_start_of_a_vae_keeps_the_size_of_its_signal():
    """Whatever the depth: in the decoder of HunyuanVideo nothing else holds it before the last norm."""
    for name in ("hunyuan_video", "mochi"):
        family = FAMILIES[name]
        torch.manual_seed(0)
        vae = family.build_vae()
        initialise_vae(vae)
        family.quieten(vae)
        video = torch.stack([draw_video(Options(), 1, generator(Options(), 9, n))[0] for n in range(4)])
        with torch.no_grad():
            posterior = vae.encode(video).latent_dist
            decoded = vae.decode(posterior.mean).sample
        assert 0.2 < posterior.mean.std() < 8 and posterior.std.mean() < 0.5
        assert 0.1 < decoded.std() < 5
