"""The report page as a file: what it holds, what it escapes, and what is said of bad input."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask
from scripts import report
from scripts.evaluation.report_forms import NUMBER, checked
from scripts.evaluation.report_html import figures, node, tostring
from scripts.evaluation.report_mask import packed_mask, pair_shares, runs
from scripts.evaluation.report_plots import scale, tick_text
from scripts.evaluation.report_runs import clips, find_runs
from scripts.evaluation.report_videos import Difference, open_video, read_frames
from scripts.run.outputs import encode
from tests import report_cases as cases


class Page(HTMLParser):
    """Elements of a page: ids, texts of table cells by caption, and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.addresses, self.texts, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[name] for name in ("src", "href", "action") if name in given]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def runs_of_all(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return cases.every_kind(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page_text(runs_of_all: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out") / "new" / "report.html"
    assert report.main([*map(str, runs_of_all), "--out", str(out)]) == 0
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


def test_holds_every_part_and_loads_nothing(page_text):
    page = Page(page_text)
    parts = {"videos", "fidelity", "mask", "heads", "decay", "cost", "ablation", "made"}
    assert parts <= set(page.ids) and "missing" not in page.ids
    assert len(page.ids) == len(set(page.ids))
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page_text)


def test_scores_fits_and_rates_are_shown(page_text):
    texts = Page(page_text).texts
    assert {"Scores of VBench", "imaging quality", "0.617", "Seconds: measured on the CPU."} <= set(texts)
    assert any("n log n fits with R² = 0.9877" in words for words in texts)


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path):
    run = cases.edited(cases.cost(tmp_path / "cost"), "cost", lambda c: c.update(command="a \ud800 b"))
    assert report.main([str(run), "--out", str(tmp_path / "out.html")]) == 0
    assert "a ? b" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_text_of_json_stays_text(page_text):
    page, prompt = Page(page_text), cases.PROMPTS[1]
    assert page.tags.count("script") == 2 and "b" not in page.tags
    assert prompt in page.texts
    assert data_of(page_text)["clips"][1]["prompt"] == prompt
    assert "{{" not in re.sub(re.escape("{{style}}"), "", page_text)


def test_videos_are_those_of_the_run_and_the_difference_is_computed(page_text, runs_of_all, tmp_path):
    clip = data_of(page_text)["clips"][0]
    assert list(clip["videos"]) == ["dense", "radial", "sparse"] and clip["frames"] == cases.FRAMES
    head, _, body = clip["videos"]["radial"].partition(",")
    assert head == "data:video/mp4;base64"
    assert base64.b64decode(body) == (runs_of_all[0] / "0_radial.mp4").read_bytes()
    shown = tmp_path / "difference.mp4"
    shown.write_bytes(base64.b64decode(clip["differences"]["sparse"].partition(",")[2]))
    one, other = (open_video(runs_of_all[0] / f"0_{name}.mp4") for name in ("dense", "sparse"))
    wanted = [
        np.minimum(4 * np.abs(a.astype(int) - b), 255)
        for a, b in zip(read_frames(one), read_frames(other), strict=True)
    ]
    found = list(read_frames(open_video(shown)))
    assert len(found) == cases.FRAMES
    assert np.abs(np.mean(found) - np.mean(wanted)) < 3  # chroma is halved and H.264 rounds


def test_a_video_that_browsers_do_not_play_is_encoded_anew(tmp_path):
    import imageio

    frames = [np.full((33, 41, 3), 20 * number, np.uint8) for number in range(6)]
    options = {"codec": "libx264", "pixelformat": "yuv444p", "macro_block_size": 1}
    run = cases.generation(tmp_path / "run")
    imageio.mimwrite(run / "circle_seed3.mp4", frames, fps=8, **options)
    assert not open_video(run / "circle_seed3.mp4").plays
    text = report.build([run], 1, 4, 100)
    (tmp_path / "again.mp4").write_bytes(
        base64.b64decode(data_of(text)["clips"][0]["videos"]["radial"].partition(",")[2])
    )
    again = open_video(tmp_path / "again.mp4")
    assert again.plays and (again.frames, again.height, again.width) == (6, 34, 42)


def test_difference_of_known_frames(tmp_path):
    for name, value in (("a", 100), ("b", 130)):
        encode(tmp_path / f"{name}.mp4", np.full((4, 32, 32, 3), value, np.uint8), 8)
    pair = [open_video(tmp_path / f"{name}.mp4") for name in "ab"]
    frames = np.stack(list(Difference(*pair, 5)))
    assert frames.shape == (4, 32, 32, 3) and np.abs(frames.astype(int) - 150).max() <= 10


def test_plain_runs_of_one_prompt_stand_side_by_side(tmp_path):
    places = [
        cases.generation(tmp_path / name, pattern) for name, pattern in (("r", "radial"), ("d", "dense"))
    ]
    (clip,) = clips(find_runs(places))
    assert list(clip.files) == ["dense", "radial"] and clip.reference == "dense"
    cases.generation(tmp_path / "longer", "radial", frames=16)
    assert len(clips(find_runs([*places, tmp_path / "longer"]))) == 2


def test_plain_runs_that_differ_in_more_than_attention_stand_alone(tmp_path):
    def run(name: str, **changes: dict) -> Path:
        folder = cases.generation(tmp_path / name, changes.pop("pattern", "dense"))
        file = folder / "circle_seed3.json"
        record = json.loads(file.read_text())
        record["inputs"] = changes.pop("inputs", None)
        for group, values in changes.items():
            record["config"].setdefault(group, {}).update(values)
        file.write_text(json.dumps(record))
        return folder

    same = {"output": {"path": "a", "fps": 16}, "generation": {"prompt_file": "a.txt"}}
    places = [
        run("dense"),
        run("radial", pattern="radial", parallel={"ulysses_degree": 2}, **same),
        run("other", pattern="radial", model={"path": "assets/mochi-tiny"}, generation={"steps": 4}),
        run("image", pattern="radial", inputs={"image": {"file": "a.png", "sha256": "1"}}),
        run("same image", inputs={"image": {"file": "b.png", "sha256": "1"}}),
    ]
    found = clips(find_runs(places))
    assert [list(clip.files) for clip in found] == [["dense", "radial"], ["radial"], ["dense", "radial"]]


def test_plain_runs_of_one_name_are_numbered(tmp_path):
    places = [cases.generation(tmp_path / parent / "x") for parent in "ab"]
    (clip,) = clips(find_runs(places))
    assert list(clip.files) == [f"radial (x/circle_seed3) {number}" for number in (1, 2)]
    assert len(set(clip.files.values())) == 2


def test_equal_videos_are_counted_beside_the_mean(runs_of_all, tmp_path):
    def equal(content: dict) -> None:
        content["videos"][0]["metrics"]["radial"] |= {"psnr": None, "ssim": 1.0}

    assert "infinite and not in the mean" not in report.build(runs_of_all[:1], 1, 4, 100)
    shutil.copytree(runs_of_all[0], tmp_path / "run")
    text = report.build([cases.edited(tmp_path / "run", "evaluation", equal)], 1, 4, 100)
    assert "PSNR of 1 equal video is infinite and not in the mean." in Page(text).texts


def test_missing_parts_are_sentences(tmp_path):
    text = report.build([cases.cost(tmp_path / "cost")], 1, 4, 100)
    page = Page(text)
    assert {"cost", "made", "missing"} <= set(page.ids)
    assert not {"videos", "player", "mask", "heads", "decay", "fidelity"} & set(page.ids)
    assert "No ablations among these runs; bash scripts/ablate.sh makes them." in page.texts


def test_only_so_many_prompts_are_shown_and_it_says_so(runs_of_all):
    text = report.build(runs_of_all[:1], 1, 4, 100)
    assert len(data_of(text)["clips"]) == 1
    assert "1 of 2 prompts and seeds are in this page." in Page(text).texts


def test_mask_is_the_one_of_the_options():
    grid, config = TokenGrid(5, 4, 10, 7), RadialConfig(decay_factor=0.5, block_size=16)
    packed, mask = packed_mask(grid, config), radial_mask(grid, config)
    values = np.repeat(packed["runs"][::2], packed["runs"][1::2]).reshape(packed["count"], -1)
    assert np.array_equal(values > 0, mask.blocks.numpy())
    assert packed["density"] == mask.density
    assert sum(entry["share"] for entry in packed["legend"]) == pytest.approx(1, abs=1e-3)
    assert [entry["kind"] for entry in packed["legend"]][-2:] == ["sink", "text"]


def test_shares_of_frame_pairs_are_those_of_the_tokens():
    grid = TokenGrid(3, 5, 7, 6)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand((grid.num_blocks(16),) * 2, generator=generator) < 0.5
    mask = BlockMask(grid, 16, blocks)
    tokens, edges = mask.token_mask().double(), [0, 35, 70, 105, 111]
    spans = [slice(low, high) for low, high in pairwise(edges)]
    wanted = [[tokens[query, key].mean().item() for key in spans] for query in spans]
    np.testing.assert_allclose(pair_shares(mask), wanted, atol=1e-12)


def test_runs_of_equal_values():
    assert runs(np.array([0, 0, 2, 1, 1, 1], np.uint8)) == [0, 2, 2, 1, 1, 3]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.57253, "0.573"),
        (27.31, "27.3"),
        (-4.2, "−4.20"),
        (1840.2, "1,840"),
        (3.871e-5, "3.87\u00a0×\u00a010⁻⁵"),
        (1.5e12, "1.50\u00a0×\u00a010¹²"),
    ],
)
def test_numbers_in_words(value, text):
    assert figures(value) == text


def test_ticks():
    to_x, ticks = scale([0.0, 8.0], False, 0, 100)
    assert ticks == [0, 2, 4, 6, 8] and [to_x(tick) for tick in ticks] == [0, 25, 50, 75, 100]
    to_x, ticks = scale([2e-4, 0.05], True, 0, 300)
    assert [tick_text(tick, powers=True) for tick in ticks] == ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]
    assert to_x(1e-3) == 100
    assert scale([20.0, 60.0], True, 0, 1)[1] == [20, 50]


def test_markup_is_escaped():
    made = node("p", "a < b & c", node("b", "d"), "e", title='"x" > y')
    html = tostring(made, encoding="unicode", method="html")
    assert html == '<p title="&quot;x&quot; &gt; y">a &lt; b &amp; c<b>d</b>e</p>'


def test_numbers_that_are_not_finite_are_none():
    form = {"a": [NUMBER], "b?": str}
    assert checked({"a": [1, float("nan"), None], "c": 2}, form, "x") == {"a": [1, None, None], "b": None}
