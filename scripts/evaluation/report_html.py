"""Elements of a page and numbers in words; text is escaped by the serialiser, never by hand."""

import math
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

NONE = "–"  # in place of a number that was not measured
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Child = Element | str | None


def node(tag: str, *children: Child, **attributes: str | float | None) -> Element:
    """An element; `class_` and `aria_label` become `class` and `aria-label`, None is left out."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    element = Element(tag, {key: str(value) for key, value in named.items() if value is not None})
    for child in children:
        append(element, child)
    return element


def append(parent: Element, child: Child) -> None:
    """Adds an element or a text behind what `parent` holds."""
    if isinstance(child, Element):
        parent.append(child)
    elif child is not None and len(parent):
        parent[-1].tail = (parent[-1].tail or "") + child
    elif child is not None:
        parent.text = (parent.text or "") + child


def markup(elements: Iterable[Element]) -> str:
    """The HTML of some elements."""
    return "\n".join(tostring(element, encoding="unicode", method="html") for element in elements)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Child]], caption: str, *, hidden: bool = False
) -> Element:
    """A table in a frame that scrolls by itself; each row begins with its heading.

    A `caption` that is `hidden` is read out, and not shown.
    """
    head = node("tr", *(node("th", column, scope="col") for column in columns))
    body = node("tbody")
    for first, *others in rows:
        body.append(node("tr", node("th", first, scope="row"), *(_cell(value) for value in others)))
    shown = node("caption", caption, class_="aside" if hidden else None)
    whole = node("table", shown, node("thead", head), body)
    return node("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _cell(value: Child) -> Element:
    words = isinstance(value, str) and value != NONE
    return node("td", value, class_="words" if words else None)


def measured(value: float | None, text: str | None = None) -> Element:
    """A number in words, with all its digits beside them for programs; a dash where there is none."""
    if value is None:
        return node("span", NONE, title="not measured")
    return node("data", figures(value) if text is None else text, value=repr(value))


def figures(value: float, digits: int = 3) -> str:
    """A number with so many significant digits: 0.573, 27.3, 1,840, 3.24 × 10⁻⁵."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -4 < size < 7:
        return f"{minus(value / 10.0**size, digits - 1)} × {power(size)}"
    return minus(value, max(digits - 1 - size, 0))


def minus(value: float, decimals: int) -> str:
    """A number with a true minus sign and commas at thousands."""
    return f"{value:,.{decimals}f}".replace("-", "−")


def power(exponent: int) -> str:
    """10 to a whole number."""
    return f"10{str(exponent).translate(SUPERSCRIPTS)}"


def percent(share: float | None, decimals: int = 1) -> Element:
    """A share of 1 in percent."""
    return measured(share, None if share is None else f"{minus(100 * share, decimals)} %")


def unit(values: Iterable[float | None]) -> tuple[float, str]:
    """The prefix in which the largest of some numbers reads well, as factor and letter."""
    largest = max((value for value in values if value is not None), default=1.0)
    return next(((factor, letter) for factor, letter in PREFIXES if largest >= factor), PREFIXES[-1])


def section(name: str, heading: str, *children: Child) -> Element:
    """A part of the page, which its heading names."""
    title = node("h2", heading, id=f"{name}-heading")
    return node("section", title, *children, id=name, aria_labelledby=f"{name}-heading")


def details(summary: str, *children: Child) -> Element:
    """Children that stand behind a summary until it is opened."""
    return node("details", node("summary", summary), *children)


def definitions(pairs: Iterable[tuple[str, Child]], kind: str) -> Element:
    """A list of terms, each with what it is."""
    found = node("dl", class_=kind)
    for term, value in pairs:
        pair = SubElement(found, "div")
        pair.append(node("dt", term))
        pair.append(node("dd", value))
    return found
