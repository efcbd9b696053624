"""Videos and calls of the command that makes latents, for tests of any file."""

from pathlib import Path

import imageio
import numpy as np

from scripts.prepare_latents import main

SIZES = "data.sizes=17x32x48, 9x32x32, 9x48x32"


def write_video(path: Path, frames: int, height: int, width: int, fps: int = 16) -> None:
    """Writes a video of a bar that moves over a slope."""
    path.parent.mkdir(parents=True, exist_ok=True)
    slope = np.linspace(0, 180, height * width * 3).reshape(height, width, 3)
    video = np.repeat(slope[None], frames, axis=0).astype(np.uint8)
    for i, frame in enumerate(video):
        frame[:, i % width] = 255
    imageio.mimwrite(path, list(video), fps=fps, quality=9, macro_block_size=1)


def run(config: Path, videos: Path, latents: Path, *arguments: str) -> int:
    keys = [f"data.folder={videos}", f"data.latents={latents}", "data.shard_mb=1", SIZES, *arguments]
    return main([str(config), *keys])


def table(folder: Path, name: str, content: str) -> list[str]:
    (folder / name).write_text(content, encoding="utf-8")
    return ["data.folder=null", f"data.table={folder / name}"]
