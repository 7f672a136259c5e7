"""What earlier decisions on the same statistics have found, so that many methods and ratios find it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Known = dict[tuple[object, ...], Any]  # by what was found and all options that it depends on
T = TypeVar("T")


def once(known: Known, key: tuple[object, ...], find: Callable[[], T]) -> T:
    """What is known under `key`; found first where nothing is."""
    if key not in known:
        known[key] = find()
    return known[key]
