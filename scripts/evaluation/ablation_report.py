"""Makes the tables of an ablation in Markdown, and the picture of fidelity over density."""

from typing import TYPE_CHECKING, Any

from scripts.run.results import document, number, style, subplots, table
from scripts.run.schema import shown
from scripts.run.system import pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS = {  # of the columns after the first
    "density": ".3f",
    "density of the run": ".3f",
    "PSNR": ".2f",
    "SSIM": ".4f",
    "recall": ".4f",
    "output MSE": ".3g",
    "relative MSE": ".3g",
    "attributes, %": ".1f",
    "s a step": ".3f",
}
COLUMNS = tuple(FORMS)
MEANING = """PSNR and SSIM compare with the dense videos of the same captions and seeds, means over the
videos; the PSNR of equal videos is infinite and not in the mean, no PSNR means that all are equal. Density
is that of the mask, density of the run counts dense steps and layers. Recall is the share of the dense
softmax mass that the mask keeps, output MSE the mean squared error of an attention output, relative MSE its
ratio to the mean square of that output: along the dense run of the first caption, means over all steps,
layers, heads and the sampled query rows; dense steps and layers keep everything and have no error.
Attributes are what the toy world's reader finds right. The time of a step is the median of radial and of
dense steps, in turn with all others, weighted by number. Values whose masks keep the same are one run."""


def lines(data: dict[str, Any], picture: str) -> list[str]:
    """Returns the Markdown."""
    config = data["config"]
    sizes, options = config["generation"], config["attention"]
    numbers = f"{data['captions']} captions, {sizes['steps']} steps, {data['rows']} query rows."
    return document(
        data,
        f"Ablation of the mask: {config['model']['path']}, {sizes['num_frames']} frames",
        f"{numbers} {MEANING}",
        f"![PSNR over density]({picture})",
        *(part for entry in data["tables"] for part in _section(entry)),
        f"- what is not varied: {pairs(options)}",
    )


def _section(entry: dict[str, Any]) -> tuple[str | list[str], ...]:
    rows = ((shown(first), *map(number, rest, FORMS.values())) for first, *rest in entry["rows"])
    return f"## {entry['title']}", entry["note"], table(" | ".join(entry["columns"]), rows)


def draw(data: dict[str, Any]) -> "Figure":
    """Draws PSNR over the density of the run: a curve for each table, named points for other patterns."""
    figure, axes = subplots((9, 5.5))
    across, up = (1 + COLUMNS.index(name) for name in ("density of the run", "PSNR"))
    for order, entry in enumerate(data["tables"]):
        points = [(row[across], row[up], row[0]) for row in entry["rows"] if row[up] is not None]
        apart = entry["columns"][0] == "attention.pattern"
        look = style(order) | {"linestyle": "" if apart else "-", "label": entry["title"], "alpha": 0.85}
        line = sorted(point[:2] for point in points)
        axes.plot([x for x, _ in line], [y for _, y in line], markersize=5, **look)
        for x, y, value in points if apart else []:
            axes.annotate(shown(value), (x, y), fontsize=7)
    axes.set(xlabel="density of the run", ylabel="PSNR to the dense video, dB")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
