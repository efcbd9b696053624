"""The files of the cost command: cost.json, tables in Markdown, and curves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scripts.evaluation.files import number, style, table
from scripts.run.system import pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "cost.json"
WAN = """Sparsity counts pairs of video tokens alone. The paper's 73.6 % of Wan2.1-14B at 161 frames is that
of 768 x 1280, and its preset is of 720 x 1280; the last column has the presets as they stand, with their
text, whose rows and columns are kept."""


def lines(data: dict[str, Any], picture: str) -> list[str]:
    """The Markdown."""
    return [
        "# What attention costs over length and resolution",
        "",
        f"    {data['command']}",
        "",
        "FLOPs of self-attention in all layers of one call of the transformer: 4 n^2 d a layer if dense, "
        "times the mask's density if radial, no warm-up. " + _times(data["rates"]),
        *_rows(data["rows"]),
        "",
        f"![FLOPs over length and resolution]({picture})",
        *_fits(data["fits"]),
        *_paper(data["paper"]),
        "",
        *(f"- mask of {name}: {_options(mask)}" for name, mask in data["masks"].items()),
        "",
        pairs(data["versions"], data["hardware"]),
    ]


def _times(rates: dict[str, Any] | None) -> str:
    if rates is None:
        return "No times: no rate was given or measured."
    speeds = f"dense {rates['dense'] / 1e12:.4g}, radial {rates['radial'] / 1e12:.4g} TFLOP/s"
    return f"Seconds are predicted, FLOPs over a rate: {speeds}, {rates['source']}."


def _rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    titles = (
        "model | frames | size | tokens | density | dense TFLOP | radial TFLOP | fewer | c n log n TFLOP | "
        "kept blocks | of 4 s^2 f log2 f | dense s | radial s"
    )
    return table(titles, map(_cells, rows))


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    dense, radial = row["dense_flops"] / 1e12, row["radial_flops"] / 1e12
    return (
        row["model"],
        row["frames"],
        f"{row['height']}x{row['width']}",
        row["tokens"],
        f"{row['density']:.4f}",
        f"{dense:.4g}",
        f"{radial:.4g}",
        f"{dense / radial:.2f}x",
        f"{row['n_log_n'] / 1e12:.4g}",
        row["kept_blocks"],
        number(row["of_bound"], ".2f"),
        number(row["seconds_dense"], ".3g"),
        number(row["seconds_radial"], ".3g"),
    )


def _fits(fits: dict[str, dict[str, Any]]) -> list[str]:
    titles = (
        "model | c, FLOP | R^2 of c n log2 n over length | dense ~ frames^ | radial ~ frames^ | "
        "dense ~ pixels^ | radial ~ pixels^"
    )
    names = [f"{kind}_exponent_{over}" for over in ("length", "pixels") for kind in ("dense", "radial")]
    rows = (
        (name, f"{found['c']:.4g}", number(found["r2"], ".4f"), *(number(found[key], ".2f") for key in names))
        for name, found in fits.items()
    )
    said = (
        "`c` by least squares on the radial FLOPs over length at one resolution; exponents by least squares "
        "of logarithms over the lengths and over the resolutions of the table. In frames the method is "
        "n log n; in resolution its bound stays quadratic (2 in pixels), where bands are wider than a block."
    )
    return ["", "## n log n", "", said, *table(titles, rows)]


def _paper(rows: Sequence[dict[str, Any]]) -> list[str]:
    titles = "model | frames | paper, % | ours, % | difference, points | preset as it stands, %"
    cells = (
        (
            row["model"],
            row["frames"],
            row["paper"],
            f"{row['ours']:.2f}",
            f"{row['ours'] - row['paper']:+.2f}",
            f"{row['preset']:.2f}",
        )
        for row in rows
    )
    return ["", "## Sparsity, the paper's and ours", "", " ".join(WAN.split()), *table(titles, cells)]


def _options(mask: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in mask.items() if value is not None)


def draw(data: dict[str, Any]) -> "Figure":
    """FLOPs over frames, and over pixels, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    along, across = figure.subplots(1, 2)
    for order, (name, found) in enumerate(data["fits"].items()):
        rows = [row for row in data["rows"] if row["model"] == name]
        size, frames = tuple(found["size"]), found["frames"]
        look = style(order)
        lengths = [row for row in rows if (row["height"], row["width"]) == size]
        _lines(along, sorted(lengths, key=_frames), _frames, name, look)
        _lines(across, sorted((r for r in rows if r["frames"] == frames), key=_pixels), _pixels, None, look)
    along.set(xlabel="video frames", ylabel="attention FLOPs of a call")
    across.set(xlabel="pixels a frame")
    for axes in (along, across):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*along.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _lines(axes: "Axes", rows: Sequence[dict[str, Any]], x: Any, name: str | None, style: dict) -> None:
    places = [x(row) for row in rows]
    kinds = (("dense_flops", "--", "dense"), ("radial_flops", "-", "radial"), ("n_log_n", ":", "c n log n"))
    for key, line, title in kinds:
        look = style | {"linestyle": line, "label": name and f"{name}, {title}"}
        if key == "n_log_n":
            look |= {"marker": None, "alpha": 0.7}
        axes.plot(places, [row[key] for row in rows], markersize=4, **look)


def _frames(row: dict[str, Any]) -> int:
    return row["frames"]


def _pixels(row: dict[str, Any]) -> int:
    return row["height"] * row["width"]
