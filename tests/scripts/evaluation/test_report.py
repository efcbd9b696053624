"""Tests the report page: its content, escapes, and the messages for bad input."""

import base64
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from scripts import report
from scripts.evaluation.frame_sheet import read_video
from scripts.evaluation.page.clips import find_clips
from scripts.evaluation.page.render import parts
from scripts.evaluation.page.run_files import find_runs
from scripts.run.outputs import encode
from tests.support import report_cases as cases


class Page(HTMLParser):
    """Reads a page as a browser does: tags, addresses, rows of tables, text, and the player's JSON."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids, self.addresses, self.rows, self.texts = [""], [], [], [], []
        self.feed(text)
        json_texts = [text for tag, text in self.texts if tag == "script" and text.startswith("{")]
        self.data = json.loads(json_texts[0]) if json_texts else None

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[name] for name in ("src", "href", "action") if name in given]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1], data))
        if self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip()

    def says(self, text: str) -> bool:
        return any(text in data for tag, data in self.texts if tag not in ("script", "style"))


def made(out: Path, *arguments: object) -> Page:
    """Runs a command that succeeds, and reads its page."""
    assert report.main([*map(str, arguments), "--out", str(out)]) == 0
    assert [file.name for file in out.parent.iterdir() if file.is_file()] == [out.name]
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    kinds = (cases.cost, cases.evaluation, cases.analysis, cases.ablation)
    return [make(root / make.__name__) for make in kinds]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return made(tmp_path_factory.mktemp("out") / "new" / "report.html", *runs)


def test_holds_tables_and_figures_of_every_kind_and_loads_nothing(page):
    rows = page.rows
    assert ["radial", "27.31", "0.8861", "0.9732", "3.87e-05", "0.573", "0.573", "3e+09", "0.145"] in rows
    assert ["VBench imaging quality", "0.6170"] in rows
    assert ["temporal", "0.4", "-4", "0.9871", "0.987", "4 of 4"] in rows
    assert ["Mochi 1", "331", "76.4", "76.51", "+0.11", "75.00"] in rows
    assert any(row[:4] == ["true", "0.573", "0.658", "21.48"] for row in rows)
    assert page.tags.count("img") == 4  # mask, curves, costs, ablation
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "link" not in page.tags and len(page.ids) == len(set(page.ids))
    assert page.says("bash scripts/some.sh <config>")


def test_every_video_is_a_row_with_settings_and_metrics(page, tmp_path):
    rows = [row for row in page.rows if row[0] in cases.PROMPTS]
    assert [row[1:4] for row in rows[::2]] == [[x, "dense", "attention.pattern=dense"] for x in "01"]
    assert rows[1][2:] == ["radial", "attention.pattern=radial", "0.573", "0.145", "27.31", "0.8861"]
    assert rows[3][-2:] == ["inf", "1.0000"]
    head, row = made(tmp_path / "out.html", cases.generation(tmp_path / "run")).rows
    assert head[4:] == ["density", "s a step", "s a video"]
    assert row[1:] == ["3", "radial", "12 frames of 64 x 64, 20 steps", "0.573", "0.300", "12.60"]


def test_text_of_json_stays_text(page):
    assert page.tags.count("script") == 2 and "b" not in page.tags
    prompt = cases.PROMPTS[1]
    assert page.says(prompt) and page.data["clips"][1]["label"] == f"{prompt}, seed 1"


def test_the_player_gets_the_videos_of_the_run_reference_first(page, runs):
    first = page.data["clips"][0]
    assert [video["name"] for video in first["videos"]] == ["dense", "radial"] and first["compared"]
    assert (first["frames"], first["fps"], first["width"]) == (cases.FRAMES, cases.FPS, cases.SIZE)
    assert first["videos"][1]["caption"] == "PSNR 27.31, SSIM 0.8861"
    for video in first["videos"]:
        head, _, body = video["source"].partition(",")
        assert head == "data:video/mp4;base64"
        assert base64.b64decode(body) == (runs[1] / f"0_{video['name']}.mp4").read_bytes()


def test_a_video_that_browsers_do_not_play_is_encoded_anew(tmp_path):
    import imageio

    run = cases.generation(tmp_path / "run")
    options = {"codec": "libx264", "pixelformat": "yuv444p", "macro_block_size": 1}
    imageio.mimwrite(run / "circle_seed3.mp4", cases.noise(0, 6, 33, 41), fps=8, **options)
    (entry,) = made(tmp_path / "out.html", run).data["clips"]
    (tmp_path / "again.mp4").write_bytes(base64.b64decode(entry["videos"][0]["source"].partition(",")[2]))
    again = read_video(tmp_path / "again.mp4")
    assert again.shape == (6, 34, 42, 3)
    assert np.abs(again[:, :33, :41].mean((1, 2)) - cases.noise(0, 6, 33, 41).mean((1, 2))).max() < 4


def test_plain_runs_stand_side_by_side_if_attention_alone_differs(tmp_path):
    def run(name: str, pattern: str, **changes: dict) -> Path:
        def change(record: dict) -> None:
            record["inputs"] = changes.pop("inputs", None)
            for group, values in changes.items():
                record["config"].setdefault(group, {}).update(values)

        return cases.edited(cases.generation(tmp_path / name, pattern), "circle_seed3", change)

    same = {"output": {"path": "a"}, "generation": {"prompt_file": "a.txt"}}
    same["parallel"] = {"ulysses_degree": 2}
    paths = [
        run("a", "radial", **same),
        run("dense", "dense"),
        run("b", "radial"),
        run("model", "radial", model={"path": "assets/mochi-tiny"}),
        run("image", "radial", inputs={"image": {"file": "a.png", "sha256": "1"}}),
        run("same image", "dense", inputs={"image": {"file": "b.png", "sha256": "1"}}),
    ]
    clips = find_clips(find_runs(paths))
    names = [[video.name for video in clip.videos] for clip in clips]
    pair = ["dense", "radial (a/circle_seed3)", "radial (b/circle_seed3)"]
    assert names == [pair, ["radial"], ["dense", "radial"]]
    assert [clip.compared for clip in clips] == [True, False, True]


def test_only_so_many_prompts_are_in_the_page_and_it_says_so(runs, tmp_path):
    page = made(tmp_path / "out.html", runs[1], "--videos", 1, "--amplify", 8)
    assert len(page.data["clips"]) == 1 and page.data["amplify"] == 8
    assert page.says("1 of 2 prompts")


def test_a_page_without_videos_has_no_player_and_names_what_is_missing(tmp_path):
    run = cases.edited(cases.cost(tmp_path / "run"), "cost", lambda c: c.update(command="half \ud800 pair"))
    page = made(tmp_path / "out.html", run)
    assert "script" not in page.tags and not page.ids
    assert page.says("ablation (bash scripts/ablate.sh)")


def test_parts_of_markdown():
    lines = ["# A", "", "    b", "", "c", "d", "| x | y |", "|---|---|", "| 1 |  |", "- e", "![f](g)"]
    assert parts(lines) == [
        ("title", ["A"]), ("code", ["b"]), ("text", ["c", "d"]), ("table", [["x", "y"], ["1", ""]]),
        ("item", ["e"]), ("picture", ["f](g)"]),
    ]  # fmt: skip


def failure(capsys: pytest.CaptureFixture, out: Path, *arguments: object) -> str:
    """Returns the line of a command that exits with 2 and leaves nothing next to `out`."""
    try:
        code = report.main([*map(str, arguments), "--out", str(out)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and not out.is_file() and not list(out.parent.glob(".*part"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error") for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(kind="other"), ["'other'", "allowed: evaluation"]),
        (lambda c: c.update(rows=5), [".rows: got 5, must be a list"]),
        (lambda c: c["rows"][0].pop("frames"), [".rows[0]", "'frames'"]),
        (lambda c: c["rows"][1].update(density="0.5"), [".rows[1].density: got '0.5', must be a number"]),
        (lambda c: c["rows"][1].update(frames=True), [".rows[1].frames: got True, must be a whole number"]),
        (lambda c: c["rows"][1].pop("of_bound"), ["'of_bound'", "bash scripts/cost.sh"]),
        (lambda c: c.update(made=3), [".made: got 3, must be a text"]),
    ],
)
def test_a_file_of_another_form_gives_one_line(tmp_path, capsys, change: Callable, expected: list[str]):
    run = cases.edited(cases.cost(tmp_path / "cost"), "cost", change)
    line = failure(capsys, tmp_path / "out.html", run)
    assert all(text in line for text in [*expected, "cost.json"])


def test_places_that_are_no_runs_give_one_line(tmp_path, capsys):
    out = tmp_path / "out.html"
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in failure(capsys, out, tmp_path / "empty")
    assert str(tmp_path / "none") in failure(capsys, out, tmp_path / "none")
    for text, expected in (
        ('{"kind": "cost", ', "is no JSON"),
        ('{"prompt": 3}', ".prompt: got 3"),
        ("[]", "is no run"),
    ):
        (tmp_path / "bad.json").write_text(text)
        line = failure(capsys, out, tmp_path / "bad.json")
        assert expected in line and "bad.json" in line


def test_bad_videos_give_one_line(tmp_path, capsys):
    out, run = tmp_path / "out.html", cases.generation(tmp_path / "run")
    video = run / "circle_seed3.mp4"
    encode(video, np.random.default_rng(0).integers(0, 256, (24, 256, 256, 3), np.uint8), 8)
    line = failure(capsys, out, run, "--limit", 1)
    assert "--videos: got 1" in line and "--limit above 1" in line
    video.write_text("no video")
    assert str(video) in failure(capsys, out, run)
    video.unlink()
    assert str(video) in failure(capsys, out, run / "circle_seed3.json")
    pair = [cases.generation(tmp_path / name, name) for name in ("dense", "radial")]
    encode(pair[1] / "circle_seed3.mp4", cases.noise(1, 9), 8)
    line = failure(capsys, out, *pair)
    assert "9 frames of 64 x 64" in line and "12 frames" in line


def test_bad_masks_and_arguments_give_one_line(tmp_path, capsys):
    out, run = tmp_path / "out.html", cases.evaluation(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert "--out" in failure(capsys, tmp_path / "file" / "out.html", run)
    assert "--out" in failure(capsys, tmp_path / "out.txt", run)
    assert "--videos" in failure(capsys, out, run, "--videos", 0)
    cases.edited(run, "evaluation", lambda content: content["settings"][1]["mask"].update(block_size=17))
    line = failure(capsys, out, run)
    assert "block_size must be one of" in line and "evaluation.json" in line


def test_an_interrupted_command_leaves_the_page_that_was_there(tmp_path, capsys, monkeypatch):
    run, out = cases.cost(tmp_path / "cost"), tmp_path / "out.html"
    out.write_text("before")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "render", interrupt)
    assert report.main([str(run), "--out", str(out)]) == 130
    assert out.read_text() == "before" and capsys.readouterr().err == "interrupted; no page was written\n"
