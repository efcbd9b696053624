"""Makes the golden files in tests/data/golden: what the commands print and write, frames of bundled presets.

tests/test_golden.py compares them byte for byte. An intended change rewrites them in a commit of its own:
`python -m tests.support.golden --write [help] [plans] [keys] [frames]`.
"""

import argparse
import contextlib
import hashlib
import io
import json
import platform
import re
import runpy
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
import imageio
import numpy as np
import pytest
import torch

from scripts.run.config import ROOT
from tests.support.lora_cases import make_latents, write_config
from tests.support.tiny import wan_pipeline

DATA = Path(__file__).parents[1] / "data/golden"
WIDE = "1000"  # columns of the help, so that no version of Python breaks a line elsewhere
LEVELS = 2  # of 255, by which a pixel may differ on another processor
# rounding to int8 and the choice of blocks amplify: there the mean may differ
ROUNDED, MEAN_LEVELS = ("adaptive", "profile", "quantized"), 0.5
KEPT = 5  # frames of a video that a picture shows

COMMANDS = {  # the name in the golden files -> the module that runs, and a subcommand
    "generate": "scripts.generate",
    "launch": "scripts.launch",
    "train_lora": "scripts.train_lora",
    "prepare_latents": "scripts.prepare_latents",
    "evaluate": "scripts.evaluate",
    "ablate": "scripts.ablate",
    "analyse_attention": "scripts.analyse_attention",
    "calibrate": "scripts.calibrate",
    "cost": "scripts.cost",
    "report": "scripts.report",
    "demo": "scripts.demo",
    "benchmark": "scripts.benchmark",
    "benchmark_gpu": "scripts.benchmark_gpu",
    "benchmark_mask": "scripts.benchmark --mask",
    "benchmark_quantized": "scripts.benchmark --quantized",
    "benchmark_length": "scripts.benchmark --length",
    "prompt_accuracy": "scripts.prompt_accuracy",
    "length_study": "scripts.length_study",
    "train_tiny": "scripts.train_tiny",
    "render_toyworld": "scripts.render_toyworld",
    "contact_sheet": "scripts.contact_sheet",
    "export_flash4": "scripts.export_flash4",
    "flash4_report": "scripts.flash4_report",
    "tune_triton": "scripts.tune_triton",
    "kernel_report": "scripts.kernel_report",
    "check_upstream": "scripts.check_upstream",
    "backends": "radial_attn backends",
    "draw": "radial_attn draw",
    "density": "radial_attn density",
}
NO_HELP = ("launch",)  # hands it to processes that it starts

FRAMES: dict[str, tuple[str, ...]] = {  # bundled preset -> what the golden run changes, to be short
    "hunyuan_tiny": (),
    "hunyuan_tiny_profile": ("generation.steps=2",),
    "mochi_tiny": (),
    "mochi_tiny_profile": ("generation.steps=2",),
    "wan_i2v_tiny": (),
    "wan_i2v_tiny_profile": ("generation.steps=2",),
    "wan_tiny": (),
    "wan_tiny_4x": ("generation.steps=4", "attention.dense_steps=1"),
    "wan_tiny_4x_profile": ("generation.steps=2",),
    "wan_tiny_adaptive": ("generation.steps=8",),
    "wan_tiny_profile": ("generation.steps=4",),
    "wan_tiny_quantized": ("generation.steps=4",),
}

# What depends on the machine is pinned or replaced here, and only here.
ALONE = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "NPROC")
ABSENT = (
    *("torchao", "bitsandbytes", "flash_attn", "flash_attn_interface", "tvm_ffi", "flashinfer"),
    "sageattention",
    "gradio",
)
REPLACED = [
    (r"(not on this machine: .*?'[^']*').*", r"\1 ..."),  # the reason names what is installed
    (r"(\bmeasured +at the first sparse call: ).*(; )", r"\1...\2"),
    (r"(\bcalls)\.(?!dense)\w+", r"\1.KERNEL"),  # the one that auto takes
    (r"(\blpips): .*", r"\1: float|null"),  # null without torchvision and its weights
    (re.escape(str(ROOT)), "ROOT"),
]


