"""Marks slow cases of a test that add little as `long`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def all_but(quick: Collection, values: Iterable[Any], name: Any = lambda value: value) -> list[Any]:
    """Returns the values as test parameters; marks as `long` those whose `name` is not in `quick`."""
    return [pytest.param(x, marks=() if name(x) in quick else pytest.mark.long) for x in values]
