"""Videos to latents by the command: what it makes, bad input, runs that stop and resume."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from radial_attn.models.pipeline.load import load_pipeline
from radial_attn.models.training.flow import encode_text, encode_video
from scripts.lora import latent_shards
from scripts.lora import prepare as prepare_latents
from scripts.lora.fingerprint import fingerprint
from scripts.lora.latent_shards import locked
from scripts.lora.latents import LatentStore
from scripts.run.config import ROOT
from scripts.run.errors import UsageError
from scripts.run.inputs import fit, read_frames
from tests.support.latent_cases import SIZES, run, write_video
from tests.support.tiny_hunyuan import hunyuan_pipeline
from tests.support.tiny_mochi import mochi_pipeline

MODEL, ENLARGED = "assets/wan-tiny", "note: 1 clips are enlarged: a.mp4"
SHARD = 5000  # bytes: a text each, one clip and then two
CAPTIONS = {"a": "a red circle", "b": "a blue square moving around", "deep/c": "a red circle", "d": "short"}
# frames, height, width
SHAPES = {"a": (20, 32, 48), "b": (9, 64, 40), "deep/c": (16, 40, 40), "d": (8, 32, 32)}


def write_model(file: Path, path: str | Path, family: str = "wan") -> Path:
    """Writes a configuration that names a model and nothing else."""
    model = f"{{path: {path}, family: {family}, dtype: float32, device: cpu}}"
    file.write_text(f"# tiny\nmodel: {model}\n")
    return file


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Makes four videos with captions; one is too short for all sizes."""
    folder = tmp_path_factory.mktemp("videos")
    for name, sizes in SHAPES.items():
        write_video(folder / f"{name}.mp4", *sizes)
        (folder / f"{name}.txt").write_text(CAPTIONS[name] + "\n", encoding="utf-8-sig")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Writes a configuration of the bundled model."""
    return write_model(tmp_path_factory.mktemp("config") / "tiny.yaml", MODEL)


@pytest.fixture(scope="module")
def prepared(config, videos, tmp_path_factory) -> Path:
    """Prepares all videos, in shards of two small clips."""
    folder = tmp_path_factory.mktemp("prepared") / "latents"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_latents, "MIB", SHARD)
        assert run(config, videos, folder) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the index and the shards by name."""
    files = [folder / "index.json", *folder.glob("*.safetensors")]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def fitted(path: Path, frames: int, height: int, width: int, first: int = 0) -> torch.Tensor:
    """Returns frames of a video as a VAE takes them, `[1, 3, frames, height, width]`."""
    images = list(read_frames("video", str(path)))[first : first + frames]
    pixels = np.stack([np.asarray(fit(image, height, width)) for image in images])
    return torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def check_sample(store: LatentStore, i: int, pipeline: Any, video: Path, first: int) -> None:
    """Asserts that a sample holds the pipeline's latents of the video from frame `first` on, and its text."""
    family, sample = store.fingerprint["family"], store.samples[i]
    latents, text = store.load(i)
    pixels = fitted(video, sample.frames, sample.height, sample.width, first)
    assert torch.equal(latents, encode_video(pipeline, pixels)[0])
    assert latents.dtype == torch.float32 and tuple(latents.shape) == sample.latent_shape
    expected = encode_text(pipeline, family, CAPTIONS[sample.name.removesuffix(".mp4")])
    assert text.keys() == expected.keys() and all(torch.equal(text[name], expected[name]) for name in text)


def test_latents_and_texts_are_those_of_the_pipeline(prepared, videos):
    store = LatentStore.open(prepared)
    store.check(fingerprint(str(ROOT / MODEL), "wan"))
    assert [(s.name, s.frames, s.height, s.width) for s in store.samples] == [
        ("a.mp4", 17, 32, 48),
        ("b.mp4", 9, 48, 32),
        ("deep/c.mp4", 9, 32, 32),
    ]
    assert [sample.bucket for sample in store.samples] == [(5, 4, 6), (3, 6, 4), (3, 4, 4)]
    pipeline = load_pipeline(str(ROOT / MODEL), "wan", torch.float32, "cpu")
    for i, (sample, first) in enumerate(zip(store.samples, (1, 0, 3), strict=True)):  # from the middle
        check_sample(store, i, pipeline, videos / sample.name, first)
    empty = encode_text(pipeline, "wan", "")["prompt_embeds"]
    assert torch.equal(store.empty_text["prompt_embeds"], empty)
    assert sorted(contents(prepared)) == [
        "index.json",
        *(f"latents-0000{i}.safetensors" for i in range(2)),
        *(f"text-0000{i}.safetensors" for i in range(3)),  # the empty one and two captions
    ]