@dataclass(frozen=True)
class Said:
    """Holds the result of a command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def pinned(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Pretends that there is no GPU, optional library, network or second process; works in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ALONE:
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", WIDE)
        patch.setenv("NO_COLOR", "1")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for name in ABSENT:
            patch.setitem(sys.modules, name, None)
        yield patch


def call(folder: Path, command: str, *words: str, **environment: str) -> Said:
    """Runs a command in this process and in `folder`, on the machine that `pinned` pretends."""
    module, *first = COMMANDS[command].split()
    with contextlib.redirect_stderr(io.StringIO()):  # libraries speak while they are imported
        import_module(module)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pinned(folder) as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [command, *first, *words])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
            try:
                runpy.run_module(module, run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
    return Said(code, out.getvalue(), err.getvalue())


def replaced(text: str) -> str:
    """Replaces what the machine decides."""
    for pattern, text_of_all in REPLACED:
        text = re.sub(pattern, text_of_all, text)
    return text


def table(name: str) -> list[list[str]]:
    """Reads a table that is written by hand: rows of stripped cells; lines that begin with # are left out."""
    root = str(ROOT).replace(" ", "\\ ")  # command lines are split as a shell does
    lines = (DATA / name).read_text(encoding="utf-8").replace("{ROOT}", root).splitlines()
    return [[cell.strip() for cell in line.split(" | ")] for line in lines if line and line[0] != "#"]


def plans() -> dict[str, str]:
    """Maps names to command lines of dry runs: the presets and the rows of dry_runs.txt."""
    generation = {file.stem: f"generate configs/{file.name}" for file in ROOT.glob("configs/*.yaml")}
    training = {
        f"train_{file.stem}": f"train_lora configs/train/{file.name}"
        for file in ROOT.glob("configs/train/*.yaml")
    }
    return dict(sorted((generation | training | dict(table("dry_runs.txt"))).items()))


def planned(name: str, folder: Path) -> str:
    """Returns what a dry run prints; raises AssertionError with its message if it fails."""
    command, *words = shlex.split(plans()[name])
    said = call(folder, command, *words, "--dry-run")
    assert said.code == 0, said.err
    return replaced(said.out)


def helped(command: str, folder: Path) -> str:
    """Returns what `--help` of a command prints."""
    return replaced(call(folder, command, "--help").out)


def keys(content: Any) -> list[str]:
    """Returns a sorted line `group.key: type` for every value of a JSON; `[]` stands for a list's entries."""
    types: dict[str, set[str]] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for name, entry in value.items():
                walk(entry, f"{path}.{name}" if path else name)
        elif isinstance(value, list) and value:
            for entry in value:
                walk(entry, f"{path}[]")
        else:
            kind = "null" if value is None else type(value).__name__
            types.setdefault(path, set()).add(kind)

    walk(content, "")
    lines = [f"{path}: {'|'.join(sorted(kinds))}" for path, kinds in types.items()]
    return sorted(set(replaced("\n".join(lines)).splitlines()))


class _Recorder:
    """Writes a video and keeps its frames."""

    def __init__(self, writer: Any, frames: list[np.ndarray]) -> None:
        self._writer, self._frames = writer, frames

    def __enter__(self) -> "_Recorder":
        self._writer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)

    def append_data(self, frame: np.ndarray) -> None:
        self._frames.append(np.array(frame))
        self._writer.append_data(frame)


