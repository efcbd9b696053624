"""The trainer of the bundled models: it resumes exactly, and trains on what the pipelines use."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from radial_attn.models.hunyuan_video import attention_layers
from scripts.toyworld import Attributes, all_attributes, parse_caption
from scripts.toyworld.train.hunyuan_video import LIKENESS, WORDS_APART
from scripts.toyworld.train.hunyuan_video import Denoiser as HunyuanVideo
from scripts.toyworld.train.loop import Stage, build_optimizers, learning_rate
from scripts.toyworld.train.options import (
    FAMILIES,
    Options,
    draw_mosaic,
    draw_scene,
    generator,
    render_scene,
    run,
)
from scripts.toyworld.train.vae import initialise_vae
from scripts.toyworld.train.wan import TEXT_SLOTS, Denoiser
from scripts.train_tiny import parse, prepare, train, write_caption
from tests.support.long import all_but

CAPTION = "a red circle moving around on a navy background"


def linear_stage(options: Options, stop_at: int | None = None) -> Stage:
    """Makes a small regression whose loss raises KeyboardInterrupt at one step."""
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


@pytest.mark.parametrize("damaged", [b"", b"PK\x03\x04", bytes(500)])
def test_a_damaged_checkpoint_is_one_line(damaged, tmp_path):
    options = Options(work=tmp_path, save_every=4)
    run(linear_stage(options), options)
    (tmp_path / "linear.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"checkpoint .*linear.pt cannot be read .*; remove it to train"):
        run(linear_stage(options), options)


def test_damaged_latents_are_made_again_and_damaged_options_refused(tmp_path, capsys):
    options = shortest("wan", tmp_path, steps=1)
    train(options)
    file = options.work / "latents.safetensors"
    whole = {name: x.clone() for name, x in load_file(file).items()}  # not a map of the file
    file.write_bytes(file.read_bytes()[:-5])
    train(options)
    assert f"note: {file} is damaged" in capsys.readouterr().out
    again = load_file(file)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    (options.work / "options.json").write_bytes(b'{"seed": ')
    with pytest.raises(ValueError, match=r"options.json is damaged, .*; give another --work"):
        train(options)


def test_learning_rate_warms_up_and_decays():
    stage = Stage("linear", nn.Linear(1, 1), lambda step: None, 1000, 1.0)
    rates = [learning_rate(stage, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(1, abs=0.05)
    assert rates[100:] == sorted(rates[100:], reverse=True) and rates[-1] < 0.011


def random_denoiser(family: str) -> nn.Module:
    """Makes a denoiser whose weights are far from those that it starts with."""
    torch.manual_seed(0)
    denoiser = FAMILIES[family].denoiser().eval()
    for name, parameter in denoiser.named_parameters():
        if name != "transformer.pos_frequencies":
            nn.init.normal_(parameter, std=0.08)
    return denoiser


LATENTS, SIGMA = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1)), (0.3, 0.8)


def wan_velocity(denoiser: nn.Module, latents: Tensor, sigma: Tensor) -> Tensor:
    text = denoiser.embed([CAPTION, ""])
    text = torch.cat([text, text.new_zeros(2, TEXT_SLOTS - text.shape[1], 64)], dim=1)
    denoiser.use_training_attention(False)
    return denoiser.transformer(latents, 1000 * sigma, text, return_dict=False)[0]


def hunyuan_velocity(denoiser: nn.Module, latents: Tensor, sigma: Tensor) -> Tensor:
    pipeline = denoiser.pipeline(FAMILIES["hunyuan_video"].build_vae())
    template = {"template": "{}", "crop_start": 0}
    text, pooled, mask = pipeline.encode_prompt([CAPTION, ""], prompt_template=template)
    assert text.shape[1] == 256
    return pipeline.transformer(latents, 1000 * sigma, text, mask, pooled, return_dict=False)[0]


def mochi_velocity(denoiser: nn.Module, latents: Tensor, sigma: Tensor) -> Tensor:
    """Mochi's own velocity points from noise to video, and its time runs from 0, noise, to 1000."""
    pipeline = denoiser.pipeline(FAMILIES["mochi"].build_vae())
    text, mask, empty, no_mask = pipeline.encode_prompt([CAPTION], "")
    assert text.shape[1] == 256 and not no_mask.any()
    text, mask = torch.cat([text, empty]), torch.cat([mask, no_mask])
    return -pipeline.transformer(latents, text, 1000 * (1 - sigma), mask, return_dict=False)[0]


@pytest.mark.parametrize(
    ("family", "velocity", "channels"),
    [("wan", wan_velocity, 16), ("hunyuan_video", hunyuan_velocity, 16), ("mochi", mochi_velocity, 12)],
)
def test_training_predicts_what_the_pipeline_does(family, velocity, channels):
    """Shorter text and other processors of attention change nothing."""
    denoiser, latents, sigma = random_denoiser(family), LATENTS[:, :channels], torch.tensor(SIGMA)
    with torch.no_grad():
        output = denoiser(latents, sigma, [CAPTION, ""])
        expected = velocity(denoiser, latents, sigma)
    assert torch.allclose(output, expected, atol=1e-4 * expected.abs().max().item())


