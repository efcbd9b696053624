"""`kill -9` at random moments: the same command resumes, and the files are those of a run that nobody killed.

`KILLS=30 python -m pytest tests/test_killed.py` kills each command thirty times; without KILLS three times.
"""

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scripts import evaluate, generate, prepare_latents, train_lora
from tests.support.latent_cases import SIZES, write_video
from tests.support.long import all_but
from tests.support.lora_cases import same
from tests.support.multi_process import can_copy
from tests.support.script_cases import timeless

KILLS = int(os.environ.get("KILLS", "3"))
TINY = ("configs/wan_tiny.yaml", "generation.num_frames=9", "generation.steps=2", "model.device=cpu")
PROMPTS = "a red circle\na blue square\na green triangle\n"

pytestmark = pytest.mark.skipif(not can_copy(), reason="needs processes that are copies of this one")


def prompt_file(folder: Path, _: Path) -> list[str]:
    (folder.parent / "prompts.txt").write_text(PROMPTS)
    return [*TINY, f"generation.prompt_file={folder.parent / 'prompts.txt'}", f"output.path={folder}"]


def preparation(folder: Path, _: Path) -> list[str]:
    videos = folder.parent / "videos"
    for number in range(4) if not videos.exists() else ():
        write_video(videos / f"{number}.mp4", 20, 32, 48)
        (videos / f"{number}.txt").write_text(f"a circle, {number}")
    data = [f"data.folder={videos}", f"data.latents={folder}", SIZES]
    return ["configs/train/wan_tiny_4x.yaml", "model.path=assets/wan-tiny", "model.device=cpu", *data]


def training(folder: Path, config: Path) -> list[str]:
    return [str(config), f"output.path={folder}"]


def evaluation(folder: Path, _: Path) -> list[str]:
    wanted = ["evaluate.seeds=1", "evaluate.rows=2", "evaluate.steps=2", "attention.density=0.6"]
    return [*TINY, *wanted, "--work", str(folder), "--out", str(folder / "table.md")]


def same_videos(one: Path, other: Path) -> None:
    videos = {file.name: file.read_bytes() for file in one.glob("**/*.mp4")}
    assert videos and videos == {file.name: file.read_bytes() for file in other.glob("**/*.mp4")}
    for file in one.glob("**/*_seed*.json"):
        records = [json.loads((folder / file.relative_to(one)).read_text()) for folder in (one, other)]
        first, second = (record["config"] | {"output": None} for record in records)
        assert first == second


def same_latents(one: Path, other: Path) -> None:
    first, second = (
        {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        for folder in (one, other)
    )
    assert first and first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def same_adapter(one: Path, other: Path) -> None:
    assert same(one, other)


def same_numbers(one: Path, other: Path) -> None:
    same_videos(one, other)
    first, second = (
        timeless(json.loads((folder / "evaluation.json").read_text())) for folder in (one, other)
    )
    assert first == second


JOBS: dict[str, tuple[Callable, Callable, Callable]] = {
    "prompt file": (generate.main, prompt_file, same_videos),
    "preparation": (prepare_latents.main, preparation, same_latents),
    "training": (train_lora.main, training, same_adapter),
    "evaluation": (evaluate.main, evaluation, same_numbers),
}


@pytest.mark.timeout(0 if KILLS > 3 else 300)
@pytest.mark.parametrize("name", all_but(["preparation", "training"], JOBS))
def test_a_command_that_is_killed_ends_as_if_nobody_had(name, tmp_path, lora_config):
    main, words, check = JOBS[name]
    begun, whole = time.monotonic(), tmp_path / "whole"
    process = start(main, words(whole, lora_config), tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    seconds, chance, kills, attempt = time.monotonic() - begun, random.Random(0), 0, tmp_path / "0"
    while kills < KILLS or process.exitcode:
        process = start(main, words(attempt, lora_config), tmp_path / "log")
        process.join(chance.uniform(0, seconds) if kills < KILLS else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        check(whole, attempt)
        assert names(whole) == names(attempt)
        attempt = tmp_path / str(int(attempt.name) + 1)


def names(folder: Path) -> list[Path]:
    """Lists a run's files; tensorboard begins a new one at each start."""
    files = (file.relative_to(folder) for file in folder.rglob("*"))
    return sorted(file for file in files if file.parts[0] != "tensorboard")


def start(main: Callable[[list[str]], int], words: list[str], log: Path) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_run, args=(main, words, log))
    process.start()
    return process


def _run(main: Callable[[list[str]], int], words: list[str], log: Path) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        torch.set_num_threads(1)
        code = main(words)
    os._exit(code)
