"""The parts of the page that stand for themselves: energy decay, cost, ablations, and how runs were made."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

from scripts.evaluation.report_forms import number
from scripts.evaluation.report_html import (
    Child,
    definitions,
    details,
    figures,
    measured,
    node,
    percent,
    section,
    table,
    unit,
)
from scripts.evaluation.report_plots import Axis, Curve, plot
from scripts.evaluation.report_runs import Run
from scripts.evaluation.report_sections import each, share_bar
from scripts.evaluation.report_words import COST, DECAY

MOST_HEADS = 64  # thin lines of a plot
DISTANCES = {"temporal": "frames apart", "spatial": "tokens apart in a frame"}
Row = dict[str, Any]


def decay(runs: list[Run]) -> Element:
    """Attention over distance with its fits, the mass of each band, and the bound of the tail."""
    return section("decay", "Energy decay", node("p", DECAY, class_="aside"), *each(runs, _analysis))


def _analysis(run: Run) -> list[Child]:
    content, found = run.content, []
    fits, profiles = content["fits"] or {}, content["profiles"] or {}
    pictures = [_profile(name, profile, fits.get(name)) for name, profile in profiles.items()]
    if pictures:
        found.append(node("div", *pictures, class_="two"))
    if content["bands"]:
        rows = [
            [band["frames"].replace("-", "–"), share_bar(band["mass"]), share_bar(band["kept"])]
            for band in content["bands"]
        ]
        columns = ["Frames apart", "Share of the mass", "Of it, kept by the mask"]
        found.append(table(columns, rows, "Attention mass by band of frame distance"))
    if content["tail"]:
        found.append(_tail(content["tail"]))
    if content["heads"]:
        found.append(_classes(content["heads"], run.name))
    return found


def _profile(name: str, profile: Row, fit: Row | None) -> Element:
    x, mean = profile["distance"], profile["mean"]
    all_heads = [head for layer in profile["heads"] or [] for head in layer][:MOST_HEADS]
    curves = [
        Curve("" if number_ else "single heads", x, head, "single") for number_, head in enumerate(all_heads)
    ]
    words = "no fit"
    if fit and fit["a"] is not None and fit["b"] is not None:
        words = f"a = {figures(fit['a'])}, b = {figures(fit['b'])}"
        words += "" if fit["r2"] is None else f", R² = {figures(fit['r2'], 4)}"
        places = [value for value in x if value is not None]
        curves.append(Curve("fit", places, [_fitted(fit, value) for value in places], "fit"))
    curves.append(Curve("mean", x, mean, "radial", marks=True, line=False))
    about = f"{name} decay of attention: {words}"
    axes = Axis(DISTANCES.get(name, name)), Axis("attention", log=True)
    title = node("figcaption", node("strong", f"{name.capitalize()} decay"), node("span", words))
    numbers = [
        [figures(at) if at is not None else None, measured(value)] for at, value in zip(x, mean, strict=False)
    ]
    listed = details("Numbers", table([axes[0].label, "mean attention"], numbers, about, hidden=True))
    return node("figure", title, plot(curves, *axes, about), listed, class_="chart")


def _fitted(fit: Row, x: float) -> float | None:
    """exp(-a x + b), None where it is too large."""
    exponent = -fit["a"] * x + fit["b"]
    return math.exp(exponent) if exponent < 700 else None


def _tail(tail: Row) -> Element:
    return definitions(
        [("Bound of the right tail", measured(tail["bound"])), ("Measured L1 error", measured(tail["l1"]))],
        "pairs",
    )


def _classes(layers: list[list[Row]], name: str) -> Element:
    counts = Counter(head["class"] for layer in layers for head in layer)
    heads = max((len(layer) for layer in layers), default=0)
    rows = [
        [f"{place}", *(node("span", head["class"]) for head in layer)] for place, layer in enumerate(layers)
    ]
    rows = [row + [None] * (heads + 1 - len(row)) for row in rows]
    words = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    columns = ["Layer", *(f"head {head}" for head in range(heads))]
    return details(
        f"Classes of heads: {words}", table(columns, rows, f"Class of each head of {name}", hidden=True)
    )


def cost(runs: list[Run]) -> Element:
    """Operations over length and resolution, and the paper's sparsities beside ours."""
    return section("cost", "Cost", node("p", COST, class_="aside"), *each(runs, _costs))