def test_image_to_video_is_trained_on_the_input_of_its_pipeline():
    """Mask and first frame come with the noise, as WanImageToVideoPipeline makes them."""
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
    """It has that model's weights in the kept layers and elsewhere; the new channels do nothing yet."""
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


def test_captions_are_full_short_or_empty():
    attributes = Attributes("red", "circle", "around", "navy")
    random = torch.Generator().manual_seed(0)
    captions = [write_caption(attributes, random) for _ in range(500)]
    assert 0.05 < captions.count("") / 500 < 0.15
    assert 0.6 < captions.count(attributes.caption) / 500 < 0.7
    assert all("red circle" in caption for caption in captions if caption)
    assert parse_caption(attributes.caption) == attributes


def shortest(family: str, tmp_path: Path, **changes: object) -> Options:
    """Makes options of one or two steps a stage."""
    settings = {"image_steps": 1, "vae_steps": 1, "outline_steps": 1, "videos": 2, "steps": 2, "batch": 2}
    settings |= {"size": 16, "frames": 7 if family == "mochi" else 5, "start": FAMILIES[family].start}
    folders = {"out": tmp_path / "model", "work": tmp_path / "work"}
    return Options(family=family, **(settings | folders | changes))


@pytest.mark.parametrize("family", all_but(["wan", "hunyuan_video"], FAMILIES))
def test_all_stages_make_a_pipeline_that_diffusers_loads(family, tmp_path):
    options = shortest(family, tmp_path)
    train(options)
    pipeline = DiffusionPipeline.from_pretrained(options.out, dtype=torch.float32)
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


@pytest.mark.long
def test_starts_from_a_model(tmp_path):
    """The VAE and its statistics stay; the transformer starts from the model's weights."""
    options = shortest("wan", tmp_path, out=tmp_path / "first", work=tmp_path / "a", steps=1)
    train(options)
    train(replace(options, out=tmp_path / "second", work=tmp_path / "b", start=tmp_path / "first", rate=1e-9))
    first, second = (DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("first", "second"))
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


def test_a_family_sets_the_defaults():
    options = parse(["--family", "hunyuan_video"])
    assert (options.out, options.frames, options.start) == (Path("outputs/hunyuan-tiny"), 33, None)
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
    """It does so at any depth: the decoder of HunyuanVideo has no norm before the last one."""
    for name in ("hunyuan_video", "mochi"):
        family = FAMILIES[name]
        torch.manual_seed(0)
        vae = family.build_vae()
        initialise_vae(vae)
        family.quieten(vae)
        video = torch.stack([render_scene(draw_scene(generator(Options(), 9, n)), 1, 64) for n in range(4)])
        with torch.no_grad():
            posterior = vae.encode(video).latent_dist
            decoded = vae.decode(posterior.mean).sample
        assert 0.2 < posterior.mean.std() < 8 and posterior.std.mean() < 0.5
        assert 0.1 < decoded.std() < 5


def refined_text(one: HunyuanVideo, captions: list[str]) -> Tensor:
    """Returns the refined text `[B, T, width]` of a forward pass over one token of noise."""
    text, mask, _ = one.embed(captions)
    sigma = torch.full((len(captions),), 0.5)
    one(torch.zeros(len(captions), 16, 1, 1, 1), sigma, captions)
    return one.transformer.context_embedder(text, 1000 * sigma, mask)


def test_caption_loss_is_the_mean_cross_entropy_of_the_valid_tokens():
    torch.manual_seed(0)
    one = HunyuanVideo()
    captions = ["a red circle", "a red square moving around on a navy background"]
    with torch.no_grad():
        text = refined_text(one, captions)
        losses = []
        for row, caption in zip(text, captions, strict=True):
            numbers = one.tokenizer(caption).input_ids
            cosines = functional.cosine_similarity(row[: len(numbers), None], one.words[None], dim=-1)
            losses.append(
                functional.cross_entropy(LIKENESS * cosines, torch.tensor(numbers), reduction="none")
            )
        loss = one.caption_loss(captions)
    torch.testing.assert_close(loss, WORDS_APART * torch.cat(losses).mean())


def test_caption_loss_moves_two_shapes_apart_and_trains_only_the_text():
    torch.manual_seed(0)
    one = HunyuanVideo()
    captions = ["a red circle", "a red square"]
    optimizer = torch.optim.Adam(one.parameters(), lr=1e-3)

    def angle() -> float:
        with torch.no_grad():
            text = refined_text(one, captions)
            return functional.cosine_similarity(text[0, 2], text[1, 2], dim=0).arccos().rad2deg().item()

    with torch.no_grad():  # as close as they were without the loss
        table = one.text_encoder.get_input_embeddings().weight
        circle, square = one.tokenizer("circle square").input_ids[:2]
        table[square] = table[circle] + 0.01 * (table[square] - table[circle])
    before = angle()
    for _ in range(100):
        optimizer.zero_grad()
        refined_text(one, captions)
        one.caption_loss(captions).backward()
        optimizer.step()
    assert before < 5 and angle() > 60
    blocks = (*one.transformer.transformer_blocks, *one.transformer.single_transformer_blocks)
    assert all(weight.grad is None for block in blocks for weight in block.parameters())
