"""Trains a bundled model of one family: VAE, then text encoder and transformer together.

Every batch is drawn from a generator seeded by the step, so a run that was stopped resumes exactly.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from radial_attn.kernels.compiler import compiler_problem
from radial_attn.models.pipeline.load import read_index
from scripts.run.config import find_path
from scripts.run.errors import OneLineParser, exit_code, positive, positive_number
from scripts.run.files import replacing
from scripts.run.results import note_damage, read_json, write_json
from scripts.toyworld.render import Attributes, Scene
from scripts.toyworld.train.loop import Stage
from scripts.toyworld.train.model import TinyDenoiser, check_target, save_pipeline, take_over_vae
from scripts.toyworld.train.options import (
    FAMILIES,
    Options,
    draw_scene,
    generator,
    mixed_precision,
    render_scene,
    run,
)
from scripts.toyworld.train.vae import train_vae

FREE = ("out", "work", "device", "save_every", "compile")  # may differ when a run is resumed


def encode_videos(vae: nn.Module, options: Options) -> tuple[Tensor, list[Scene]]:
    """Returns latents `[videos, C, F, H, W]`, kept in the work folder, and their random scenes."""
    path = options.work / "latents.safetensors"
    scenes = [draw_scene(generator(options, 3, index)) for index in range(options.videos)]
    try:
        return load_file(path)["latents"], scenes
    except (OSError, SafetensorError, KeyError):
        if path.exists():
            note_damage(path)
    latents = []
    for first in tqdm(range(0, options.videos, options.batch), desc="encode", mininterval=1):
        drawn = scenes[first : first + options.batch]
        videos = [render_scene(scene, options.frames, options.size) for scene in drawn]
        with torch.no_grad():
            video = torch.stack(videos).to(options.device)
            latents.append(FAMILIES[options.family].encode(vae, video).cpu())
    stored = torch.cat(latents)
    with replacing(path) as part:
        save_file({"latents": stored}, part)
    return stored, scenes


def write_caption(attributes: Attributes, random: torch.Generator) -> str:
    """Returns the full caption in two of three cases; else a shorter one, or none (for guidance)."""
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
    denoiser: TinyDenoiser, latents: Tensor, scenes: list[Scene], options: Options
) -> Callable[[int], Tensor]:
    """Makes the rectified-flow loss of a step, with shifted logit-normal noise levels.

    A batch of eight has one level from each eighth. Channels of `latents` beyond a video's get no noise.
    """
    channels = denoiser.transformer.config.out_channels
    frames_step = FAMILIES[options.family].frames_step

    def loss(step: int) -> Tensor:
        random = generator(options, 4, step)
        chosen = torch.randint(len(latents), (options.batch,), generator=random)
        shown = [scenes[i] for i in chosen.tolist()]
        captions = [write_caption(scene.attributes, random) for scene in shown]
        share = torch.arange(options.batch) + torch.rand(options.batch, generator=random)
        level = torch.special.ndtri((share / options.batch).clamp(1e-4, 1 - 1e-4)).sigmoid()
        sigma = (options.shift * level / (1 + (options.shift - 1) * level)).to(options.device)
        video, given = latents[chosen].to(options.device).tensor_split([channels], dim=1)
        noise = torch.randn(video.shape, generator=random).to(options.device)
        mix = sigma[:, None, None, None, None]
        noisy = torch.cat([(1 - mix) * video + mix * noise, given], dim=1)
        with mixed_precision(options):
            velocity = denoiser(noisy, sigma, captions)
            more = denoiser.more_loss(captions, shown, options.frames, frames_step)
        return (velocity.float() - (noise - video)).square().mean() + more

    return loss


def train_denoiser(
    denoiser: TinyDenoiser, latents: Tensor, scenes: list[Scene], options: Options
) -> nn.Module:
    """Trains text encoder and transformer on normalised latents, with dense attention."""
    denoiser.to(options.device)
    if options.compile:
        blocks = (block for name in denoiser.BLOCKS for block in getattr(denoiser.transformer, name))
        for block in blocks:
            block.compile()
    loss = flow_loss(denoiser, latents, scenes, options)
    matrices = tuple(f"transformer.{name}." for name in denoiser.BLOCKS)
    more = {"ema": 0.998, "matrices": matrices, "decay": 0.4}
    return run(Stage("transformer", denoiser, loss, options.steps, options.rate, **more), options)


def prepare(options: Options) -> None:
    """Makes the work folder; ValueError if it holds a run with other options, which it names."""
    check_target(options.out)
    check_start(options)
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "options.json"
    now = {name: x if x is None else str(x) for name, x in vars(options).items() if name not in FREE}
    if options.start is not None:
        weights = hashlib.sha256()
        for part in sorted(options.start.rglob("*.safetensors")):
            weights.update(part.read_bytes())
        now["weights of start"] = weights.hexdigest()[:16]
    before = read_json(file) if file.exists() else now
    if not before:
        raise ValueError(f"{file} is damaged, so the options of its run are unknown; give another --work")
    changed = [f"{name} {before.get(name)} -> {x}" for name, x in now.items() if before.get(name) != x]
    if changed:
        raise ValueError(
            f"{options.work} holds a run with other options ({', '.join(changed)}); give another --work"
        )
    write_json(file, now)


def check_start(options: Options) -> None:
    """Raises ValueError unless `start` is a model of the family, or one that the family may start from."""
    family = FAMILIES[options.family]
    if options.start is None and family.start is None:
        return
    if options.start is None or not (options.start / "model_index.json").is_file():
        raise ValueError(f"start must be the folder of a model, got {options.start}")
    kind = read_index(str(options.start)).get("_class_name")
    known = {family.denoiser.PIPELINE.__name__} | ({"WanPipeline"} if family.start else set())
    if kind not in known:
        raise ValueError(f"start must hold a {' or '.join(sorted(known))}, got {options.start}, a {kind}")


def train(options: Options) -> None:
    """Runs all stages and writes the pipeline folder."""
    prepare(options)
    family, start = FAMILIES[options.family], options.start
    vae = train_vae(options) if start is None else family.build_vae()
    torch.manual_seed(options.seed)
    denoiser = family.denoiser()
    if start is not None:
        pipeline = DiffusionPipeline.from_pretrained(start, dtype=torch.float32)
        denoiser.take_over(pipeline)
        vae = take_over_vae(vae, pipeline.vae).to(options.device).requires_grad_(False).eval()
    latents, scenes = encode_videos(vae, options)
    if start is None:
        family.set_statistics(vae, latents)
    denoiser = train_denoiser(denoiser, family.normalise(latents, vae), scenes, options)
    save_pipeline(options.out, denoiser.cpu().pipeline(vae.cpu()))
    print(f"saved {options.out}")


def parse(argv: list[str] | None = None) -> Options:
    """Parses the command line; the family sets the default folders and frames."""
    parser = OneLineParser(prog="scripts/train_tiny.sh", description=__doc__.splitlines()[0])
    for name, field in Options.__dataclass_fields__.items():
        flag = f"--{name.replace('_', '-')}"
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
            continue
        kind = {int: positive, float: positive_number}.get(field.type, field.type)
        kind = {"seed": int, "start": Path}.get(name, kind)
        choices = FAMILIES if name == "family" else None
        parser.add_argument(flag, type=kind, default=field.default, choices=choices)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu", compile=None)
    name = parser.parse_args(argv).family
    family, short = FAMILIES[name], name.removesuffix("_video")
    parser.set_defaults(out=Path(f"outputs/{short.replace('_', '-')}-tiny"), start=family.start)
    parser.set_defaults(work=Path(f"outputs/train_{short}_tiny"), frames=family.frames, **family.defaults)
    options = Options(**vars(parser.parse_args(argv)))
    if options.start is not None:
        options = replace(options, start=find_path(str(options.start)))
    device = options.device.split(":")[0]
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device: got {options.device!r}, must be cpu, or cuda if there is a GPU")
    problem = compiler_problem(device)
    if options.compile and problem:
        parser.error(f"--compile needs {problem}")
    options = replace(options, compile=options.compile is not False and problem is None)
    step = family.frames_step
    if options.size % 8 or options.frames % step != 1:
        parser.error(f"size must be 8k and frames {step}k + 1, got {options.size} and {options.frames}")
    return options


if __name__ == "__main__":
    options = parse()
    stopped = "run the same command to resume from the last checkpoint"
    sys.exit(exit_code(lambda: train(options), stopped, ValueError))
