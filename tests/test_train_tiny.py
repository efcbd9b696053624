"""The trainer of the bundled model: exact resumption, the short-text equivalence, a run of all stages."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from torch import nn

from scripts.tiny_model import TEXT_SLOTS, Denoiser
from scripts.train_loop import Stage, learning_rate
from scripts.train_options import Options, generator, run
from scripts.train_tiny import parse, prepare, train, write_caption
from toyworld import Attributes, all_attributes, parse_caption

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


def test_processors_of_training_equal_those_of_pipelines():
    torch.manual_seed(0)
    denoiser = Denoiser().eval()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.08)
    latents, sigma = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        short = denoiser(latents, sigma, [CAPTION, ""])
        text = denoiser.embed([CAPTION, ""])
        denoiser.use_training_attention(False)
        text = torch.cat([text, text.new_zeros(2, TEXT_SLOTS - text.shape[1], 64)], dim=1)
        padded = denoiser.transformer(latents, 1000 * sigma, text, return_dict=False)[0]
    assert torch.allclose(short, padded, atol=1e-4 * padded.abs().max().item())


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


def test_all_stages_make_a_pipeline_that_diffusers_loads(tmp_path):
    options = Options(
        out=tmp_path / "model",
        work=tmp_path / "work",
        image_steps=1,
        vae_steps=1,
        outline_steps=1,
        videos=2,
        steps=2,
        batch=2,
        frames=5,
        size=16,
        device="cpu",
    )
    train(options)
    pipeline = WanPipeline.from_pretrained(options.out)
    video = pipeline(
        CAPTION, height=16, width=16, num_frames=5, num_inference_steps=2, output_type="np"
    ).frames
    assert video.shape == (1, 5, 16, 16, 3)
    assert torch.isfinite(torch.from_numpy(video)).all()


def test_goes_on_from_a_model(tmp_path):
    """The VAE and what it was normalised with stay; the transformer starts where it was and is trained."""
    options = Options(
        out=tmp_path / "first", work=tmp_path / "a", image_steps=1, vae_steps=1, outline_steps=1, videos=2,
        steps=1, batch=2, frames=5, size=16,
    )  # fmt: skip
    train(options)
    train(replace(options, out=tmp_path / "second", work=tmp_path / "b", start=tmp_path / "first", rate=1e-9))
    first, second = (WanPipeline.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert first.vae.config.latents_mean == second.vae.config.latents_mean
    written = [(tmp_path / name / "vae" / "config.json").read_text() for name in ("first", "second")]
    assert written[0] == written[1]
    for part in ("vae", "transformer", "text_encoder"):
        before, after = (getattr(pipeline, part).state_dict() for pipeline in (first, second))
        assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    with pytest.raises(ValueError, match="start must be the folder of a model, got"):
        train(replace(options, work=tmp_path / "c", start=tmp_path / "none"))


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "error: argument --steps: must be a whole number from 1 on, got '0'"),
        (["--shift", "-2"], "error: argument --shift: must be a number above 0, got '-2'"),
        (["--rate", "fast"], "error: argument --rate: must be a number above 0, got 'fast'"),
        (["--frames", "32"], "error: size must be 8k and frames 4k + 1, got 64 and 32"),
        (["--stps", "5"], "error: unrecognized arguments: --stps 5"),
    ],
)
def test_bad_options_give_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err == message + "\n"
