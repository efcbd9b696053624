"""Fills the page with the tables and figures that the commands save."""

import base64
import json
import math
import tempfile
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from radial_attn import RadialConfig, TokenGrid
from radial_attn.masks.draw import MOST_BLOCKS, draw_mask, save_figure
from scripts.evaluation import ablation_report, attention_tables, cost_tables, tables
from scripts.evaluation.page.clips import Clip
from scripts.evaluation.page.run_files import MADE_BY, Run
from scripts.run.errors import UsageError, one_line
from scripts.run.results import number
from scripts.run.system import pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDIES = {"analysis": attention_tables, "cost": cost_tables, "ablation": ablation_report}
COLUMNS = ("density", "seconds_step", "seconds_video", "psnr", "ssim", "lpips")  # of the table of videos
EQUAL = 0.999999  # the SSIM from which a PSNR of null is that of equal videos
MARKS = {
    "|": "table",
    "- ": "item",
    "    ": "code",
    "# ": "title",
    "## ": "heading",
    "![": "picture",
    "": "text",
}


def render(runs: list[Run], clips: list[Clip], packed: list[dict[str, Any]], amplify: int) -> str:
    """Returns the page's HTML; UsageError if a run lacks what its tables and figures need.

    Args:
        packed: the clips whose videos are in the page, as player.js takes them.
        amplify: factor on the brightness of differences.
    """
    page = template("template.html").render(
        runs=runs,
        days=sorted({run.content["made"] for run in runs if run.content.get("made")}),
        count=len(clips),
        data={"clips": packed, "amplify": amplify, "plays": False},
        videos=all_videos(clips),
        documents=[document(run) for run in runs if run.kind != "generation"],
        missing=[kind for kind in MADE_BY if kind not in {"generation", *(run.kind for run in runs)}],
        made_by=MADE_BY,
        pairs=pairs,
        dumps=lambda config: json.dumps(config, indent=2, ensure_ascii=False),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half of a surrogate pair


def player(packed: dict[str, Any], amplify: int) -> str:
    """Returns a page for a frame of another page: it plays one clip, and sets the height of its frame."""
    return template("pair.html").render(data={"clips": [packed], "amplify": amplify, "plays": True})


def template(name: str) -> Template:
    """Returns a template of this folder; a value that it lacks is an error."""
    loader = FileSystemLoader(Path(__file__).parent)
    settings = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, autoescape=True, **settings).get_template(name)


def all_videos(clips: list[Clip]) -> list[list[str]]:
    """Returns titles and a row for each video; columns that no video has are left out."""
    videos = [video.values for clip in clips for video in clip.videos]
    columns = [key for key in COLUMNS if any(values.get(key) is not None for values in videos)]
    rows = [["prompt", "seed", "setting", "options", *(tables.COLUMNS[key][0] for key in columns)]]
    for clip in clips:
        for video in clip.videos:
            values = dict(video.values)
            if values.get("psnr") is None and (values.get("ssim") or 0) >= EQUAL:
                values["psnr"] = math.inf
            seed = "" if clip.seed is None else str(clip.seed)
            cells = [number(values.get(key), tables.COLUMNS[key][1]) or "" for key in columns]
            rows.append([clip.prompt, seed, video.name, video.options, *cells])
    return rows


def document(run: Run) -> dict[str, Any]:
    """Returns kind, name, parts and figures of what the run's command saves next to its JSON."""
    study = STUDIES.get(run.kind)
    try:
        if study is None:
            lines, figures = tables.markdown(run.content, None).splitlines(), masks(run.content["settings"])
        else:
            lines = study.lines(run.content, "picture")
            title = next((line for line in lines if line.startswith("![")), "![figure]")[2:].partition("]")[0]
            figures = {title: study.draw(run.content)}
        pictures = {name: picture(figure) for name, figure in figures.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{run.file}: cannot be shown ({type(error).__name__}: {one_line(error)}); make it again with "
            f"bash scripts/{MADE_BY[run.kind]}"
        ) from error
    return {"kind": run.kind, "name": run.name, "parts": parts(lines), "pictures": pictures}


def parts(lines: list[str]) -> list[tuple[str, list[Any]]]:
    """Splits the commands' Markdown into kind and lines of each part; lines of a table are lists of cells."""
    grouped: list[tuple[str, list[Any]]] = []
    for mark, group in groupby(lines, lambda line: next(filter(line.startswith, MARKS)) if line else None):
        if mark is None:
            continue
        inner = [line.removeprefix(mark) for line in group if not line.startswith("|---")]
        if mark == "|":
            inner = [[cell.strip() for cell in line.removesuffix("|").split("|")] for line in inner]
        grouped.append((MARKS[mark], inner))
    return grouped


def picture(figure: "Figure") -> str:
    """Returns a figure as the data: address of a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figure.png"
        save_figure(figure, file)
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def masks(settings: list[dict[str, Any]]) -> dict[str, "Figure"]:
    """Draws the different masks of an evaluation's settings that are not too large for a picture."""
    names: dict[tuple[TokenGrid, RadialConfig], str] = {}
    for setting in settings:
        if setting.get("grid") and (options := setting.get("mask")) and options["pattern"] != "dense":
            grid, config = TokenGrid(*setting["grid"]), RadialConfig(**options)
            if grid.num_blocks(config.block_size) <= MOST_BLOCKS:
                names.setdefault((grid, config), setting["name"])
    return {f"mask of {name}": draw_mask(*mask) for mask, name in names.items()}
