"""Makes the tables and the picture of an analysis from its JSON."""

from collections import Counter
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.evaluation import head_maps
from scripts.run.results import document, number, options_text, subplots, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito
PAPERS = 0.985  # R^2 of the paper's fits
DISTANCES = {"temporal": "frames", "spatial": "tokens in raster order", "planar": "tokens in the plane"}
MEANING = """`temporal`: mean attention after the softmax on one key at the query's own position in another
frame, over the distance in frames. `spatial`: on one key of the query's own frame, over the distance in
raster order, the paper's |k - l|; a token above or below is a whole row of the frame away. `planar`: the same
keys over their Euclidean distance within the frame, rounded. Each curve is the mean over all heads, and the
fit is by least squares of y itself, every distance counting alike, as is R^2."""
CLASSES = """A head is temporal if it puts more attention on the column of its query's position (raster
distance up to {reach} in every frame) than on its own frame: both have about as many keys."""
TAIL = """L1 is the error of the masked, renormalised softmax row. For each row alpha, beta and C_rel are
those with which eq. 3 holds for every key of the video and the bound is least; the bound is
2 C_rel p(own key) sum over dropped keys of exp(-alpha d - beta |k - l|), analysis/bound.py derives it. No
error exceeds 2, so a bound of 2 or more says nothing. Eq. 7 is the paper's bound with the same constants."""


def lines(data: dict[str, Any], picture: str) -> list[str]:
    """Returns the Markdown."""
    density = f"density {data['density']:.4f}; {options_text(data['mask'])}"
    return document(
        data,
        "Energy decay of attention",
        _setting(data),
        MEANING,
        _fits(data),
        f"![attention over temporal and spatial distance]({picture})",
        CLASSES.format(reach=data["column_reach"]),
        _classes(data),
        f"What the mask ({density}) keeps of it:",
        _bands(data["bands"]),
        *_heads(data, picture),
        TAIL,
        *_tail(data["tail"]),
    )


def fit_lines(data: dict[str, Any]) -> list[str]:
    """Returns a line for each fit."""
    texts = []
    for name, fit in data["fits"].items():
        numbers = ", ".join(f"{key} {number(value, '.4g') or '-'}" for key, value in fit.items())
        texts.append(f"{name}: {'no fit' if fit['a'] is None else f'y = exp(-a x + b), {numbers}'}")
    return texts


def _setting(data: dict[str, Any]) -> str:
    """Says what was observed, in one sentence."""
    frames, height, width, text = data["grid"]
    calls = f"steps {', '.join(map(str, data['steps']))} of {data['config']['generation']['steps']}"
    if data["timestep"] is not None:
        calls = f"one call on noise at timestep {data['timestep']:g}"
    of_text = f" and {text} text tokens" if text else ""
    layers = data["layers"]
    whole = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    listed = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
    return (
        f"{data['config']['model']['path']}, {frames} frames of {height} x {width} tokens{of_text}; dense, "
        f"{calls}, {len(data['prompts'])} prompt(s), {data['rows']} query rows of each call, layers {listed}."
    )


def _fits(data: dict[str, Any]) -> list[str]:
    """Returns the fits of the mean curves, and how good those of single heads are."""
    rows = []
    for name, fit in data["fits"].items():
        heads = [head["fit"][name]["r2"] for layer in data["heads"] for head in layer]
        known = [r2 for r2 in heads if r2 is not None]
        good = sum(r2 > PAPERS for r2 in known)
        middle = float(np.median(known)) if known else None
        cells = [number(fit[key], form) for key, form in (("a", ".4g"), ("b", ".4g"), ("r2", ".4f"))]
        rows.append([name, *cells, number(middle, ".3f"), f"{good} of {len(heads)}"])
    return table(f"curve | a | b | R^2 | R^2 of a head, median | heads above {PAPERS}", rows)


def _classes(data: dict[str, Any]) -> list[str]:
    rows = []
    for layer, heads in zip(data["layers"], data["heads"], strict=True):
        counts = Counter(head["class"] for head in heads)
        masses = [mean(head[name] for head in heads) for name in ("own_frame", "own_column")]
        rows.append([layer, counts["spatial"], counts["temporal"], *(f"{mass:.3f}" for mass in masses)])
    return table("layer | spatial heads | temporal heads | mass on own frame | on own column", rows)


