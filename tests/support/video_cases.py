"""Makes small videos with ffmpeg: of plain colours, damaged, of odd times."""

import subprocess
from pathlib import Path

from imageio_ffmpeg import get_ffmpeg_exe

COUNTING = "color=black:s=96x64:r=16:d=2,format=rgb24,geq=r='8*N':g='X*2':b='Y*3'"
H264 = "-c:v libx264 -qp 0 -pix_fmt yuv444p -bf 0"


def ffmpeg(*arguments: object) -> None:
    """Runs ffmpeg with these arguments; fails if it does."""
    command = [get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def make(path: Path, source: str = COUNTING, options: str = H264) -> Path:
    """Writes what a source of ffmpeg's (`-f lavfi`) shows; by default 32 frames of 64 x 96 that redden."""
    ffmpeg("-f", "lavfi", "-i", source, *options.split(), path)
    return path
