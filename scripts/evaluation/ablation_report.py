"""The files of the ablation: ablation.json, tables in Markdown, and fidelity over density as a picture."""

from typing import TYPE_CHECKING, Any

from scripts.evaluation.files import number, style, table
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
NAME = "ablation.json"
SAID = """PSNR and SSIM compare with the dense videos of the same captions and seeds, means over the
videos; the PSNR of equal videos is infinite and not in the mean, no PSNR means that all are equal. Density
is that of the mask, density of the run counts dense steps and layers. Recall is the share of the dense
softmax mass that the mask keeps, output MSE the mean squared error of an attention output, relative MSE its
ratio to the mean square of that output: along the dense run of the first caption, means over all steps,
layers, heads and the sampled query rows, where dense steps and layers keep everything and err by nothing.
Attributes are what `toyworld.read` finds right. The time of a step is the median of radial and of dense
steps, in turn with all others, weighted by their number. Values whose masks keep the same are one run."""


def lines(data: dict[str, Any], picture: str) -> list[str]:
    """The Markdown."""
    config = data["config"]
    sizes, options = config["generation"], config["attention"]
    return [
        f"# Ablation of the mask: {config['model']['path']}, {sizes['num_frames']} frames",
        "",
        f"    {data['command']}",
        "",
        f"{data['captions']} captions, {sizes['steps']} steps, {data['rows']} query rows. "
        + " ".join(SAID.split()),
        "",
        f"![PSNR over density]({picture})",
        *(line for found in data["tables"] for line in _section(found)),
        "",
        f"- what is not varied: {pairs(options)}",
        "",
        pairs(data["versions"], data["hardware"]),
    ]


def _section(found: dict[str, Any]) -> list[str]:
    forms = FORMS.values()
    rows = (
        (shown(first), *(number(value, form) for value, form in zip(rest, forms, strict=True)))
        for first, *rest in found["rows"]
    )
    titles = " | ".join(found["columns"])
    return ["", f"## {found['title']}", "", found["note"], *table(titles, rows)]


def draw(data: dict[str, Any]) -> "Figure":
    """PSNR against the density of the run, a curve for each table; static masks are named points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    place, height = (1 + COLUMNS.index(name) for name in ("density of the run", "PSNR"))
    for order, found in enumerate(data["tables"]):
        rows = [row for row in found["rows"] if row[height] is not None]
        apart = found["columns"][0] == "attention.pattern"
        look = style(order) | {"linestyle": "" if apart else "-", "label": found["title"], "alpha": 0.85}
        points = sorted((row[place], row[height]) for row in rows)
        axes.plot([x for x, _ in points], [y for _, y in points], markersize=5, **look)
        for row in rows if apart else []:
            axes.annotate(shown(row[0]), (row[place], row[height]), fontsize=7)
    axes.set(xlabel="density of the run", ylabel="PSNR to the dense video, dB")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
