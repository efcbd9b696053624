"""One page of what runs have measured: `python -m scripts.report RUN ... [--out FILE.html]`.

A RUN is the output folder, or a JSON file in it, of evaluate, analyse_attention, cost or ablate, or a folder
of generated videos with their JSON. The page holds everything that it shows and needs no network.
Exit codes: 0 done; 2 bad input, one line on stderr says which; 130 interrupted.
"""

import argparse
import base64
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from tqdm import tqdm

from scripts.evaluation import report_maps as maps
from scripts.evaluation import report_sections as parts
from scripts.evaluation import report_studies as studies
from scripts.evaluation.files import write_text
from scripts.evaluation.report_html import markup
from scripts.evaluation.report_mask import mask_of, packed_mask
from scripts.evaluation.report_runs import Run, clips, find_runs
from scripts.evaluation.report_videos import packed_clip
from scripts.run.errors import OneLineParser, UsageError, exit_code, one_line, positive

PAGE = Path(__file__).parent / "evaluation" / "page"
SCRIPTS = ("colours.js", "player.js", "mask.js", "heads.js", "page.js")
ORDER = ("evaluation", "generation", "analysis", "cost", "ablation")
MIB = 2**20


def build(places: list[Path], most_videos: int, amplify: int, limit: int) -> str:
    """The page of the runs at `places`.

    Args:
        most_videos: prompts and seeds whose videos are in the page, the first ones.
        amplify: how many times as bright a difference is shown.
        limit: MiB that the page may have.

    Raises:
        UsageError: no run, a run that is not what it should be, or a page that would be too large.
    """
    runs = sorted(find_runs(places), key=lambda run: ORDER.index(run.kind))
    found = clips(runs)
    with tempfile.TemporaryDirectory() as work:
        chosen = tqdm(found[:most_videos], desc="videos", disable=not found, leave=False)
        packed, size = [], 0
        for clip in chosen:
            packed.append(packed_clip(clip, amplify, Path(work)))
            size += sum(map(len, [*packed[-1]["videos"].values(), *packed[-1]["differences"].values()]))
            _require_room(size, len(packed), min(most_videos, len(found)), limit)
    masks, reasons = all_masks(runs)
    data = {"clips": packed, "masks": masks, "heads": all_heads(runs)}
    return fill(data, sections(runs, found, data, reasons))


def _require_room(size: int, clip: int, wanted: int, limit: int) -> None:
    if size > limit * MIB:
        raise UsageError(
            f"--videos: got {wanted}, whose first {clip} fill {size / MIB:.0f} MiB of the page; allowed: "
            f"fewer of them, or --limit above {limit} (MiB)"
        )


def sections(runs: list[Run], found: list, data: dict[str, Any], reasons: list[str]) -> list[Element]:
    """The parts of the page, heading and contents first; what the runs do not hold is said at the end."""
    kinds = {kind: parts.of_kind(runs, kind) for kind in parts.WORDS}
    scored = [run for run in kinds["evaluation"] if run.content["means"] or run.content["settings"]]
    shown = {
        "videos": maps.videos(found, data["clips"]) if data["clips"] else None,
        "fidelity": parts.fidelity(scored) if scored else None,
        "masks": maps.masks(data["masks"]) if data["masks"] else None,
        "recall of layers and heads": maps.heads() if data["heads"] else None,
        "energy decay": studies.decay(kinds["analysis"]) if kinds["analysis"] else None,
        "costs": studies.cost(kinds["cost"]) if kinds["cost"] else None,
        "ablations": studies.ablation(kinds["ablation"]) if kinds["ablation"] else None,
    }
    have = {name: part is not None for name, part in shown.items()}
    last = [studies.made(runs), parts.missing(runs, have, reasons)]
    body = [part for part in [*shown.values(), *last] if part is not None]
    return [parts.heading(runs), parts.contents(body), *body]


