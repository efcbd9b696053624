"""What the files of these commands have in common: the head of their JSON, tables, how they are written."""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radial_attn.masks.draw import save_figure
from scripts.run import files
from scripts.run.config import Config
from scripts.run.system import hardware, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")
MARKERS = "osD^vP*Xh"  # the colours before them are those of Okabe and Ito, and a grey


def head(kind: str, command: str, device: str, config: Config | None = None) -> dict[str, Any]:
    """The first entries of every JSON."""
    return {
        "kind": kind,
        "command": command,
        "made": time.strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "versions": versions(),
        "config": config and asdict(config),
    }


def table(titles: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """A table in Markdown; `titles` are separated by bars. None becomes a dash."""
    names = titles.split("|")
    lines = ["", f"| {' | '.join(name.strip() for name in names)} |", "|" + "---|" * len(names)]
    return lines + [f"| {' | '.join('-' if cell is None else str(cell) for cell in row)} |" for row in rows]


def number(value: float | None, form: str) -> str | None:
    """A number as text; None stays None."""
    return None if value is None else format(value, form)


def write_text(path: Path, text: str) -> Path:
    """Writes a file whole, in a folder that is made where it is missing; OSError where it cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)
    return path


def write_json(path: Path, data: Any) -> Path:
    """The same for JSON; numbers that are not finite become null."""
    return write_text(path, json.dumps(_finite(data), indent=1, ensure_ascii=False) + "\n")


def style(number: int) -> dict[str, str]:
    """Colour and marker of a curve by its number, from 0."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def publish(
    data: dict[str, Any],
    kept: Path,
    out: Path,
    lines: Callable[[dict[str, Any], str], list[str]],
    draw: Callable[[dict[str, Any]], "Figure"],
) -> list[Path]:
    """Writes the JSON as `kept`, the Markdown of `lines` and the picture of `draw` at `out`; the files.

    `lines` gets the name of the picture. Raises OSError where a file cannot be written.
    """
    picture = out.with_suffix(".png")
    files = [write_json(kept, data), write_text(out, "\n".join(lines(data, picture.name)) + "\n")]
    save_figure(draw(data), picture)
    return [*files, picture]


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
