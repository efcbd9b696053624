"""The command on a tiny random model: files, record, determinism, prompt files."""

import gc
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import imageio
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from scripts.generate import main
from scripts.run.errors import UsageError
from scripts.run.files import claim
from tests.support.auto_backend import AUTO, AUTO_BFLOAT16
from tests.support.plans import TINY
from tests.support.script_cases import error_lines


def run(model: Path, output: Path, *overrides: str) -> int:
    short = ["generation.steps=3", "generation.num_frames=9", "generation.height=32", "generation.width=48"]
    return main([TINY, f"model.path={model}", f"output.path={output}", *short, *overrides])


def record_in(folder: Path) -> dict[str, Any]:
    """Reads the record of the folder's one video."""
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def test_a_video_and_its_record(tiny_model, tmp_path, capsys):
    overrides = ["attention.dense_steps=1", "attention.dense_layers=2", "generation.prompt=a b"]
    assert run(tiny_model, tmp_path, *overrides) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-b_seed1.json", "a-b_seed1.mp4"]
    assert np.stack(imageio.mimread(tmp_path / "a-b_seed1.mp4", memtest=False)).shape == (9, 32, 48, 3)
    record = json.loads((tmp_path / "a-b_seed1.json").read_text())
    assert (record["prompt"], record["seed"], record["tokens"]) == ("a b", 1, 3 * 4 * 6)
    assert record["config"]["generation"]["num_frames"] == 9
    assert record["config"]["model"]["path"] == str(tiny_model)
    assert set(record["seconds"]) == {"load", "encode_text", "denoise", "decode", "write"}
    assert all(value >= 0 for value in record["seconds"].values())
    assert len(record["step_seconds"]) == 3 and record["dense_steps"] == [0]
    # one dense step of 4 layers, two steps with 2 layers dense and 2 radial; two guidance halves
    assert record["attention"]["calls"] == {"dense": 2 * (4 + 2 * 2), AUTO: 2 * 2 * 2}
    reasons = {"dense_step": 8, "dense_layer": 8, "too_short": 0, "mask": 0, "cross_attention": 24}
    assert record["attention"]["stayed_dense"] == reasons and None not in record["speed"].values()
    assert 0 < record["density"] <= 1
    assert record["peak_memory"]["host_bytes"] > 2**27
    assert {"python", "torch", "diffusers", "transformers", "radial-attention"} <= set(record["versions"])
    assert {"device", "cpu", "cores", "threads", "memory_bytes"} <= set(record["hardware"])
    printed = capsys.readouterr()
    assert printed.out.startswith(f"config: {TINY} (named on the command line)\n")
    assert f"backend {AUTO} for" in printed.out and re.search("x (fast|slow)er, efficiency ", printed.out)
    assert f" calls: 8 {AUTO}, 16 dense (8 dense step, 8 dense layer), 24 cross-attention\n" in printed.out
    assert all(f"\n{word} " in printed.out for word in ("video", "seconds", "a step", "attention", "memory"))
    assert "denoising: 100%" in printed.err and "radial" in printed.err


