"""The one exception that cprune raises for input it refuses."""

from __future__ import annotations


class CpruneError(ValueError):
    """Refused input: one sentence that says what must hold and what was given, raised before any costly work."""
