"""The report page in headless Chromium: it plays, scrubs, answers the keyboard, fits phone and desktop."""

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from radial_attn import RadialConfig, TokenGrid, radial_mask
from scripts import report
from scripts.evaluation.report_html import figures
from tests import report_cases as cases

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
browser = pytest.importorskip("tests.browser")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
PHONE, DESKTOP = 375, 1280
TIMES = "return [...document.querySelectorAll('#stage video')].map((video) => video.currentTime)"
STILL = """return [...document.querySelectorAll('#stage video')].every(
    (video) => video.readyState >= 2 && !video.seeking)"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    places = cases.every_kind(root)
    assert report.main([*map(str, places), "--out", str(root / "report.html")]) == 0
    return root


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(started, runs: Path):
    browser.show(started, DESKTOP)
    started.get((runs / "report.html").as_uri())
    browser.wait(lambda: started.execute_script(STILL))
    return started


def arrive(page: "webdriver.Chrome", frame: int) -> None:
    """Waits until all videos show a frame."""
    browser.wait(lambda: {int(at * cases.FPS) for at in page.execute_script(TIMES)} == {frame})


def test_opens_from_the_file_without_a_complaint_or_a_request(page):
    complaints = [line for line in page.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]
    assert complaints == []
    events = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = [one["request"]["url"] for one in sent if one["documentURL"].startswith("file:")]
    assert any(url.startswith("file:") for url in asked)
    assert [url for url in asked if not url.startswith(("file:", "blob:"))] == []
    prompts = page.execute_script("return [...document.getElementById('clip').options].map((o) => o.text)")
    assert prompts == [f"{prompt}, seed {seed}" for seed, prompt in enumerate(cases.PROMPTS)]


def test_plays_all_videos_together(page):
    page.execute_script("document.getElementById('loop').click()")
    page.find_element("id", "rate").send_keys("0.25")
    page.find_element("id", "play").click()
    samples = []
    browser.wait(lambda: samples.append(page.execute_script(TIMES)) or samples[-1][0] > 0.6)
    assert browser.text(page, "play") == "Pause"
    assert len(samples[-1]) == 3 and samples[-1][0] > samples[0][0]
    moving = [sample for sample in samples if sample[0] > 0.3]
    assert max(max(sample) - min(sample) for sample in moving) <= 1 / cases.FPS
    page.find_element("id", "rate").send_keys("1")
    browser.wait(lambda: browser.text(page, "play") == "Play")
    assert browser.text(page, "time").startswith(f"{cases.FRAMES} / {cases.FRAMES}")


def test_loops(page):
    page.find_element("id", "play").click()
    seen = []
    browser.wait(lambda: seen.append(page.execute_script(TIMES)[0]) or any(b < a for a, b in pairwise(seen)))
    assert browser.text(page, "play") == "Pause"
    page.find_element("id", "play").click()
    assert browser.text(page, "play") == "Play"


def test_scrubs_to_a_frame_in_all_videos(page):
    for frame in (7, 2, 11):
        browser.set_value(page, "frame", frame)
        arrive(page, frame)
        assert browser.text(page, "time").startswith(f"{frame + 1} / {cases.FRAMES}")
    page.find_element("id", "back").click()
    arrive(page, 10)


def test_shows_the_pixels_of_that_frame(page):
    script = """const canvas = document.createElement('canvas'); canvas.width = canvas.height = 64;
        const context = canvas.getContext('2d');
        context.drawImage(document.querySelector('#stage video'), 0, 0, 64, 64);
        return [...context.getImageData(0, 0, 64, 64).data]"""
    wanted = cases.toy_video(0).astype(int)
    for frame in (9, 4):
        browser.set_value(page, "frame", frame)
        arrive(page, frame)
        browser.wait(lambda: page.execute_script(STILL))
        pixels = page.execute_script(script)
        red = [pixels[place] for place in range(0, len(pixels), 4)]
        errors = [abs(wanted[number, :, :, 0].ravel() - red).mean() for number in range(cases.FRAMES)]
        assert min(range(cases.FRAMES), key=errors.__getitem__) == frame


def test_choosers_of_prompt_and_setting(page):
    browser.set_value(page, "setting", 1)
    names = "return [...document.querySelectorAll('#stage figcaption')].map((caption) => caption.innerText)"
    found = [" ".join(name.split()) for name in page.execute_script(names)]
    assert found == ["dense reference", "sparse PSNR 23.1 dB · SSIM 0.804", "difference × 4"]
    browser.set_value(page, "clip", 1)
    labels = [
        video.get_attribute("aria-label") for video in page.find_elements("css selector", "#stage video")
    ]
    assert labels[0] == f"dense: {cases.PROMPTS[1]}" and len(labels) == 3
    browser.wait(lambda: page.execute_script(STILL))


def test_table_of_metrics_is_that_of_the_json(page, runs):
    content = json.loads((runs / "evaluation" / "evaluation.json").read_text())
    script = """return [...document.querySelectorAll('#fidelity table')[0].rows].map(
        (row) => [...row.cells].map((cell) => [cell.innerText, cell.querySelector('data')?.value]))"""
    head, *rows = page.execute_script(script)
    places = {name: number for number, (name, _) in enumerate(head)}
    found = {row[0][0].split()[0]: row for row in rows}
    columns = {"PSNR, dB": "psnr", "SSIM": "ssim", "LPIPS": "lpips", "Recall": "recall", "Output MSE": "mse"}
    for name, means in content["means"].items():
        for column, key in columns.items():
            shown, value = found[name][places[column]]
            assert value == (None if means[key] is None else repr(means[key]))
            assert shown == ("–" if means[key] is None else figures(means[key], 4 if key == "psnr" else 3))
    assert [float(row[places["Density"]][1]) for row in rows] == [1.0, 0.5725, 0.5725]


def test_mask_names_a_pair_of_frames(page):
    grid, config = TokenGrid(*cases.GRID), RadialConfig(**cases.MASK)
    kept = radial_mask(grid, config).token_mask()[6 * 64 : 7 * 64, 2 * 64 : 3 * 64].float().mean()
    share = f"{100 * kept:.1f}\u00a0% of the token pairs kept."
    wanted = f"Query frame 6, key frame 2: 4 frames apart, band 4 to 7; {share}"
    area = page.find_element("id", "mask-map")
    page.execute_script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", area)
    side = area.size["width"]
    offset = [int((frame + 0.5) / 9 * side - side / 2) for frame in (2, 6)]
    webdriver.ActionChains(page).move_to_element_with_offset(area, *offset).perform()
    assert browser.text(page, "mask-text") == wanted
    page.execute_script("document.getElementById('mask-map').focus()")
    keys = webdriver.Keys
    browser.press(page, keys.HOME, *[keys.ARROW_UP] * 9)
    assert "Query frame 0, key frame 0: the same frame, band 0 to 1; 100.0\u00a0%" in browser.text(
        page, "mask-text"
    )
    browser.press(page, *[keys.ARROW_DOWN] * 6, *[keys.ARROW_RIGHT] * 2)
    assert browser.text(page, "mask-text") == wanted


def test_mask_is_drawn_block_by_block(page):
    script = """const canvas = document.getElementById('mask-picture');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return [canvas.width, [...data].filter((_, i) => i % 4 < 3)]"""
    count, values = page.execute_script(script)
    kept = radial_mask(TokenGrid(*cases.GRID), RadialConfig(**cases.MASK)).blocks
    assert count == len(kept)
    pixels = [tuple(values[3 * place : 3 * place + 3]) for place in range(count * count)]
    dropped = {pixel for pixel, keep in zip(pixels, kept.flatten().tolist(), strict=True) if not keep}
    coloured = {pixel for pixel, keep in zip(pixels, kept.flatten().tolist(), strict=True) if keep}
    assert len(dropped) == 1 and len(coloured) == 5 and not dropped & coloured


def test_map_of_heads_follows_step_and_keys(page, runs):
    values = json.loads((runs / "evaluation" / "evaluation.json").read_text())["attention"]["radial"]
    cells = "return [...document.querySelectorAll('#heads-map [data-row]')].map((cell) => cell.textContent)"
    for place, step in enumerate(values["steps"]):
        browser.set_value(page, "heads-step", place)
        flat = [value for layer in values["recall"][place] for value in layer]
        assert page.execute_script(cells) == [f"{value:.2f}" for value in flat]
        assert f"step {step}: recall {flat[0]:.3f}." in browser.text(page, "heads-text")
    page.execute_script("document.getElementById('heads-map').focus()")
    browser.press(page, webdriver.Keys.ARROW_DOWN, webdriver.Keys.END)
    assert (
        browser.text(page, "heads-text")
        == f"Layer 1, head 3, step 10: recall {values['recall'][1][1][3]:.3f}."
    )
    browser.set_value(page, "heads-what", 1)
    assert "output mse 9" in browser.text(page, "heads-text")


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_fits_without_scrolling_sideways(page, width):
    browser.show(page, width)
    page.execute_script("document.querySelectorAll('details').forEach((found) => (found.open = true))")
    inner, needed = page.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inner == width and needed <= width
    cut = """return [...document.querySelectorAll('main *')].filter(
        (found) => !found.closest('.scroll, pre, svg') && found.getBoundingClientRect().right > innerWidth + 1
    ).map((found) => found.outerHTML.slice(0, 80))"""
    assert page.execute_script(cut) == []


def test_tab_reaches_every_control_with_a_mark_and_space_plays(page):
    reached, marked = [], []
    where = """const found = document.activeElement, name = found.id || found.getAttribute('href');
        return [name || found.tagName, getComputedStyle(found).outlineStyle]"""
    for _ in range(60):
        browser.press(page, webdriver.Keys.TAB)
        name, outline = page.execute_script(where)
        reached.append(name)
        marked.append(outline)
        if name == "heads-map":
            break
    controls = ["#main", "#videos", "clip", "setting", "play", "back", "forward", "frame", "loop", "rate"]
    controls += ["mask-choice", "mask-map", "heads-run", "heads-what", "heads-step", "heads-map"]
    assert [name for name in reached if name in controls] == controls
    assert set(marked) <= {"solid", "auto"}
    for name in ("frame", "play"):
        page.execute_script("document.getElementById(arguments[0]).focus()", name)
        browser.press(page, " ")
        assert browser.text(page, "play") == "Pause"
        browser.press(page, " ")
        assert browser.text(page, "play") == "Play"


def test_contrast_of_text_in_light_and_dark(page):
    script = """const behind = (found) => { for (; found; found = found.parentElement) {
            const colour = getComputedStyle(found).backgroundColor;
            if (!/, 0\\)$/.test(colour)) return colour; } return 'rgb(255, 255, 255)'; };
        return [...document.querySelectorAll('body *')].filter((found) => found.checkVisibility()
                && [...found.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
            .map((found) => [found.outerHTML.slice(0, 60), getComputedStyle(found)[
                found.namespaceURI.endsWith('svg') ? 'fill' : 'color'], behind(found)])"""
    grounds = set()
    for scheme in ("light", "dark"):
        browser.show(page, DESKTOP, scheme)
        found = page.execute_script(script)
        grounds.add(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert len(found) > 150
        assert [entry for entry in found if browser.contrast(*entry[1:]) < 4.5] == []
    assert len(grounds) == 2


def test_the_mask_is_drawn_anew_in_the_dark(page):
    script = """const canvas = document.getElementById('mask-picture');
        return [...canvas.getContext('2d').getImageData(0, 0, 1, 1).data]"""
    light = page.execute_script(script)
    browser.show(page, DESKTOP, "dark")
    browser.wait(lambda: page.execute_script(script) != light)


def test_plain_runs_alone_have_a_player_and_no_empty_part(started, tmp_path):
    pair = [cases.generation(tmp_path / name, name) for name in ("dense", "radial")]
    out = tmp_path / "pair.html"
    assert report.main([*map(str, pair), "--out", str(out)]) == 0
    browser.show(started, DESKTOP)
    started.get(out.as_uri())
    browser.wait(lambda: started.execute_script(STILL))
    names = "return [...document.querySelectorAll('#stage strong')].map((name) => name.textContent)"
    assert started.execute_script(names) == ["dense", "radial", "difference"]
    parts = "return [...document.querySelectorAll('section')].map((part) => part.id)"
    assert started.execute_script(parts) == ["videos", "mask", "made", "missing"]