@lru_cache
def generated(preset: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns frames uint8 `[T, H, W, 3]` of a bundled preset before encoding, and the video's record.

    Runs on one thread, since the order of sums depends on the number of threads.
    """
    frames: list[np.ndarray] = []
    writer, threads = imageio.get_writer, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(imageio, "get_writer", lambda *a, **b: _Recorder(writer(*a, **b), frames))
            words = [f"configs/{preset}.yaml", *FRAMES[preset], "output.path=golden.mp4"]
            said = call(Path(folder), "generate", *words)
            assert said.code == 0, said.err
            record = json.loads((Path(folder) / "golden.json").read_text())
    finally:
        torch.set_num_threads(threads)
    return np.stack(frames), record


def kept(frames: np.ndarray) -> list[int]:
    """Returns the numbers of the frames that the picture shows: first, last, and between in even steps."""
    return np.linspace(0, len(frames) - 1, KEPT).round().astype(int).tolist()


def picture(frames: np.ndarray) -> np.ndarray:
    """Puts the kept frames side by side, uint8 `[H, 5 W, 3]`."""
    return np.concatenate([frames[number] for number in kept(frames)], axis=1)


def about(preset: str) -> dict[str, Any]:
    """Returns what frames.json says of a preset: changes, kept frames, sha256 of all, and the machine."""
    frames, record = generated(preset)
    return {
        "changed": list(FRAMES[preset]),
        "shape": list(frames.shape),
        "kept": kept(frames),
        "sha256": hashlib.sha256(frames.tobytes()).hexdigest(),
        "computed_by": computed_by(record),
    }


def computed_by(record: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be equal for frames to be equal: processor, instructions, libraries and kernels."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.is_file() else []
    entries = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    names = ("model name", "cpu family", "model", "stepping")
    processor = {name: entries[name].strip() for name in names if name in entries}
    return {
        "processor": processor or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: record["versions"][name] for name in ("torch", "diffusers", "transformers")},
        "kernels": sorted(record["attention"]["calls"]),
    }


def _trained(folder: Path) -> dict[str, Any]:
    """Trains a LoRA for two steps; returns the names of its files and the content of the JSON files."""
    model, out = folder / "model", folder / "out"
    wan_pipeline(patch_size=(1, 1, 1), rope_max_seq_len=1024).save_pretrained(model)
    config = write_config(folder / "tiny.yaml", model, make_latents(model, folder / "latents"))
    words = [str(config), f"output.path={out}", "train.steps=2", "validation.every=2"]
    said = call(folder, "train_lora", *words)
    assert said.code == 0, said.err
    files = [file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()]
    content: dict[str, Any] = {f"file {name}": "" for name in files if not name.startswith("tensorboard")}
    content["log.jsonl"] = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return content | {file.name: json.loads(file.read_text()) for file in out.rglob("*.json")}


def _evaluated(folder: Path) -> dict[str, Any]:
    """Evaluates a video of one step; returns the names of its files and the content of its JSON."""
    work = folder / "work"
    words = [
        *("configs/wan_tiny.yaml", "generation.num_frames=5", "generation.steps=1"),
        *("evaluate.compare=thin: attention.density=0.8", "evaluate.rows=4"),
        *("--work", str(work), "--out", str(folder / "table.md")),
    ]
    said = call(folder, "evaluate", *words)
    assert said.code == 0, said.err
    files = [file.relative_to(work).as_posix() for file in work.rglob("*") if file.is_file()]
    return {f"file {name}": "" for name in files} | json.loads((work / "evaluation.json").read_text())


KEYS: dict[str, Callable[[Path], Any]] = {  # name -> the content whose keys are kept
    "record_lora": lambda folder: generated("wan_tiny_4x")[1],
    "record_image": lambda folder: generated("wan_i2v_tiny")[1],
    "training": _trained,
    "evaluation": _evaluated,
}


def texts(kind: str) -> dict[str, Callable[[Path], str]]:
    """Maps names to functions that make the text of a golden file in an empty folder."""
    match kind:
        case "help":
            return {name: partial(helped, name) for name in COMMANDS if name not in NO_HELP}
        case "plans":
            return {name: partial(planned, name) for name in plans()}
    return {name: partial(listed, make) for name, make in KEYS.items()}


def listed(make: Callable[[Path], Any], folder: Path) -> str:
    """Returns the keys of what `make` makes, a line each."""
    return "".join(f"{line}\n" for line in keys(make(folder)))


def write(kind: str) -> None:
    """Writes all files of a kind, and removes those that no longer belong to it."""
    target = DATA / kind
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if kind == "frames":
        for preset in FRAMES:
            imageio.imwrite(target / f"{preset}.png", picture(generated(preset)[0]))
        content = {preset: about(preset) for preset in FRAMES}
        (target / "frames.json").write_text(json.dumps(content, indent=1) + "\n")
        return
    for name, make in texts(kind).items():
        with TemporaryDirectory() as folder:
            (target / f"{name}.txt").write_text(make(Path(folder)), encoding="utf-8")


def main() -> None:
    """Reads the command line and writes the files."""
    kinds = ("help", "plans", "keys", "frames")
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.golden", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--write", nargs="*", choices=kinds, required=True, help="the kinds to write; none: all"
    )
    for kind in parser.parse_args().write or kinds:
        write(kind)
        print(f"written {DATA / kind}; look at the difference with git diff")


if __name__ == "__main__":
    main()