def test_the_same_seed_gives_the_same_video_and_another_does_not(tiny_model, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(tiny_model, tmp_path / f"{name}.mp4", f"generation.seed={seed}") == 0
    first, second, other = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert first == second
    assert first != other


def test_only_radial_attention_changes_the_video(tiny_model, tmp_path):
    """Dense steps, dense layers and the dense pattern give the same video; radial gives another."""
    variants = {
        "pattern": ["attention.pattern=dense"],
        "steps": ["attention.dense_steps=3"],
        "layers": ["attention.dense_layers=4"],
        "last": ["attention.dense_last_steps=3"],
        "radial": ["attention.decay_factor=0.2", "attention.sink=false"],
    }
    size = ["generation.num_frames=33", "generation.height=64", "generation.width=64"]
    for name, overrides in variants.items():
        assert run(tiny_model, tmp_path / f"{name}.mp4", *size, *overrides) == 0
    videos = {name: (tmp_path / f"{name}.mp4").read_bytes() for name in variants}
    assert videos["pattern"] == videos["steps"] == videos["layers"] == videos["last"]
    assert videos["pattern"] != videos["radial"]


@pytest.mark.parametrize("overrides", [["model.dtype=bfloat16"], ["generation.guidance_scale=1"]])
def test_other_dtype_and_no_guidance(overrides, tiny_model, tmp_path):
    assert run(tiny_model, tmp_path, *overrides) == 0
    record = record_in(tmp_path)
    halves = 1 if "guidance" in overrides[0] else 2
    assert record["attention"]["calls"][AUTO if halves == 1 else AUTO_BFLOAT16] == 3 * 4 * halves


def test_a_dense_run_has_its_steps_and_a_cache_says_what_it_skipped(tiny_model, tmp_path, capsys):
    cache = ["model.cache=first_block", "attention.dense_steps=1", "model.cache_threshold="]
    assert run(tiny_model, tmp_path / "a.mp4", "attention.pattern=dense", *cache[:2], f"{cache[2]}1e-9") == 0
    printed = capsys.readouterr().out
    assert re.search(r"\na step +dense \d+\.\d{3} s \(median of 3\)\n", printed) and "fewer" not in printed
    assert "first_block: 0 of 24 attention calls skipped; a larger model.cache_threshold skips" in printed
    assert run(tiny_model, tmp_path / "b.mp4", *cache[:2], f"{cache[2]}1e9") == 0
    skipped = re.search(r"first_block: (\d+) of 24 attention calls skipped\n", capsys.readouterr().out)
    assert (
        int(skipped[1]) == 2 * 2 * 3
    )  # after the dense step, two of each half of guidance; not the first block


def test_a_wanted_density_is_solved_printed_and_recorded(tiny_model, tmp_path, capsys):
    size = ["generation.num_frames=33", "generation.height=64", "generation.width=64"]
    assert run(tiny_model, tmp_path, *size, "attention.density=0.5") == 0
    record = record_in(tmp_path)
    assert record["density"] == pytest.approx(0.5, rel=0.02)
    assert (record["config"]["attention"]["density"], record["mask"]["density"]) == (0.5, None)
    assert f"density 0.5: decay_factor {record['mask']['decay_factor']:g}" in capsys.readouterr().out
    solved = [f"attention.{name}={str(value).lower()}" for name, value in record["mask"].items() if value]
    assert run(tiny_model, tmp_path / "again", *size, *solved) == 0
    assert record_in(tmp_path / "again")["density"] == record["density"]


def test_a_prompt_file_resumes(tiny_model, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\n\n  a dog\na cat\n")
    overrides = [f"generation.prompt_file={prompts}"]
    assert run(tiny_model, out, *overrides) == 0
    names = ["0001_a-cat_seed1", "0003_a-dog_seed1", "0004_a-cat_seed1"]
    assert sorted(file.name for file in out.iterdir()) == [f"{n}.{s}" for n in names for s in ("json", "mp4")]
    assert json.loads((out / "0003_a-dog_seed1.json").read_text())["prompt"] == "a dog"
    times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    (out / "0003_a-dog_seed1.mp4").unlink()
    cut, whole = out / "0001_a-cat_seed1.mp4", (out / "0001_a-cat_seed1.mp4").read_bytes()
    cut.write_bytes(whole[:1000])
    capsys.readouterr()
    assert run(tiny_model, out, *overrides) == 0
    printed = capsys.readouterr().out
    assert f"{cut} is damaged: made again" in printed and "2 of 3 videos to make" in printed
    kept = [file for file in times if file.name.startswith("0004")]
    assert all(file.stat().st_mtime_ns == times[file] for file in kept)
    assert cut.read_bytes() == whole
    assert (out / "0003_a-dog_seed1.mp4").is_file()
    assert run(tiny_model, out, *overrides) == 0
    assert "0 of 3 videos to make" in capsys.readouterr().out
    assert run(tiny_model, out, *overrides, "generation.steps=2", "output.overwrite=true") == 0
    assert "made with other settings (generation.steps): made again" in capsys.readouterr().out


def test_a_failing_prompt_loses_none_of_the_others(tiny_model, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\nthree\n")
    (out / "0002_two_seed1.mp4").mkdir(parents=True)
    assert run(tiny_model, out, f"generation.prompt_file={prompts}") == 1
    (line,) = error_lines(capsys)
    assert "line 2" in line and "0002_two_seed1.mp4" in line
    videos = sorted(file.name for file in out.iterdir() if file.is_file())
    assert videos == [f"{name}_seed1.{s}" for name in ("0001_one", "0003_three") for s in ("json", "mp4")]


class ErrorCounter(io.StringIO):
    """Counts the UsageErrors alive at each error line that is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[int] = []

    def write(self, text: str) -> int:
        if text.startswith("error"):
            gc.collect()
            self.alive.append(sum(type(thing) is UsageError for thing in gc.get_objects()))
        return super().write(text)


def test_failures_keep_no_exception_and_so_no_tensors(tiny_model, tmp_path, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\n")
    for name in ("0001_one", "0002_two"):
        (out / f"{name}_seed1.mp4").mkdir(parents=True)
    gc.collect()
    before = sum(type(thing) is UsageError for thing in gc.get_objects())
    stream = ErrorCounter()
    monkeypatch.setattr(sys, "stderr", stream)
    assert run(tiny_model, out, f"generation.prompt_file={prompts}", "generation.steps=1") == 1
    assert stream.alive == [before, before]


def test_other_settings_overwrite_only_if_asked(tiny_model, tmp_path, capsys):
    """The same settings make the same file again."""
    words, video = ["generation.prompt=a", "generation.steps=1"], tmp_path / "a_seed1.mp4"
    assert run(tiny_model, tmp_path, *words) == 0
    before, record = video.read_bytes(), video.with_suffix(".json").read_text()
    assert run(tiny_model, tmp_path, *words, "parallel.cfg_degree=1") == 0
    assert f"{video} was made with these settings: made again" in capsys.readouterr().out
    assert video.read_bytes() == before
    record = video.with_suffix(".json").read_text()
    (tmp_path / "prompts.txt").write_text("a\n")
    for out in (tmp_path, video):
        differs = [*words, "model.positions=riflex", "attention.pattern=dense"]
        assert run(tiny_model, out, *differs) == 2
        (line,) = error_lines(capsys)
        had = "is there and was made with other settings (attention.pattern, model.positions)"
        remedy = "name another output.path, or set output.overwrite=true"
        assert line == f"error: output.path: {str(video)!r} {had}; {remedy}"
    assert video.read_bytes() == before and video.with_suffix(".json").read_text() == record
    assert run(tiny_model, tmp_path, *differs, "output.overwrite=true") == 0
    assert "other settings (attention.pattern, model.positions): made again" in capsys.readouterr().out
    assert json.loads(video.with_suffix(".json").read_text())["config"]["attention"]["pattern"] == "dense"


def test_other_weights_in_the_same_folder_are_another_model(tiny_model, tmp_path, capsys):
    """A copy is the same model; a record that is the configuration tells that its model has changed."""
    words, model = ["generation.prompt=a", "generation.steps=1"], tmp_path / "m"
    shutil.copytree(tiny_model, model)
    assert run(model, tmp_path / "v", *words) == 0
    shutil.move(model, tmp_path / "old")
    shutil.copytree(tmp_path / "old", model)
    assert run(model, tmp_path / "v", *words) == 0
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * x for name, x in load_file(file).items()}, file, {"format": "pt"})
    capsys.readouterr()
    assert run(model, tmp_path / "v", *words) == 2
    assert "was made with other settings (content of model.path)" in error_lines(capsys)[0]
    record = str(tmp_path / "v" / "a_seed1.json")
    assert main([record, "--dry-run"]) == 0
    assert f"note: content of model.path: not the files that {record} was made" in capsys.readouterr().out


def test_a_named_file_of_someone_else_is_replaced_only_if_asked(tiny_model, tmp_path, capsys):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"before")
    assert run(tiny_model, file) == 2
    assert "has no record of its settings" in error_lines(capsys)[0] and file.read_bytes() == b"before"
    assert run(tiny_model, file, "output.overwrite=true") == 0
    assert file.stat().st_size > 1000 and (tmp_path / "a.json").is_file()
    (tmp_path / "a_seed1.mp4").write_bytes(b"before")
    assert run(tiny_model, tmp_path, "generation.prompt=a", "generation.steps=1") == 0
    assert "a_seed1.mp4 has no record of its settings: made again" in capsys.readouterr().out


def test_several_seeds_of_several_prompts(tiny_model, tmp_path, capsys):
    """Each video is that of its seed alone; comments are no prompts."""
    (tmp_path / "prompts.txt").write_text("# of the first week\na\n  # b\n\\#c\n")
    words = [f"generation.prompt_file={tmp_path / 'prompts.txt'}", "generation.steps=1"]
    assert run(tiny_model, tmp_path / "out", *words, "generation.seeds=3,7") == 0
    printed = capsys.readouterr().out
    assert "4 of 4 videos to make" in printed and "video 1 of 4: line 2, seed 3: a\n" in printed
    assert re.search(r"\nvideo 4 of 4, about \d+ s left: line 4, seed 7: #c\n", printed)
    names = ["0002_a_seed3", "0002_a_seed7", "0004_c_seed3", "0004_c_seed7"]
    assert sorted(file.stem for file in tmp_path.glob("out/*.mp4")) == names
    record = json.loads((tmp_path / "out/0004_c_seed7.json").read_text())
    generation = record["config"]["generation"]
    assert (record["prompt"], record["seed"], generation["seed"], generation["seeds"]) == ("#c", 7, 7, [])
    assert run(tiny_model, tmp_path / "one.mp4", words[1], "generation.prompt=#c", "generation.seed=7") == 0
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "out/0004_c_seed7.mp4").read_bytes()
    assert main([str(tmp_path / "out/0004_c_seed7.json"), f"output.path={tmp_path / 'same.mp4'}"]) == 0
    assert (tmp_path / "same.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()
    assert run(tiny_model, tmp_path / "out", *words, "generation.seeds=7,3") == 0
    assert "0 of 4 videos to make" in capsys.readouterr().out
    assert run(tiny_model, tmp_path, words[1], "generation.prompt=a", "generation.seeds=1,2") == 0
    assert re.search(r"\nvideo 2 of 2, about \d+ s left: seed 2: a\n", capsys.readouterr().out)
    assert sorted(file.name for file in tmp_path.glob("*.mp4")) == [
        "a_seed1.mp4",
        "a_seed2.mp4",
        "one.mp4",
        "same.mp4",
    ]


def test_two_runs_share_a_prompt_file(tiny_model, tmp_path, capsys):
    """A video that another run claims is left to it; one that is not claimed any more is made."""
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    words = [f"generation.prompt_file={tmp_path / 'prompts.txt'}", "generation.steps=1"]
    out = tmp_path / "out"
    out.mkdir()
    (out / ".0003_c_seed1.mp4.lock").touch()  # of a run that was killed
    with claim(out / "0002_b_seed1.mp4") as mine:
        assert mine and run(tiny_model, out, *words) == 0
    printed = capsys.readouterr().out
    assert "0002_b_seed1.mp4 is being made by another run\n" in printed
    assert "videos that another run makes: 1; this one has no more to make" in printed
    names = [f"{name}_seed1.{end}" for name in ("0001_a", "0003_c") for end in ("json", "mp4")]
    assert sorted(file.name for file in out.iterdir()) == names
    assert run(tiny_model, out, *words) == 0
    assert sorted(file.name for file in out.glob("*.mp4"))[1] == "0002_b_seed1.mp4"
    assert not list(out.glob(".*"))
