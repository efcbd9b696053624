"""Marks the cases of a test that take long and add little as `long`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def all_but(quick: Collection, values: Iterable[Any], name: Any = lambda value: value) -> list[Any]:
    """Returns the values as parameters of a test, all but those whose `name` is in `quick` marked `long`."""
    return [pytest.param(x, marks=() if name(x) in quick else pytest.mark.long) for x in values]
