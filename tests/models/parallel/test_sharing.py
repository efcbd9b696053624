"""What processes share beside the transformer: tiles of the decoder, skipped steps, gradients, choices."""

import json
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from radial_attn.models.parallel.decoding import share
from radial_attn.models.parallel.groups import Degrees
from scripts.run.config import ROOT, ModelConfig, VideoSize, read_config
from scripts.run.describe import describe_decoding
from scripts.run.memory import decoded_tiles
from scripts.run.model_info import ModelInfo
from tests.support.decode_cases import SIDE, tiled
from tests.support.multi_process import environment, run_ranks, torchrun
from tests.support.plans import FULL, TINY, plan_of
from tests.support.tiny_hunyuan import hunyuan_vae
from tests.support.tiny_vaes import architecture
from tests.support.tolerances import MOST

QUICK, LONG = ("gradient", "compile", "choice"), ("decode", "cache")


@cache
def results(parts: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Runs all cases of these parts in two processes, once; returns one entry for each process."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        run_ranks(2, "tests.support.sharing_worker", out, *parts)
        return json.loads(out.read_text())


def cases(kind: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the cases of one kind."""
    made = results(LONG if kind.startswith(LONG) else QUICK)
    return {name: everyone for name, everyone in made.items() if name.startswith(f"{kind}: ")}


@pytest.mark.long
def test_tiles_of_every_family_are_shared_and_give_the_video_of_one_process():
    decoded = cases("decode")
    assert len(decoded) == 12
    for name, everyone in decoded.items():
        for one in everyone:
            assert one["equal"] and one["after"], name
            assert len(one["owners"]) == one["tiles"], name
            assert set(one["owners"]) == ({0} if one["tiles"] == 1 else {0, 1}), name


def test_the_largest_tiles_are_dealt_out_first():
    assert share([4, 4, 2, 4, 4, 2, 2, 2, 1], 3) == [0, 1, 1, 2, 0, 2, 1, 2, 0]
    assert share([5], 4) == [0] and share([1, 9], 2) == [1, 0]


@pytest.mark.long
@pytest.mark.parametrize("shared", ["sequence", "guidance"])
def test_caches_skip_alike_in_all_processes(shared):
    skipped = cases(f"cache, shared {shared}")
    assert len(skipped) == (7 if shared == "sequence" else 5)
    for name, everyone in skipped.items():
        own_half = shared == "guidance" and "wan" in name  # each process makes one of the calls of a step
        for one in everyone:
            assert one["difference"] <= MOST, name
            assert one["alone"]["computed"] < one["alone"]["due"], name
            share_of = 2 if own_half else 1
            for count in ("due", "computed"):
                assert one["together"][count] * share_of == one["alone"][count], name


def test_gradients_averaged_over_processes_are_those_of_one():
    compared = cases("gradients")
    assert len(compared) == 6
    for name, everyone in compared.items():
        for one in everyone:
            assert one["count"] > 50 and one["parameters"] <= MOST and one["inputs"] <= MOST, name


def test_compiled_blocks_exchange_and_are_not_compiled_again():
    compiled = cases("compile")
    assert len(compiled) == 1
    for name, everyone in compiled.items():
        for one in everyone:
            assert one["difference"] <= MOST, name
            first, second = one["graphs"][: len(one["graphs"]) // 2], one["graphs"][len(one["graphs"]) // 2 :]
            assert 0 < first[-1] <= 8 and set(second) == {first[-1]}, name


def test_all_take_the_backends_of_the_first():
    everyone, sparse = cases("choice").values()
    assert [one["times"] for one in everyone] == 2 * [everyone[0]["own"]]
    assert [one["name"] for one in everyone] == 2 * ["native"]
    assert everyone[1]["own"] != everyone[0]["own"]
    assert [one["own"] for one in sparse] == ["reference", "blocks"]
    assert [one["names"] for one in sparse] == 2 * [["reference", "reference", "dense"]]
    assert all(one["dense"] < 1e-4 for one in sparse)


@pytest.mark.long
def test_a_failure_in_decoding_ends_all_in_one_line(tiny_model: Path, tmp_path: Path):
    arguments = [TINY, f"model.path={tiny_model}", "generation.steps=1", "generation.num_frames=5"]
    arguments += ["generation.height=272", "model.vae_tiling=always", f"output.path={tmp_path / 'out'}"]
    options = {"capture_output": True, "text": True, "env": environment()}
    result = subprocess.run(
        torchrun(2, "tests.support.failing_decoder", *arguments), cwd=ROOT, check=False, **options
    )
    assert result.returncode != 0 and not list(tmp_path.iterdir())
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line == "error: rank 1: the pipeline failed with ArithmeticError: no tile for you"


def planned(path: str, count: int, *arguments: str) -> list[str]:
    """Returns the lines about decoding in a plan in which `count` processes make each of two videos."""
    plan = plan_of(read_config(path, list(arguments)), ModelInfo(2, 4, 8, 64))
    return describe_decoding(replace(plan, degrees=Degrees(ulysses=count, data=2)))


@torch.no_grad()
def test_the_tiles_that_are_told_are_those_that_are_decoded():
    vae, calls = tiled(hunyuan_vae()), []
    vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    vae.decode(torch.zeros(1, vae.config.latent_channels, 5, 9, 4))
    model = replace(architecture("hunyuan_video"), vae_tile=SIDE)
    predicted = decoded_tiles(model, VideoSize(17, 72, 32), ModelConfig(family="hunyuan_video"))
    assert len(calls) == predicted == 4


def test_who_decodes_is_told():
    small = ["generation.height=480", "generation.width=832"]
    assert planned(FULL, 1, *small) == []
    assert planned(FULL, 4, *small, "model.vae_tiling=always") == ["decoding: 15 tiles shared by 4 processes"]
    assert planned(FULL, 32, *small, "model.vae_tiling=always") == [
        "decoding: 15 tiles shared by 15 processes"
    ]
    (line,) = planned(FULL, 4, *small)
    assert line.startswith("decoding: by one process, as one tile; set model.vae_tiling=always")
    assert planned(TINY, 2, "model.vae_tiling=always") == ["decoding: by one process, as one tile"]
