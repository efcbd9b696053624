"""Writes results: the head of their JSON, tables, pictures, Markdown."""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import torch

from radial_attn.masks.draw import save_figure
from scripts.run.errors import one_line
from scripts.run.files import write_text
from scripts.run.system import hardware, pairs, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scripts.run.config import Config

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")
MARKERS = "osD^vP*Xh"  # the colours are those of Okabe and Ito, and a grey
DIGITS = 6
RESULTS = Path("outputs/results")  # from where the user stands
OUT = f"file of the tables, or its folder ({RESULTS})"  # help of --out


def results_file(out: Path | None, *words: str) -> Path:
    """Returns the file that `--out` names, else WORDS_DEVICE_DATE.md in the folder that it names, or here.

    The words are joined by `_`.
    """
    if out is not None and out.suffix and not out.is_dir():
        return out
    device = "gpu" if torch.cuda.is_available() else "cpu"
    return (out or RESULTS) / f"{'_'.join([*words, device, time.strftime('%Y-%m-%d')])}.md"


def head(kind: str, command: str, device: str, config: "Config | None" = None) -> dict[str, Any]:
    """Returns the first entries of every JSON."""
    return {
        "kind": kind,
        "command": command,
        "made": time.strftime("%Y-%m-%d"),
        "hardware": hardware(device),
        "versions": versions(),
        "config": config and asdict(config),
    }


def table(titles: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """Returns an empty line and a table in Markdown; bars separate `titles`, and None becomes a dash."""
    names = titles.split("|")
    lines = ["", f"| {' | '.join(name.strip() for name in names)} |", "|" + "---|" * len(names)]
    return lines + [f"| {' | '.join('-' if cell is None else str(cell) for cell in row)} |" for row in rows]


def number(value: float | None, form: str) -> str | None:
    """Formats a number; None stays None."""
    return None if value is None else format(value, form)


def rounded(values: Any) -> Any:
    """Rounds a number, or every number of nested lists, an array or a tensor, to `DIGITS` digits."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.{DIGITS}g}")


def document(data: dict[str, Any], title: str, *parts: str | list[str]) -> list[str]:
    """Returns Markdown lines: title, command, parts, then versions and hardware.

    A text becomes one paragraph. A list of lines, which begins with an empty one, stays as it is.
    """
    lines = [f"# {title}", "", f"    {data['command']}"]
    for part in parts:
        lines += part if isinstance(part, list) else ["", " ".join(part.split())]
    return [*lines, "", pairs(data["versions"], data["hardware"])]


def options_text(mask: dict[str, Any]) -> str:
    """Lists the options of a mask that are given: `pattern radial, decay_factor 0.5`."""
    return ", ".join(f"{name} {value}" for name, value in mask.items() if value is not None)


def write_json(path: Path, data: Any) -> Path:
    """Writes a whole JSON file, its folder too; numbers that are not finite become null."""
    return write_text(path, json.dumps(_finite(data), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: type = dict) -> Any:
    """Returns what a cache file contains, a `kind` that is empty if there is none.

    A file that is damaged counts as empty, and a note says that its content is made again.
    """
    try:
        if path.is_file() and isinstance(content := json.loads(path.read_bytes()), kind):
            return content
    except (OSError, ValueError, RecursionError):
        pass
    if path.exists():
        note_damage(path)
    return kind()


def note_damage(path: Path) -> None:
    """Prints that a cache file is damaged."""
    print(f"note: {path} is damaged; what it held is made again", flush=True)


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Returns the dictionary that `torch.save` wrote; ValueError if it is damaged, by its checksums too."""
    try:
        with ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise ValueError(f"{part} does not fit its checksum")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a broken archive may raise anything
        raise ValueError(one_line(error)) from error
    if not isinstance(content, dict):
        raise ValueError("it holds another kind of data")
    return content


def style(index: int) -> dict[str, str]:
    """Returns colour and marker of a curve."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def subplots(size: tuple[float, float], *shape: int) -> tuple["Figure", Any]:
    """Makes a figure of this size in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*shape)


def publish(
    data: dict[str, Any],
    work: Path,
    out: Path,
    lines: Callable[[dict[str, Any], str], list[str]],
    draw: Callable[[dict[str, Any]], "Figure"],
) -> None:
    """Writes JSON to the folder `work`, Markdown and picture to `out`, and prints their paths.

    `lines` gets the name of the picture. Raises OSError if a file cannot be written.
    """
    picture = out.with_suffix(".png")
    numbers = write_json(work / f"{data['kind']}.json", data)
    text = write_text(out, "\n".join(lines(data, picture.name)) + "\n")
    save_figure(draw(data), picture)
    for file in (numbers, text, picture):
        print(f"written    {file}")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
