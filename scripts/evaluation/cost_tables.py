"""Makes the tables of the cost command in Markdown, and its curves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scripts.run.results import document, number, options_text, style, subplots, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WAN = """Sparsity counts pairs of video tokens alone. The paper's 73.6 % of Wan2.1-14B at 161 frames is that
of 768 x 1280, and its preset is of 720 x 1280; the last column has the presets as they stand, with their
text, whose rows and columns are kept."""
FITS = """`c` by least squares on the radial FLOPs over length at one resolution; exponents by least squares
of logarithms over the lengths and over the resolutions of the table. In frames the method is n log n; in
resolution its bound stays quadratic (2 in pixels) if bands are wider than a block."""


def lines(data: dict[str, Any], picture: str) -> list[str]:
    """Returns the Markdown."""
    masks = data["masks"].items()
    return document(
        data,
        "What attention costs over length and resolution",
        "FLOPs of self-attention in all layers of one call of the transformer: 4 n^2 d a layer if dense, "
        "times the mask's density if radial, no warm-up. " + _times(data["rates"]),
        _rows(data["rows"]),
        f"![FLOPs over length and resolution]({picture})",
        "## n log n",
        FITS,
        _fits(data["fits"]),
        "## Sparsity, the paper's and ours",
        WAN,
        _paper(data["paper"]),
        ["", *(f"- mask of {name}: {options_text(mask)}" for name, mask in masks)],
    )


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
    cells = []
    for row in rows:
        dense, radial = row["dense_flops"] / 1e12, row["radial_flops"] / 1e12
        start = row["model"], row["frames"], f"{row['height']}x{row['width']}", row["tokens"]
        flops = f"{dense:.4g}", f"{radial:.4g}", f"{dense / radial:.2f}x", f"{row['n_log_n'] / 1e12:.4g}"
        seconds = (number(row[f"seconds_{kind}"], ".3g") for kind in ("dense", "radial"))
        blocks = row["kept_blocks"], number(row["of_bound"], ".2f")
        cells.append([*start, f"{row['density']:.4f}", *flops, *blocks, *seconds])
    return table(titles, cells)


def _fits(fits: dict[str, dict[str, Any]]) -> list[str]:
    titles = (
        "model | c, FLOP | R^2 of c n log2 n over length | dense ~ frames^ | radial ~ frames^ | "
        "dense ~ pixels^ | radial ~ pixels^"
    )
    names = [f"{kind}_exponent_{over}" for over in ("length", "pixels") for kind in ("dense", "radial")]
    rows = (
        (name, f"{fit['c']:.4g}", number(fit["r2"], ".4f"), *(number(fit[key], ".2f") for key in names))
        for name, fit in fits.items()
    )
    return table(titles, rows)


def _paper(rows: Sequence[dict[str, Any]]) -> list[str]:
    titles = "model | frames | paper, % | ours, % | difference, points | preset as it stands, %"
    cells = []
    for row in rows:
        ours, difference = f"{row['ours']:.2f}", f"{row['ours'] - row['paper']:+.2f}"
        cells.append((row["model"], row["frames"], row["paper"], ours, difference, f"{row['preset']:.2f}"))
    return table(titles, cells)


def draw(data: dict[str, Any]) -> "Figure":
    """Draws FLOPs over frames and over pixels, all axes logarithmic."""
    figure, (along, across) = subplots((11, 5), 1, 2)
    for order, (name, fit) in enumerate(data["fits"].items()):
        rows = [
            row | {"pixels": row["height"] * row["width"]} for row in data["rows"] if row["model"] == name
        ]
        lengths = [row for row in rows if [row["height"], row["width"]] == fit["size"]]
        _lines(along, lengths, "frames", name, style(order))
        _lines(across, [row for row in rows if row["frames"] == fit["frames"]], "pixels", None, style(order))
    along.set(xlabel="video frames", ylabel="attention FLOPs of a call")
    across.set(xlabel="pixels a frame")
    for axes in (along, across):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*along.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _lines(axes: "Axes", rows: list[dict[str, Any]], key: str, name: str | None, style: dict) -> None:
    rows = sorted(rows, key=lambda row: row[key])
    kinds = (("dense_flops", "--", "dense"), ("radial_flops", "-", "radial"), ("n_log_n", ":", "c n log n"))
    for kind, line, title in kinds:
        look = style | {"linestyle": line, "label": name and f"{name}, {title}"}
        if kind == "n_log_n":
            look |= {"marker": None, "alpha": 0.7}
        axes.plot([row[key] for row in rows], [row[kind] for row in rows], markersize=4, **look)
