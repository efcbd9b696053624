"""Runs the code of a notebook without Jupyter: `python -m tests.support.notebook --write` keeps its outputs.

IPython need not be installed: what a cell displays is collected by a small stand-in for its `display`.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts.run.config import ROOT

NOTEBOOK = ROOT / "docs/quickstart.ipynb"


class Shown:
    """Stands in for `IPython.display.Image`."""

    def __init__(self, data: bytes, format: str = "png") -> None:
        self.bundle = {f"image/{format}": base64.b64encode(data).decode("ascii") + "\n"}


def read(path: Path = NOTEBOOK) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs_of(notebook: dict[str, Any], changes: Mapping[str, str]) -> list[list[dict[str, Any]]]:
    """Runs the cells one after the other in one namespace; returns the outputs of each.

    `changes`: lines of the notebook that are replaced, each of which must be there once.
    """
    sources = ["".join(cell["source"]) for cell in code_cells(notebook)]
    for before, after in changes.items():
        assert sum(source.count(before) for source in sources) == 1, before
        sources = [source.replace(before, after) for source in sources]
    shown: list[dict[str, str]] = []
    display = ModuleType("IPython.display")
    display.Image, display.display = Shown, lambda image: shown.append(image.bundle)
    sys.modules["IPython.display"] = display
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for number, source in enumerate(sources, 1):
        shown.clear()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.parse(source), f"cell {number}", "exec"), namespace)
        text = printed.getvalue().splitlines(keepends=True)
        stream = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
        images = [{"data": data, "metadata": {}, "output_type": "display_data"} for data in shown]
        outputs.append(stream + images)
    return outputs


def main() -> None:
    """Runs the notebook with the changes that are given as BEFORE AFTER; `--write`: keeps the outputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the outputs in the file")
    parser.add_argument("--change", nargs=2, action="append", default=[], metavar=("BEFORE", "AFTER"))
    options = parser.parse_args()
    notebook = read()
    outputs = outputs_of(notebook, dict(options.change))
    if options.write:
        for number, (cell, output) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
            cell |= {"execution_count": number, "outputs": output}
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    json.dump(outputs, sys.stdout)


if __name__ == "__main__":
    main()
