"""Curves as SVG that stands in the page: its colours are those of the page, light or dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from xml.etree.ElementTree import Element

from scripts.evaluation.report_html import figures, node, power

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 408, 14, 252  # of the frame inside
STEPS = (1, 2, 5, 10)
FEW = 24  # points that are marked with large dots
SMALL, LARGE = 1e-3, 1e6  # numbers between are written out
LETTER = 7  # width of one in the text of a tick


@dataclass(frozen=True)
class Curve:
    """Points of one line; `style` is its class in page.css, `marks` are dots, `line` joins them."""

    label: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    style: str
    marks: bool = False
    line: bool = True

    def points(self) -> list[tuple[float, float]]:
        """The points whose two numbers are there."""
        pairs = zip(self.x, self.y, strict=False)
        return [(x, y) for x, y in pairs if x is not None and y is not None]


@dataclass(frozen=True)
class Axis:
    """A label, whether steps are equal in ratio (`log`) or in difference, and texts of values to mark."""

    label: str
    log: bool = False
    ticks: dict[float, str] = field(default_factory=dict)


def plot(curves: list[Curve], across: Axis, along: Axis, about: str) -> Element:
    """A picture of some curves with axes and a legend; `about` is what a screen reader says of it."""
    drawn = [(curve, _shown(curve.points(), across.log, along.log)) for curve in curves]
    drawn = [(curve, points) for curve, points in drawn if points]
    to_x, x_ticks = scale([x for _, points in drawn for x, _ in points], across.log, LEFT, RIGHT)
    to_y, y_ticks = scale([y for _, points in drawn for _, y in points], along.log, BOTTOM, TOP)
    picture = node("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=about, class_="plot")
    for tick in y_ticks:
        picture.append(node("line", x1=LEFT, x2=RIGHT, y1=to_y(tick), y2=to_y(tick), class_="grid"))
        text = tick_text(tick, powers=along.log and min(y_ticks) < SMALL)
        picture.append(node("text", text, x=LEFT - 8, y=round(to_y(tick) + 4, 1), class_="tick left"))
    marks = across.ticks or {tick: tick_text(tick) for tick in x_ticks}
    for at, text in _spread({to_x(value): text for value, text in marks.items()}).items():
        picture.append(node("line", x1=at, x2=at, y1=BOTTOM, y2=BOTTOM + 5, class_="axis"))
        inside = min(at, WIDTH - LETTER * len(text) / 2)
        picture.append(node("text", text, x=inside, y=BOTTOM + 20, class_="tick"))
    picture.append(node("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    for curve, points in drawn:
        picture.extend(_line(curve, [(to_x(x), to_y(y)) for x, y in points]))
    middle = (LEFT + RIGHT) / 2
    picture.append(node("text", across.label, x=middle, y=HEIGHT - 6, class_="label"))
    return node("div", node("p", along.label, class_="unit"), picture, _legend(drawn), class_="plotted")


def _shown(points: list[tuple[float, float]], log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]


def _line(curve: Curve, points: list[tuple[float, float]]) -> list[Element]:
    found = []
    if curve.line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        found.append(node("polyline", points=path, class_=f"curve {curve.style}"))
    if curve.marks:
        radius = 3.4 if len(points) <= FEW else 2.2
        found += [node("circle", cx=x, cy=y, r=radius, class_=f"mark {curve.style}") for x, y in points]
    return found


def _legend(drawn: list[tuple[Curve, list]]) -> Element:
    """A sample of each line that has a label, with the label."""
    found = node("ul", class_="legend")
    for curve, _ in drawn:
        if curve.label:
            sample = [*_line(replace(curve, marks=False), [(1.0, 6.0), (27.0, 6.0)])]
            sample += _line(replace(curve, line=False), [(14.0, 6.0)])
            picture = node("svg", *sample, viewBox="0 0 28 12", class_="plot sample", aria_hidden="true")
            found.append(node("li", picture, curve.label))
    return found


def scale(
    values: list[float], log: bool, start: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """A function from values to places between `start` and `end`, and the values to mark."""
    low, high = min(values, default=1.0), max(values, default=2.0)
    if log:
        low, high, ticks = _log_range(low, high)
        first, last = math.log(low), math.log(high)
        return lambda value: _place(math.log(value), first, last, start, end), ticks
    low = min(low, 0.0)
    step = _step(high - low or 1.0)
    high = math.ceil(high / step - 1e-9) * step or step
    ticks = [low + step * number for number in range(round((high - low) / step) + 1)]
    return lambda value: _place(value, low, high, start, end), ticks


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return round(start + (end - start) * (value - low) / (high - low), 1)


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, four to eight of which fill the span."""
    size = 10.0 ** math.floor(math.log10(span / 4))
    return next(size * step for step in STEPS if span / (size * step) <= 6)


def _log_range(low: float, high: float) -> tuple[float, float, list[float]]:
    """A little more than the range, and its ticks: powers of ten, or 1, 2 and 5 of each in a short one."""
    decades = math.log10(high / low)
    if decades < 2:
        bases = [10.0**exponent for exponent in range(math.floor(math.log10(low)) - 1, 20)]
        ticks = [base * step for base in bases for step in STEPS[:3]]
        pad = 10 ** max(0.04 * decades, 0.02)
        return low / pad, high * pad, [tick for tick in ticks if low / pad <= tick <= high * pad]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = -(-(last - first) // 6)
    return 10.0**first, 10.0**last, [10.0**exponent for exponent in range(first, last + 1, stride)]


def tick_text(value: float, *, powers: bool = False) -> str:
    """The number at a tick, which has one significant digit or is one of the data; `powers`: as 10ⁿ."""
    if value and (powers or not SMALL <= abs(value) < LARGE):
        exponent = round(math.log10(abs(value)))
        return power(exponent) if math.isclose(10.0**exponent, value) else figures(value, 1)
    return f"{value:,.10g}".replace("-", "−")


def _spread(marks: dict[float, str]) -> dict[float, str]:
    """The marks, places and texts, of which the texts do not touch; the two ends are there in any case."""
    found: dict[float, str] = {}
    for at, text in sorted(marks.items(), key=lambda mark: mark[0] not in (min(marks), max(marks))):
        if all(
            abs(at - place) >= LETTER * (len(text) + len(other)) / 2 + 8 for place, other in found.items()
        ):
            found[at] = text
    return found