def test_a_caption_that_the_model_reads_in_part_is_noted(config, tmp_path, capsys):
    write_video(tmp_path / "videos/a.mp4", 9, 32, 32)
    (tmp_path / "videos/a.txt").write_text(512 * "red " + "blue dragon\n")
    assert run(config, tmp_path / "videos", tmp_path / "new", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "note: tokenizer passes on 512 tokens; it cuts, from the caption of a.mp4: 'red blue" in out
    assert "note: the model does not know, in the caption of a.mp4: dragon; its words: a moving" in out


def test_a_dry_run_counts_and_loads_nothing(config, videos, prepared, tmp_path, capsys):
    assert run(config, videos, tmp_path / "new", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "videos     4 with captions, 16 frames a second",
        "clips      3: 17x32x48 1, 9x32x32 1, 9x48x32 1",
        "dropped    1 of under 9 frames: d.mp4 (8 frames)",
        f"latents    {tmp_path / 'new'}: 0 of 3 clips and 0 of 3 texts are there",
    ]
    assert not (tmp_path / "new").exists()
    assert run(config, videos, prepared, "data.sizes=17x64x64", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    short = "b.mp4 (9 frames), d.mp4 (8 frames), deep/c.mp4 (16 frames)"
    assert lines[2:4] == [f"dropped    3 of under 17 frames: {short}", ENLARGED]
    assert lines[4].endswith("0 of 1 clips and 2 of 2 texts are there")


def stop_at(call: int, function: Callable) -> Callable:
    """Interrupts a function at one of its calls, counted from 0, as Ctrl-C does."""
    calls = iter(range(100))

    def stopping(*arguments: object) -> object:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return stopping


@pytest.mark.parametrize("moment", [1, 3, 4, 10, "second clip of a shard"])
def test_a_stopped_run_resumes_and_ends_with_the_same_files(
    moment, config, videos, prepared, *, tmp_path, monkeypatch, capsys
):
    """Numbers count renames: readings, list and index, then each shard and the index after it."""
    monkeypatch.setattr(prepare_latents, "MIB", SHARD)
    with monkeypatch.context() as patch:
        if isinstance(moment, int):
            patch.setattr(latent_shards.os, "replace", stop_at(moment, os.replace))
        else:
            patch.setattr(prepare_latents, "encode_video", stop_at(2, encode_video))
        assert run(config, videos, tmp_path) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("interrupted; the files that were written are whole")
    kept = {name for name in contents(tmp_path) if name.endswith("safetensors")}
    assert kept < set(contents(prepared)) and not list(tmp_path.glob("*.part"))
    assert run(config, videos, tmp_path) == 0
    assert contents(tmp_path) == contents(prepared)


def test_a_killed_run_resumes(config, videos, prepared, tmp_path, monkeypatch):
    program = (
        f"import sys, scripts.lora.prepare as p, scripts.prepare_latents as c; p.MIB = {SHARD}; "
        "sys.exit(c.main(sys.argv[1:]))"
    )
    keys = [f"data.folder={videos}", f"data.latents={tmp_path}", "data.shard_mb=1", SIZES]
    process = subprocess.Popen([sys.executable, "-c", program, str(config), *keys], cwd=ROOT)
    while not list(tmp_path.glob("text-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / ".index.json.1.part").write_text("cut off")  # a kill while the index is written leaves this
    monkeypatch.setattr(prepare_latents, "MIB", SHARD)
    assert run(config, videos, tmp_path) == 0
    assert contents(tmp_path) == contents(prepared)


def test_further_videos_and_sizes_are_added(config, videos, tmp_path, capsys):
    more, out = tmp_path / "videos", tmp_path / "out"
    more.mkdir()
    for name in ("b.mp4", "b.txt"):
        os.link(videos / name, more / name)
    assert run(config, more, out) == 0
    before = contents(out)
    for name in ("d.mp4", "d.txt"):
        os.link(videos / name, more / name)
    capsys.readouterr()
    assert run(config, more, out, "data.sizes=9x48x32, 5x32x32") == 0
    assert "1 of 2 clips and 2 of 3 texts are there" in capsys.readouterr().out
    assert [sample.name for sample in LatentStore.open(out).samples] == ["b.mp4", "d.mp4"]
    assert run(config, more, out, "data.sizes=5x32x32") == 0
    assert "1 of 2 clips" in capsys.readouterr().out
    assert run(config, more, out) == 0  # clips of the first call are still there
    assert "1 of 1 clips" in capsys.readouterr().out
    after = contents(out)
    assert all(after[name] == content for name, content in before.items() if name != "index.json")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


DAMAGES = {  # what is done to the folder, and the parts of the note
    "no shard": (
        lambda f: (f / "latents-00000.safetensors").unlink(),
        ["latents-00000.safetensors (missing)"],
    ),
    "cut shard": (lambda f: cut(f / "latents-00001.safetensors"), ["latents-00001", "not fully covered"]),
    "cut text": (lambda f: cut(f / "text-00002.safetensors"), ["text-00002", "not fully covered"]),
    "NUL": (lambda f: (f / "text-00000.safetensors").write_bytes(bytes(99)), ["text-00000"]),
    "swapped": (
        lambda f: shutil.copy(f / "latents-00001.safetensors", f / "latents-00000.safetensors"),
        ["latents-00000.safetensors (it lacks clips)"],
    ),
    "cut index": (lambda f: cut(f / "index.json"), ["index.json"]),
    "no JSON": (lambda f: (f / "index.json").write_bytes(bytes(20)), ["index.json"]),
    "both": (
        lambda f: (cut(f / "index.json"), cut(f / "text-00000.safetensors")),
        ["index.json", "text-00000"],
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_is_made_again(case, config, videos, prepared, *, tmp_path, monkeypatch, capsys):
    """Training names the one command, which encodes what is missing and nothing else."""
    folder = Path(shutil.copytree(prepared, tmp_path / "latents"))
    damage, parts = DAMAGES[case]
    damage(folder)
    before = {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}
    with pytest.raises(UsageError, match=r"run the same scripts/prepare_latents.sh command again"):
        LatentStore.open(folder)
    monkeypatch.setattr(prepare_latents, "MIB", SHARD)
    assert run(config, videos, folder) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "made again" in line]
    count = 2 if case == "both" else 1
    assert note.startswith(f"note: {count} files are made again: ") and all(part in note for part in parts)
    expected, store = LatentStore.open(prepared), LatentStore.open(folder)
    for i in range(len(expected.samples)):
        (latents, text), (wanted, words) = store.load(i), expected.load(i)
        assert torch.equal(latents, wanted) and all(torch.equal(text[name], words[name]) for name in words)
    after = {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}
    kept = [name for name in before if after.get(name) == before[name]]
    assert len(kept) == len(before) - (case not in ("no shard", "cut index", "no JSON"))


def test_a_full_disk_is_one_line_and_keeps_the_files(config, videos, tmp_path, capsys):
    assert run(config, videos, tmp_path, "data.sizes=9x32x32") == 0
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        assert run(config, videos, tmp_path) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: data.latents: cannot write") and "latents-00001.safetensors" in line
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name != "index.json")
    assert run(config, videos, tmp_path) == 0
    assert len(LatentStore.open(tmp_path).samples) == 3


def test_one_process_at_a_time(config, videos, tmp_path, capsys):
    with locked(tmp_path):
        assert run(config, videos, tmp_path) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "data.latents: got" in line and "another process" in line and "another folder" in line


def test_latents_of_another_model_are_not_added_to(config, videos, prepared, tmp_path, capsys):
    before = contents(prepared)
    assert run(config, videos, prepared, "model.dtype=bfloat16") == 2
    assert "made with model.dtype=float32" in capsys.readouterr().err.splitlines()[-1]
    other = tmp_path / "index.json"
    content = json.loads(before["index.json"])
    content["fingerprint"]["vae"] = "another"
    other.write_text(json.dumps(content))
    assert run(config, videos, tmp_path) == 2
    assert "made with another vae than model.path" in capsys.readouterr().err.splitlines()[-1]
    assert contents(prepared) == before


def test_a_model_of_16_bits_makes_latents_of_16_bits(config, videos, tmp_path):
    assert run(config, videos, tmp_path, "model.dtype=bfloat16", "data.sizes=9x32x32") == 0
    latents, text = LatentStore.open(tmp_path).load(0)
    assert latents.dtype == torch.bfloat16 and text["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_model_that_lacks_a_tensor_makes_no_latents(part, videos, tmp_path, capsys):
    shutil.copytree(ROOT / MODEL, tmp_path / "model")
    (file,) = (tmp_path / "model" / part).glob("*.safetensors")
    state = load_file(file)
    name = [name for name, x in state.items() if x.ndim > 1][1]
    del state[name]
    save_file(state, file, {"format": "pt"})
    config = write_model(tmp_path / "config.yaml", tmp_path / "model")
    assert run(config, videos, tmp_path / "out", "data.sizes=9x32x32") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model.path" in line and f"model/{part} lacks 1 tensor" in line and name in line
    assert not list((tmp_path / "out").glob("latents-*"))


@pytest.mark.parametrize(
    ("family", "build", "frames", "names"),
    [("hunyuan_video", hunyuan_pipeline, 9, 3), ("mochi", mochi_pipeline, 7, 2)],
)
def test_families(family, build, frames, names, *, videos, tmp_path):
    model = str(tmp_path / "model")
    build().save_pretrained(model)
    config = write_model(tmp_path / "config.yaml", model, family)
    assert run(config, videos, tmp_path / "out", f"data.sizes={frames}x32x32") == 0
    store = LatentStore.open(tmp_path / "out")
    store.check(fingerprint(model, family))
    pipeline = load_pipeline(model, family, torch.float32, "cpu")
    check_sample(store, 0, pipeline, videos / "a.mp4", first=(20 - frames) // 2)
    assert store.samples[0].bucket == ((frames - 1) // pipeline.vae.temporal_compression_ratio + 1, 4, 4)
    assert len(store.load(0)[1]) == names
