"""What tests of a page in Chromium have in common."""

import re
import time
from collections.abc import Callable

from selenium import webdriver


def show(driver, width: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait(until: Callable[[], object], seconds: float = 20) -> object:
    end = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def text(driver, identity: str) -> str:
    return driver.execute_script("return document.getElementById(arguments[0]).textContent", identity)


def set_value(driver, identity: str, value: object) -> None:
    script = """const found = document.getElementById(arguments[0]); found.value = arguments[1];
        for (const kind of ['input', 'change']) found.dispatchEvent(new Event(kind, { bubbles: true }))"""
    driver.execute_script(script, identity, value)


def press(driver, *keys: str) -> None:
    webdriver.ActionChains(driver).send_keys(*keys).perform()


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
