"""Damaged and odd files: the result is right, or one line names the file, and nothing is written.

`FUZZ=400 python -m pytest tests/test_fuzz.py` tries 400 inputs of each kind; without FUZZ 40.
"""

import csv
import io
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
import yaml
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from safetensors.torch import load, save

from scripts.lora.config import read_arguments
from scripts.lora.dataset import read_dataset
from scripts.run.config import ROOT, keys, read_config
from tests.support import golden
from tests.support.fuzz import damaged
from tests.support.video_cases import make

COUNT = int(os.environ.get("FUZZ", "40"))
SECONDS = 30  # an input that takes longer hangs
CAPTIONS = ("a red circle, moving", 'he said "go"\nand went', "a\u2028b")


class Kind(NamedTuple):
    """Holds a kind of file.

    Attributes:
        seeds: makes the whole files that are damaged; gets a folder for files that they name.
        words: the command that reads the file, without its name.
        check: raises an error if the file was read wrong.
    """

    suffix: str
    seeds: Callable[[Path], list[bytes]]
    words: tuple[str, ...]
    check: Callable[[Path], None]
    is_text: bool = False


def pixels(image_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.radial_gradient("L").resize((20, 16)).convert("RGB").save(stream, image_format, **options)
    return stream.getvalue()


def check_image(file: Path) -> None:
    """Lets Pillow alone decode it whole."""
    with Image.open(file) as image:
        image.load()


def tables(folder: Path) -> list[list[dict[str, str]]]:
    (folder / "a.png").write_bytes(pixels("PNG"))
    (folder / "b c.png").write_bytes(pixels("PNG"))
    return [
        [{"video": "a.png", "caption": CAPTIONS[0]}, {"video": "b c.png", "caption": CAPTIONS[number]}]
        for number in (1, 2)
    ]


def csv_files(folder: Path) -> list[bytes]:
    contents = []
    for rows in tables(folder):
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, ["video", "caption"])
        writer.writeheader()
        writer.writerows(rows)
        contents.append(stream.getvalue().encode())
    return contents


def jsonl_files(folder: Path) -> list[bytes]:
    return [
        "".join(json.dumps(row, ensure_ascii=bool(number)) + "\n" for row in rows).encode()
        for number, rows in enumerate(tables(folder))
    ]


def captions_of(file: Path) -> list[tuple[str, str]]:
    config, _ = read_arguments([PREPARE[1], f"data.table={file}", *PREPARE[2:-1]], "")
    return [(video.name, video.caption) for video in read_dataset(config.data, dry_run=True).videos]


def videos(folder: Path) -> list[bytes]:
    """Makes a second of video of each case, options of ffmpeg; the table names the damaged file."""
    (folder / "videos.csv").write_text("video,caption\ninput.mp4,a red circle\n")
    source = "testsrc=s=96x64:r=16:d=1"
    return [make(folder / f"{n}.mp4", source, options).read_bytes() for n, options in enumerate(CASES)]


def check_video(file: Path) -> None:
    """Lets ffmpeg's own program decode all frames."""
    command = [get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", file, "-map", "0:v:0", "-fps_mode"]
    done = subprocess.run([*command, "passthrough", "-f", "framemd5", "-"], capture_output=True, check=True)
    frames = [line for line in done.stdout.splitlines() if not line.startswith(b"#")]
    config, _ = read_arguments([PREPARE[1], f"data.table={file.parent / 'videos.csv'}", *PREPARE[2:-1]], "")
    (video,) = read_dataset(config.data, dry_run=True).videos
    assert not done.stderr and video.frames == len(frames), done.stderr


def check_csv(file: Path) -> None:
    text = file.read_bytes().decode("utf-8-sig")
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row not in ([], [""])]
    (header, *rows) = rows
    assert all(len(row) == len(header) for row in rows)
    expected = [dict(zip(header, row, strict=True)) for row in rows]
    assert captions_of(file) == [(row["video"], row["caption"].strip()) for row in expected]


