"""The tests that docs/development.md names are there; the notebook runs, and holds what it made."""

import json
import re

import pytest

from scripts.run.config import ROOT
from tests.support.notebook import NOTEBOOK, code_cells, outputs_of, read


def test_every_named_test_is_there():
    text = (ROOT / "docs/development.md").read_text(encoding="utf-8").split("## What users met")[1]
    rows = [line for line in text.split("## House rules")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 30
    for row in rows:
        kind, tests = row.strip("| ").split(" | ")
        for part in tests.split("; "):
            file, *names = re.findall(r"`([^`]+)`", part)
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            missing = [name for name in names if f"\ndef {name}(" not in source]
            assert file.endswith(".py") and not missing, (kind, file, missing)


def kinds(outputs: list[list[dict]]) -> list[list[str]]:
    """Names what each cell printed and showed."""
    return [[name for output in cell for name in output.get("data", {"text": 0})] for cell in outputs]


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.long)])
def test_the_notebook_runs(steps):
    """With few steps also with one density."""
    changes = {} if steps == 20 else {"steps = 20": f"steps = {steps}", "(0.21, 0.35, 0.5)": "(0.21,)"}
    outputs = outputs_of(read(), changes)
    assert kinds(outputs) == kinds([cell["outputs"] for cell in code_cells(read())])
    assert kinds(outputs)[2] == ["text", "image/gif"] and kinds(outputs)[4] == ["text", "image/png"]
    if steps == 20:
        radial, profile = (re.search(r"([\d.]+) dB at 0.21", line)[1] for line in outputs[4][0]["text"])
        assert float(profile) > float(radial) > 15


def test_the_notebook_is_whole_small_and_of_no_machine():
    notebook, text = read(), NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 60_000 and (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(names) == len(set(names))
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    said = [output.get("text", "") for cell in cells for output in cell["outputs"]]
    assert not re.search(r"/home|/tmp|/root|/work|\.venv/lib", json.dumps(said))
