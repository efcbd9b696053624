"""Writes small runs of every kind for tests of the report page, in the JSON that the commands save."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scripts.run.outputs import encode

FRAMES, SIZE, FPS = 12, 64, 8
GRID = [9, 8, 8, 0]
MASK = {"pattern": "radial", "decay_factor": 0.5, "block_size": 16}
PROMPTS = ("a red circle on a navy background", "</script><b title='x'>bold</b> & \"quoted\" {{ 7 * 7 }}")
HEAD = {
    "command": "bash scripts/some.sh <config>",
    "made": "2026-11-21",
    "hardware": {"device": "cpu", "cores": 2},
    "versions": {"torch": "2.13.0"},
    "config": {
        "model": {"path": "assets/wan-tiny", "cache": "none"},
        "attention": {"pattern": "radial"},
        "generation": {"steps": 20, "num_frames": FRAMES, "height": SIZE, "width": SIZE},
    },
}


def noise(seed: int, count: int = FRAMES, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Frames of moving noise, uint8 `[T, H, W, 3]`."""
    block = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    picture = np.tile(block, (height // 8 + 1, width // 8 + 1, 1))[:height, :width]
    return np.stack([np.roll(picture, number, 0) for number in range(count)])


def save(folder: Path, name: str, content: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def evaluation(folder: Path) -> Path:
    """Writes two prompts with dense and one radial setting; the videos of the second are equal."""
    numbers = {"attention_flops": 3e9, "seconds_step": 0.1452, "seconds_video": None}
    settings = [
        {"name": name, "words": [f"attention.pattern={name}"], "grid": GRID, "mask": MASK | {"pattern": name}}
        | {"density": density, "density_with_warmup": density, **numbers}
        for name, density in (("dense", 1.0), ("radial", 0.5725))
    ]
    metrics = ({"psnr": 27.3123, "ssim": 0.8861, "lpips": None}, {"psnr": None, "ssim": 1.0, "lpips": None})
    videos = []
    folder.mkdir(parents=True, exist_ok=True)
    for seed, prompt in enumerate(PROMPTS):
        files = {name: f"{seed}_{name}.mp4" for name in ("radial", "dense")}
        for number, name in enumerate(files.values()):
            encode(folder / name, noise(2 * seed + number), FPS)
        videos.append({"prompt": prompt, "seed": seed, "files": files, "metrics": {"radial": metrics[seed]}})
    means = {"radial": metrics[0] | {"recall": 0.9732, "mse": 3.87e-05}}
    scores = {"radial": {"VBench": {"imaging quality": 0.617}}}
    content = {"reference": "dense", "settings": settings, "videos": videos, "means": means, "scores": scores}
    return save(folder, "evaluation", {"kind": "evaluation", **HEAD, **content})


def analysis(folder: Path) -> Path:
    """Writes two layers of two heads with exact exponentials."""
    x = list(range(9))
    y = [float(np.exp(-0.4 * at - 4)) for at in x]
    curves, fit = ("temporal", "spatial", "planar"), {"a": 0.4, "b": -4.0, "r2": 0.9871}
    head = {"class": "spatial", "fit": dict.fromkeys(curves, fit), "own_frame": 0.4, "own_column": 0.2}
    errors = {"bound": 0.0842, "l1": 0.0291, "mask_bound": 0.05, "mask_l1": 0.02}
    content = {
        "grid": GRID, "prompts": [PROMPTS[0]], "steps": [1, 20], "timestep": None, "rows": 8,
        "layers": [0, 1], "column_reach": 1, "density": 0.57, "mask": MASK,
        "profiles": {name: {"distance": x, "mean": y, "heads": [[y, y]] * 2} for name in curves},
        "fits": dict.fromkeys(curves, fit),
        "heads": [[head, head]] * 2,
        "frames": {"distance": x, "mass": y, "kept": y},
        "bands": [{"frames": "0", "mass": 0.6, "kept": 1.0}, {"frames": "1", "mass": 0.4, "kept": None}],
        "tail": {"rows": 8, "median": errors | {"alpha": 0.4, "beta": 0.1, "c_rel": 1.5}, "exceeded": 0}
        | {"vacuous": 0.0, "mask_vacuous": 0.0, "paper_exceeded": 0.1} | errors,
    }  # fmt: skip
    return save(folder, "analysis", {"kind": "analysis", **HEAD, **content})


def cost(folder: Path) -> Path:
    """Writes three lengths of one model, and a row of the paper."""
    rows = [
        {"model": "wan", "frames": frames, "height": 480, "width": 800, "tokens": 1500 * frames}
        | {"density": 4 / frames, "dense_flops": 1e12 * frames**2, "radial_flops": 4e12 * frames}
        | {"n_log_n": 4e12 * frames, "kept_blocks": 40, "of_bound": 0.3}
        | {"seconds_dense": None, "seconds_radial": None}
        for frames in (18, 36, 72)
    ]
    names = [f"{kind}_exponent_{over}" for kind in ("dense", "radial") for over in ("length", "pixels")]
    fit = {"c": 4e12, "r2": 0.98765, "frames": 18, "size": [480, 800]} | dict.fromkeys(names, 1.5)
    paper = [{"model": "Mochi 1", "frames": 331, "paper": 76.4, "ours": 76.51, "preset": 75.0}]
    content = {"rows": rows, "paper": paper, "fits": {"wan": fit}, "rates": None, "masks": {"wan": MASK}}
    return save(folder, "cost", {"kind": "cost", **HEAD, **content})


def ablation(folder: Path) -> Path:
    """Writes one table of two values."""
    columns = ["attention.sink", "density", "density of the run", "PSNR", "SSIM", "recall", "output MSE"]
    columns += ["relative MSE", "attributes, %", "s a step"]
    rows = [[sink, 0.573, 0.658, 21.48, 0.91, 0.97, 1e-4, 0.02, 95.0, None] for sink in (True, False)]
    tables = [{"title": "Sink", "note": "a | bar", "columns": columns, "rows": rows}]
    return save(folder, "ablation", {"kind": "ablation", **HEAD, "tables": tables, "captions": 2, "rows": 8})


def generation(folder: Path, pattern: str = "radial", count: int = FRAMES) -> Path:
    """Writes a video as the inference scripts save it, with its record."""
    config = HEAD["config"] | {"attention": {"pattern": pattern}}
    config["generation"] = config["generation"] | {"num_frames": count}
    record = {"prompt": PROMPTS[0], "seed": 3, "config": config, "density": 0.5725, "dense_steps": [0]}
    record |= {"step_seconds": [9.0, 0.25, 0.35], "hardware": HEAD["hardware"], "versions": HEAD["versions"]}
    record["seconds"] = {"load": 50.0, "encode_text": 1.0, "denoise": 9.6, "decode": 2.0, "write": 7.0}
    save(folder, "circle_seed3", record)
    encode(folder / "circle_seed3.mp4", noise(3 + (pattern == "radial"), count), FPS)
    return folder


def edited(run: Path, name: str, change: Callable[[dict], object]) -> Path:
    """Changes the JSON of a run in place."""
    content = json.loads((run / f"{name}.json").read_text())
    change(content)
    return save(run, name, content)