def _costs(run: Run) -> list[Child]:
    content, found = run.content, []
    rows, fits = content["rows"] or [], content["fits"] or {}
    pictures = []
    for model in dict.fromkeys(row["model"] for row in rows):
        pictures += _curves(model, [row for row in rows if row["model"] == model], fits.get(model, {}))
    if pictures:
        found.append(node("div", *pictures, class_="two"))
    if content["paper"]:
        columns = ["Model", "Frames", "Sparsity in the paper", "Ours", "Difference, points"]
        found.append(table(columns, map(_beside, content["paper"]), "Sparsity, the paper’s and ours"))
    if rows:
        source = (content["rates"] or {}).get("source")
        note = node("p", f"Seconds: {source}.", class_="aside") if isinstance(source, str) else None
        found.append(details(f"All {len(rows)} rows", note, _cost_table(rows)))
    return found


def _curves(model: str, rows: list[Row], fit: Row) -> Iterator[Element]:
    """Over frames at the size with most rows, and over tokens of a frame at the length with most rows."""
    size = Counter((row["height"], row["width"]) for row in rows).most_common(1)[0][0]
    length = Counter(row["frames"] for row in rows).most_common(1)[0][0]
    at_size = sorted((r for r in rows if (r["height"], r["width"]) == size), key=lambda r: r["frames"])
    at_length = sorted((r for r in rows if r["frames"] == length), key=lambda r: r["height"] * r["width"])
    if len({row["frames"] for row in at_size}) > 1:
        yield _curve(f"{model}, {size[0]} × {size[1]}", "frames", at_size, fit)
    if len({row["height"] * row["width"] for row in at_length}) > 1:
        yield _curve(f"{model}, {length} frames", "height × width", at_length)


def _curve(title: str, across: str, rows: list[Row], fit: Row | None = None) -> Element:
    """Operations of some rows; over frames, where a `fit` was made, with n log n."""
    sizes = {row["height"] * row["width"]: f"{row['height']} × {row['width']}" for row in rows}
    over_frames = fit is not None
    ticks = {row["frames"]: f"{row['frames']}" for row in rows} if over_frames else sizes
    x = [row["frames"] if over_frames else row["height"] * row["width"] for row in rows]
    factor, letter = unit(row["dense_flops"] for row in rows)
    lines = {"dense": "dense_flops", "radial": "radial_flops"} | (
        {"n log n": "n_log_n"} if over_frames else {}
    )
    curves = []
    for (label, key), style in zip(lines.items(), ("dense", "radial", "fit"), strict=False):
        y = [None if row[key] is None else row[key] / factor for row in rows]
        curves.append(Curve(label, x, y, style, marks=style != "fit"))
    about = f"{title}: operations of dense and radial attention"
    axes = Axis(across, log=True, ticks=ticks), Axis(f"attention, {letter}FLOP", log=True)
    words = ", ".join(filter(None, [_saved(rows), _fit_words(fit)]))
    caption = node("figcaption", node("strong", title), node("span", words))
    return node("figure", caption, plot(curves, *axes, about), class_="chart")


def _fit_words(fit: Row | None) -> str:
    quality = number(fit.get("r2")) if fit else None
    return "" if quality is None else f"n log n fits with R² = {figures(quality, 4)}"


def _saved(rows: list[Row]) -> str:
    last = rows[-1]
    if not last["dense_flops"] or not last["radial_flops"]:
        return ""
    return f"{figures(last['dense_flops'] / last['radial_flops'])} times fewer operations at the right end"


