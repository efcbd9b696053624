"""Runs the code of a notebook without Jupyter: `python -m tests.support.notebook --write` keeps its outputs.

IPython need not be installed: what a cell displays is collected by a small stand-in for its `display`.
"""

import argparse
import base64
import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts.run.config import ROOT

NOTEBOOK = ROOT / "docs/quickstart.ipynb"


class Shown:
    """Stands in for `IPython.display.Image`."""

    def __init__(self, data: bytes, format: str = "png", **size: int) -> None:
        kind = f"image/{format}"
        self.data = {kind: base64.b64encode(data).decode("ascii") + "\n"}
        self.metadata = {kind: size} if size else {}


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
    shown: list[Shown] = []
    display = ModuleType("IPython.display")
    display.Image, display.display = Shown, shown.append
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, display.__name__, display)
        patch.setattr(sys, "path", [*sys.path])
        for number, source in enumerate(sources, 1):
            shown.clear()
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(source, f"cell {number}", "exec"), namespace)
            text = printed.getvalue().splitlines(keepends=True)
            stream = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
            outputs.append(stream + [vars(image) | {"output_type": "display_data"} for image in shown])
    return outputs


def main() -> None:
    """Runs the notebook and keeps its outputs in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", required=True, help="keep the outputs in the file")
    parser.parse_args()
    notebook = read()
    for number, outputs in enumerate(outputs_of(notebook, {}), 1):
        code_cells(notebook)[number - 1] |= {"execution_count": number, "outputs": outputs}
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
