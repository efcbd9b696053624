"""The page in a browser; skipped without Gradio (`pip install gradio`), playwright or Chromium."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts.run.config import ROOT
from scripts.web.choices import BUNDLED, LARGE

gr = pytest.importorskip("gradio")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 400_000  # milliseconds that a pair of videos may take
VIDEOS = "[...document.querySelectorAll('video')].map(video => [video.currentTime, video.paused])"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def test_what_suits_a_model():
    from scripts.web.page import suit, suit_model

    models = BUNDLED | LARGE
    frames, way, density, layer, head = suit(models, "Mochi (bundled)", 31, "profile")
    assert (frames["value"], way["value"], density) == (31, "profile", 0.75)
    assert (layer["maximum"], head["maximum"]) == (4, 3)
    *_, words, prompt = suit_model(models, "Wan (bundled)", "A cat walks on the grass")
    assert words["visible"] and prompt == "a red circle moving around on a navy background"
    mine = "a blue square moving vertically on a gray background"
    assert suit_model(models, "Mochi (bundled)", mine)[-1] == mine
    with pytest.raises(gr.Error, match="does not fit here: no CUDA device"):
        suit_model(models, "Wan2.1 14B", mine)


@contextmanager
def served(work: Path, ending: signal.Signals) -> Iterator[str]:
    """Yields the address of the page, started on a free port; at the end a signal ends it with one line."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.demo", "--port", str(port), "--work", str(work)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        line = process.stdout.readline()
        assert line == f"open http://127.0.0.1:{port}/ in a browser; Ctrl-C ends it\n"
        second = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert (second.returncode, second.stderr) == (
            2,
            f"error: --port: got {port}, which is in use; name another port\n",
        )
        yield line.split()[1]
        process.send_signal(ending)
        rest = process.stdout.read()
    assert process.returncode == 130 and rest.endswith(
        "interrupted; the videos that were written are whole\n"
    )
    assert "Traceback" not in rest


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Returns the address of a page that Ctrl-C ends."""
    with served(tmp_path_factory.mktemp("work"), signal.SIGINT) as page:
        yield page


@pytest.mark.long
def test_sigterm_ends_it_as_ctrl_c_does(tmp_path):
    with served(tmp_path, signal.SIGTERM) as page:
        assert page.startswith("http://127.0.0.1:")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with (
        playwright.sync_playwright() as play,
        closing(play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])) as chromium,
    ):
        yield chromium


@pytest.fixture
def opened(browser, address) -> Iterator[Any]:
    """Returns a function that opens the page as a user of its own; at the end no script has failed."""
    failures, asked, contexts = [], [], []

    def open_page(**options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#make")
        page.get_by_label("Model").click()
        page.get_by_role("option", name="Mochi (bundled)").click()  # the quickest one
        page.wait_for_selector("#frames :text('31')")
        density_of(page, 0.9)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not failures
    assert not [url for url in asked if not url.startswith((address, "blob:", "data:"))]


def density_of(page: Any, value: float) -> None:
    """Waits until the density is within 0.01 of a value."""
    near = f"Math.abs(document.querySelector('#density input').value - {value}) < 0.01"
    page.wait_for_function(near, timeout=SECONDS)


def status_of(page: Any, text: str) -> str:
    """Waits for a status that has a text, and returns all of it."""
    page.locator("#status", has_text=re.compile(text)).wait_for(timeout=SECONDS)
    return page.locator("#status").inner_text()


def line_of(page: Any, text: str) -> str:
    """Waits for the line above the videos, and returns it."""
    line = page.locator("#player strong", has_text=text)
    line.wait_for(timeout=SECONDS)
    return line.inner_text()


def videos_of(page: Any) -> list[list]:
    """Waits for the player; returns time, in seconds, and state of its videos when they have begun."""
    page.wait_for_selector("#player iframe", timeout=SECONDS)
    frame = page.locator("#player iframe").element_handle().content_frame()
    for _ in range(SECONDS // 100):  # the frame forbids the eval that playwright's own waiting needs
        videos = frame.evaluate(VIDEOS)
        if len(videos) == 2 and videos[1][0] > 0.3:
            break
        page.wait_for_timeout(100)
    return videos


@pytest.mark.long
def test_from_a_click_to_two_playing_videos(opened):
    page = opened()
    page.locator("#make").click()
    status_of(page, r"dense: step \d+ of 20")
    line = line_of(page, "the speed of dense")
    assert re.search(r"static has [\d.]+x the speed of dense; PSNR [\d.]+ dB, density 0\.90\d", line)
    (one, paused), (two, also) = videos_of(page)
    assert not paused and not also and abs(one - two) < 0.1
    assert page.locator("#numbers td").first.inner_text() == "denoising"
    assert page.locator("#mask img").evaluate("image => image.naturalWidth") > 500

    page.get_by_text("profile: each head").click()
    density_of(page, 0.75)
    page.locator("#make").click()
    assert "density 0.75" in line_of(page, "profile has")
    videos_of(page)


@pytest.mark.long
def test_a_wrong_input_is_one_line_and_words_that_are_unknown_a_note(opened):
    page = opened()
    page.locator("#density input[type=number]").fill("0.05")
    page.locator("#density input[type=number]").press("Enter")
    page.locator("#make").click()
    line = page.locator("#status [role=alert]")
    line.wait_for(timeout=SECONDS)
    assert line.inner_text().startswith("attention.density: got 0.05, which no mask has")
    assert not page.locator("#player iframe").count() and not page.locator("#mask img").count()
    page.locator("#density input[type=number]").fill("1")
    page.locator("#prompt textarea").fill("a purple circle moving around on a navy background")
    page.locator("#make").click()
    assert "does not know, in the prompt: purple" in status_of(page, "of 20")
    page.locator("#stop").click()
    status_of(page, "Stopped")


@pytest.mark.long
def test_two_users_wait_for_each_other_on_a_phone_too(opened):
    one, two = opened(), opened(**PHONE)
    for page, seed in ((one, "11"), (two, "12")):
        page.get_by_text("Seed, and the layer").click()
        page.locator("#seed input").fill(seed)
        page.locator("#make").click()
    status_of(one, "of 20")
    status_of(two, "waiting in the queue: 1 run before yours")
    assert two.locator("#status").bounding_box()["width"] <= PHONE["viewport"]["width"]
    for page in (one, two):
        line_of(page, "the speed of dense")
        videos_of(page)
    width, whole = two.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert width == whole == PHONE["viewport"]["width"]
    frame = two.locator("#player iframe").element_handle().content_frame()
    boxes = frame.evaluate(
        "[...document.querySelectorAll('video')].map(x => x.getBoundingClientRect().toJSON())"
    )
    assert boxes[0]["top"] == boxes[1]["top"] and boxes[1]["right"] <= width
    inside = frame.evaluate("[document.documentElement.scrollHeight, innerHeight]")
    assert inside[0] == inside[1]
