"""Trains the bundled text-to-video model from nothing: VAE, then text encoder and transformer together.

Every batch is drawn from a generator seeded by the step, so that a run which was stopped continues exactly.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from scripts.errors import OneLineParser, positive
from scripts.tiny_model import Denoiser, build_vae, check_target, save_pipeline
from scripts.train_loop import Stage, run_stage
from toyworld import all_attributes, random_scene, render
from toyworld.render import Attributes

FREE = ("out", "work", "device", "save_every")  # may differ when a run is continued


@dataclass(frozen=True)
class Options:
    """What can be set from the command line (`--name value`)."""

    out: Path = Path("assets/wan-tiny")
    work: Path = Path("outputs/train_tiny")
    device: str = "cpu"  # on the command line: CUDA where there is one
    seed: int = 0
    image_steps: int = 1100
    vae_steps: int = 500
    decoder_steps: int = 500
    videos: int = 1400
    steps: int = 2200
    batch: int = 8
    frames: int = 33
    size: int = 64
    save_every: int = 100


def generator(options: Options, stage: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed((options.seed * 10 + stage) * 10_000_000 + step)


def run(stage: Stage, options: Options) -> nn.Module:
    """Trains one stage in the work folder; returns the averaged model."""
    return run_stage(stage, options.work, options.device, options.save_every)


def draw_video(
    options: Options, frames: int, random: torch.Generator, start: float = 0.0
) -> tuple[Tensor, Attributes]:
    """A random captioned video as the VAE takes it: `[3, frames, size, size]` in [-1, 1]."""
    combinations = all_attributes()
    attributes = combinations[int(torch.randint(len(combinations), (), generator=random))]
    video = render(random_scene(attributes, random), frames, options.size, options.size)
    return video.permute(3, 0, 1, 2) * 2 - 1, attributes


def vae_loss(
    vae: nn.Module, options: Options, stage: int, frames: int, batch: int
) -> Callable[[int], Tensor]:
    """Reconstruction (L1 + L2) and a small Kullback-Leibler term that keeps the latents smooth."""

    def loss(step: int) -> Tensor:
        random = generator(options, stage, step)
        video = torch.stack([draw_video(options, frames, random)[0] for _ in range(batch)]).to(options.device)
        posterior = vae.encode(video).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=random).to(options.device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - video
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + error.square().mean() + 1e-4 * divergence

    return loss


def initialise_vae(vae: nn.Module) -> None:
    """Starts as an image model with a strong signal: in the default scale the biases of a deep, narrow
    network drown its input, and hundreds of steps pass before anything but the background is learnt.
    """
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                weight = layer.weight
                scale = 1.8 / math.sqrt(weight.shape[1] * weight.shape[-1] * weight.shape[-2])
                newest = (
                    weight[:, :, -1] if weight.ndim == 5 else weight
                )  # causal: the last tap is the present
                weight.zero_()
                newest.normal_(std=scale)
                layer.bias.zero_()
        for name, layer in vae.named_modules():
            if name.endswith("time_conv"):  # begins as the identity: a still video
                layer.weight.zero_()
                identity = torch.eye(layer.in_channels).repeat(layer.out_channels // layer.in_channels, 1)
                layer.weight[:, :, -1, 0, 0] = identity
        vae.quant_conv.bias[vae.config.z_dim :] = -7.0  # log variance: little noise at first


def train_vae(options: Options) -> nn.Module:
    """Single frames first, which is cheap, then clips of nine frames: the VAE is causal and chunked."""
    torch.manual_seed(options.seed)
    vae = build_vae()
    initialise_vae(vae)
    vae.to(options.device)
    images = Stage("vae_images", vae, vae_loss(vae, options, 1, 1, 8), options.image_steps, 3e-3, 0.99)
    vae = run(images, options)
    clips = Stage("vae_clips", vae, vae_loss(vae, options, 2, 9, 4), options.vae_steps, 2e-3, 0.99)
    return run(clips, options).requires_grad_(False).eval()


def sharpen_decoder(vae: nn.Module, options: Options) -> None:
    """Trains the decoder further under a frozen encoder, so that the latents stay what they are."""
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)

    def loss(step: int) -> Tensor:
        random = generator(options, 5, step)
        video = torch.stack([draw_video(options, 9, random)[0] for _ in range(4)]).to(options.device)
        with torch.no_grad():
            mean = vae.encode(video).latent_dist.mean
        noise = torch.randn(mean.shape, generator=random).to(options.device)
        error = vae.decode(mean + 0.05 * noise).sample - video
        return error.abs().mean() + error.square().mean()

    average = run(Stage("decoder", decoder, loss, options.decoder_steps, 2e-3, 0.99), options)
    decoder.load_state_dict(average.state_dict())
    decoder.requires_grad_(False)


def encode_videos(vae: nn.Module, options: Options) -> tuple[Tensor, list[Attributes]]:
    """Latents `[videos, 16, F, H, W]` and attributes of random scenes, kept in the work folder."""
    path = options.work / "latents.safetensors"
    combinations = all_attributes()
    if path.exists():
        stored = load_file(path)
        return stored["latents"], [combinations[i] for i in stored["attributes"].tolist()]
    latents, names = [], []
    for index in tqdm(range(options.videos), desc="encode", mininterval=1):
        video, attributes = draw_video(options, options.frames, generator(options, 3, index))
        with torch.no_grad():
            latents.append(vae.encode(video[None].to(options.device)).latent_dist.mean[0].cpu())
        names.append(combinations.index(attributes))
    stored = {"latents": torch.stack(latents), "attributes": torch.tensor(names)}
    save_file(stored, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    return stored["latents"], [combinations[i] for i in names]


def write_caption(attributes: Attributes, random: torch.Generator) -> str:
    """The full caption mostly; else a shorter one, or none (for guidance)."""
    a = attributes
    draw = torch.rand((), generator=random).item()
    if draw < 0.1:
        return ""
    if draw < 0.75:
        return a.caption
    others = (
        f"a {a.colour} {a.shape} moving {a.motion} on {a.background}",
        f"{a.colour} {a.shape}, moving {a.motion}, {a.background} background",
        f"a {a.colour} {a.shape} moving {a.motion}",
        f"a {a.colour} {a.shape} on a {a.background} background",
        f"a {a.colour} {a.shape}",
    )
    return others[int(len(others) * (draw - 0.75) / 0.25)]


def flow_loss(
    denoiser: Denoiser, latents: Tensor, attributes: list[Attributes], options: Options
) -> Callable[[int], Tensor]:
    """Rectified flow, logit-normal noise levels shifted by 3."""

    def loss(step: int) -> Tensor:
        random = generator(options, 4, step)
        chosen = torch.randint(len(latents), (options.batch,), generator=random)
        captions = [write_caption(attributes[i], random) for i in chosen.tolist()]
        level = torch.randn(options.batch, generator=random).sigmoid()
        sigma = (3 * level / (1 + 2 * level)).to(options.device)
        video = latents[chosen].to(options.device)
        noise = torch.randn(video.shape, generator=random).to(options.device)
        mix = sigma[:, None, None, None, None]
        velocity = denoiser((1 - mix) * video + mix * noise, sigma, captions)
        return (velocity - (noise - video)).square().mean()

    return loss


def train_denoiser(latents: Tensor, attributes: list[Attributes], options: Options) -> nn.Module:
    """Text encoder and transformer on normalised latents, with dense attention."""
    torch.manual_seed(options.seed)
    denoiser = Denoiser().to(options.device)
    loss = flow_loss(denoiser, latents, attributes, options)
    return run(Stage("transformer", denoiser, loss, options.steps, 1e-3, 0.9985), options)


def prepare(options: Options) -> None:
    """Makes the work folder. Raises ValueError where it holds a run with other options, naming them."""
    check_target(options.out)
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "options.json"
    now = {name: value for name, value in vars(options).items() if name not in FREE}
    before = json.loads(file.read_text()) if file.exists() else now
    changed = [
        f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{options.work} holds a run with other options ({', '.join(changed)}): give another --work"
        )
    file.write_text(json.dumps(now))


def train(options: Options) -> None:
    """All stages; writes the pipeline folder."""
    prepare(options)
    vae = train_vae(options)
    latents, attributes = encode_videos(vae, options)
    sharpen_decoder(vae, options)
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    latents = (latents - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    denoiser = train_denoiser(latents, attributes, options)
    save_pipeline(options.out, vae.cpu(), denoiser.cpu())
    print(f"saved {options.out}")


def parse(argv: list[str] | None = None) -> Options:
    """Options from the command line."""
    parser = OneLineParser(prog="scripts/train_tiny.sh", description=__doc__.splitlines()[0])
    for name, field in Options.__dataclass_fields__.items():
        kind = positive if field.type is int and name != "seed" else field.type
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    options = Options(**vars(parser.parse_args(argv)))
    if options.size % 8 or options.frames % 4 != 1:
        parser.error(f"size must be 8k and frames 4k + 1, got {options.size} and {options.frames}")
    return options


if __name__ == "__main__":
    try:
        train(parse())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
