"""Small runs of every kind for tests of the report page, in the JSON forms of the evaluation commands."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from scripts.run.outputs import encode
from scripts.toyworld import parse_caption, random_scene, render

FRAMES, SIZE, FPS = 12, 64, 8
GRID = [9, 8, 8, 0]
MASK = {"decay_factor": 0.5, "block_size": 16, "sink": True, "neighbour": "full", "decimation_width": 64}
PROMPTS = ("a red circle moving around on a navy background", '</script><b>bold</b> & "quoted" {{style}}')
MEANS = {
    "radial": {"psnr": 27.31234, "ssim": 0.88612, "lpips": None, "recall": 0.97321, "mse": 3.871e-05},
    "sparse": {"psnr": 23.05, "ssim": 0.8044, "lpips": None, "recall": 0.9125, "mse": 1.2e-4},
}
HEAD = {
    "command": "bash scripts/evaluate.sh configs/wan_tiny.yaml",
    "made": "2026-11-21",
    "hardware": {"device": "cpu", "cpu": "some processor", "cores": 2, "memory_bytes": 24 * 2**30},
    "versions": {"radial-attention": "0.1.0", "torch": "2.13.0"},
    "config": {"attention": {"decay_factor": 0.5}, "generation": {"steps": 20}},
}


def toy_video(seed: int, noise: float = 0.0, frames: int = FRAMES) -> np.ndarray:
    """A toyworld video, uint8 `[T, H, W, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    video = render(random_scene(parse_caption(PROMPTS[0]), generator), frames, SIZE, SIZE)
    video += noise * torch.randn(video.shape, generator=generator)
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def write(folder: Path, kind: str, content: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}.json"
    file.write_text(json.dumps({"kind": kind, **HEAD, **content}), encoding="utf-8")
    return folder


def evaluation(folder: Path) -> Path:
    """Two prompts, dense and two radial settings, recall and error at two steps of 3 layers and 4 heads."""
    folder.mkdir(parents=True, exist_ok=True)
    videos = []
    for seed, prompt in enumerate(PROMPTS):
        files = {}
        for name, noise in (("dense", 0.0), ("radial", 0.03), ("sparse", 0.1)):
            files[name] = f"{seed}_{name}.mp4"
            encode(folder / files[name], toy_video(seed, noise), FPS)
        metrics = {
            name: {key: values[key] for key in ("psnr", "ssim", "lpips")} for name, values in MEANS.items()
        }
        videos.append({"prompt": prompt, "seed": seed, "files": files, "metrics": metrics})
    settings = [
        setting("dense", "dense"),
        setting("radial", "radial"),
        setting("sparse", "radial", decay_factor=0.2),
    ]
    levels = {
        step: [[round(0.8 + 0.01 * (step + 3 * layer + head), 4) for head in range(4)] for layer in range(3)]
        for step in (1, 10)
    }
    errors = [[[value / 1e4 for value in layer] for layer in levels[step]] for step in levels]
    attention = {"steps": [1, 10], "recall": list(levels.values()), "mse": errors}
    return write(
        folder,
        "evaluation",
        {
            "reference": "dense",
            "settings": settings,
            "videos": videos,
            "attention": {"radial": attention, "sparse": attention},
            "means": MEANS,
            "scores": {"radial": {"VBench": {"imaging quality": 0.617, "aesthetic quality": None}}},
        },
    )


def setting(name: str, pattern: str, **options: float) -> dict:
    return {
        "name": name,
        "words": [f"attention.pattern={pattern}"],
        "grid": GRID,
        "density": 1.0 if pattern == "dense" else 0.5725,
        "density_with_warmup": 1.0 if pattern == "dense" else 0.6,
        "attention_flops": 3.06e9,
        "seconds_step": 0.1452,
        "seconds_video": None,
        "mask": {**MASK, "pattern": pattern, "density": None, **options},
    }


def analysis(folder: Path) -> Path:
    """Exact exponentials with their fits."""
    temporal, spatial = list(range(9)), list(range(0, 64, 2))
    curves = {"temporal": (temporal, 0.45, -4.0), "spatial": (spatial, 0.06, -4.2)}
    profiles = {}
    for name, (x, a, b) in curves.items():
        heads = [
            [[math.exp(-a * (0.7 + 0.2 * head) * at + b) for at in x] for head in range(4)] for _ in range(3)
        ]
        profiles[name] = {"distance": x, "mean": [math.exp(-a * at + b) for at in x], "heads": heads}
    return write(
        folder,
        "analysis",
        {
            "grid": GRID,
            "profiles": profiles,
            "fits": {name: {"a": a, "b": b, "r2": 0.9871} for name, (_, a, b) in curves.items()},
            "heads": [
                [{"class": kind, "fit": None} for kind in ("spatial", "temporal", "spatial", "spatial")]
            ]
            * 3,
            "bands": [
                {"frames": "0", "mass": 0.412, "kept": 1.0},
                {"frames": "1", "mass": 0.271, "kept": 1.0},
                {"frames": "2-3", "mass": 0.193, "kept": 0.842},
                {"frames": "4-7", "mass": 0.124, "kept": None},
            ],
            "tail": {"bound": 0.0842, "l1": 0.0291},
            "mask": MASK,
        },
    )


def cost(folder: Path) -> Path:
    """Three lengths and two sizes of one model, and two rows of the paper."""
    rows = []
    for frames, height, width in ((18, 48, 80), (36, 48, 80), (72, 48, 80), (18, 24, 40)):
        tokens = frames * height * width
        dense = 4.0 * 5120 * tokens**2 * 40
        density = 4 / frames + 0.1
        rows.append(
            {
                "model": "Wan2.1-14B",
                "frames": frames,
                "height": height,
                "width": width,
                "tokens": tokens,
                "density": density,
                "dense_flops": dense,
                "radial_flops": dense * density,
                "kept_blocks": int((tokens / 128) ** 2 * density),
                "n_log_n": dense / frames * (1 + math.log2(frames)),
                "seconds_dense": None,
                "seconds_radial": None,
            }
        )
    paper = [
        {"model": "HunyuanVideo", "frames": 253, "paper": 80.8, "ours": 80.83},
        {"model": "Mochi 1", "frames": 331, "paper": 76.4, "ours": None},
    ]
    more = {"fits": {"Wan2.1-14B": {"r2": 0.98765}}, "rates": {"source": "measured on the CPU"}}
    return write(folder, "cost", {"rows": rows, "paper": paper, **more})


def ablation(folder: Path) -> Path:
    tables = [
        {
            "title": "Dense steps at the start",
            "note": "12 captions; of 20 steps.",
            "columns": ["dense steps", "density", "PSNR, dB", "sink"],
            "rows": [[0, 0.573, 21.482, True], [4, 0.658, 24.9, True], [8, 0.744, None, False]],
        }
    ]
    return write(folder, "ablation", {"tables": tables})


def generation(folder: Path, pattern: str = "radial", frames: int = FRAMES) -> Path:
    """A video as the inference scripts write it, with its record."""
    folder.mkdir(parents=True, exist_ok=True)
    encode(folder / "circle_seed3.mp4", toy_video(3, 0.05 * (pattern == "radial"), frames), FPS)
    record = {
        "prompt": PROMPTS[0],
        "seed": 3,
        "config": {
            "attention": {"pattern": pattern},
            "generation": {"height": SIZE, "width": SIZE, "num_frames": frames},
        },
        "tokens": 576,
        "density": 0.5725,
        "mask": {**MASK, "pattern": pattern, "density": None},
        "attention": {"grid": GRID[:3]},
        "hardware": HEAD["hardware"],
        "versions": HEAD["versions"],
    }
    (folder / "circle_seed3.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def every_kind(root: Path) -> list[Path]:
    """A run of each kind of the evaluation commands."""
    makers = (evaluation, analysis, cost, ablation)
    return [maker(root / maker.__name__) for maker in makers]


def edited(run: Path, kind: str, change: Callable[[dict], object]) -> Path:
    """The run with its JSON changed in place."""
    content = json.loads((run / f"{kind}.json").read_text())
    change(content)
    (run / f"{kind}.json").write_text(json.dumps(content))
    return run