def all_masks(runs: list[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """The different masks of the runs, and a sentence for each that a page cannot show."""
    found, reasons, seen = [], [], set()
    for label, sizes, options, where in _mask_options(runs):
        grid, config = mask_of(sizes, options, where)
        if (grid, config) not in seen and config.pattern != "dense":
            seen.add((grid, config))
            try:
                found.append({"label": label, **packed_mask(grid, config)})
            except ValueError as error:
                reasons.append(f"No picture of the mask of {label}: {one_line(error)}.")
    return found, reasons


def _mask_options(runs: list[Run]) -> list[tuple[str, list[int], dict, str]]:
    """Label, grid, options and place of each mask that a run names with its grid."""
    found = []
    for run in runs:
        content = run.content
        if run.kind == "evaluation":
            settings = [(f"{entry['name']} of {run.name}", entry) for entry in content["settings"] or []]
            found += [(label, entry["grid"], entry["mask"]) for label, entry in settings]
        elif run.kind == "analysis":
            found.append((run.name, content["grid"], content["mask"]))
        elif run.kind == "generation" and content["attention"]:
            found.append((run.name, _with_text(content), content["mask"]))
    return [(label, grid, mask, f"mask of {label}") for label, grid, mask in found if grid and mask]


def _with_text(content: dict[str, Any]) -> list[int] | None:
    """Grid of a generated video: its record counts text among the tokens, and not in the grid."""
    grid, tokens = content["attention"]["grid"], content["tokens"]
    if not grid or len(grid) != 3 or tokens is None:
        return grid
    return [*grid, max(int(tokens) - grid[0] * grid[1] * grid[2], 0)]


def all_heads(runs: list[Run]) -> list[dict[str, Any]]:
    """Recall and error over steps, layers and heads of each setting that has them."""
    found = []
    several = len(parts.of_kind(runs, "evaluation")) > 1
    for run in parts.of_kind(runs, "evaluation"):
        for name, values in (run.content["attention"] or {}).items():
            kept = {key: values[key] for key in ("recall", "mse") if values[key]}
            if kept:
                found.append(
                    {"label": f"{name} of {run.name}" if several else name, "steps": values["steps"], **kept}
                )
    return found


def fill(data: dict[str, Any], content: list[Element]) -> str:
    """The template with style, scripts, content and data in their places."""
    style = (PAGE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    places = {
        "policy": policy(style, script),
        "style": style,
        "script": script,
        "content": markup(content),
        "data": embedded(data),
    }
    template = (PAGE / "template.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], template)
    return page.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half of a surrogate pair


def embedded(data: Any) -> str:
    """JSON that can stand in a script element: no `<`, `>` or `&`."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(style: str, script: str) -> str:
    """What the browser may load and run: this style, this script, and media that the page itself holds."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "media-src blob:; base-uri 'none'; form-action 'none'"
    )


def _publish(out: Path, page: str) -> None:
    """Writes the page whole or not at all; UsageError where it cannot be written."""
    try:
        write_text(out, page)
    except OSError as error:
        raise UsageError(f"--out: cannot write {out} ({error.strerror or one_line(error)})") from error


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="scripts/report.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="an output folder or a JSON file of a run"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/report.html"), help="the page to write")
    parser.add_argument("--videos", type=positive, default=8, help="prompts and seeds whose videos are shown")
    parser.add_argument("--amplify", type=positive, default=4, help="brightness of the difference")
    parser.add_argument("--limit", type=positive, default=200, help="MiB of videos that the page may hold")
    options = parser.parse_args(argv)
    if options.out.suffix.lower() not in (".html", ".htm"):
        parser.error(f"--out: got {options.out}, allowed: a name ending in .html")
    if options.out.is_dir():
        parser.error(f"--out: got {options.out}, which is a folder; allowed: a file")
    return options


def write(options: argparse.Namespace) -> None:
    """Builds the page and writes it."""
    _publish(options.out, build(options.runs, options.videos, options.amplify, options.limit))
    print(f"{options.out}: {options.out.stat().st_size / MIB:.1f} MiB, open it in a browser")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    return exit_code(lambda: write(options), "no page was written")


if __name__ == "__main__":
    sys.exit(main())