def _bands(bands: list[dict[str, Any]]) -> list[str]:
    shares = [(band["frames"], band["mass"], band["kept"]) for band in bands]
    kept = sum(mass * kept for _, mass, kept in shares if kept is not None)
    shares.append(("all", sum(mass for _, mass, _ in shares), kept))
    rows = [[name, *(x if x is None else f"{100 * x:.2f}" for x in cells)] for name, *cells in shares]
    return table("frames apart | mass, % | of it kept, %", rows)


def _heads(data: dict[str, Any], picture: str) -> list[Any]:
    """Returns what masks keep of each head; nothing if an older version made the JSON."""
    if "maps" not in data:
        return []
    text = head_maps.MEANING.format(density=data["density"])
    return [text, head_maps.lines(data["maps"], picture.replace(".png", "_heads.png"))]


def _tail(tail: dict[str, Any]) -> tuple[list[str], str]:
    middle = tail["median"]
    rows = []
    for mask, start in (("eq. 4", ""), ("the one in use", "mask_")):
        names = (f"{start}l1", f"{start}bound")
        errors = (f"{x:.4g}" for name in names for x in (tail[name], middle[name]))
        rows.append([mask, *errors, f"{100 * tail[f'{start}vacuous']:.1f} %"])
    titles = "mask | L1, mean | L1, median | bound, mean | bound, median | rows with a bound of 2 or more"
    fitted = ", ".join(f"{name} {middle[name]:.3g}" for name in ("alpha", "beta", "c_rel"))
    return (
        table(titles, rows),
        f"Medians over {tail['rows']} rows: {fitted}. The error exceeds the bound in {tail['exceeded']} "
        f"rows, and eq. 7 in {100 * tail['paper_exceeded']:.1f} %.",
    )


def draw(data: dict[str, Any]) -> "Figure":
    """Draws the curves with heads and fits, and the mass by frame distance with what the mask keeps."""
    figure, panels = subplots((12, 8.4), 2, 2)
    for axes, name in zip(panels.flat, data["profiles"], strict=False):
        _draw_curve(axes, name, data["profiles"][name], data["fits"][name])
    frames, axes = data["frames"], panels[1, 1]
    x, dropped = frames["distance"], {"color": ORANGE, "hatch": "///", "edgecolor": "white"}
    axes.bar(x, frames["mass"], label="dropped", **dropped)
    axes.bar(x, frames["kept"], color=BLUE, label="kept by the mask")
    axes.set(xlabel="frames apart", ylabel="share of the attention", title="Mass by frame distance")
    axes.legend(frameon=False)
    return figure


def _draw_curve(axes: "Axes", name: str, profile: dict[str, Any], fit: dict[str, Any]) -> None:
    """Draws heads as thin lines, their mean as points, its fit dashed; attention on a logarithmic scale."""
    x, y = np.array(profile["distance"]), _positive(profile["mean"])
    for head in (head for layer in profile["heads"] for head in layer):
        axes.plot(x, _positive(head), color=GREY, linewidth=0.4, alpha=0.5, zorder=1)
    axes.plot(x, y, "." if len(x) > 40 else "o", color=BLUE, label="mean of all heads", zorder=3)
    if fit["a"] is not None:
        r2 = "" if fit["r2"] is None else f", R² {fit['r2']:.3f}"
        label = f"exp(-{fit['a']:.3g} x {fit['b']:+.3g}){r2}"
        axes.plot(x, np.exp(fit["b"] - fit["a"] * x), "--", color=ORANGE, label=label, zorder=4)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(1e-9, 0.2 * np.nanmin(y)))
    title = f"{name.capitalize()} decay"
    axes.set(xlabel=f"distance, {DISTANCES[name]}", ylabel="attention on one key", title=title)
    axes.legend(frameon=False)


def _positive(curve: list[float]) -> np.ndarray:
    """Replaces values that have no logarithm by NaN, which leaves a gap."""
    values = np.array(curve, dtype=float)
    return np.where(values > 0, values, np.nan)