def _beside(row: Row) -> list[Child]:
    both = row["paper"] is not None and row["ours"] is not None
    apart = row["ours"] - row["paper"] if both else None
    given = [
        measured(row[key], None if row[key] is None else f"{figures(row[key], digits)} %")
        for key, digits in (("paper", 3), ("ours", 4))
    ]
    text = None if apart is None else f"{apart:+.1f}".replace("-", "−")
    return [row["model"], measured(row["frames"], str(row["frames"])), *given, measured(apart, text)]


def _cost_table(rows: list[Row]) -> Element:
    factor, letter = unit(value for row in rows for value in (row["dense_flops"], row["radial_flops"]))
    columns = ["Model", "Frames", "Size", "Tokens", "Density", "Kept blocks", f"Dense, {letter}FLOP"]
    columns += [f"Radial, {letter}FLOP", "Dense, s", "Radial, s"]
    listed = []
    for row in rows:
        work = [
            measured(None if row[key] is None else row[key] / factor)
            for key in ("dense_flops", "radial_flops")
        ]
        counts = [
            measured(row[key], None if row[key] is None else f"{row[key]:,.0f}")
            for key in ("tokens", "kept_blocks")
        ]
        seconds = [measured(row[key]) for key in ("seconds_dense", "seconds_radial")]
        size = node("span", f"{row['height']} × {row['width']}")
        listed.append(
            [
                row["model"],
                measured(row["frames"], str(row["frames"])),
                size,
                counts[0],
                percent(row["density"]),
                counts[1],
                *work,
                *seconds,
            ]
        )
    return table(columns, listed, "Cost over length and resolution", hidden=True)


def ablation(runs: list[Run]) -> Element:
    """The tables as they are given."""
    return section("ablation", "Ablations", *each(runs, _tables))


def _tables(run: Run) -> list[Child]:
    found: list[Child] = []
    for given in run.content["tables"] or []:
        rows = [
            [_given(value, first=place == 0) for place, value in enumerate(row)]
            for row in given["rows"]
            if row
        ]
        found.append(table(given["columns"], rows, given["title"]))
        found.append(node("p", given["note"], class_="aside") if given["note"] else None)
    return found


def _given(value: Any, *, first: bool) -> Child:
    """A cell: numbers as such, anything else as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) or value is None:
        whole = isinstance(value, int)
        return measured(number(value), f"{value:,}".replace("-", "−") if whole else None)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return node("span", text) if first else text


def made(runs: list[Run]) -> Element:
    """Command, machine, versions and configuration of each run."""
    return section("made", "How it was made", *(_made(run) for run in runs))


def _made(run: Run) -> Element:
    content = run.content
    pairs: list[tuple[str, Child]] = [
        ("Command", node("code", content["command"]) if content["command"] else None),
        ("Date", content["made"]),
        ("Machine", _listed(content["hardware"])),
        ("Versions", _listed(content["versions"])),
    ]
    shown = [(term, value) for term, value in pairs if value is not None]
    config = content["config"]
    text = json.dumps(config, indent=2, ensure_ascii=False)
    code = node("pre", node("code", text), tabindex="0", aria_label=f"Configuration of {run.name}")
    name = run.kind.capitalize() if run.name == run.kind else f"{run.kind.capitalize()}: {run.name}"
    parts = [node("h3", name), definitions(shown, "pairs")]
    return node("article", *parts, details("Configuration", code) if config else None)


def _listed(values: Row | None) -> str | None:
    """Keys and values in one line, bytes in GiB."""
    if not values:
        return None
    words = []
    for key, value in values.items():
        if key.endswith("_bytes") and number(value) is not None:
            words.append(f"{key.removesuffix('_bytes')} {value / 2**30:.1f} GiB")
        else:
            words.append(f"{key} {value}")
    return ", ".join(words).replace("_", " ")
