"""Tests folders of finished videos, and the adapters to VBench and VisionReward."""

import json
from pathlib import Path

import imageio
import numpy as np
import pytest

from scripts.evaluate import main
from scripts.evaluation import folders
from scripts.evaluation.frame_sheet import read_video
from scripts.evaluation.metrics import compare
from scripts.evaluation.vbench import listed_prompts, place, read_scores, video_name
from scripts.run.errors import UsageError
from scripts.run.outputs import encode

SIZE = (3, 32, 48, 3)
INFO = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a dog ", "dimension": ["subject_consistency", "dynamic_degree"]},
    {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a dog", "dimension": ["color"]},
]


def video(file: Path, seed: int, shape: tuple[int, ...] = SIZE) -> Path:
    """Writes a smooth random video, which survives the encoder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = np.linspace(0, 1, shape[2])[None, None, :, None]
    colours = np.random.default_rng(seed).uniform(60, 255, (shape[0], 1, 1, 3))
    frames = np.broadcast_to(line * colours, shape)
    encode(file, frames.astype(np.uint8), 8)
    return file


def scored(folder: Path, *words: str) -> int:
    places = [f"{name}={folder / name}" for name in ("dense", "radial")]
    options = ["--work", str(folder / "work"), "--out", str(folder / "t.md")]
    return main(["--folders", *places, *words, *options])


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a cat-0", "b")):
        video(tmp_path / "dense" / f"{name}.mp4", seed)
        video(tmp_path / "radial" / f"{name}.mp4", seed + 5 * (name == "b"))
    return tmp_path


def test_folders_are_scored_by_name(pair: Path):
    (pair / "radial" / "notes.txt").write_text("no video")
    assert scored(pair) == 0
    data = json.loads((pair / "work" / "evaluation.json").read_text())
    assert (data["kind"], data["reference"], data["config"]) == ("evaluation", "dense", None)
    assert [entry["prompt"] for entry in data["videos"]] == ["a cat-0", "b"]
    assert data["settings"][1]["density"] is None
    equal, other = (entry["metrics"]["radial"] for entry in data["videos"])
    assert equal["psnr"] is None and equal["ssim"] == pytest.approx(1)
    expected = compare(read_video(pair / "radial" / "b.mp4"), read_video(pair / "dense" / "b.mp4"))
    assert other == pytest.approx(expected)
    assert data["means"]["radial"]["psnr"] == pytest.approx(expected["psnr"])
    table = (pair / "t.md").read_text()
    assert f"| radial | {expected['psnr']:.2f} |" in table and "PSNR of 1 equal video" in table


def test_hidden_and_half_written_files_are_left_out_with_a_note(pair: Path, capsys):
    names = (".7.b.mp4", "._b.mp4", ".b.mp4.0123abcd-7.part.mp4")
    for name in names:
        (pair / "radial" / name).write_bytes(b"x")
    assert scored(pair) == 0
    note = f"note: radial: {min(names)} and 2 more left out, a hidden or half-written file"
    assert note in capsys.readouterr().out


def test_a_gif_is_compared(pair: Path):
    for name in ("dense", "radial"):
        frames = [np.full((32, 48, 3), 60 * i, dtype=np.uint8) for i in range(4)]
        imageio.mimwrite(pair / name / "c.gif", frames, duration=100)
    assert scored(pair) == 0
    videos = json.loads((pair / "work" / "evaluation.json").read_text())["videos"]
    assert [entry["metrics"]["radial"]["psnr"] for entry in videos if entry["prompt"] == "c"] == [None]


def test_readings_of_unchanged_files_are_kept(pair: Path, monkeypatch):
    read, taken = folders._metrics, []
    monkeypatch.setattr(folders, "_metrics", lambda *files: taken.append(files[1].name) or read(*files))
    assert scored(pair) == 0 and scored(pair) == 0
    assert taken == ["a cat-0.mp4", "b.mp4"]
    video(pair / "radial" / "b.mp4", 9)
    assert scored(pair) == 0 and taken[2:] == ["b.mp4"]


@pytest.mark.parametrize("damaged", [b"", b'{"a', b"[]", bytes(30)])
def test_damaged_readings_are_made_again(damaged: bytes, pair: Path, capsys):
    assert scored(pair) == 0
    file, wanted = (
        pair / "work" / "readings.json",
        json.loads((pair / "work" / "evaluation.json").read_text()),
    )
    whole = file.read_bytes()
    file.write_bytes(damaged)
    assert scored(pair) == 0 and file.read_bytes() == whole
    assert f"note: {file} is damaged; what it held is made again" in capsys.readouterr().out
    assert json.loads((pair / "work" / "evaluation.json").read_text())["videos"] == wanted["videos"]


def refused(pair: Path, capsys: pytest.CaptureFixture, *words: str) -> str:
    """Returns the line that the command ends with, below its progress bar."""
    assert scored(pair, *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not (pair / "work" / "evaluation.json").exists() and not (pair / "t.md").exists()
    return lines[0]


def test_other_names_are_one_line(pair: Path, capsys):
    video(pair / "radial" / "c.mp4", 1)
    video(pair / "radial" / "d.mp4", 1)
    assert refused(pair, capsys) == "error: --folders: radial has 'c' and 1 others, which dense has not"
    for name in ("b", "c", "d"):
        (pair / "radial" / f"{name}.mp4").unlink()
    assert refused(pair, capsys) == "error: --folders: dense has 'b', which radial has not"


@pytest.mark.parametrize("shape", [(2, 32, 48, 3), (3, 32, 40, 3), (3, 34, 48, 3)])
def test_other_sizes_and_lengths_are_one_line(pair: Path, capsys, shape):
    video(pair / "radial" / "b.mp4", 1, shape)
    line = refused(pair, capsys)
    assert f"b.mp4 has frames, height, width {list(shape[:3])}" in line and "has [3, 32, 48]" in line


def test_a_broken_video_and_bad_words_are_one_line(pair: Path, capsys):
    (pair / "radial" / "b.mp4").write_bytes(b"nothing")
    assert "cannot read frames of" in refused(pair, capsys)
    assert "got 'c', must be NAME=DIR" in refused(pair, capsys, "c")
    assert "c is 'absent', which is no folder" in refused(pair, capsys, "c=absent")
    (pair / "empty").mkdir()
    assert "which has no videos (.mp4, " in refused(pair, capsys, f"c={pair / 'empty'}")
    assert main(["--folders", f"dense={pair / 'dense'}", "--work", str(pair / "work")]) == 2
    assert "--folders: got one; name two or more" in capsys.readouterr().err


def test_scores_of_other_judges_come_back(pair: Path, capsys):
    ours, theirs = pair / "ours_eval_results.json", pair / "reward.csv"
    results = [{"video_path": "b.mp4", "video_results": 0.5}]
    ours.write_text(json.dumps({"subject_consistency": [0.93, results], "dynamic_degree": [0.25, results]}))
    theirs.write_text("video,score\na cat-0.mp4,0.1\nb.mp4,0.3\n")
    assert scored(pair, f"evaluate.scores=radial: {ours} {theirs}; dense: {theirs}") == 0
    data = json.loads((pair / "work" / "evaluation.json").read_text())
    assert data["scores"]["radial"]["vbench"] == {"subject_consistency": 0.93, "dynamic_degree": 0.25}
    assert data["scores"]["dense"] == {"visionreward": {"mean": pytest.approx(0.2)}}
    table = (pair / "t.md").read_text()
    assert "| vbench dynamic_degree | 0.2500 |  |" in table
    assert "| visionreward mean | 0.2000 | 0.2000 |" in table


@pytest.mark.parametrize(
    "text",
    [
        *("{}", '{"a": "b"}', "a,1,2", "[1]", '{"a": [1], "b": 2}', "{", "a,nan", "a,1\na,2", 'a"b,1'),
        '{"a": 1, "a": 2}',
    ],
)
def test_other_score_files_are_refused(tmp_path: Path, text: str):
    (tmp_path / "s").write_text(text)
    with pytest.raises(UsageError, match=r"^evaluate.scores: got .*/s'"):
        read_scores(str(tmp_path / "s"))


def test_visionreward_scores_may_be_json(tmp_path: Path):
    (tmp_path / "s.json").write_text('{"a.mp4": 0.5, "b.mp4": -0.25}')
    assert read_scores(str(tmp_path / "s.json")) == {"visionreward": {"mean": 0.125}}


def test_prompts_come_from_text_and_from_vbenchs_json(tmp_path: Path):
    text, info = tmp_path / "p.txt", tmp_path / "full_info.json"
    text.write_text("a dog\n\n a cat,\u2028slowly \r\na dog\n", encoding="utf-8-sig")
    info.write_text(json.dumps(INFO))
    assert listed_prompts(str(text), None) == ["a dog", "a cat,\u2028slowly"]
    assert listed_prompts(str(info), None) == ["In a still frame, a stop sign", "a dog", "a red car"]
    assert listed_prompts(str(info), "color") == ["a red car", "a dog"]
    assert listed_prompts(str(info), "color, temporal_flickering")[0] == "In a still frame, a stop sign"


@pytest.mark.parametrize(
    ("text", "dimensions", "line"),
    [
        ("", None, "has no prompts"),
        ("[{}]", None, "entries without prompt_en"),
        ("[1", None, "which cannot be read"),
        ('["a \\ud800"]', None, "half of a surrogate pair"),
        ("caf\udce9", None, r"line 1 is not UTF-8 \(byte 0xe9\)"),
        ("a\n", "color", "evaluate.dimensions: .* has no dimensions; set evaluate.dimensions=null"),
        (json.dumps(INFO), "colour", "got 'colour', allowed: color, dynamic_degree, subject"),
    ],
)
def test_other_prompt_files_are_refused(tmp_path: Path, text, dimensions, line):
    (tmp_path / "p").write_text(text, errors="surrogateescape")
    with pytest.raises(UsageError, match=line):
        listed_prompts(str(tmp_path / "p"), dimensions)


def test_videos_get_the_names_that_vbench_expects(tmp_path: Path):
    assert video_name("a dog, 5 o'clock.", 4) == "a dog, 5 o'clock.-4.mp4"
    for prompt in ("a/b", "x" * 250):
        with pytest.raises(UsageError, match=r"^evaluate\.vbench: .* set evaluate\.vbench=off"):
            video_name(prompt, 0)
    (tmp_path / "v.mp4").write_bytes(b"1")
    place(tmp_path / "v.mp4", tmp_path / "vbench", "a-0.mp4")
    place(tmp_path / "v.mp4", tmp_path / "vbench", "a-0.mp4")
    assert [file.name for file in (tmp_path / "vbench").iterdir()] == ["a-0.mp4"]


def test_an_evaluation_reads_vbenchs_list_and_writes_its_names(tmp_path: Path):
    info = tmp_path / "info.json"
    info.write_text(json.dumps(INFO))
    words = ["generation.num_frames=5", "generation.steps=2", f"evaluate.prompts={info}", "evaluate.rows=0"]
    words += ["evaluate.dimensions=temporal_flickering", "evaluate.seeds=3,4", "evaluate.vbench=names"]
    options = ["--work", str(tmp_path / "w"), "--out", str(tmp_path / "t.md")]
    assert main(["configs/wan_tiny.yaml", *words, *options]) == 0
    names = [f"In a still frame, a stop sign-{index}.mp4" for index in (0, 1)]
    for setting in ("dense", "radial"):
        assert sorted(file.name for file in (tmp_path / "w" / "vbench" / setting).iterdir()) == names
    data = json.loads((tmp_path / "w" / "evaluation.json").read_text())
    assert data["attention"] == {} and data["means"]["radial"]["recall"] is None
    assert [entry["seed"] for entry in data["videos"]] == [3, 4]
    fewer = [*words[:-2], "evaluate.seeds=3", words[-1]]
    assert main(["configs/wan_tiny.yaml", *fewer, *options]) == 0
    assert [file.name for file in (tmp_path / "w" / "vbench" / "dense").iterdir()] == names[:1]
