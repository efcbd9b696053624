"""The parts of the page that its scripts fill: the player, the mask, and the map of layers and heads."""

from typing import Any
from xml.etree.ElementTree import Element

from scripts.evaluation import report_words as words
from scripts.evaluation.report_html import node, section
from scripts.evaluation.report_runs import Clip


def videos(clips: list[Clip], packed: list[dict[str, Any]]) -> Element:
    """The player, which page.js fills."""
    more = len(clips) - len(packed)
    note = f"{len(packed)} of {len(clips)} prompts and seeds are in this page." if more else None
    compared = any(clip["differences"] for clip in packed)
    apart = words.DIFFERENCE.format(packed[0]["amplify"])
    return section(
        "videos",
        "Videos",
        node("p", apart if compared else "", words.KEYS, class_="aside"),
        node("p", note, class_="aside") if note else None,
        node(
            "div",
            node(
                "div",
                chooser("clip", "Prompt and seed"),
                chooser("setting", "Compared setting"),
                class_="choosers",
            ),
            node("p", id="prompt", class_="prompt"),
            node("div", id="stage", class_="stage"),
            controls(),
            id="player",
            class_="player",
        ),
    )


def chooser(name: str, label: str) -> Element:
    """A select with its label; page.js fills it, and hides it where there is no choice."""
    return node("div", node("label", label, for_=name), node("select", id=name), class_="chooser")


def controls() -> Element:
    """One set of controls for all videos of the stage."""
    rates = [node("option", f"{rate}×", value=rate) for rate in ("0.25", "0.5", "1")]
    rates[-1].set("selected", "selected")
    return node(
        "div",
        node("button", "Play", id="play", type="button", class_="primary"),
        node("button", "‹", id="back", type="button", aria_label="One frame back"),
        node("button", "›", id="forward", type="button", aria_label="One frame forward"),
        node("input", id="frame", type="range", min="0", value="0", step="1", aria_label="Frame"),
        node("output", id="time", for_="frame"),
        node("label", node("input", id="loop", type="checkbox", checked="checked"), " Loop"),
        node("label", "Speed ", node("select", *rates, id="rate")),
        class_="controls",
        role="group",
        aria_label="Playback",
    )


def masks(packed: list[dict[str, Any]]) -> Element:
    """The picture of a mask, which page.js draws."""
    return section(
        "mask",
        "Mask",
        node("p", words.MASK, class_="aside"),
        chooser("mask-choice", "Mask"),
        node(
            "div",
            node("div", _mask_frame(), node("output", id="mask-text", class_="readout"), class_="map"),
            node(
                "div",
                node("p", id="mask-about"),
                node("ul", id="mask-legend", class_="legend"),
                class_="beside",
            ),
            class_="two",
        ),
    )


def _mask_frame() -> Element:
    picture = node("canvas", id="mask-picture"), node("svg", id="mask-lines", aria_hidden="true")
    about = "Blocks that the mask keeps; query frames from above, key frames from the left"
    return _map("mask", "map of frame pairs", about, *picture)


def _map(name: str, kind: str, about: str, *children: Element, class_: str = "focusable") -> Element:
    """An element that is walked over by keys; `name-text` says where one stands."""
    return node(
        "div",
        *children,
        id=f"{name}-map",
        class_=class_,
        tabindex="0",
        role="application",
        aria_roledescription=kind,
        aria_label=about,
        aria_describedby=f"{name}-text",
    )


def heads() -> Element:
    """The map of recall and error over layers and heads, which page.js fills."""
    choices: list[tuple[str, str]] = [
        ("heads-run", "Setting"),
        ("heads-what", "Quantity"),
        ("heads-step", "Step"),
    ]
    return section(
        "heads",
        "Layers and heads",
        node("p", words.HEADS, class_="aside"),
        node("div", *(chooser(*choice) for choice in choices), class_="choosers"),
        _map(
            "heads", "map of layers and heads", "One cell for each layer and head", class_="focusable heads"
        ),
        node("output", id="heads-text", class_="readout"),
        node("div", id="heads-scale", class_="colours"),
    )