def check_jsonl(file: Path) -> None:
    lines = [json.loads(line) for line in file.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    assert captions_of(file) == [(line["video"], line["caption"].strip()) for line in lines]


def check_values(file: Path, values: dict[str, dict[str, Any]]) -> None:
    """Compares the configuration with values that another reader got."""
    config = read_config(str(file), [])
    for group, leaves in values.items():
        for name, value in leaves.items():
            got, kind = getattr(getattr(config, group), name), keys()[f"{group}.{name}"].type
            if kind in (str, str | None):
                assert got == value or (got is None and value in ("", "~", "null", "Null", "NULL"))
            elif isinstance(got, float | int) and not isinstance(got, bool):
                assert got == float(value)


def check_yaml(file: Path) -> None:
    check_values(file, yaml.load(file.read_bytes().decode("utf-8-sig"), yaml.BaseLoader))


def check_record(file: Path) -> None:
    content = json.loads(file.read_bytes().decode("utf-8-sig"))
    check_values(file, content.get("config", content))


def presets(_: Path) -> list[bytes]:
    names = ("wan_tiny", "wan_tiny_4x", "mochi_tiny")
    return [
        (ROOT / f"configs/{name}.yaml").read_bytes().replace(b"assets/", f"{ROOT}/assets/".encode())
        for name in names
    ]


def records(folder: Path) -> list[bytes]:
    contents = [yaml.safe_load(content) for content in presets(folder)]
    return [
        json.dumps({"config": content, "seconds": {"load": 1.5}}, indent=2).encode() for content in contents
    ]


def loras(_: Path) -> list[bytes]:
    name = "transformer.blocks.0.attn1.to_q.lora_{}.weight"
    pair = {name.format("A"): torch.ones(2, 192), name.format("B"): torch.ones(192, 2)}
    return [save(pair), save({key: value.bfloat16() for key, value in pair.items()}, {"format": "pt"})]


def check_lora(file: Path) -> None:
    assert load(file.read_bytes())


def check_prompts(file: Path) -> None:
    file.read_bytes().decode("utf-8-sig")


CASES = ("-c:v libx264 -pix_fmt yuv420p", "-c:v mpeg4", "-c:v libvpx-vp9 -f webm", "-c:v libx264 -f mpegts")
GENERATE = ("generate", "configs/wan_tiny.yaml", "--dry-run")
PREPARE = (
    "prepare_latents",
    str(ROOT / "configs/train/wan_tiny_4x.yaml"),
    "data.folder=null",
    "data.latents=latents",
    "data.sizes=1x64x64",
    "--dry-run",
)
KINDS = {
    "png": Kind(
        ".png",
        lambda _: [pixels("PNG"), pixels("PNG", interlace=1)],
        ("generate", "configs/wan_i2v_tiny.yaml", "--dry-run", "generation.image={}"),
        check_image,
    ),
    "jpg": Kind(
        ".jpg",
        lambda _: [pixels("JPEG"), pixels("JPEG", progressive=True)],
        ("generate", "configs/wan_i2v_tiny.yaml", "--dry-run", "generation.image={}"),
        check_image,
    ),
    "mp4": Kind(".mp4", videos, (*PREPARE, "data.table=videos.csv"), check_video),
    "csv": Kind(".csv", csv_files, (*PREPARE, "data.table={}"), check_csv, is_text=True),
    "jsonl": Kind(".jsonl", jsonl_files, (*PREPARE, "data.table={}"), check_jsonl, is_text=True),
    "yaml": Kind(".yaml", presets, ("generate", "{}", "--dry-run"), check_yaml, is_text=True),
    "json": Kind(".json", records, ("generate", "{}", "--dry-run"), check_record, is_text=True),
    "txt": Kind(
        ".txt",
        lambda _: [b"a red circle\n# b\n\\#c\n", b"\xef\xbb\xbfa\r\nb\r\n"],
        (*GENERATE, "generation.prompt_file={}"),
        check_prompts,
        is_text=True,
    ),
    "safetensors": Kind(".safetensors", loras, (*GENERATE, "model.loras={}"), check_lora),
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_right_or_refused_in_one_line(name, tmp_path):
    kind, read, wrong = KINDS[name], 0, []
    seeds, file = kind.seeds(tmp_path), tmp_path / f"input{kind.suffix}"
    for number, content in enumerate(damaged(seeds, COUNT, text=kind.is_text)):
        file.write_bytes(content)
        try:
            read += is_read(kind, file)
        except Exception as error:  # all are shown, not the first alone
            wrong.append(f"{number}: {type(error).__name__}: {str(error)[:600]}\n  {content[:200]!r}")
        assert wrong or number >= len(seeds) or read == number + 1, "a whole file is refused"
    if wrong:
        pytest.fail("\n".join(wrong[:20]), pytrace=False)


def is_read(kind: Kind, file: Path) -> bool:
    """Runs the command on a file; returns whether it was read, and checks that; else checks the error."""
    content, before = file.read_bytes(), sorted(file.parent.rglob("*"))
    with time_limit(SECONDS):
        said = golden.call(file.parent, *(word.format(file.name) for word in kind.words))
    if sorted(file.parent.rglob("*")) != before or file.read_bytes() != content:
        raise AssertionError("files have changed")
    if said.code == 0:
        kind.check(file)
        return True
    if said.code != 2 or not re.fullmatch(rf"error: .*({NAMED}).*\n", said.err):
        raise AssertionError(f"exit code {said.code}, {said.err[:300]!r}")
    return False


NAMED = r"input\.\w+|(?<![\w.])(model|attention|generation|output|parallel|data)\.\w+|config file"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in a block that takes longer."""

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
