"""The tests that docs/development.md names for each kind of trouble are there."""

import re

from scripts.run.config import ROOT


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
